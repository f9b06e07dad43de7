"""The report's curves: spectra, principal angles, errors and bytes over k, the ratio over the number of adapters.

Each function takes the report, and gives an `<svg>`.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ... import numbers
from ...data import ReportData, SideFigures, TaskFrontier
from ...frontier import METHODS, SHARING_METHODS, TASK_METHODS
from . import module_labels, svg
from .svg import HALF, WIDE, ink, series

SIDES = {"down": "down (LoRA A)", "up": "up (LoRA B)"}

MOST_KINDS = 8

_RANDOM = "random directions"

_LEAST_ERROR = 1e-4
"""The smallest error that is drawn beside others."""

_FLOOR = 1e-6
"""The smallest share of energy that is drawn, in units of the largest."""


def scree(report: ReportData, side: str) -> str:
    """One side's spectrum, its mean over the modules of a kind, and that of the null model; logarithmic."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        _curves(axis, spectra(report, side))
        axis.set_yscale("log")
        # both sides on one scale; what is smaller is rounding
        shown = np.concatenate([curve for each in SIDES for curve in spectra(report, each).values()])
        axis.set_ylim(shown[shown >= _FLOOR * shown.max()].min() / 1.5, shown.max() * 1.5)
        axis.yaxis.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(title=SIDES[side], xlabel="direction", ylabel="share of energy")
        axis.margins(x=0.01)
        _count_along(axis)
        _mark_k(axis, [getattr(module, side) for module in report.modules])
        figure.legend(loc="outside lower left", ncols=3)

    return svg.draw(f"scree-{side}", (HALF, 330), f"{SIDES[side]}: share of energy by direction, by kind", paint)


def cumulative(report: ReportData, side: str) -> str:
    """The energy that the first directions keep, likewise."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        _curves(axis, {label: np.cumsum(curve) for label, curve in spectra(report, side).items()})
        axis.set(title=SIDES[side], xlabel="directions kept", ylabel="energy kept", ylim=(0, 1.02))
        axis.margins(x=0.01)
        _count_along(axis)
        _mark_k(axis, [getattr(module, side) for module in report.modules], at=0.08)
        figure.legend(loc="outside lower left", ncols=3)

    return svg.draw(f"cumulative-{side}", (HALF, 330), f"{SIDES[side]}: energy kept by the first directions", paint)


def angles(report: ReportData) -> str:
    """Principal angles between the subspaces of two halves of the collection, sorted, their mean over modules."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for number, (side, title) in enumerate(SIDES.items()):
            found = [getattr(module, side).angles for module in report.modules if getattr(module, side).angles]
            if found:
                mean = _mean(found, np.nan)
                axis.plot(np.arange(1, len(mean) + 1), mean, marker=_dot(mean), color=series(number), label=title)
            by_chance = [
                getattr(module, side).null_angles for module in report.modules if getattr(module, side).null_angles
            ]
            if by_chance:
                mean = _mean(by_chance, np.nan)
                axis.plot(np.arange(1, len(mean) + 1), mean, "--", color=series(number), linewidth=1.2)
        axis.set(ylim=(0, 92), yticks=[0, 30, 60, 90], xlabel="principal angle, in order", ylabel="degrees")
        _count_along(axis)
        axis.legend(loc="lower right")

    return svg.draw("angles", (HALF, 330), "Principal angles between the subspaces of two halves", paint)


def ratio(report: ReportData) -> str:
    """The compression ratio over the number of adapters, the basis counted."""
    counted, found = zip(*report.bytes.over_n, strict=True)

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        axis.axhline(
            report.bytes.limit, color=ink("muted"), linestyle="--", linewidth=1.2, label="limit: the basis is free"
        )
        axis.axhline(1, color=ink("bad"), linestyle=":", linewidth=1.4, label="as large as the LoRAs")
        axis.plot(counted, found, color=series(0))
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
    """Bytes over the worst error, both logarithmic: a line for each way, and the pack as a point."""
    found = report.frontier
    assert found is not None
    pack, *others = found.points
    ways = list(dict.fromkeys(point.way for point in others))
    stored = [point.stored_bytes for point in found.points if point.stored_bytes]
    unit, name = _unit(max(*stored, found.lora_float16))

    def paint(figure: Any) -> None:
        from matplotlib.ticker import LogLocator

        axis = figure.subplots()
        axis.axhline(found.lora_float16 / unit, color=ink("bad"), linestyle=":", linewidth=1.4, label="LoRAs, 16 bits")
        for way in ways:
            line = [point for point in others if point.way == way and point.worst > 0 and point.stored_bytes]
            axis.plot(
                [point.worst for point in line],
                [point.stored_bytes / unit for point in line],
                "--" if way in SHARING_METHODS else "-",
                marker="o",
                markersize=3.5,
                color=series(1 + ways.index(way)),
                label=METHODS[way],
            )
        if pack.stored_bytes:
            axis.plot(
                [max(pack.worst, _LEAST_ERROR)],
                [pack.stored_bytes / unit],
                "*",
                markersize=13,
                color=series(0),
                label=METHODS["pack"],
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            each.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(xlabel="delta error of the worst adapter", ylabel=name)
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("frontier", (WIDE, 430), "Bytes over the worst adapter's error, by every way", paint)


def task_frontier(found: TaskFrontier, measure: str, name: str) -> str:
    """What becomes of a task over the bytes of all adapters, on a logarithmic scale: fits at several ratios and what
    stands alone in their bytes as lines, the pack as a point, the originals as a line across.

    measure: "accuracy", "perplexity" or "kl", of which the points have one. name: unlike that of any other picture.
    """
    words = {"accuracy": "accuracy", "perplexity": "perplexity", "kl": "KL from the originals, nats"}[measure]
    unit, of_bytes = _unit(max(found.lora_float16, *(point.stored_bytes for point in found.points)))
    original = 0.0 if measure == "kl" else getattr(found, f"original_{measure}")
    bare = getattr(found, f"without_{measure}")

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        if original is not None:
            axis.axhline(original, color=ink("muted"), linestyle="--", linewidth=1.2, label="the originals")
        if bare is not None:
            axis.axhline(bare, color=ink("bad"), linestyle=":", linewidth=1.4, label="no update")
        for number, (way, label) in enumerate(TASK_METHODS.items()):
            there = [(point.stored_bytes / unit, getattr(point, measure)) for point in found.points if point.way == way]
            # a logarithmic scale has no place for nothing
            line = [(stored, value) for stored, value in there if stored and value is not None]
            mark = {"marker": "*", "markersize": 13} if way == "pack" else {"marker": "o", "markersize": 3.5}
            if line:
                axis.plot(*zip(*line, strict=True), **mark, color=series(number), label=label)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(_plain)
        axis.minorticks_off()
        axis.set(xlabel=of_bytes, ylabel=words)
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw(name, (HALF, 330), f"{found.task}: {words} over bytes", paint)


def _unit(most: int) -> tuple[int, str]:
    """The decimal unit in which so many bytes are shown."""
    return next(((10**p, n) for p, n in ((9, "GB"), (6, "MB"), (3, "kB")) if most >= 10**p), (1, "bytes"))


def sizes(report: ReportData) -> str:
    """Errors over k."""
    k = [point.k for point in report.sizes]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for number, (field, label) in enumerate(
            (
                ("mean", "mean"),
                ("worst", "worst"),
                ("left_out", "left out, mean"),
                ("random", "random bases, mean"),
                ("null", "random directions, mean"),
            )
        ):
            found = [(at, getattr(point, field)) for at, point in zip(k, report.sizes, strict=True)]
            found = [pair for pair in found if pair[1] is not None]
            if found:
                dash = "--" if field in ("random", "null") else "-"
                axis.plot(
                    *zip(*found, strict=True), dash, marker="o", markersize=3.5, color=series(number), label=label
                )
        axis.set(xlabel="k", ylabel="delta error")
        _count_along(axis)
        axis.set_ylim(0, max(1.15, axis.get_ylim()[1]))
        _mark_k(axis, _all_sides(report))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("sizes", (HALF, 330), "Errors over the number of components", paint)


def size_bytes(report: ReportData) -> str:
    """Bytes over k, and where they exceed those of the LoRAs."""
    k = [point.k for point in report.sizes]
    stored = [point.stored_bytes for point in report.sizes]
    top = max(*stored, report.bytes.lora)
    unit, name = _unit(top)

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
        axis.set(xlabel="k", ylabel=name)
        _count_along(axis)
        axis.set_ylim(0, 1.18 * top / unit)
        _mark_k(axis, _all_sides(report))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("size-bytes", (HALF, 330), "Bytes over the number of components", paint)


def spectra(report: ReportData, side: str) -> dict[str, np.ndarray]:
    """One side's mean spectrum of each kind of module, by its label, and that of the null model."""
    groups = module_labels.grouped(report.modules, MOST_KINDS)
    found = {label: [getattr(module, side).spectrum for module in group] for label, group in groups.items()}
    found[_RANDOM] = [getattr(module, side).null for module in report.modules]
    curves = {label: [curve for curve in group if curve] for label, group in found.items()}
    return {label: _mean(group, 0.0) for label, group in curves.items() if group}


def _curves(axis: Any, lines: dict[str, np.ndarray]) -> None:
    for number, (label, curve) in enumerate(lines.items()):
        shape: dict[str, Any] = {"color": series(number), "linestyle": "-" if number < 4 else "-."}
        if label == _RANDOM:
            shape = {"color": ink("muted"), "linestyle": "--", "linewidth": 1.4}
        axis.plot(
            range(1, len(curve) + 1), np.where(curve > 0, curve, np.nan), marker=_dot(curve), label=label, **shape
        )


def _dot(curve: np.ndarray) -> str:
    """matplotlib's marker for the curve's points: none, unless there is but one, of which a line shows nothing."""
    return "o" if len(curve) == 1 else ""


def _count_along(axis: Any) -> None:
    """Has whole numbers alone on the x axis, be they few."""
    from matplotlib.ticker import MaxNLocator

    # two ticks, its least otherwise, may need fractions
    axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _mean(curves: Sequence[Sequence[float]], beyond: float) -> np.ndarray:
    """Their mean, place by place. beyond: what a curve has after its end; NaN where it then no longer counts."""
    table = np.full((len(curves), max(map(len, curves))), beyond)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    return np.asarray(np.nanmean(table, axis=0))


def _all_sides(report: ReportData) -> list[SideFigures]:
    return [side for module in report.modules for side in (module.down, module.up)]


def _mark_k(axis: Any, sides: list[SideFigures], at: float = 1.0) -> None:
    """A line where most sides are cut, a band from the least to the most; its words at this height of the axes."""
    found = [side.k for side in sides]
    middle = statistics.median_low(found)
    if min(found) < max(found):
        axis.axvspan(min(found), max(found), color=ink("accent"), alpha=0.1, linewidth=0)
    axis.axvline(middle, color=ink("accent"), linewidth=1.2)
    axis.annotate(
        f"k = {middle}" if min(found) == max(found) else f"k = {min(found)}–{max(found)}",
        (middle, at),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        color=ink("accent"),
        fontsize=11.5,
    )


def _crossing(k: list[int], stored: list[int], limit: int) -> float | None:
    for (left, low), (right, high) in pairwise(zip(k, stored, strict=True)):
        if low <= limit < high:
            return left + (right - left) * (limit - low) / (high - low)
    return float(k[0]) if stored[0] > limit else None


def _plain(value: float, _place: int) -> str:
    """Without an exponent, which not everybody reads."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")
