"""Sizes of one module of a subspace, without its tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...core.subspace import ModuleBases


@dataclass(frozen=True, slots=True)
class ModuleSizes:
    """Numbers of components (k_down, k_up) and widths (n_in, n_out) of one module of a subspace."""

    k: tuple[int, int]
    widths: tuple[int, int]

    @classmethod
    def of(cls, bases: "ModuleBases") -> "ModuleSizes":
        """Return the sizes of bases in memory."""
        return cls((bases.down.k, bases.up.k), (bases.down.dimension, bases.up.dimension))
