"""A matrix of rows in 8 bits: integers, and a scale for each row.

Rows are converted to floats for each product, so that no copy of them in floats stays in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError

LEVELS = 127
"""Largest absolute value of an integer."""
# Number of entries of a row that are tested first, to find out whether the row is already on a grid
_SAMPLE = 64
# Distance from the nearest integer that float32 rounding explains
_ON_GRID = 1e-3


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows quantised to 8 bits: codes · scales.

    Attributes:
        codes: Integers from -127 to 127, (k, d) int8.
        scales: Scale of each row, (k, 1).
    """

    codes: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """(k, d)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.scales

    def to(self, device: torch.device) -> "Int8Rows":
        """Return the rows on `device`."""
        return Int8Rows(self.codes.to(device), self.scales.to(device))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the rows as floats, (k, d)."""
        return dequantise(self.codes, self.scales, dtype)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes · scales in a float dtype, (k, d).

    Args:
        codes: Integers, (k, d) int8.
        scales: Scale of each row, (k, 1).
        dtype: Dtype of the result.
    """
    # in float32 first: in half precision, a product with the bare codes would overflow
    return (codes.float() * scales.float()).to(dtype)


BasisRows = Tensor | Int8Rows


def as_float(rows: BasisRows, dtype: torch.dtype) -> Tensor:
    """Return the rows, (k, d), in a float dtype."""
    return rows.dequantise(dtype) if isinstance(rows, Int8Rows) else rows.to(dtype)


def stored_tensors(rows: BasisRows) -> tuple[Tensor, ...]:
    """Return the tensors that hold the rows in memory."""
    return rows.tensors if isinstance(rows, Int8Rows) else (rows,)


def is_int8(name: str, dtype: str | torch.dtype | None) -> bool:
    """Return whether an option asks for 8 bits.

    Args:
        name: Name of the option, for the message.
        dtype: "int8", `torch.int8`, or None for floats.

    Raises:
        OptionError: `dtype` is anything else.
    """
    if dtype not in (None, "int8", torch.int8):
        raise OptionError(f"{name} must be 'int8' or None, which keeps bases as floats; got {dtype!r}.")
    return dtype is not None


def quantise_rows(rows: Tensor) -> Int8Rows:
    """Quantise each row to integers from -127 to 127, scaled by its largest entry.

    Rows that are on such a grid already, such as bases of integer packs, keep their integers: their scale is found
    even if the largest integer in use is below 127.

    Args:
        rows: Rows, (k, d).
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    grid_scales = _grid_scales(rows, largest)
    scales = torch.where(grid_scales > 0, grid_scales, largest / LEVELS)
    # a row of zeros
    scales = torch.where(scales == 0, 1.0, scales)
    return Int8Rows((rows / scales).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales)


def _grid_scales(rows: Tensor, largest: Tensor) -> Tensor:
    """Return the scale of each row whose entries are integer multiples of it, at most 127 times; otherwise 0."""
    # A row whose largest integer is below 64 is also on the grid of half the scale, with integers twice as large; so
    # largest integers from 64 to 127 cover all cases.
    levels = torch.arange(LEVELS, LEVELS // 2, -1, device=rows.device)
    # a few entries rule most rows out before all entries are tried
    sample = rows[:, :: max(1, rows.shape[1] // _SAMPLE)]
    distance = _grid_distance(sample[:, None, :], largest[:, None] / levels[:, None])
    worst = distance.amax(dim=2, keepdim=True).squeeze(2)
    least, index = worst.min(dim=1, keepdim=True)
    scales = largest / levels[index]
    is_on_grid = (least < _ON_GRID) & (largest > 0)
    if bool(is_on_grid.any()):
        is_on_grid &= _grid_distance(rows, scales).amax(dim=1, keepdim=True) < _ON_GRID
    return torch.where(is_on_grid, scales, 0.0)


def _grid_distance(rows: Tensor, scales: Tensor) -> Tensor:
    """Return the distance of each entry from the nearest multiple of its scale, in units of the scale."""
    multiples = rows / torch.where(scales == 0, 1.0, scales)
    return (multiples - multiples.round()).abs()
