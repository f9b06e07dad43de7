"""Figures of a history: the path of its versions, distances to the last one, bytes, and metrics."""

from collections.abc import Sequence
from typing import Any

from ... import numbers
from ...history_data import HistoryFigures
from . import svg
from .axes import byte_unit, count_along
from .svg import HALF, WIDE, ink, series

MAX_METRICS = 8
"""Maximum number of metrics with a plot of their own, in the order of their names, those of evaluations first."""
_HEIGHT = 330


def path(history: HistoryFigures, number: int) -> str:
    """Draw the versions in the leading two components of their updates, connected in their order.

    Args:
        history: The history.
        number: Number of the history, for ids that are unique in the page.
    """
    shown = [version for version in history.versions if version.x is not None]
    name = f"history-{number}-path"

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        x, y = [version.x for version in shown], [version.y for version in shown]
        axis.plot(x, y, color=ink("muted"), linewidth=1.2)
        axis.scatter(x, y, s=42, color=series(0), edgecolors=ink("card"), linewidths=1, zorder=3, gid=f"{name}-marks")
        for index, alignment in ((0, "bottom"), (len(shown) - 1, "top")):
            axis.annotate(
                numbers.shortened(shown[index].version, 20),
                (x[index], y[index]),
                xytext=(0, 7 if alignment == "bottom" else -7),
                textcoords="offset points",
                ha="center",
                va=alignment,
            )
        axis.set_aspect("equal", adjustable="datalim")
        axis.margins(0.12)
        axis.set(xlabel="first component", ylabel="second component")

    drawn = svg.draw(name, (HALF, _HEIGHT), f"Path of {numbers.plural(len(shown), 'version')}", paint)
    titles = [f"{version.version}: {numbers.error(version.to_final)} from the last version" for version in shown]
    return svg.titled(drawn, f"{name}-marks", titles)


def to_final(history: HistoryFigures, number: int) -> str:
    """Draw the distance of each version to the last one, relative to the norm of the last one."""
    steps = _steps(history)
    points = [
        (step, version.to_final)
        for step, version in zip(steps, history.versions, strict=True)
        if version.to_final is not None
    ]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=series(0))
        axis.set(xlabel=_axis(history), ylabel="distance to the last version")
        axis.set_ylim(bottom=0)

    return svg.draw(f"history-{number}-final", (HALF, _HEIGHT), "Distance to the last version", paint)


def stored(history: HistoryFigures, number: int) -> str:
    """Draw the bytes of each version, those of the LoRA below those of all other tensors."""
    versions = history.versions
    unit, unit_name = byte_unit(max(version.lora_stored + version.tensors_stored for version in versions))
    lora = [version.lora_stored / unit for version in versions]
    others = [version.tensors_stored / unit for version in versions]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        positions = range(1, len(versions) + 1)
        axis.bar(positions, lora, color=series(0), label="LoRA")
        if any(others):
            axis.bar(positions, others, bottom=lora, color=series(1), label="all other tensors")
            figure.legend(loc="outside upper left", ncols=2)
        axis.margins(x=0.01)
        axis.set(xlabel="version, in order", ylabel=unit_name)
        count_along(axis)

    return svg.draw(f"history-{number}-bytes", (WIDE, 280), "Bytes of each version", paint)


def metrics(history: HistoryFigures, number: int) -> str:
    """Draw each metric over the steps, at most `MAX_METRICS` of them."""
    names, steps = metric_names(history), _steps(history)
    rows = -(-len(names) // 2)

    def paint(figure: Any) -> None:
        axes = list(figure.subplots(rows, 2, squeeze=False, sharex=True).flat)
        for axis, name in zip(axes[: len(names)], names, strict=True):
            pairs = zip(steps, history.versions, strict=True)
            points = [(step, version.metrics[name]) for step, version in pairs if name in version.metrics]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=series(0))
            axis.set_title(numbers.shortened(name, 40))
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        for axis in axes[max(len(names) - 2, 0) : len(names)]:
            axis.set_xlabel(_axis(history))
            axis.tick_params(labelbottom=True)

    return svg.draw(f"history-{number}-metrics", (WIDE, 60 + 190 * rows), "Metrics of the versions", paint)


def metric_names(history: HistoryFigures) -> list[str]:
    """Return the names of the metrics that are drawn."""
    names = sorted({name for version in history.versions for name in version.metrics})
    # the epoch grows with the step, and tells nothing else
    return sorted((name for name in names if name != "epoch"), key=lambda name: not name.startswith("eval"))[
        :MAX_METRICS
    ]


def _has_steps(history: HistoryFigures) -> bool:
    return all(version.step is not None for version in history.versions)


def _steps(history: HistoryFigures) -> Sequence[int]:
    """Return the step of each version, or its position if a step is unknown."""
    if _has_steps(history):
        return [version.step or 0 for version in history.versions]
    return range(1, len(history.versions) + 1)


def _axis(history: HistoryFigures) -> str:
    return "step" if _has_steps(history) else "version, in order"
