"""Augmentation of a subspace, as manifests record it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Augmentation:
    """A growth step that appended `n_extra` random components to every basis, and the seed that rebuilds them."""

    n_extra: int
    seed: int
