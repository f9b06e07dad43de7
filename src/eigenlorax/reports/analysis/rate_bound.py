"""Gaussian rate–distortion bound: bytes that adapters need at an error bound if each is encoded by itself."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_BISECTIONS = 60
_WIDEST = 128.0
"""Range of the water level, in octaves below and above the largest variance of a coordinate."""


def least_bytes(
    spectra: Sequence[tuple[Float[Tensor, "n _"], tuple[int, int]]], errors: Sequence[float]
) -> list[float]:
    """Return the bytes of all adapters at each error bound, by reverse water-filling (Cover & Thomas, §10.3.3).

    A singular component of an update (out, in) counts as out + in independent Gaussian coordinates, of variances
    σ² / out and σ² / in. A coordinate of variance v that is kept with the squared error θ takes ½ log₂(v / θ) bits. All
    coordinates of an adapter have one θ. A component may be dropped instead, which loses σ².

    Args:
        spectra: For each module, the squared singular values of each adapter's update, and the shape (out, in).
        errors: Relative errors of an adapter's whole update, each above 0.
    """
    squares = torch.cat([values for values, _ in spectra], dim=1).to(torch.float64)
    sides = tuple(
        torch.cat([torch.full((values.shape[1],), float(shape[side])) for values, shape in spectra]).double()
        for side in range(2)
    )
    trained = squares.sum(1) > 0
    squares = squares[trained]
    return [float(_bits(squares, sides, error).sum()) / 8 for error in errors]


def _bits(squares: Float[Tensor, "n c"], sides: tuple[Float[Tensor, " c"], ...], error: float) -> Float[Tensor, " n"]:
    """Return the bits of each adapter.

    Args:
        squares: Squared singular values of all modules.
        sides: Numbers of coordinates of each component, (out, in).
        error: Relative error.
    """
    allowed = error**2 * squares.sum(1)
    top = torch.log2(squares.amax(1))
    low, high = top - _WIDEST, top + _WIDEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_above = _at_level(squares, sides, middle.exp2())[1] > allowed
        low, high = low.where(is_above, middle), middle.where(is_above, high)
    # where a component is dropped, bits and error jump: in between, time sharing gives the convex hull
    (bits, lost), (fewer, more) = (_at_level(squares, sides, level.exp2()) for level in (low, high))
    share = ((allowed - lost) / (more - lost)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    return torch.lerp(bits, fewer, share)


def _at_level(
    squares: Float[Tensor, "n c"], sides: tuple[Float[Tensor, " c"], ...], level: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the bits and the squared error of each adapter at a water level θ."""
    level = level[:, None]
    bits, lost = torch.zeros_like(squares), torch.zeros_like(squares)
    for d in sides:
        bits += d / 2 * torch.log2((squares / (d * level)).clamp_min(1))
        lost += torch.minimum(d * level, squares)
    # at θ, one unit of squared error costs as much as 1 / (2 ln 2 θ) bits
    is_kept = bits + (lost - squares) / (2 * math.log(2) * level) < 0
    return (bits * is_kept).sum(1), lost.where(is_kept, squares).sum(1)
