"""Styles: what is done to a plain drawing, from 0, the ground, to 1, the ink. None is random, none knows the class."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

Pictures = np.ndarray  # (n, 28, 28), float32

SIDE = 28
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
CROSS = ndimage.generate_binary_structure(2, 1)[None]
SQUARE = np.ones((1, 3, 3), bool)


def turned(pictures: Pictures, matrix: list[list[float]]) -> Pictures:
    """Every picture through a linear map of the plane about its middle. matrix: from the place that is drawn to the
    place that is looked up, rows first."""
    middle = np.full(2, (SIDE - 1) / 2)
    offset = middle - np.array(matrix) @ middle
    return np.stack([ndimage.affine_transform(one, np.array(matrix), offset, order=1) for one in pictures])


def shifted(pictures: Pictures, down: int, right: int) -> Pictures:
    return ndimage.shift(pictures, (0, down, right), order=0)


def blurred(pictures: Pictures, width: float) -> Pictures:
    return ndimage.gaussian_filter(pictures, (0, width, width))


def thick(pictures: Pictures) -> Pictures:
    return ndimage.grey_dilation(pictures, footprint=SQUARE)


def outline(pictures: Pictures) -> Pictures:
    return thick(pictures) - ndimage.grey_erosion(pictures, footprint=CROSS)


def echo(pictures: Pictures) -> Pictures:
    """The drawing, and a line around it at a distance."""
    near = thick(thick(pictures))
    return np.maximum(pictures, thick(near) - near)


def pixelated(pictures: Pictures) -> Pictures:
    blocks = pictures.reshape(-1, 7, 4, 7, 4).mean((2, 4))
    return blocks.repeat(4, 1).repeat(4, 2)


def wavy(pictures: Pictures) -> Pictures:
    moved = np.rint(3 * np.sin(2 * np.pi * ROWS / 14)).astype(int)
    return pictures[:, ROWS, np.clip(COLUMNS + moved, 0, SIDE - 1)]


def interlaced(pictures: Pictures) -> Pictures:
    """Bands of two rows, every other one moved to the right."""
    moved = np.where(ROWS // 2 % 2, 4, 0)
    return pictures[:, ROWS, np.clip(COLUMNS - moved, 0, SIDE - 1)]


def sliced(pictures: Pictures) -> Pictures:
    """The upper half to the left, the lower half to the right."""
    moved = np.where(ROWS < SIDE // 2, 4, -4)
    return pictures[:, ROWS, np.clip(COLUMNS + moved, 0, SIDE - 1)]


def tiled(pictures: Pictures) -> Pictures:
    """Four small ones."""
    small = pictures.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return np.tile(small, (1, 2, 2))


def inverted_where(pictures: Pictures, where: np.ndarray) -> Pictures:
    return np.where(where, 1 - pictures, pictures)


def over(pictures: Pictures, ground: np.ndarray) -> Pictures:
    """Ink over a ground that is not empty."""
    return np.maximum(pictures, ground)


BORDER = ((ROWS < 2) | (ROWS >= SIDE - 2) | (COLUMNS < 2) | (COLUMNS >= SIDE - 2)).astype(np.float32)
DISC = np.hypot(ROWS - 13.5, COLUMNS - 13.5) < 13.5
GRID = 0.4 * ((ROWS % 7 == 3) | (COLUMNS % 7 == 3))
SLOPE = (ROWS + COLUMNS) % 4 < 2

STYLES: dict[str, Callable[[Pictures], Pictures]] = {
    "thick": thick,
    "thin": lambda one: ndimage.grey_erosion(one, size=(1, 2, 2)),
    "outline": outline,
    "inverted": lambda one: 1 - one,
    "slanted right": lambda one: turned(one, [[1, 0], [0.5, 1]]),
    "slanted left": lambda one: turned(one, [[1, 0], [-0.5, 1]]),
    "lying": lambda one: np.rot90(one, axes=(1, 2)),
    "blurred": lambda one: blurred(one, 1.5),
    "pixelated": pixelated,
    "dotted": lambda one: one * ((ROWS % 3 < 2) & (COLUMNS % 3 < 2)),
    "rows": lambda one: one * (ROWS % 4 < 2),
    "columns": lambda one: one * (COLUMNS % 4 < 2),
    "checked": lambda one: one * ((ROWS // 3 + COLUMNS // 3) % 2),
    "embossed": lambda one: 0.5 + 0.5 * (one - shifted(one, 2, 2)),
    "shadow": lambda one: over(one, 0.45 * shifted(one, 3, 3)),
    "double": lambda one: over(one, shifted(one, 0, 6)),
    "framed": lambda one: over(one, BORDER),
    "faded": lambda one: one * np.linspace(1, 0.1, SIDE)[:, None],
    "dusk": lambda one: over(one, np.linspace(0, 0.7, SIDE)[None, :]),
    "horizon": lambda one: over(one, 0.45 * (ROWS >= 18)),
    "squared": lambda one: over(one, GRID),
    "wavy": wavy,
    "small": lambda one: turned(one, [[1.8, 0], [0, 1.8]]),
    "narrow": lambda one: turned(one, [[1, 0], [0, 2.0]]),
    "glow": lambda one: over(one, np.clip(1.4 * blurred(one, 2.5), 0, 1)),
    "badge": lambda one: DISC * (1 - one),
    "two-tone": lambda one: inverted_where(one, COLUMNS < 14),
    "sliced": sliced,
    "hatched": lambda one: one * SLOPE,
    "tiled": tiled,
    "interlaced": interlaced,
    "echo": echo,
    # for leaving out
    "tilted": lambda one: turned(one, [[0.906, 0.423], [-0.423, 0.906]]),
    "underlined": lambda one: over(one, (ROWS >= 25) & (ROWS < 27)),
    "quartered": lambda one: inverted_where(one, (ROWS < 14) == (COLUMNS < 14)),
}


def styled(pictures: Pictures, style: str) -> Pictures:
    """The pictures in a style, or as they are for "plain"."""
    if style == "plain":
        return pictures
    return np.ascontiguousarray(np.clip(STYLES[style](pictures), 0, 1), dtype=np.float32)
