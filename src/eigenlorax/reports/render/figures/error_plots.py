"""The report's pictures of errors: by layer, by adapter and module, and how they are spread. Each gives an `<svg>`."""

import statistics
from typing import Any

import numpy as np

from ... import numbers
from ...data import ReportData
from . import module_labels, svg
from .svg import HALF, WIDE, ink, series

MOST_NAMES = 40
"""Rows up to which each has its name."""

LEAST_STARRED = 0.005
"""The error from which on the worst module has a star: less is printed as 0.00."""

_BINS = 40

_LEAST_TOP = 0.1
"""A colour scale ends no lower: an error of nearly nothing shall look like nothing."""


def has_grid(report: ReportData) -> bool:
    """Whether modules have layers and kinds enough for a heat map."""
    layers = {module.layer for module in report.modules}
    return None not in layers and len(layers) > 1 and len({module.kind for module in report.modules}) > 1


def layers(report: ReportData) -> str:
    """The error of each module, by layer and kind; a star on the worst, where anything is lost."""
    names = module_labels.labels(module.kind for module in report.modules)
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
    worst = float(np.nanmax(table))
    top = max(worst, _LEAST_TOP)
    mark = "★" if worst >= LEAST_STARRED else ""

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
                    said = f"{value:.2f} {mark if (y, x) == (row, column) else ''}".strip()
                    shade = _over(colours(value / top))
                    axis.text(x, y, said, ha="center", va="center", fontsize=11, color=shade)
        elif mark:
            axis.text(column, row, mark, ha="center", va="center", color=_over(colours(worst / top)))
        _bar(figure, axis, image)

    return svg.draw("layers", (WIDE, 90 + 30 * len(rows)), "Delta error by layer and kind of module", paint)


def grid(report: ReportData) -> str:
    """Delta error of each adapter, a row, in each module, a column."""
    table = np.array([[np.nan if v is None else v for v in row] for row in report.module_errors], dtype=float)
    names = [one.name for one in report.adapters]
    few = len(names) <= MOST_NAMES

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        # few colours make a small image
        colours = svg.colour_map(svg.SEQUENTIAL, steps=65)
        top = max(float(np.nanmax(table)), _LEAST_TOP)
        image = axis.imshow(table, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="none")
        axis.set_yticks(
            range(len(names)) if few else [], [numbers.shortened(name, 32) for name in names] if few else []
        )
        axis.set(xlabel="module, in the order of the model", ylabel="" if few else "adapters, the worst first")
        _without_lines(axis)
        _bar(figure, axis, image)

    height = 90 + 19 * len(names) if few else 480
    return svg.draw("grid", (WIDE, height), "Delta error of each adapter in each module", paint)


def newcomers(report: ReportData) -> str:
    """How many adapters have which error, in the fit and left out; as lines, what random bases and the mean do."""
    pairs = [(one.delta_error, one.left_out_error) for one in report.adapters if one.left_out_error is not None]
    end = max(1.0, *(value for pair in pairs for value in pair)) * 1.04

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        for values, colour, label in zip(
            zip(*pairs, strict=True), (series(0), series(1)), ("in the fit", "left out"), strict=True
        ):
            axis.hist(values, bins=_BINS, range=(0, end), color=colour, alpha=0.85, label=label, rwidth=0.9)
        for field, dash, label in (
            ("random_error", "--", "random bases, mean"),
            ("mean_scaled_error", ":", "mean adapter, mean"),
        ):
            found = [getattr(one, field) for one in report.adapters if getattr(one, field) is not None]
            if found:
                axis.axvline(statistics.fmean(found), color=ink("text"), linestyle=dash, linewidth=1.4, label=label)
        axis.set(xlim=(0, end), xlabel="delta error", ylabel="adapters")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.grid(visible=False, axis="x")
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("newcomers", (HALF, 330), "Errors of adapters in the fit, and of those left out of it", paint)


def _bar(figure: Any, axis: Any, image: Any) -> None:
    bar = figure.colorbar(image, ax=axis, label="delta error", pad=0.01, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=4)


def _without_lines(axis: Any) -> None:
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _over(colour: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is read more easily on this colour, in either theme."""
    red, green, blue = (part**2.2 for part in colour[:3])
    # of this luminance, both have the same contrast
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18 else "#101216"
