"""Classes of integers and their bits in closed form, for decisions before anything is encoded.

`entropy` encodes an integer of class c with the logistic distribution of scale 2^(c/4 − 4). Its tables are exact but
slow to look up; here the bits of whole tensors come from the distribution itself.
"""

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .class_tables import CLASSES, PRECISION

TABLE_SIZE = 64
"""Absolute integers below this have their bits in a table."""


@cache
def bit_table() -> Float[Tensor, "classes size"]:
    """Return about how many bits each absolute integer below `TABLE_SIZE` takes in each class."""
    return _code_bits(torch.arange(TABLE_SIZE, dtype=torch.float64), torch.arange(CLASSES)[:, None])


def code_bits(codes: Tensor, classes: Tensor) -> Tensor:
    """Return about how many bits each integer takes in its class; the shapes broadcast."""
    magnitudes = codes.abs()
    narrow = magnitudes.clamp_max(TABLE_SIZE - 1).to(torch.int64)
    bits = bit_table().take(classes.to(torch.int64) * TABLE_SIZE + narrow)
    is_wide = (magnitudes >= TABLE_SIZE).expand_as(bits)
    if is_wide.any():
        bits[is_wide] = _code_bits(magnitudes.expand_as(bits)[is_wide], classes.expand_as(bits)[is_wide])
    return bits


def row_bits(
    magnitudes: Float[Tensor, "... d"], classes: Int[Tensor, "candidates ..."]
) -> Float[Tensor, "candidates ..."]:
    """Return about how many bits each row of absolute integers takes in each of several classes."""
    rows, row_classes = magnitudes.flatten(0, -2), classes.flatten(1)
    bits = torch.empty(row_classes.shape, dtype=torch.float64)
    is_narrow = rows.amax(1) < TABLE_SIZE if rows.numel() else torch.ones(len(rows), dtype=torch.bool)
    narrow = rows if is_narrow.all() else rows[is_narrow]
    # integers of 32 bits, because they are counted twice as fast
    offsets = TABLE_SIZE * torch.arange(len(narrow), dtype=torch.int32)[:, None]
    table_indices = narrow.to(torch.int32).add_(offsets).flatten()
    histogram = torch.bincount(table_indices, minlength=len(narrow) * TABLE_SIZE).reshape(-1, TABLE_SIZE)
    bits[:, is_narrow] = (bit_table()[row_classes[:, is_narrow]] * histogram).sum(-1)
    wide = _code_bits(rows[~is_narrow], row_classes[:, ~is_narrow, None])
    bits[:, ~is_narrow] = wide.sum(-1)
    return bits.reshape(classes.shape)


def _code_bits(codes: Tensor, classes: Tensor) -> Tensor:
    """Return the bits of integers in their classes, from the distribution itself."""
    scale = torch.exp2(classes.to(torch.float64) / 4 - 4)
    # both logistic functions on the negative side: near 1, their difference would have no digits left
    above, below = torch.sigmoid((codes.abs() - 0.5) / -scale), torch.sigmoid((codes.abs() + 0.5) / -scale)
    # no symbol of a table has less than one count
    least_probability = 2.0**-PRECISION
    return -(above - below + least_probability).log2()


def classes_of_spread(spread: Tensor) -> Int[Tensor, "..."]:
    """Return the classes for integers of these standard deviations."""
    # four classes an octave; class 16 has the scale 1, which is √3 / π standard deviations
    classes = 4 * (spread.clamp_min(1e-9) * math.sqrt(3) / math.pi).log2()
    return (classes.round() + 16).clamp(0, CLASSES - 1).to(torch.int64)
