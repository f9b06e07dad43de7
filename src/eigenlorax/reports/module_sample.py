"""The choice of modules and adapters on which a report is measured, in about half the time of the fit."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core import module_names
from .analysis import crowded

MIN_SECONDS = 3.0
"""Estimated seconds up to which all modules are measured, whatever the fit takes."""
SHARE_OF_FIT = 0.5
"""Share of the estimated time of the fit that measuring modules may take; reading and drawing take the rest."""
MIN_MODULES = 4
"""Minimum number of modules that are measured: standard errors need several."""
MIN_GROUPS, MAX_GROUPS = 3, 5
"""Numbers of groups of modules from which standard errors are estimated."""
LEFT_OUT_MIN, LEFT_OUT_MAX = 8, 32
"""Numbers of adapters that are left out: of modules that take long, and by default."""

# measured on one core of a server
_FIT_PER_NUMBER = 5e-8
"""Seconds of a fit by components for each element of the factors."""
_MEASURING_PER_NUMBER = 1.5e-7
"""Seconds of reading, rounding and comparing each element."""
_EIGEN_CALL, _EIGEN = 3e-4, 1.4e-10
"""Seconds of a symmetric eigenproblem of size m: for the call, and for each m³."""
_DRAWS = 3
"""Draws of the null model for which time is planned."""


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """Size of one module of a collection.

    Attributes:
        rows: Summed ranks of the adapters in the module.
        shape: Shape of the updates, (out, in).
    """

    rows: int
    shape: tuple[int, int]

    @property
    def numbers(self) -> int:
        """Number of elements of all factors."""
        return self.rows * sum(self.shape)

    def seconds(self, left_out: int, k: int) -> float:
        """Estimate the seconds that measuring the module takes on one core.

        Args:
            left_out: Number of adapters that are left out of the fit.
            k: Largest number of components of the pack's bases.
        """
        seconds = _MEASURING_PER_NUMBER * self.numbers
        for dimension in self.shape:
            size = min(self.rows, dimension)
            if crowded.is_crowded(self.rows):
                without = min(size, crowded.required_components(max(k, crowded.MAX_COMPONENTS)))
                seconds += (3 + 3 * _DRAWS) * _eigen_seconds(size) + left_out * _eigen_seconds(without)
            else:
                seconds += (3 + 3 * _DRAWS + 3 * left_out) * _eigen_seconds(size)
        return seconds


def _eigen_seconds(size: int) -> float:
    return _EIGEN_CALL + _EIGEN * size**3


@dataclass(frozen=True, slots=True)
class ModuleSample:
    """Modules on which a report is measured.

    Attributes:
        modules: Names of the modules, in the order of the model.
        of: Number of modules of the subspace.
        left_out: Maximum number of adapters that are left out of the fit.
        seconds: Estimated seconds of measuring them.
    """

    modules: list[str]
    of: int
    left_out: int
    seconds: float

    @property
    def is_whole(self) -> bool:
        """True if all modules are measured."""
        return len(self.modules) == self.of

    @classmethod
    def whole(cls, sizes: Mapping[str, ModuleSize], k: int, left_out: int) -> "ModuleSample":
        """Return all modules."""
        return cls(list(sizes), len(sizes), left_out, sum(size.seconds(left_out, k) for size in sizes.values()))


def fit_seconds(sizes: Mapping[str, ModuleSize]) -> float:
    """Estimate the seconds of a fit by components on one core."""
    return _FIT_PER_NUMBER * sum(size.numbers for size in sizes.values())


def choose(sizes: Mapping[str, ModuleSize], k: int, left_out: int | None, seed: int) -> ModuleSample:
    """Choose as many modules as can be measured in half the time of the fit, at least `MIN_MODULES`.

    Every kind of module, such as all query projections, has about its share of the sample.

    Args:
        sizes: Size of each module of the subspace.
        k: Largest number of components of the pack's bases.
        left_out: Number of adapters to leave out; None chooses it.
        seed: Seed of the sample.
    """
    limit = max(MIN_SECONDS, SHARE_OF_FIT * fit_seconds(sizes))
    whole = ModuleSample.whole(sizes, k, LEFT_OUT_MAX if left_out is None else left_out)
    if whole.seconds <= limit or whole.of <= MIN_MODULES:
        return whole
    for count_left_out in (LEFT_OUT_MAX, LEFT_OUT_MIN) if left_out is None else (left_out,):
        seconds = ModuleSample.whole(sizes, k, count_left_out).seconds
        count = int(limit / seconds * whole.of)
        if count >= 2 * MIN_MODULES:
            break
    count = min(max(count, MIN_MODULES), whole.of)
    modules = systematic(list(sizes), count, seed)
    return ModuleSample(modules, whole.of, count_left_out, seconds * count / whole.of)


def systematic(modules: Sequence[str], count: int, seed: int) -> list[str]:
    """Return `count` modules at equal distances in the order of kinds and layers, from a random start."""
    ordered = sorted(modules, key=_kind)
    start = float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    chosen = {ordered[int((start + index) * len(ordered) / count)] for index in range(count)}
    return [name for name in modules if name in chosen]


def jackknife_groups(modules: Sequence[str]) -> dict[str, int]:
    """Return the index of the jackknife group of each sampled module.

    Modules are dealt in the order of kinds, so that the numbers of modules of a kind in two groups differ by at most
    one. Otherwise groups could be kinds, and the jackknife would measure how much kinds differ, although every kind
    has its share of the sample. Of `MAX_GROUPS` to `MIN_GROUPS` groups, the number is taken over which most kinds can
    be dealt evenly; the largest of several.

    Args:
        modules: Names of the modules of the sample.
    """
    counts = Counter(map(_kind, modules)).values()
    # each group needs a module
    numbers = range(min(MAX_GROUPS, len(modules)), min(MIN_GROUPS, len(modules)) - 1, -1)
    n_groups = max(numbers, key=lambda number: sum(count % number == 0 for count in counts))
    return {name: index % n_groups for index, name in enumerate(sorted(modules, key=_kind))}


def _kind(name: str) -> str:
    return module_names.layer_and_kind(name)[1]
