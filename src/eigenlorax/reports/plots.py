"""The report's pictures of modules and of adapters: each takes the report, and gives an `<svg>`."""

import statistics
from typing import Any

import numpy as np

from . import kinds, numbers, svg
from .data import Report
from .svg import WIDE, ink, series

MOST_BARS = 40


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
                    axis.text(x, y, f"{value:.2f}{star}", ha="center", va="center", fontsize=11, color=shade)
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

    return svg.draw("modules", (WIDE, 90 + 19 * len(known)), "Delta error by module, the worst first", paint)


def adapters(report: Report) -> str:
    """Bars of delta errors, the worst first; the error when left out, and of the mean adapter's best multiple."""
    shown = [one for one in report.adapters if not one.untrained][:MOST_BARS]

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        handles = []
        for fitted, colour, label in ((True, series(0), "delta error"), (False, series(5), "the same, not in the fit")):
            group = [(place, one.delta_error) for place, one in enumerate(shown) if one.in_fit is fitted]
            if group:
                handles.append(axis.barh(*zip(*group, strict=True), height=0.62, color=colour, label=label))
        for field, shape, label in (
            ("left_out_error", {"marker": "D", "markersize": 5.5, "color": series(1)}, "left out of the fit"),
            (
                "mean_scaled_error",
                {"marker": "|", "markersize": 12, "markeredgewidth": 2, "color": ink("text")},
                "best multiple of the mean adapter",
            ),
        ):
            found = [(getattr(one, field), y) for y, one in enumerate(shown) if getattr(one, field) is not None]
            if found:
                handles += axis.plot(*zip(*found, strict=True), linestyle="none", label=label, **shape)
        _rows(axis, [one.name for one in shown])
        axis.set_xlabel("relative error (1: all is lost)")
        axis.set_xlim(left=0)
        figure.legend(handles=handles, loc="outside upper left", ncols=4)

    return svg.draw("adapters", (WIDE, 110 + 19 * len(shown)), "Errors by adapter, the worst first", paint)


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

    height = 90 + 19 * len(names) if len(names) <= MOST_BARS else 480
    return svg.draw("grid", (WIDE, height), "Delta error of each adapter in each module", paint)


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


def _over(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is read more easily on this colour, in either theme."""
    red, green, blue = (part**2.2 for part in colour[:3])
    # of this luminance, both have the same contrast
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18 else "#101216"
