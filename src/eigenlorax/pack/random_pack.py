"""`random_pack`: random components in the shapes of a pack, as a control for its subspace."""

import os
from typing import Any

from ..core import basis
from ..core.basis import Basis
from ..core.options import to_int
from ..core.subspace import ModuleBases, Subspace
from ..errors import OptionError
from . import manifest
from .manifest import FitInfo
from .pack import Pack


def random_pack(like: Pack | str | os.PathLike[str], *, seed: int = 0, n_components: int | None = None) -> Pack:
    """Return a pack of random orthonormal components, with the modules and shapes of another pack and no adapters.

    It is the control for a subspace: what coefficients over these components learn as well does not come from the
    adapters of `like`. All subspaces of the same size are equally likely. The components are a function of the seed,
    the names of the modules and the shapes alone, but for the last bits, in which machines may differ.

    Args:
        like: Pack, its folder, or its repository on the Hub. Of an entropy-coded pack, the basis for training counts.
        seed: Seed of the components, at least 0.
        n_components: Maximum number of components per side and module. Default: for each side, the number of
            components that `like` has, including those that it was augmented or extended by.

    Returns:
        A pack in memory, for `EigenLoraxConfig(subspace=...)`; `Pack.save` writes it. Its components have the dtype of
        those of `like`, or float32 if these are integers.

    Raises:
        OptionError: `seed` or `n_components` is out of range, or `like` has no components.

    Example:
        >>> random_pack = eigenlorax.random_pack(like=pack, seed=0)
        >>> len(random_pack), random_pack.info.modules.keys() == pack.info.modules.keys()
        (0, True)
        >>> config = eigenlorax.EigenLoraxConfig(subspace=random_pack)
    """
    for name, number, smallest in (("seed", seed, 0), ("n_components", n_components, 1)):
        if number is not None and to_int(name, number) < smallest:
            raise OptionError(f"{name} must be at least {smallest}, got {number!r}.")
    pack = (like if isinstance(like, Pack) else Pack.from_pretrained(like)).training_pack

    def random_side(side: Basis, label: str) -> Basis:
        k = side.k if n_components is None else min(n_components, side.dimension)
        return basis.random(k, side.dimension, seed, label, side.components.dtype)

    modules = {
        name: ModuleBases(random_side(bases.down, f"{name}.down"), random_side(bases.up, f"{name}.up"))
        for name, bases in pack.subspace.modules.items()
    }
    largest = max((max(bases.down.k, bases.up.k) for bases in modules.values()), default=0)
    if not largest:
        raise OptionError(
            "the pack has no components whose number could be copied. Pass n_components=, or a pack that was fitted "
            "for training (purpose='training', or basis=32)."
        )
    subspace = Subspace(modules)
    return Pack(
        subspace,
        manifest.describe(subspace),
        {},
        _fit_info(largest),
        base_model=pack.base_model,
        revision=pack.revision,
        coefficient_dtype=pack.coefficient_dtype,
    )


def _fit_info(n_components: int) -> FitInfo:
    """Return the description of the fit that would have found as many components."""
    no_target: dict[str, Any] = dict.fromkeys(("energy", "max_error", "max_bytes", "ratio"))
    return FitInfo(n_components, **no_target, auto=False, weighting="delta", sweeps=0, purpose="training")
