"""The report's pictures of how adapters lie to one another: matrices with their dendrogram, and a map."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ... import numbers
from ...data import AdapterFigures, ReportData, Similarity
from . import svg
from .svg import WIDE, ink, series

MOST_NAMES = 40
"""Adapters up to which each has its name in a picture."""

PIXELS = 500
"""Rows and columns of a matrix's picture, at most."""

LEAST_COSINE, LEAST_OVERLAP = 0.2, 0.3
"""Where the colour scales end at the soonest: what unrelated adapters have in common shall look like nothing."""

_LEAST_HEIGHT = 0.1
"""Where the dendrogram's axis ends at the soonest."""

_NAMED_WORST, _NAMED_OUTLIERS = 5, 20
_SIZE, _CHARACTER, _LINE = 11, 0.6, 1.25
"""Of a name on the map: its size in pixels, and the width and height of a character in it."""


def matrices(similarity: Similarity) -> str:
    """Cosines and overlaps in the order of the dendrogram, which is at their left; names where they are few."""
    names = similarity.names
    few = len(names) <= MOST_NAMES
    tables = [("cosine of the updates", similarity.cosine), ("overlap of directions", similarity.overlap)]

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 3, sharey=True, width_ratios=[0.28, 1, 1])
        _dendrogram(axes[0], similarity.tree, len(names))
        for axis, (title, rows) in zip(axes[1:], tables, strict=True):
            _matrix(figure, axis, np.array(rows), title)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        axes[-1].tick_params(labelleft=False, labelright=few)
        if few:
            axes[-1].set_yticks(range(len(names)), [numbers.shortened(name, 28) for name in names])
            axes[-1].tick_params(axis="y", labelcolor=ink("text"), labelsize=11)

    return svg.draw(
        "matrices",
        (WIDE, max(410, 130 + 14 * len(names)) if few else 520),
        f"Similarity of {numbers.plural(len(names), 'adapter')}, with their dendrogram",
        paint,
    )


def downsampled(matrix: Float[np.ndarray, "n n"], most: int) -> Float[np.ndarray, "m m"]:
    """The matrix with neighbours averaged until it has at most `most` rows."""
    if len(matrix) <= most:
        return np.asarray(matrix, dtype=np.float64)
    starts = np.arange(most) * len(matrix) // most
    counts = np.diff([*starts, len(matrix)])
    sums = np.add.reduceat(np.add.reduceat(np.asarray(matrix, dtype=np.float64), starts, axis=0), starts, axis=1)
    return np.asarray(sums / np.outer(counts, counts))


def points(report: ReportData) -> str:
    """The map: a point for each adapter that has a place, coloured by cluster."""
    shown = [one for one in report.adapters if one.x is not None and one.y is not None]
    places = np.array([(one.x, one.y) for one in shown], dtype=float)
    outliers = set(report.outliers)
    size = (WIDE, 520)

    def paint(figure: Any) -> None:
        figure.set_layout_engine("none")
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_axis_off()
        axis.margins(0.09)
        radius = 4.5 if len(shown) <= 200 else 3.2
        colours = [ink("muted") if one.cluster is None else series(one.cluster) for one in shown]
        axis.scatter(
            *places.T, s=(2 * radius) ** 2, c=colours, edgecolors=ink("card"), linewidths=1, gid="points-marks"
        )
        ringed = places[[one.name in outliers for one in shown]]
        axis.scatter(*ringed.T, s=(2 * radius + 7) ** 2, facecolors="none", edgecolors=ink("bad"), linewidths=1.6)
        figure.draw_without_rendering()
        pixels = axis.transData.transform(places) * 72 / figure.dpi
        for number, (at, anchor, name) in enumerate(_labels(pixels, _named(report, shown), shown, radius, size)):
            axis.annotate(
                name,
                at,
                xycoords="figure pixels",
                fontsize=_SIZE,
                ha=anchor,
                va="center",
                gid=f"points-name-{number}",
                color=ink("bad") if name in outliers else ink("text"),
            )

    drawn = svg.draw(
        "points", size, f"Map of {numbers.plural(len(shown), 'adapter')}: near ones have similar updates", paint
    )
    return svg.titled(drawn, "points-marks", [_tooltip(one) for one in shown]) if len(shown) <= 1000 else drawn


def _matrix(figure: Any, axis: Any, table: np.ndarray, title: str) -> None:
    """Cosines from −top to top, overlaps from 0; top is the largest off the diagonal, which says nothing, or more."""
    n = len(table)
    table = downsampled(table, PIXELS)
    others = table[~np.eye(len(table), dtype=bool)]
    signed = "cosine" in title
    top = float(np.abs(others).max(initial=LEAST_COSINE if signed else LEAST_OVERLAP))
    # few colours make a small image
    colours = svg.colour_map(svg.DIVERGING if signed else svg.SEQUENTIAL, steps=65)
    edges = (-0.5, n - 0.5, n - 0.5, -0.5)
    image = axis.imshow(
        table, cmap=colours, vmin=-top if signed else 0, vmax=top, interpolation="none", aspect="auto", extent=edges
    )
    axis.set_title(title)
    axis.grid(visible=False)
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, orientation="horizontal", fraction=0.05, pad=0.02, shrink=0.7, extend="max")
    bar.outline.set_visible(False)
    bar.set_ticks([-top, 0, top] if signed else [0, top / 2, top])
    bar.ax.set_xticklabels([f"{value:.2f}".replace("-", "−") for value in bar.get_ticks()])


def _dendrogram(axis: Any, tree: Sequence[Sequence[float]], leaves: int) -> None:
    from matplotlib.collections import LineCollection

    places = [(float(leaf), 0.0) for leaf in range(leaves)]
    lines = []
    for first, second, height, _ in tree:
        (y, x), (other_y, other_x) = places[int(first)], places[int(second)]
        lines.append([(x, y), (height, y), (height, other_y), (other_x, other_y)])
        places.append(((y + other_y) / 2, height))
    axis.add_collection(LineCollection(lines, colors=ink("muted"), linewidths=1.1))
    # duplicates join at 0, and an axis needs a length
    top = max([_LEAST_HEIGHT, *(row[2] for row in tree)])
    axis.set_xlim(top * 1.05, 0)
    axis.set(xticks=[0, round(top, 2)], xlabel="1 − overlap")
    axis.grid(visible=False)
    axis.tick_params(length=0, labelleft=False)
    axis.spines[:].set_visible(False)


def _named(report: ReportData, shown: list[AdapterFigures]) -> list[int]:
    """Places in `shown` of those that are named, the most important first."""
    outliers = [one.name for one in shown if one.name in set(report.outliers)][:_NAMED_OUTLIERS]
    first = dict.fromkeys([*outliers, *(one.name for one in shown[:_NAMED_WORST])])
    if len(shown) <= MOST_NAMES:
        first |= dict.fromkeys(one.name for one in shown)
    where = {one.name: place for place, one in enumerate(shown)}
    return [where[name] for name in first]


def _labels(
    pixels: np.ndarray, named: list[int], shown: list[AdapterFigures], radius: float, size: tuple[int, int]
) -> Iterator[tuple[tuple[float, float], str, str]]:
    """Where each name goes: beside its point, where it hides no other name and, if possible, no point.

    A name that has no room is left out: the point's tooltip has it.
    """
    taken: list[tuple[float, float, float, float]] = []
    for place in named:
        name = numbers.shortened(shown[place].name, 26)
        width, height = len(name) * _SIZE * _CHARACTER, _SIZE * _LINE
        best = None
        for dx, dy in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 2), (1, -2), (-1, 2), (-1, -2)):
            x = float(pixels[place][0]) + dx * (radius + 7)
            y = float(pixels[place][1]) + dy * (height * 0.75)
            box = (x if dx > 0 else x - width, y - height / 2, x + width if dx > 0 else x, y + height / 2)
            if box[0] < 4 or box[2] > size[0] - 4 or box[1] < 4 or box[3] > size[1] - 4:
                continue
            if any(_overlap(box, other) for other in taken):
                continue
            inside = (pixels[:, 0] > box[0] - radius) & (pixels[:, 0] < box[2] + radius)
            inside &= (pixels[:, 1] > box[1] - radius) & (pixels[:, 1] < box[3] + radius)
            hidden = int(inside.sum())
            if best is None or hidden < best[0]:
                best = (hidden, box, (x, y), "left" if dx > 0 else "right")
        if best is not None and (best[0] == 0 or len(shown) <= MOST_NAMES or place < _NAMED_WORST):
            taken.append(best[1])
            yield best[2], best[3], name


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tooltip(one: AdapterFigures) -> str:
    cluster = "in no cluster" if one.cluster is None else f"cluster {one.cluster + 1}"
    return f"{one.name}: delta error {numbers.error(one.delta_error)}, {cluster}"
