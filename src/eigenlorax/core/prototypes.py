"""Arrow prototypes: the leading right singular vector of each adapter's update of one module (arXiv 2405.11157, §4.1).

An update s·B·A changes an input most along that vector. In the bases of a pack it is k numbers, and it is found from
r × r Gram matrices: no out × in matrix is formed, and no factor A or B either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import linalg
from .coefficients import Coefficients


@dataclass(frozen=True, slots=True)
class ModulePrototypes:
    """Prototypes of several adapters in one module: coordinates · V + outside, unit vectors with an arbitrary sign.

    Rows of adapters that do not change the module are zero.

    Attributes:
        coordinates: Coordinates in the down basis V.
        outside: Parts that V does not represent; None where no adapter has a residual of its down factor.
    """

    coordinates: Float[Tensor, "n k_down"]
    outside: Float[Tensor, "n n_in"] | None = None

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "ModulePrototypes":
        """Return the prototypes on another device or in another dtype."""
        outside = None if self.outside is None else self.outside.to(device, dtype)
        return ModulePrototypes(self.coordinates.to(device, dtype), outside)


def leading_combination(down_gram: Float[Tensor, "r r"], up_gram: Float[Tensor, "r r"]) -> Float[Tensor, " r"]:
    """Return g for which g @ A is the leading right singular vector of B @ A, of unit length; zeros if B @ A is zero.

    (B·A)ᵀ(B·A) = (S·A)ᵀ(S·A) with S = (BᵀB)^½, and the right singular vectors of S·A follow from S·A·Aᵀ·S.

    Args:
        down_gram: A·Aᵀ, float64.
        up_gram: Bᵀ·B, float64.
    """
    root = linalg.psd_root(up_gram)
    squares, vectors = linalg.descending_eigh(root @ down_gram @ root)
    square = squares[0]
    # rounding leaves a square of an update that is zero slightly above or below zero
    if float(square) <= torch.finfo(square.dtype).eps * float(down_gram.trace() * up_gram.trace()):
        return torch.zeros_like(squares)
    combination: Tensor = root @ vectors[:, 0] / square.sqrt()
    return combination


def module_prototypes(
    adapters: Sequence[Coefficients | None],
    down_basis: Float[Tensor, "k_down n_in"],
    up_basis: Float[Tensor, "k_up n_out"],
) -> ModulePrototypes:
    """Return the prototypes of adapters in one module, float64.

    Args:
        adapters: Coefficients of each adapter in the module; None for an adapter that does not change it.
        down_basis: Rows of the down basis, as stored: they need not be exactly orthonormal.
        up_basis: Rows of the up basis.
    """
    down_basis, up_basis = down_basis.double(), up_basis.double()
    down_gram, up_gram = down_basis @ down_basis.mT, up_basis @ up_basis.mT
    coordinates = down_basis.new_zeros(len(adapters), len(down_basis))
    has_residual = any(adapter is not None and adapter.down_residual is not None for adapter in adapters)
    outside = down_basis.new_zeros(len(adapters), down_basis.shape[1]) if has_residual else None
    for index, adapter in enumerate(adapters):
        if adapter is None:
            continue
        up_residual = None if adapter.up_residual is None else adapter.up_residual.mT
        combination = leading_combination(
            _factor_gram(adapter.down, down_gram, adapter.down_residual, down_basis),
            _factor_gram(adapter.up.mT, up_gram, up_residual, up_basis),
        )
        coordinates[index] = combination @ adapter.down.double()
        if outside is not None and adapter.down_residual is not None:
            outside[index] = combination @ adapter.down_residual.double()
    return ModulePrototypes(coordinates, outside)


def _factor_gram(rows: Tensor, basis_gram: Tensor, residual: Tensor | None, basis: Tensor) -> Tensor:
    """Return the Gram matrix of the factor rows @ basis + residual, (r, r) float64."""
    rows = rows.double()
    gram: Tensor = rows @ basis_gram @ rows.mT
    if residual is not None:
        residual = residual.double()
        cross = rows @ (basis @ residual.mT)
        gram = gram + cross + cross.mT + residual @ residual.mT
    return gram
