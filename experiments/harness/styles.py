"""Styles: fixed changes of plain pictures, (n, 28, 28) in float32 from 0, the ground, to 1, the ink."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

Pictures = np.ndarray

SIDE = 28
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE]
CROSS = ndimage.generate_binary_structure(2, 1)[None]
SQUARE = np.ones((1, 3, 3), bool)
BORDER = ((ROWS < 2) | (ROWS >= SIDE - 2) | (COLUMNS < 2) | (COLUMNS >= SIDE - 2)).astype(np.float32)
DISC = np.hypot(ROWS - 13.5, COLUMNS - 13.5) < 13.5


def transform(ink: Pictures, matrix: list[list[float]]) -> Pictures:
    """Apply a linear map about the centre. matrix: maps (row, column) of the result to that of the source."""
    centre = np.full(2, (SIDE - 1) / 2)
    offset = centre - np.array(matrix) @ centre
    return np.stack([ndimage.affine_transform(picture, np.array(matrix), offset, order=1) for picture in ink])


def shift(ink: Pictures, down: int, right: int) -> Pictures:
    return ndimage.shift(ink, (0, down, right), order=0)


def blur(ink: Pictures, sigma: float) -> Pictures:
    return ndimage.gaussian_filter(ink, (0, sigma, sigma))


def thicken(ink: Pictures) -> Pictures:
    return ndimage.grey_dilation(ink, footprint=SQUARE)


def outline(ink: Pictures) -> Pictures:
    return thicken(ink) - ndimage.grey_erosion(ink, footprint=CROSS)


def move_columns(ink: Pictures, offsets: np.ndarray) -> Pictures:
    """Take each pixel from so many columns to its right."""
    return ink[:, ROWS, np.clip(COLUMNS + offsets, 0, SIDE - 1)]


def invert(ink: Pictures, mask: np.ndarray) -> Pictures:
    """Invert the pixels of the mask."""
    return np.where(mask, 1 - ink, ink)


STYLES: dict[str, Callable[[Pictures], Pictures]] = {
    "thick": thicken,
    "outline": outline,
    "inverted": lambda ink: 1 - ink,
    "slanted right": lambda ink: transform(ink, [[1, 0], [0.5, 1]]),
    "lying": lambda ink: np.rot90(ink, axes=(1, 2)),
    "blurred": lambda ink: blur(ink, 1.5),
    "dotted": lambda ink: ink * ((ROWS % 3 < 2) & (COLUMNS % 3 < 2)),
    "rows": lambda ink: ink * (ROWS % 4 < 2),
    "columns": lambda ink: ink * (COLUMNS % 4 < 2),
    "checked": lambda ink: ink * ((ROWS // 3 + COLUMNS // 3) % 2),
    "embossed": lambda ink: 0.5 + 0.5 * (ink - shift(ink, 2, 2)),
    "double": lambda ink: np.maximum(ink, shift(ink, 0, 6)),
    "framed": lambda ink: np.maximum(ink, BORDER),
    "dusk": lambda ink: np.maximum(ink, np.linspace(0, 0.7, SIDE)[None, :]),
    "wavy": lambda ink: move_columns(ink, np.rint(3 * np.sin(2 * np.pi * ROWS / 14)).astype(int)),
    "small": lambda ink: transform(ink, [[1.8, 0], [0, 1.8]]),
    "glow": lambda ink: np.maximum(ink, np.clip(1.4 * blur(ink, 2.5), 0, 1)),
    "badge": lambda ink: DISC * (1 - ink),
    "two-tone": lambda ink: invert(ink, COLUMNS < 14),
    "sliced": lambda ink: move_columns(ink, np.where(ROWS < SIDE // 2, 4, -4)),
    "hatched": lambda ink: ink * ((ROWS + COLUMNS) % 4 < 2),
    "tilted": lambda ink: transform(ink, [[0.906, 0.423], [-0.423, 0.906]]),
    "underlined": lambda ink: np.maximum(ink, (ROWS >= 25) & (ROWS < 27)),
    "quartered": lambda ink: invert(ink, (ROWS < 14) == (COLUMNS < 14)),
}


def apply(style: str, pictures: Pictures) -> Pictures:
    """Return the pictures in a style; "plain" leaves them as they are."""
    if style == "plain":
        return pictures
    return np.ascontiguousarray(np.clip(STYLES[style](pictures), 0, 1), dtype=np.float32)
