"""Figures of errors: by layer, by adapter and module, and their distribution."""

import statistics
from typing import Any

import numpy as np

from ... import numbers
from ...data import ReportData
from . import module_labels, svg
from .svg import HALF, WIDE, ink, series

MAX_NAMES = 40
"""Maximum number of rows with labels."""

MIN_STARRED = 0.005
"""Minimum error of a worst module that is marked with a star; smaller ones are printed as 0.00."""

_BINS = 40

_MIN_SCALE_END = 0.1
"""Smallest end of a colour scale, so that negligible errors look negligible."""


def has_grid(report: ReportData) -> bool:
    """Return whether there are several layers and several kinds of modules, as a heat map needs."""
    layers = {module.layer for module in report.modules}
    return None not in layers and len(layers) > 1 and len({module.kind for module in report.modules}) > 1


def layers(report: ReportData) -> str:
    """Draw a heat map of errors by layer and kind of module, with a star on the worst."""
    names = module_labels.labels(module.kind for module in report.modules)
    rows = list(dict.fromkeys(names[module.kind] for module in report.modules))
    columns = sorted({module.layer for module in report.modules if module.layer is not None})
    table = np.full((len(rows), len(columns)), np.nan)
    for row, label in enumerate(rows):
        for column, layer in enumerate(columns):
            errors = [
                module.delta_error
                for module in report.modules
                if names[module.kind] == label and module.layer == layer and module.delta_error is not None
            ]
            if errors:
                table[row, column] = statistics.fmean(errors)
    worst = float(np.nanmax(table))
    top = max(worst, _MIN_SCALE_END)
    mark = "★" if worst >= MIN_STARRED else ""

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        colours = svg.colour_map(svg.SEQUENTIAL)
        image = axis.imshow(table, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="none")
        axis.set_yticks(range(len(rows)), [numbers.shortened(row, 32) for row in rows])
        step = max(1, -(-len(columns) // 24))
        axis.set_xticks(range(0, len(columns), step), columns[::step])
        _hide_lines(axis)
        axis.set_xlabel("layer")
        row, column = np.unravel_index(np.nanargmax(table), table.shape)
        if len(columns) <= 16:
            for (y, x), value in np.ndenumerate(table):
                if np.isfinite(value):
                    text = f"{value:.2f} {mark if (y, x) == (row, column) else ''}".strip()
                    shade = _text_colour(colours(value / top))
                    axis.text(x, y, text, ha="center", va="center", fontsize=11, color=shade)
        elif mark:
            axis.text(column, row, mark, ha="center", va="center", color=_text_colour(colours(worst / top)))
        _add_colour_bar(figure, axis, image)

    return svg.draw("layers", (WIDE, 90 + 30 * len(rows)), "Delta error by layer and kind of module", paint)


def grid(report: ReportData) -> str:
    """Draw the delta error of each adapter (row) in each module (column)."""
    table = np.array([[np.nan if v is None else v for v in row] for row in report.module_errors], dtype=float)
    names = [adapter.name for adapter in report.adapters]
    is_labelled = len(names) <= MAX_NAMES

    def paint(figure: Any) -> None:
        axis = figure.subplots()
        # few colours make a small image
        colours = svg.colour_map(svg.SEQUENTIAL, steps=65)
        top = max(float(np.nanmax(table)), _MIN_SCALE_END)
        image = axis.imshow(table, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="none")
        labels = [numbers.shortened(name, 32) for name in names] if is_labelled else []
        axis.set_yticks(range(len(labels)), labels)
        axis.set(xlabel="module, in the order of the model", ylabel="" if is_labelled else "adapters, the worst first")
        _hide_lines(axis)
        _add_colour_bar(figure, axis, image)

    height = 90 + 19 * len(names) if is_labelled else 480
    return svg.draw("grid", (WIDE, height), "Delta error of each adapter in each module", paint)


def newcomers(report: ReportData) -> str:
    """Draw histograms of errors in the fit and when left out, and mean errors of random bases and the mean adapter."""
    pairs = [
        (adapter.delta_error, adapter.left_out_error)
        for adapter in report.adapters
        if adapter.left_out_error is not None
    ]
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
            errors = [error for adapter in report.adapters if (error := getattr(adapter, field)) is not None]
            if errors:
                axis.axvline(statistics.fmean(errors), color=ink("text"), linestyle=dash, linewidth=1.4, label=label)
        axis.set(xlim=(0, end), xlabel="delta error", ylabel="adapters")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.grid(visible=False, axis="x")
        figure.legend(loc="outside upper left", ncols=2)

    return svg.draw("newcomers", (HALF, 330), "Errors of adapters in the fit and when left out", paint)


def _add_colour_bar(figure: Any, axis: Any, image: Any) -> None:
    bar = figure.colorbar(image, ax=axis, label="delta error", pad=0.01, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.locator_params(nbins=4)


def _hide_lines(axis: Any) -> None:
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _text_colour(background: tuple[float, float, float, float]) -> str:
    """Return black or white, whichever has more contrast with the background."""
    red, green, blue = (channel**2.2 for channel in background[:3])
    # at this luminance, both have the same contrast
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.18 else "#101216"
