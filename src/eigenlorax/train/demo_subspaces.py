"""The demo's subspaces: how much one basis holds of adapters that were left out of its fit.

The demo's own adapters share little. For comparison, adapters are planted: drawn at random in one subspace of the same
modules, with noise outside of it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.adapter import Adapter, LoRAFactors, from_factors
from ..core.progress import Progress
from ..fitting.fit import fit
from ..pack.manifest import SubspaceInfo
from ..pack.pack import Pack

PLANTED_ADAPTERS = 32
PLANTED_COMPONENTS = 24
"""Dimension of the planted subspace on each side of each module."""
PLANTED_RANK = 8
PLANTED_NOISE = 0.05
"""Norm of the noise of each planted factor, relative to its norm."""
SEED = 0


@dataclass(frozen=True, slots=True)
class SubspaceCheck:
    """Errors of adapters in a basis that was fitted to some of them.

    Attributes:
        n_components: Maximum number of components per module and side.
        fitted: Delta errors of the adapters of the fit, by name.
        left_out: Delta errors of the adapters that were left out of the fit and then projected, by name.
    """

    n_components: int
    fitted: dict[str, float]
    left_out: dict[str, float]


@dataclass(frozen=True, slots=True)
class Planted:
    """Adapters that share a subspace by construction, and how they are stored.

    Attributes:
        adapters: Number of adapters.
        shared: Dimension of the subspace that they share, on each side of each module.
        noise: Norm of their noise outside of it, relative to the norm of each factor.
        check: Errors in a basis that was fitted without one of them.
        ratio: Compression ratio of all of them in a pack for storage.
        worst: Largest delta error in that pack.
    """

    adapters: int
    shared: int
    noise: float
    check: SubspaceCheck
    ratio: float
    worst: float


def fit_without(
    adapters: Mapping[str, Path] | Mapping[str, Adapter], left_out: Collection[str], n_components: int
) -> tuple[Pack, SubspaceCheck]:
    """Fit a basis for training without some adapters, and project these on it.

    Args:
        adapters: Adapters by name.
        left_out: Names of the adapters that are left out of the fit.
        n_components: Maximum number of components per module and side.

    Returns:
        The pack of all adapters, in memory, and their errors.
    """
    fitted = {name: adapter for name, adapter in adapters.items() if name not in left_out}
    pack = fit(fitted, purpose="training", n_components=n_components, warn_above=1.0)
    for name in left_out:
        pack.add(adapters[name], name=name, warn_above=1.0)
    errors = {name: record.delta_error for name, record in pack.records.items()}
    return pack, SubspaceCheck(
        n_components, {name: errors[name] for name in fitted}, {name: errors[name] for name in left_out}
    )


def check_planted(modules: SubspaceInfo, n_components: int, progress: Progress) -> Planted:
    """Plant adapters in a subspace of the same modules, fit a basis without one of them, and store all of them.

    Args:
        modules: Subspace whose modules and shapes the planted adapters get.
        n_components: Maximum number of components per module and side.
        progress: Function that is called with (stage, done, total).
    """
    adapters = plant(modules, torch.Generator().manual_seed(SEED))
    _, check = fit_without(adapters, list(adapters)[-1:], n_components)
    stored = fit(adapters, progress=progress).summary
    assert stored.in_fit is not None
    return Planted(
        adapters=len(adapters),
        shared=PLANTED_COMPONENTS,
        noise=PLANTED_NOISE,
        check=check,
        ratio=stored.bytes.ratio,
        worst=stored.in_fit.worst,
    )


def plant(modules: SubspaceInfo, generator: torch.Generator) -> dict[str, Adapter]:
    """Return random adapters whose factors lie in one subspace per module and side, but for noise.

    Args:
        modules: Subspace whose modules and shapes the adapters get.
        generator: Random numbers.
    """
    factors: list[dict[str, LoRAFactors]] = [{} for _ in range(PLANTED_ADAPTERS)]
    for module, sides in modules.modules.items():
        bases = [_random_basis(sides[side].dimension, generator) for side in ("down", "up")]
        for modules_of_adapter in factors:
            down, up = (_random_rows(basis, generator) for basis in bases)
            modules_of_adapter[module] = LoRAFactors(down, up.mT.contiguous(), 1.0)
    return {f"planted-{index}": from_factors(f"planted-{index}", rows) for index, rows in enumerate(factors)}


def _random_basis(dimension: int, generator: torch.Generator) -> torch.Tensor:
    """Return orthonormal rows in random directions."""
    columns = torch.randn(dimension, PLANTED_COMPONENTS, generator=generator, dtype=torch.float64)
    basis: torch.Tensor = torch.linalg.qr(columns)[0]
    return basis.mT


def _random_rows(basis: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random rows of norms around 1 in the span of a basis, with noise, in float16."""
    shared, dimension = basis.shape
    weights = torch.randn(PLANTED_RANK, shared, generator=generator, dtype=torch.float64) / shared**0.5
    noise = torch.randn(PLANTED_RANK, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    rows: torch.Tensor = weights @ basis + PLANTED_NOISE * noise
    return rows.half()
