"""The report's pictures of spectra, modules, adapters, bytes and sizes. Each takes the report and gives an inline SVG."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import kinds, numbers, svg
from .data import Report, SideFigures
from .svg import ink, series

SIDES = (("down", "down (LoRA A)"), ("up", "up (LoRA B)"))
WIDE, HALF = 1000, 492
"""Widths in pixels: of the page, and of one of two pictures side by side."""

MOST_KINDS = 8
MOST_BARS = 40


def scree(report: Report) -> str:
    """The spectrum, its mean over the modules of a kind, and that of Gaussian adapters; logarithmic."""

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (side, title) in zip(axes, SIDES, strict=True):
            _curves(axis, report, side, lambda spectrum: spectrum)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(_plain)
            axis.minorticks_off()
            axis.set(title=title, xlabel="direction")
            _mark_k(axis, [getattr(module, side) for module in report.modules])
        axes[0].set_ylabel("share of energy")
        _legend_below(figure, axes[0])

    return svg.draw("scree", (WIDE, 360), "Share of energy by direction, for each side and kind of module", paint)


def cumulative(report: Report) -> str:
    """The energy that the first directions keep, likewise."""

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (side, title) in zip(axes, SIDES, strict=True):
            _curves(axis, report, side, np.cumsum)
            axis.set(title=title, xlabel="directions kept", ylim=(0, 1.02))
            _mark_k(axis, [getattr(module, side) for module in report.modules])
        axes[0].set_ylabel("energy kept")
        _legend_below(figure, axes[0])

    return svg.draw("cumulative", (WIDE, 360), "Energy kept by the first directions, for each side and kind", paint)


def angles(report: Report) -> str:
    """Principal angles between the subspaces of two halves of the collection, sorted, their mean over modules."""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for number, (side, title) in enumerate(SIDES):
            found = [getattr(module, side).angles for module in report.modules if getattr(module, side).angles]
            if found:
                mean = _mean(found, np.nan)
                axis.plot(np.arange(1, len(mean) + 1), mean, color=series(number), label=title)
        axis.set(ylim=(0, 92), yticks=[0, 30, 60, 90], xlabel="principal angle, in order", ylabel="degrees")
        axis.legend(loc="lower right")

    return svg.draw("angles", (HALF, 300), "Principal angles between the subspaces of two halves", paint)


def has_grid(report: Report) -> bool:
    """Whether modules have layers and kinds enough for a heat map."""
    layers = {module.layer for module in report.modules}
    return None not in layers and len(layers) > 1 and len({module.kind for module in report.modules}) > 1


def layers(report: Report) -> str:
    """The error of each module, by layer and kind; a star on the worst."""
    names = kinds.labels(module.kind for module in report.modules)
    rows = list(dict.fromkeys(names[module.kind] for module in report.modules))
    columns = sorted({module.layer for module in report.modules if module.layer is not None})
    table = np.full((len(rows), len(columns)), np.nan)
    for row, label in enumerate(rows):
        for column, layer in enumerate(columns):
            found = [
                module.delta_error
                for module in report.modules
                if names[module.kind] == label and module.layer == layer and module.delta_error is not None
            ]
            if found:
                table[row, column] = statistics.fmean(found)
    top = float(np.nanmax(table)) or 1.0

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        colours = svg.colour_map(svg.SEQUENTIAL)
        image = axis.imshow(table, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="none")
        axis.set_yticks(range(len(rows)), [numbers.shortened(row, 32) for row in rows])
        step = max(1, -(-len(columns) // 24))
        axis.set_xticks(range(0, len(columns), step), columns[::step])
        _without_lines(axis)
        axis.set_xlabel("layer")
        row, column = np.unravel_index(np.nanargmax(table), table.shape)
        if len(columns) <= 16:
            for (y, x), value in np.ndenumerate(table):
                if np.isfinite(value):
                    star = " ★" if (y, x) == (row, column) else ""
                    shade = _over(colours(value / top))
                    axis.text(x, y, f"{value:.2f}{star}", ha="center", va="center", fontsize=9.5, color=shade)
        else:
            axis.text(column, row, "★", ha="center", va="center", color=_over(colours(1.0)))
        bar = figure.colorbar(image, ax=axis, label="delta error", pad=0.01, fraction=0.03)
        bar.outline.set_visible(False)
        bar.ax.locator_params(nbins=4)

    return svg.draw("layers", (WIDE, 90 + 30 * len(rows)), "Delta error by layer and kind of module", paint)


def modules(report: Report) -> str:
    """The error of each module as bars, the worst first: for models without layers, or with one kind of module."""
    known = [(module.delta_error, module) for module in report.modules if module.delta_error is not None]
    known = sorted(known, key=lambda pair: -pair[0])[:MOST_BARS]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        axis.barh(range(len(known)), [error for error, _ in known], height=0.62, color=series(0))
        _rows(axis, [module.name for _, module in known])
        axis.set_xlabel("delta error")

    return svg.draw("modules", (WIDE, 90 + 18 * len(known)), "Delta error by module, the worst first", paint)


def adapters(report: Report) -> str:
    """Bars of delta errors, the worst first; the error when left out, and of the mean adapter's best multiple."""
    shown = [one for one in report.adapters if not one.untrained][:MOST_BARS]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        fitted = [(place, one) for place, one in enumerate(shown) if one.in_fit]
        later = [(place, one) for place, one in enumerate(shown) if not one.in_fit]
        for group, colour, label in (
            (fitted, series(0), "delta error"),
            (later, series(5), "delta error, not in the fit"),
        ):
            if group:
                places, errors = zip(*((place, one.delta_error) for place, one in group), strict=True)
                axis.barh(places, errors, height=0.62, color=colour, label=label)
        for field, marker, colour, label in (
            ("left_out_error", "D", series(1), "left out of the fit"),
            ("mean_scaled_error", "|", ink("text"), "best multiple of the mean adapter"),
        ):
            found = [(getattr(one, field), y) for y, one in enumerate(shown) if getattr(one, field) is not None]
            if found:
                size, edge = (5.0, 1.0) if marker == "D" else (11.0, 2.0)
                axis.plot(
                    *zip(*found, strict=True), marker, markersize=size, markeredgewidth=edge, color=colour, label=label
                )
        _rows(axis, [one.name for one in shown])
        axis.set_xlabel("relative error (1: all is lost)")
        axis.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=4)

    return svg.draw("adapters", (WIDE, 110 + 18 * len(shown)), "Errors by adapter, the worst first", paint)


def grid(report: Report) -> str:
    """Delta error of each adapter, a row, in each module, a column."""
    table = np.array([[np.nan if v is None else v for v in row] for row in report.module_errors], dtype=float)
    names = [one.name for one in report.adapters]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        colours = svg.colour_map(svg.SEQUENTIAL)
        top = float(np.nanmax(table)) or 1.0
        image = axis.imshow(table, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="none")
        few = len(names) <= MOST_BARS
        axis.set_yticks(
            range(len(names)) if few else [], [numbers.shortened(name, 32) for name in names] if few else []
        )
        axis.set(xlabel="module, in the order of the model", ylabel="" if few else "adapters, the worst first")
        _without_lines(axis)
        bar = figure.colorbar(image, ax=axis, label="delta error", pad=0.01, fraction=0.03)
        bar.outline.set_visible(False)

    height = 90 + 15 * len(names) if len(names) <= MOST_BARS else 480
    return svg.draw("grid", (WIDE, height), "Delta error of each adapter in each module", paint)


def ratio(report: Report) -> str:
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


def sizes(report: Report) -> str:
    """Errors over k."""
    k = [point.k for point in report.sizes]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for number, (field, label) in enumerate(
            (("mean", "mean"), ("worst", "worst"), ("left_out", "left out, mean"), ("random", "random bases, mean"))
        ):
            found = [(at, getattr(point, field)) for at, point in zip(k, report.sizes, strict=True)]
            found = [pair for pair in found if pair[1] is not None]
            if found:
                dash = "--" if field == "random" else "-"
                axis.plot(
                    *zip(*found, strict=True), dash, marker="o", markersize=3.5, color=series(number), label=label
                )
        axis.set(xlabel="k", ylabel="delta error")
        axis.set_ylim(0, max(1.02, axis.get_ylim()[1]))
        _mark_k(axis, _all_sides(report))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("sizes", (HALF, 330), "Errors over the number of components", paint)


def size_bytes(report: Report) -> str:
    """Bytes over k, and where they exceed those of the LoRAs."""
    k = [point.k for point in report.sizes]
    stored = [point.stored_bytes for point in report.sizes]
    top = max(*stored, report.bytes.lora)
    unit, name = next(((10**p, n) for p, n in ((9, "GB"), (6, "MB"), (3, "kB")) if top >= 10**p), (1, "bytes"))

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
        axis.set_ylim(bottom=0)
        _mark_k(axis, _all_sides(report))
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("size-bytes", (HALF, 330), "Bytes over the number of components", paint)


def _curves(axis: Any, report: Report, side: str, of: Any) -> None:
    for number, (label, group) in enumerate(kinds.grouped(report.modules, MOST_KINDS).items()):
        found = [getattr(module, side).spectrum for module in group if getattr(module, side).spectrum]
        if found:
            curve = of(_mean(found, 0.0))
            style = "-" if number < 4 else "-."
            axis.plot(
                range(1, len(curve) + 1), np.where(curve > 0, curve, np.nan), style, color=series(number), label=label
            )
    null = [getattr(module, side).null for module in report.modules if getattr(module, side).null]
    if null:
        curve = of(_mean(null, 0.0))
        axis.plot(range(1, len(curve) + 1), curve, "--", color=ink("muted"), linewidth=1.4, label="Gaussian adapters")


def _mean(curves: Sequence[Sequence[float]], beyond: float) -> np.ndarray:
    """Their mean, place by place; beyond: what a curve has after its end, NaN where only those count that reach so far."""
    table = np.full((len(curves), max(map(len, curves))), beyond)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    return np.asarray(np.nanmean(table, axis=0))


def _all_sides(report: Report) -> list[SideFigures]:
    return [side for module in report.modules for side in (module.down, module.up)]


def _mark_k(axis: Any, sides: list[SideFigures]) -> None:
    """A line where most sides are cut, a band from the least to the most."""
    found = [side.k for side in sides]
    middle = statistics.median_low(found)
    if min(found) < max(found):
        axis.axvspan(min(found), max(found), color=ink("accent"), alpha=0.1, linewidth=0)
    axis.axvline(middle, color=ink("accent"), linewidth=1.2)
    axis.annotate(
        f"k = {middle}" if min(found) == max(found) else f"k = {min(found)}–{max(found)}",
        (middle, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        color=ink("accent"),
        fontsize=10.5,
    )


def _crossing(k: list[int], stored: list[int], limit: int) -> float | None:
    for (left, low), (right, high) in zip(
        zip(k, stored, strict=True), list(zip(k, stored, strict=True))[1:], strict=False
    ):
        if low <= limit < high:
            return left + (right - left) * (limit - low) / (high - low)
    return float(k[0]) if stored[0] > limit else None


def _rows(axis: Any, names: list[str]) -> None:
    """A name for each bar, from the top down."""
    axis.set_yticks(range(len(names)), [numbers.shortened(name, 40) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


def _without_lines(axis: Any) -> None:
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _legend_below(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=5)


def _over(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is read more easily on this colour, in either theme."""
    red, green, blue, _ = colour
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#14161a"


def _plain(value: float, _place: int) -> str:
    return f"{value:g}" if value < 1e5 else f"{value:.0e}"
