"""A matrix of rows in 8 bits: integers, and a scale for each row. They are made wide as they are multiplied with, so
that no copy of them in floats stays.

Tensors alone: nothing here knows of bases or adapters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError

LEVELS = 127
_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """The rows codes · scales: codes (k, d) int8, from -127 to 127, and scales (k, 1)."""

    codes: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.scales

    def to(self, device: torch.device) -> "Int8Rows":
        """The same on a device."""
        return Int8Rows(self.codes.to(device), self.scales.to(device))

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The rows as floats, for the length of one product."""
        # not the codes alone, with scales put into the product: in half precision that product would overflow
        return (self.codes.float() * self.scales.float()).to(dtype)


BasisRows = Tensor | Int8Rows


def as_float(rows: BasisRows, dtype: torch.dtype) -> Tensor:
    """The rows, (k, d), in a dtype of floats."""
    return rows.wide(dtype) if isinstance(rows, Int8Rows) else rows.to(dtype)


def stored_tensors(rows: BasisRows) -> tuple[Tensor, ...]:
    """All that is in memory of the rows."""
    return rows.tensors if isinstance(rows, Int8Rows) else (rows,)


def is_int8(name: str, dtype: str | torch.dtype | None) -> bool:
    """Whether 8 bits are asked for by an option of this name, as "int8" or `torch.int8`, and not None."""
    if dtype not in (None, "int8", torch.int8):
        raise OptionError(f"{name} must be 'int8' or None, which keeps bases as floats; got {dtype!r}.")
    return dtype is not None


def quantise_rows(rows: Tensor) -> Int8Rows:
    """Each row rounded to the nearest of 255 levels, the largest of which is its largest entry.

    Rows that are integers up to 127 times a scale already, however many of them are in use, are kept to the bit of a
    float32 product.
    """
    rows = rows.float()
    largest = rows.abs().amax(dim=1, keepdim=True)
    exact = _exact_scales(rows, largest)
    scales = torch.where(exact > 0, exact, largest / LEVELS)
    scales = torch.where(scales == 0, 1.0, scales)
    return Int8Rows((rows / scales).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales)


def _exact_scales(rows: Tensor, largest: Tensor) -> Tensor:
    """(k, 1): the scale of which all entries of a row are whole multiples, at most 127 times; 0 where there is none."""
    # what has fewer levels than 64 has twice as many of half the scale, and so on
    levels = torch.arange(LEVELS, LEVELS // 2, -1, device=rows.device)
    # most rows have no such scale: a few of their entries say so
    sample = rows[:, :: max(1, rows.shape[1] // _SAMPLE)]
    off = _off(sample[:, None, :], largest[:, None] / levels[:, None]).amax(dim=2, keepdim=True).squeeze(2)
    best, which = off.min(dim=1, keepdim=True)
    scales = largest / levels[which]
    fits = (best < 1e-3) & (largest > 0)
    if bool(fits.any()):
        fits &= _off(rows, scales).amax(dim=1, keepdim=True) < 1e-3
    return torch.where(fits, scales, 0.0)


def _off(rows: Tensor, scales: Tensor) -> Tensor:
    """How far entries are from whole multiples of a scale, in units of it."""
    found = rows / torch.where(scales == 0, 1.0, scales)
    return (found - found.round()).abs()
