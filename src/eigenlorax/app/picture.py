"""The ratio–error curve as an SVG whose points can be clicked."""

import math
from collections.abc import Sequence

from ..reports.numbers import bound, ratio
from .analysis import CurvePoint

WIDTH, HEIGHT = 720, 260
"""Size of the picture in its own units; the page scales it."""
_CHOSEN = ' class="chosen"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 40, 34, 48


def draw(points: Sequence[CurvePoint], chosen: float) -> str:
    """Return the curve as an SVG element. Each point is a `<g>` with its number as `data-point`.

    Args:
        points: Two or more points by ascending error.
        chosen: Error bound of the chosen point.
    """
    ratios = [point.ratio for point in points]
    places = [(_x(point, points[0], points[-1]), _y(point.ratio, ratios)) for point in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(
        _mark(number, point, place, point.max_error == chosen)
        for number, (point, place) in enumerate(zip(points, places, strict=True))
    )
    base = HEIGHT - _BOTTOM
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Compression ratio over the error of the worst '
        f'adapter" class="curve"><path d="M{_LEFT},{_TOP / 2:.0f}V{base}H{WIDTH - _RIGHT / 2:.0f}" class="axis"/>'
        f'<polyline points="{line}"/>{marks}'
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 6}">largest error of an adapter</text>'
        f'<text transform="translate(16,{HEIGHT / 2:.0f}) rotate(-90)">times smaller</text></svg>'
    )


def _mark(number: int, point: CurvePoint, place: tuple[float, float], is_chosen: bool) -> str:
    x, y = place
    return (
        f'<g data-point="{number}"{_CHOSEN if is_chosen else ""}><title>{point}</title>'
        f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="18"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{8 if is_chosen else 5}"/>'
        f'<text x="{x:.1f}" y="{y - 14:.1f}">{ratio(point.ratio)}</text>'
        f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}">{bound(point.max_error)}</text></g>'
    )


def _x(point: CurvePoint, first: CurvePoint, last: CurvePoint) -> float:
    """Return the position of an error on a logarithmic axis."""
    part = math.log(point.max_error / first.max_error) / math.log(last.max_error / first.max_error)
    return _LEFT + 24 + part * (WIDTH - _LEFT - _RIGHT - 24)


def _y(value: float, values: Sequence[float]) -> float:
    """Return the position of a ratio on a logarithmic axis."""
    low, high = math.log(min(values)), math.log(max(values))
    part = (math.log(value) - low) / (high - low) if high > low else 0.5
    return HEIGHT - _BOTTOM - 18 - part * (HEIGHT - _BOTTOM - _TOP - 18)
