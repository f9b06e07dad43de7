"""Line plots: spectra, principal angles, errors and bytes over k, compression ratio, and frontiers."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ... import numbers
from ...data import ReportData, SideFigures
from ...frontier import BOUND, CODEC, METHODS, SHARING_METHODS, TASK_METHODS
from ...task_data import TaskFrontier
from . import module_labels, svg
from .axes import byte_unit, count_along
from .svg import HALF, WIDE, ink, series

SIDES = {"down": "down (LoRA A)", "up": "up (LoRA B)"}

MAX_KINDS = 8
"""Maximum number of kinds of modules with a curve of their own."""

_NULL = "null model"

_LINE_STYLES = {BOUND: ":", **dict.fromkeys(SHARING_METHODS, "--")}
"""Line styles of methods that are not drawn as a solid line."""
_MIN_ERROR = 1e-4
"""Smallest error on a logarithmic axis."""

_FLOOR = 1e-6
"""Smallest share of energy that is drawn, relative to the largest."""


def scree(report: ReportData, side: str) -> str:
    """Draw the spectrum of one side on a logarithmic scale, as means over the modules of a kind, and the null model."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        _curves(axis, spectra(report, side))
        axis.set_yscale("log")
        # both sides have the same scale; values below _FLOOR are rounding
        shown = np.concatenate([curve for any_side in SIDES for curve in spectra(report, any_side).values()])
        axis.set_ylim(shown[shown >= _FLOOR * shown.max()].min() / 1.5, shown.max() * 1.5)
        axis.yaxis.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(title=SIDES[side], xlabel="component", ylabel="share of energy")
        axis.margins(x=0.01)
        count_along(axis)
        _mark_k(axis, [getattr(module, side) for module in report.modules])
        figure.legend(loc="outside lower left", ncols=3)

    return svg.draw(f"scree-{side}", (HALF, 330), f"{SIDES[side]}: share of energy by component, by kind", paint)


def cumulative(report: ReportData, side: str) -> str:
    """Draw the cumulative energy of one side by number of components, as in `scree`."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        _curves(axis, {label: np.cumsum(curve) for label, curve in spectra(report, side).items()})
        axis.set(title=SIDES[side], xlabel="components", ylabel="energy kept", ylim=(0, 1.02))
        axis.margins(x=0.01)
        count_along(axis)
        _mark_k(axis, [getattr(module, side) for module in report.modules], height=0.08)
        figure.legend(loc="outside lower left", ncols=3)

    return svg.draw(f"cumulative-{side}", (HALF, 330), f"{SIDES[side]}: energy kept by the first components", paint)


def angles(report: ReportData) -> str:
    """Draw the principal angles between the subspaces of two halves of the collection, as means over modules."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for number, (side, title) in enumerate(SIDES.items()):
            sides = [getattr(module, side) for module in report.modules]
            for field, style in (("angles", {"label": title}), ("null_angles", {"linestyle": "--", "linewidth": 1.2})):
                curves = [getattr(figures, field) for figures in sides if getattr(figures, field)]
                if curves:
                    mean = _mean(curves, np.nan)
                    marker = _marker(mean) if field == "angles" else ""
                    axis.plot(np.arange(1, len(mean) + 1), mean, marker=marker, color=series(number), **style)
        axis.set(ylim=(0, 92), yticks=[0, 30, 60, 90], xlabel="principal angle, in order", ylabel="degrees")
        count_along(axis)
        axis.legend(loc="lower right")

    return svg.draw("angles", (HALF, 330), "Principal angles between the subspaces of two halves", paint)


def ratio(report: ReportData) -> str:
    """Draw the compression ratio over the number of adapters, with the bytes of the basis."""
    counts, ratios = zip(*report.bytes.over_n, strict=True)

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        axis.axhline(
            report.bytes.limit, color=ink("muted"), linestyle="--", linewidth=1.2, label="limit: without the basis"
        )
        axis.axhline(1, color=ink("bad"), linestyle=":", linewidth=1.4, label="as large as the LoRAs")
        axis.plot(counts, ratios, color=series(0))
        if report.bytes.break_even is not None:
            axis.plot(
                [report.bytes.break_even], [1], "o", color=ink("bad"), label=f"break-even: {report.bytes.break_even:,}"
            )
        axis.plot(
            [report.collection.adapters],
            [report.bytes.ratio],
            "o",
            color=series(0),
            markersize=7,
            label=f"this pack: {numbers.ratio(report.bytes.ratio)}",
        )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(xlabel="adapters", ylabel="compression ratio", ylim=(0, report.bytes.limit * 1.12))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("ratio", (HALF, 330), "Compression ratio over the number of adapters", paint)


def frontier(report: ReportData) -> str:
    """Draw bytes over the worst error on logarithmic scales, with a line for each method and a star for the pack."""
    measured = report.frontier
    assert measured is not None
    pack, *baselines = measured.points
    # the codec's curve has the colour of the pack
    methods = sorted(
        dict.fromkeys(point.way for point in baselines), key=lambda method: (method != CODEC, method == BOUND)
    )
    stored = [point.stored_bytes for point in measured.points if point.stored_bytes]
    unit, unit_name = byte_unit(max(*stored, measured.lora_float16))

    def paint(figure: Any) -> None:
        from matplotlib.ticker import LogLocator

        axis = figure.subplots()
        axis.axhline(
            measured.lora_float16 / unit, color=ink("bad"), linestyle=":", linewidth=1.4, label="LoRAs, 16 bits"
        )
        colours = {method: series(n) for n, method in enumerate(methods, start=0 if CODEC in methods else 1)}
        for method in methods:
            # zero has no position on a logarithmic scale
            points = [point for point in baselines if point.way == method and point.worst > 0 and point.stored_bytes]
            axis.plot(
                [point.worst for point in points],
                [point.stored_bytes / unit for point in points],
                _LINE_STYLES.get(method, "-"),
                marker="" if method == BOUND else "o",
                markersize=3.5,
                color=ink("muted") if method == BOUND else colours[method],
                linewidth=2.6 if method == CODEC else 1.6,
                label=METHODS[method],
            )
        if pack.stored_bytes:
            axis.plot(
                [max(pack.worst, _MIN_ERROR)],
                [pack.stored_bytes / unit],
                "*",
                markersize=13,
                color=series(0),
                label=METHODS["pack"],
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        for coordinate in (axis.xaxis, axis.yaxis):
            coordinate.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            coordinate.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(xlabel="delta error of the worst adapter", ylabel=unit_name)
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("frontier", (WIDE, 430), "Bytes over the worst adapter's error, by method", paint)


def task_frontier(measured: TaskFrontier, measure: str, name: str) -> str:
    """Draw a score over the bytes of all adapters, on a logarithmic scale.

    New fits and truncated LoRAs are lines, the pack is a star, and the original adapters are a horizontal line.

    Args:
        measured: Bytes against scores on a task.
        measure: "accuracy", "perplexity" or "kl".
        name: Name that is unique among the page's figures.
    """
    label = {"accuracy": "accuracy", "perplexity": "perplexity", "kl": "KL from the originals, nats"}[measure]
    unit, unit_name = byte_unit(max(measured.lora_float16, *(point.stored_bytes for point in measured.points)))
    original = 0.0 if measure == "kl" else getattr(measured, f"original_{measure}")
    without = getattr(measured, f"without_{measure}")

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        if original is not None:
            axis.axhline(original, color=ink("muted"), linestyle="--", linewidth=1.2, label="original adapters")
        if without is not None:
            axis.axhline(without, color=ink("bad"), linestyle=":", linewidth=1.4, label="no update")
        for number, (method, method_label) in enumerate(TASK_METHODS.items()):
            points = [
                (point.stored_bytes / unit, score)
                for point in measured.points
                # zero has no position on a logarithmic scale
                if point.way == method and point.stored_bytes and (score := getattr(point, measure)) is not None
            ]
            style = {"marker": "*", "markersize": 13} if method == "pack" else {"marker": "o", "markersize": 3.5}
            if points:
                axis.plot(*zip(*points, strict=True), **style, color=series(number), label=method_label)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(xlabel=unit_name, ylabel=label)
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw(name, (HALF, 330), f"{measured.task}: {label} over bytes", paint)


def sizes(report: ReportData) -> str:
    """Draw errors over the number of components."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for number, (field, label) in enumerate(
            (
                ("mean", "mean"),
                ("worst", "worst"),
                ("left_out", "left out, mean"),
                ("random", "random bases, mean"),
                ("null", "null model, mean"),
            )
        ):
            points = [(point.k, error) for point in report.sizes if (error := getattr(point, field)) is not None]
            if points:
                dash = "--" if field in ("random", "null") else "-"
                axis.plot(
                    *zip(*points, strict=True), dash, marker="o", markersize=3.5, color=series(number), label=label
                )
        axis.set(xlabel="k", ylabel="delta error")
        count_along(axis)
        axis.set_ylim(0, max(1.15, axis.get_ylim()[1]))
        _mark_k(axis, _all_sides(report))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("sizes", (HALF, 330), "Errors over the number of components", paint)


def size_bytes(report: ReportData) -> str:
    """Draw bytes over the number of components, with the range in which the pack is larger than the LoRAs."""
    k = [point.k for point in report.sizes]
    stored = [point.stored_bytes for point in report.sizes]
    top = max(*stored, report.bytes.lora)
    unit, unit_name = byte_unit(top)

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        axis.plot(
            k,
            [value / unit for value in stored],
            marker="o",
            markersize=3.5,
            color=series(0),
            label="basis and coefficients",
        )
        axis.axhline(report.bytes.lora / unit, color=ink("bad"), linestyle=":", label="the LoRAs")
        crossing = _crossing(k, stored, report.bytes.lora)
        if crossing is not None:
            axis.axvspan(crossing, k[-1], color=ink("bad"), alpha=0.1, linewidth=0, label="larger than the LoRAs")
        axis.set(xlabel="k", ylabel=unit_name)
        count_along(axis)
        axis.set_ylim(0, 1.18 * top / unit)
        _mark_k(axis, _all_sides(report))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("size-bytes", (HALF, 330), "Bytes over the number of components", paint)


def spectra(report: ReportData, side: str) -> dict[str, np.ndarray]:
    """Return the mean spectra of one side by label: one per kind of module, and one of the null model."""
    groups = module_labels.grouped(report.modules, MAX_KINDS)
    by_label = {label: [getattr(module, side).spectrum for module in group] for label, group in groups.items()}
    by_label[_NULL] = [getattr(module, side).null for module in report.modules]
    measured = {label: [spectrum for spectrum in group if spectrum] for label, group in by_label.items()}
    return {label: _mean(group, 0.0) for label, group in measured.items() if group}


def _curves(axis: Any, lines: dict[str, np.ndarray]) -> None:
    for number, (label, curve) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": series(number), "linestyle": "-" if number < 4 else "-."}
        if label == _NULL:
            style = {"color": ink("muted"), "linestyle": "--", "linewidth": 1.4}
        axis.plot(
            range(1, len(curve) + 1), np.where(curve > 0, curve, np.nan), marker=_marker(curve), label=label, **style
        )


def _marker(curve: np.ndarray) -> str:
    """Return a marker for a curve of a single point, which a line would not show; else no marker."""
    return "o" if len(curve) == 1 else ""


def _mean(curves: Sequence[Sequence[float]], beyond: float) -> np.ndarray:
    """Return the mean of curves of different lengths; `beyond` extends shorter ones, NaN leaves them out."""
    table = np.full((len(curves), max(map(len, curves))), beyond)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    return np.asarray(np.nanmean(table, axis=0))


def _all_sides(report: ReportData) -> list[SideFigures]:
    return [side for module in report.modules for side in (module.down, module.up)]


def _mark_k(axis: Any, sides: list[SideFigures], height: float = 1.0) -> None:
    """Mark the pack's number of components, with a band if it varies; `height` positions the text, from 0 to 1."""
    sizes = [side.k for side in sides]
    smallest, middle, largest = min(sizes), statistics.median_low(sizes), max(sizes)
    if smallest < largest:
        axis.axvspan(smallest, largest, color=ink("accent"), alpha=0.1, linewidth=0)
    axis.axvline(middle, color=ink("accent"), linewidth=1.2)
    axis.annotate(
        f"k = {middle}" if smallest == largest else f"k = {smallest}–{largest}",
        (middle, height),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        color=ink("accent"),
        fontsize=11.5,
    )


def _crossing(k: list[int], stored: list[int], limit: int) -> float | None:
    """Return the interpolated k at which the bytes exceed the limit; None if they never do."""
    for (left, low), (right, high) in pairwise(zip(k, stored, strict=True)):
        if low <= limit < high:
            return left + (right - left) * (limit - low) / (high - low)
    return float(k[0]) if stored[0] > limit else None


def _plain(value: float, _position: int) -> str:
    """Format the label of a tick without an exponent."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")
