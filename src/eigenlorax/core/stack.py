"""One module of a whole collection as two batches of rows, and norms of updates by r × r products. Float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .adapter import LoRAFactors
from .linalg import difference_square, psd_root
from .subspace import Coefficients


@dataclass(frozen=True, slots=True)
class Stack:
    """delta_weight of adapter i = up[i].mT @ down[i], (out, in): `up` has the scaling in it.

    Adapters of a lower rank than the highest have rows of zeros, and so has one without the module, whose rank is 0.
    scaling: each adapter's, 0 where it lacks the module.
    """

    down: Float[Tensor, "n r n_in"]
    up: Float[Tensor, "n r n_out"]
    scaling: Float[Tensor, " n"]
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return self.down.shape[0]

    def of(self, chosen: Sequence[int]) -> "Stack":
        """Some of the adapters."""
        return Stack(self.down[chosen], self.up[chosen], self.scaling[chosen], tuple(self.ranks[i] for i in chosen))


def stack(factors: Sequence[LoRAFactors | None], n_in: int, n_out: int) -> Stack:
    """The stack of a module's factors, None where an adapter has no such module."""
    return _stack([None if f is None else (f.down, f.up.mT, f.scaling) for f in factors], n_in, n_out)


def stack_coefficients(coefficients: Sequence[Coefficients | None], k_down: int, k_up: int) -> Stack:
    """The same of coefficients: updates as they come back, in the coordinates of orthonormal bases."""
    return _stack([None if c is None else (c.down, c.up.mT, c.scaling) for c in coefficients], k_down, k_up)


def _stack(members: Sequence[tuple[Tensor, Tensor, float] | None], n_in: int, n_out: int) -> Stack:
    ranks = tuple(0 if member is None else member[0].shape[0] for member in members)
    most = max(ranks, default=0)
    down = torch.zeros(len(ranks), most, n_in, dtype=torch.float64)
    up = torch.zeros(len(ranks), most, n_out, dtype=torch.float64)
    scaling = torch.zeros(len(ranks), dtype=torch.float64)
    for index, member in enumerate(members):
        if member is not None:
            down[index, : ranks[index]] = member[0]
            up[index, : ranks[index]] = member[1]
            up[index] *= member[2]
            scaling[index] = member[2]
    return Stack(down, up, scaling, ranks)


def gram(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "n r r"]:
    """Inner products of each adapter's own rows."""
    return rows @ rows.mT


def squares(one: Stack) -> Float[Tensor, " n"]:
    """‖D‖² of each adapter."""
    return (gram(one.down) * gram(one.up)).sum((1, 2)).clamp_min(0)


def roots(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "n r r"]:
    """Symmetric square roots of each adapter's Gram matrix."""
    return psd_root(gram(rows))


def captured(down: Float[Tensor, "n r k"], up: Float[Tensor, "n r j"]) -> Float[Tensor, " n"]:
    """‖U D Vᵀ‖² from the rows' coordinates in orthonormal bases, A·Vᵀ and (U·B)ᵀ."""
    return (gram(down) * gram(up)).sum((1, 2)).clamp_min(0)


def difference_squares(one: Stack, other_down: Tensor, other_up: Tensor) -> Float[Tensor, " n"]:
    """‖D − D'‖² where D' = other_up.mT @ other_down is in the gauge of D."""
    return difference_square(one.up.mT, one.down, other_up.mT, other_down)
