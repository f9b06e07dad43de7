"""Classes of integers and their bits in closed form, for decisions before anything is encoded.

`entropy` encodes an integer of class c with the logistic distribution of scale 2^(c/4 − 4). Its tables are exact but
slow to look up; here the bits of whole tensors come from the distribution itself.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from .class_tables import CLASSES, PRECISION


def code_bits(codes: Tensor, classes: Tensor) -> Tensor:
    """Return about how many bits each integer takes in its class; the shapes broadcast."""
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
