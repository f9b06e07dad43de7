"""Figures of similarity: matrices with a dendrogram, and a map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from ... import numbers
from ...data import AdapterFigures, ReportData, Similarity
from . import svg
from .svg import WIDE, ink, series

MAX_NAMES = 40
"""Maximum number of adapters for which all are labelled."""

PIXELS = 500
"""Maximum number of rows and columns in the image of a matrix."""

MIN_COSINE_END, MIN_OVERLAP_END = 0.2, 0.3
"""Smallest end of each colour scale, so that unrelated adapters look unrelated."""

_MIN_HEIGHT = 0.1
"""Smallest end of the dendrogram's axis."""

_MAX_TOOLTIPS = 1000
_NAMED_WORST, _NAMED_OUTLIERS = 5, 20
"""Maximum numbers of adapters that are labelled in a large map."""
_FONT_SIZE, _CHARACTER_WIDTH, _LINE_HEIGHT = 11, 0.6, 1.25
"""Font of labels on the map, in pixels; width and height of a character relative to it."""

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""


def matrices(similarity: Similarity) -> str:
    """Draw matrices of cosines and overlaps beside the dendrogram, with names if there are few."""
    names = similarity.names
    is_labelled = len(names) <= MAX_NAMES
    tables = [("cosine of the updates", similarity.cosine), ("overlap", similarity.overlap)]

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 3, sharey=True, width_ratios=[0.28, 1, 1])
        _dendrogram(axes[0], similarity.tree, len(names))
        for axis, (title, rows) in zip(axes[1:], tables, strict=True):
            _matrix(figure, axis, np.array(rows), title)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        axes[-1].tick_params(labelleft=False, labelright=is_labelled)
        if is_labelled:
            axes[-1].set_yticks(range(len(names)), [numbers.shortened(name, 28) for name in names])
            axes[-1].tick_params(axis="y", labelcolor=ink("text"), labelsize=11)

    return svg.draw(
        "matrices",
        (WIDE, max(410, 130 + 14 * len(names)) if is_labelled else 520),
        f"Similarity of {numbers.plural(len(names), 'adapter')}, with their dendrogram",
        paint,
    )


def downsampled(matrix: Float[np.ndarray, "n n"], max_size: int) -> Float[np.ndarray, "m m"]:
    """Average neighbouring rows and columns until the matrix has at most `max_size` of each."""
    if len(matrix) <= max_size:
        return np.asarray(matrix, dtype=np.float64)
    starts = np.arange(max_size) * len(matrix) // max_size
    counts = np.diff([*starts, len(matrix)])
    sums = np.add.reduceat(np.add.reduceat(np.asarray(matrix, dtype=np.float64), starts, axis=0), starts, axis=1)
    return np.asarray(sums / np.outer(counts, counts))


def points(report: ReportData) -> str:
    """Draw the map: one point for each adapter with a position, coloured by cluster."""
    shown = [adapter for adapter in report.adapters if adapter.x is not None and adapter.y is not None]
    positions = np.array([(adapter.x, adapter.y) for adapter in shown], dtype=float)
    outliers = set(report.outliers)
    size = (WIDE, 520)

    def paint(figure: Any) -> None:
        figure.set_layout_engine("none")
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_axis_off()
        axis.margins(0.09)
        radius = 4.5 if len(shown) <= 200 else 3.2
        colours = [ink("muted") if adapter.cluster is None else series(adapter.cluster) for adapter in shown]
        axis.scatter(
            *positions.T, s=(2 * radius) ** 2, c=colours, edgecolors=ink("card"), linewidths=1, gid="points-marks"
        )
        ringed = positions[[adapter.name in outliers for adapter in shown]]
        axis.scatter(*ringed.T, s=(2 * radius + 7) ** 2, facecolors="none", edgecolors=ink("bad"), linewidths=1.6)
        # labels are placed in pixels, which are known after a first drawing
        figure.draw_without_rendering()
        pixels = axis.transData.transform(positions) * 72 / figure.dpi
        texts = [numbers.shortened(adapter.name, 26) for adapter in shown]
        labels = _labels(_Canvas(pixels, texts, radius, size), _by_importance(report, shown))
        for number, label in enumerate(labels):
            axis.annotate(
                texts[label.index],
                label.anchor,
                xycoords="figure pixels",
                fontsize=_FONT_SIZE,
                ha=label.alignment,
                va="center",
                gid=f"points-name-{number}",
                color=ink("bad") if shown[label.index].name in outliers else ink("text"),
            )

    drawn = svg.draw(
        "points", size, f"Map of {numbers.plural(len(shown), 'adapter')}: near points have similar updates", paint
    )
    if len(shown) > _MAX_TOOLTIPS:
        return drawn
    return svg.titled(drawn, "points-marks", [_tooltip(adapter) for adapter in shown])


def _matrix(figure: Any, axis: Any, table: np.ndarray, title: str) -> None:
    """Draw one matrix. The scale ends at the largest off-diagonal value; for cosines it begins at its negative."""
    n = len(table)
    table = downsampled(table, PIXELS)
    off_diagonal = table[~np.eye(len(table), dtype=bool)]
    is_signed = "cosine" in title
    top = float(np.abs(off_diagonal).max(initial=MIN_COSINE_END if is_signed else MIN_OVERLAP_END))
    # few colours make a small image
    colours = svg.colour_map(svg.DIVERGING if is_signed else svg.SEQUENTIAL, steps=65)
    edges = (-0.5, n - 0.5, n - 0.5, -0.5)
    bottom = -top if is_signed else 0
    image = axis.imshow(table, cmap=colours, vmin=bottom, vmax=top, interpolation="none", aspect="auto", extent=edges)
    axis.set_title(title)
    axis.grid(visible=False)
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, orientation="horizontal", fraction=0.05, pad=0.02, shrink=0.7, extend="max")
    bar.outline.set_visible(False)
    bar.set_ticks([bottom, (bottom + top) / 2, top])
    bar.ax.set_xticklabels([f"{value:.2f}".replace("-", "−") for value in bar.get_ticks()])


def _dendrogram(axis: Any, tree: Sequence[Sequence[float]], leaves: int) -> None:
    from matplotlib.collections import LineCollection

    # (y, x) of every leaf, then of every node in the order of the tree
    nodes = [(float(leaf), 0.0) for leaf in range(leaves)]
    lines = []
    for first, second, height, _ in tree:
        (first_y, first_x), (second_y, second_x) = nodes[int(first)], nodes[int(second)]
        lines.append([(first_x, first_y), (height, first_y), (height, second_y), (second_x, second_y)])
        nodes.append(((first_y + second_y) / 2, height))
    axis.add_collection(LineCollection(lines, colors=ink("muted"), linewidths=1.1))
    # duplicates join at 0, and an axis needs a length
    top = max([_MIN_HEIGHT, *(row[2] for row in tree)])
    axis.set_xlim(top * 1.05, 0)
    axis.set(xticks=[0, round(top, 2)], xlabel="1 − overlap")
    axis.grid(visible=False)
    axis.tick_params(length=0, labelleft=False)
    axis.spines[:].set_visible(False)


def _by_importance(report: ReportData, shown: list[AdapterFigures]) -> list[int]:
    """Return the indices in `shown` of the adapters to label, the most important first."""
    outliers = set(report.outliers)
    indices = [index for index, adapter in enumerate(shown) if adapter.name in outliers][:_NAMED_OUTLIERS]
    # adapters are sorted by error
    indices += range(min(len(shown), len(shown) if len(shown) <= MAX_NAMES else _NAMED_WORST))
    return list(dict.fromkeys(indices))


@dataclass(frozen=True, slots=True)
class _Label:
    """Label on the map.

    Attributes:
        index: Index of the adapter.
        anchor: Position in pixels.
        alignment: "left" or "right".
    """

    index: int
    anchor: tuple[float, float]
    alignment: str


@dataclass(frozen=True, slots=True)
class _Canvas:
    """The map in pixels.

    Attributes:
        points: Positions of the points, (n, 2).
        texts: Labels of the points.
        radius: Radius of the points.
        size: Width and height of the figure.
    """

    points: np.ndarray
    texts: Sequence[str]
    radius: float
    size: tuple[int, int]

    def contains(self, box: Box) -> bool:
        return box[0] >= 4 and box[2] <= self.size[0] - 4 and box[1] >= 4 and box[3] <= self.size[1] - 4

    def hidden_points(self, box: Box) -> int:
        """Count the points that a label in this box would cover."""
        x, y = self.points.T
        inside = (x > box[0] - self.radius) & (x < box[2] + self.radius)
        inside &= (y > box[1] - self.radius) & (y < box[3] + self.radius)
        return int(inside.sum())


def _labels(canvas: _Canvas, indices: Sequence[int]) -> Iterator[_Label]:
    """Place labels beside their points, so that they cover no other label and as few points as possible.

    A label for which there is no space is left out; the tooltip of the point has the name.
    """
    taken: list[Box] = []
    for index in indices:
        width = len(canvas.texts[index]) * _FONT_SIZE * _CHARACTER_WIDTH
        height = _FONT_SIZE * _LINE_HEIGHT
        best: tuple[int, Box, _Label] | None = None
        for dx, dy in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (1, 2), (1, -2), (-1, 2), (-1, -2)):
            x = float(canvas.points[index][0]) + dx * (canvas.radius + 7)
            y = float(canvas.points[index][1]) + dy * (height * 0.75)
            box = (x if dx > 0 else x - width, y - height / 2, x + width if dx > 0 else x, y + height / 2)
            if not canvas.contains(box) or any(_overlap(box, label_box) for label_box in taken):
                continue
            hidden = canvas.hidden_points(box)
            if best is None or hidden < best[0]:
                best = hidden, box, _Label(index, (x, y), "left" if dx > 0 else "right")
        # in a large map, only the worst adapters may cover points
        if best is not None and (best[0] == 0 or len(canvas.points) <= MAX_NAMES or index < _NAMED_WORST):
            taken.append(best[1])
            yield best[2]


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _tooltip(adapter: AdapterFigures) -> str:
    cluster = "in no cluster" if adapter.cluster is None else f"cluster {adapter.cluster + 1}"
    return f"{adapter.name}: delta error {numbers.error(adapter.delta_error)}, {cluster}"
