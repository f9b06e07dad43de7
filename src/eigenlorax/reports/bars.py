"""Bars of shares as HTML, which fit any width, where a picture would shrink or scroll.

Nothing here knows what they are shares of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .markup import text

_ROUND = (1.0, 1.2, 1.6, 2.0, 4.0, 8.0, 10.0)
"""Leading digits of an axis's end of which a quarter is a round number too."""

_LEAST_END = 0.1
"""An axis ends no sooner: of errors and shares, nearly nothing shall look like nothing."""

_QUARTERS = (0, 1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a bar or a mark stands for. shape: a class of the style sheet, "bar" or "bar quiet" for bars, "diamond" or
    "stroke" for marks."""

    shape: str
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One row. said: the value as text. marks: further values, each at its place on the same axis."""

    name: str
    value: float
    said: str
    kind: Kind
    marks: list[tuple[Kind, float, str]] = field(default_factory=list)


def render(rows: Sequence[Bar], label: str) -> str:
    """The rows from the top down, a legend where there is more than one kind of thing, and an axis from 0.

    label: what who cannot see the bars is told that they are.
    """
    end = axis_end(
        max([_LEAST_END, *(value for row in rows for value in (row.value, *(mark[1] for mark in row.marks)))])
    )
    listed = "".join(_row(row, end) for row in rows)
    ticks = "".join(f'<span style="left:{25 * quarter}%">{end * quarter / 4:g}</span>' for quarter in _QUARTERS)
    return (
        f'{_legend(rows)}<ol class="bars" aria-label="{text(label)}">{listed}'
        f'<li class="ticks" aria-hidden="true"><span class="track">{ticks}</span></li></ol>'
    )


def axis_end(largest: float) -> float:
    """The end of an axis that begins at 0 and holds this value: its quarters are round numbers."""
    if largest <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(largest))
    return next(scale * digit for digit in _ROUND if largest <= scale * digit * (1 + 1e-9))


def _legend(rows: Sequence[Bar]) -> str:
    kinds = dict.fromkeys(kind for row in rows for kind in (row.kind, *(mark[0] for mark in row.marks)))
    if len(kinds) == 1:
        return ""
    keys = "".join(f'<li><span class="key {kind.shape}"></span>{text(kind.label)}</li>' for kind in kinds)
    return f'<ul class="legend" aria-hidden="true">{keys}</ul>'


def _row(row: Bar, end: float) -> str:
    marks = "".join(
        f'<span class="{kind.shape}" style="left:{_percent(value, end)}"></span>' for kind, value, _ in row.marks
    )
    # read out, and shown to who points at the row
    said = "; ".join([f"{row.kind.label} {row.said}", *(f"{kind.label} {said}" for kind, _, said in row.marks)])
    return (
        f'<li title="{text(f"{row.name}: {said}")}"><span class="name">{text(row.name)}</span>'
        f'<span class="track" role="img" aria-label="{text(said)}">'
        f'<span class="{row.kind.shape}" style="width:{_percent(row.value, end)}"></span>{marks}</span>'
        f'<span class="said" aria-hidden="true">{text(row.said)}</span></li>'
    )


def _percent(value: float, end: float) -> str:
    return f"{100 * max(value, 0.0) / end:.2f}%"
