"""Updates of several adapters by module: their exact inner products with another update, and their sketches.

Products are computed between coefficients where these are all that a pack stores, and between whole rows of factors
where it stores residuals or the subspace lacks the module. No out × in matrix is formed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core import projection
from ..core.adapter import LazyMapping, LoRAFactors
from ..core.batch import ModuleBatch, coefficients_as_batch, pad_factors
from ..core.coefficients import Coefficients
from ..core.subspace import ModuleBases, Subspace
from ..pack.pack import Pack
from ..pack.packed_adapter import unpack


@dataclass(frozen=True, slots=True)
class MemberUpdates:
    """Updates of one adapter of a pack.

    Attributes:
        inside: Coefficients by the module's name in the subspace. Entropy-coded ones are decoded at each access.
        outside: Factors of modules that the subspace lacks, by the adapter's own names.
    """

    inside: Mapping[str, Coefficients]
    outside: Mapping[str, LoRAFactors]

    @classmethod
    def read(cls, pack: Pack, name: str) -> "MemberUpdates":
        """Read the updates of an adapter."""
        packed = pack.packed(name)
        own_names = {inside: own for own, inside in packed.subspace_names.items()}
        outside: Mapping[str, LoRAFactors] = {}
        if packed.carried:
            modules = unpack(packed, pack.subspace, pack.lossless_dtype).modules
            outside = {module: modules[module] for module in modules if module not in packed.subspace_names}
        return cls(LazyMapping(own_names, lambda inside: packed.coefficients[own_names[inside]]), outside)

    def factors(self, subspace: Subspace) -> Mapping[str, LoRAFactors]:
        """Return whole factors by module, computed in float64 at each access."""

        def read(module: str) -> LoRAFactors:
            if module in self.outside:
                return self.outside[module]
            return projection.reconstruct(self.inside[module], subspace.modules[module])

        return LazyMapping(dict.fromkeys([*self.inside, *self.outside]), read)


@dataclass(frozen=True, slots=True)
class ModuleUpdates:
    """Updates of n adapters in one module, as rows of one rank.

    Attributes:
        batch: The rows, float64; zero for an adapter that lacks the module.
        bases: Bases whose coefficients the rows are; None if the rows have the module's whole width.
    """

    batch: ModuleBatch
    bases: ModuleBases | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the module's weight, (out, in)."""
        return self.bases.shape if self.bases is not None else (self.batch.up.shape[2], self.batch.down.shape[2])

    def side_products(self, rows: Float[Tensor, "s d"], side: str) -> Float[Tensor, "n r s"]:
        """Return the inner products of the rows of one side with other rows of the module's whole width."""
        if self.bases is not None:
            rows = rows @ self.bases.side(side).components.to(torch.float64).mT
        return self.batch.rows(side) @ rows.mT

    def products(self, factors: LoRAFactors) -> Float[Tensor, " n"]:
        """Return the inner products of all updates with another one, ⟨D_i, D⟩ = Σ (B_iᵀB)∘(A_iAᵀ)."""
        down, up = factors.down.to(torch.float64), factors.up.to(torch.float64).mT
        return factors.scaling * (self.side_products(down, "down") * self.side_products(up, "up")).sum((1, 2))

    def squares(self) -> Float[Tensor, " n"]:
        """Return the squared norm of each update."""
        return (self._grams("down") * self._grams("up")).sum((1, 2)).clamp_min(0)

    def _grams(self, side: str) -> Float[Tensor, "n r r"]:
        rows = self.batch.rows(side)
        if self.bases is None:
            return rows @ rows.mT
        # components are orthonormal but for their rounding
        components = self.bases.side(side).components.to(torch.float64)
        return rows @ (components @ components.mT) @ rows.mT


def by_module(members: Sequence[MemberUpdates], subspace: Subspace) -> Iterator[tuple[str, ModuleUpdates]]:
    """Yield each module that one of the adapters has, with the updates of all of them.

    A module outside the subspace is yielded once for each shape that it has.
    """
    for module in sorted({module for member in members for module in member.inside}):
        coefficients = [member.inside.get(module) for member in members]
        yield module, _inside(coefficients, subspace.modules[module])
    for module in sorted({module for member in members for module in member.outside}):
        factors = [member.outside.get(module) for member in members]
        for shape in sorted({shape_of(update) for update in factors if update is not None}):
            same = [update if update is not None and shape_of(update) == shape else None for update in factors]
            yield module, ModuleUpdates(pad_factors(same, shape[1], shape[0]), None)


def _inside(coefficients: Sequence[Coefficients | None], bases: ModuleBases) -> ModuleUpdates:
    if any(each is not None and each.has_residual for each in coefficients):
        n_out, n_in = bases.shape
        whole = [None if each is None else projection.reconstruct(each, bases) for each in coefficients]
        return ModuleUpdates(pad_factors(whole, n_in, n_out), None)
    # adapters of an earlier subspace have fewer coefficients
    wide = [None if each is None else projection.widen_coefficients(each, bases) for each in coefficients]
    return ModuleUpdates(coefficients_as_batch(wide, bases.down.k, bases.up.k), bases)


def shape_of(factors: LoRAFactors) -> tuple[int, int]:
    """Return the shape of an update, (out, in)."""
    return factors.up.shape[0], factors.down.shape[1]
