"""Sums over modules of what is measured with the original adapters, and their sampling errors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .analysis.pairs import Pairs
from .chance import NullSums
from .module_sample import ModuleSample
from .refits import Side


@dataclass(slots=True)
class Measured:
    """Sums over modules of squared norms and squared errors. `measure` adds each module.

    There are n trained adapters, f adapters in the fit, s adapters that are left out, and g numbers of components.

    Attributes:
        names: Names of the n adapters.
        fitted: Indices in `names` of the adapters of the fit.
        chosen: Indices in `fitted` of the adapters that are left out.
        grid: Numbers of components, ascending.
        total: ‖D‖² of each adapter, (n,).
        random: Squared norm that random bases of the pack's size keep, (n,).
        null: Sums of the null model.
        left_out_kept: Squared norm that the bases of the other adapters keep, (s,).
        left_out_by_k: The same for each number of components, (s, g).
        chance: Expected squared norm that equally many random components keep, (s,).
        chance_by_k: The same for each number of components, (s, g).
        by_k: Squared norm that a fit with each number of components keeps, (f, g).
        random_by_k: Expected squared norm that random components keep, (f, g).
        down_squared_error, up_squared_error: Squared errors of A and of B, (n,).
        down_total, up_total: Squared norms of A and of B, (n,).
        rounded: Squared errors of the factors rounded to a number of bits, (n,), by bits.
        pairs: Inner products of all pairs of adapters.
        errors: Delta error of each adapter, by module.
        weighted: Weighted delta error of the fit, by module.
        factor_errors: Root mean square errors of A and of B, by module.
        singular: For each module, the numbers of one component and the squared singular values, (n, r).
        sides: Measurements of both sides, by module.
        exact: True if the fits without an adapter include sweeps in every module.
    """

    names: list[str]
    fitted: list[int]
    chosen: list[int]
    grid: list[int]
    total: Tensor
    random: Tensor
    null: NullSums
    left_out_kept: Tensor
    left_out_by_k: Tensor
    chance: Tensor
    chance_by_k: Tensor
    by_k: Tensor
    random_by_k: Tensor
    down_squared_error: Tensor
    down_total: Tensor
    up_squared_error: Tensor
    up_total: Tensor
    rounded: dict[int, Tensor]
    pairs: Pairs
    errors: dict[str, list[float | None]] = field(default_factory=dict)
    weighted: dict[str, float] = field(default_factory=dict)
    factor_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    singular: list[tuple[int, Tensor]] = field(default_factory=list)
    sides: dict[str, tuple[Side, Side]] = field(default_factory=dict)
    exact: bool = True


_SUMS = (
    "total",
    "random",
    "left_out_kept",
    "left_out_by_k",
    "chance",
    "chance_by_k",
    "by_k",
    "random_by_k",
    "down_squared_error",
    "down_total",
    "up_squared_error",
    "up_total",
)
_BY_MODULE = ("errors", "weighted", "factor_errors", "sides")


def combine(groups: Sequence[Measured]) -> Measured:
    """Return the measurements of several groups of modules as those of all their modules."""
    first = groups[0]
    if len(groups) == 1:
        return first
    combined: dict[str, Any] = {
        "null": NullSums.combine([group.null for group in groups]),
        "rounded": {bits: torch.stack([group.rounded[bits] for group in groups]).sum(0) for bits in first.rounded},
        "pairs": Pairs.combine([group.pairs for group in groups]),
        "singular": [singular for group in groups for singular in group.singular],
        "exact": all(group.exact for group in groups),
    }
    for name in _SUMS:
        combined[name] = torch.stack([getattr(group, name) for group in groups]).sum(0)
    for name in _BY_MODULE:
        combined[name] = {module: figure for group in groups for module, figure in getattr(group, name).items()}
    return replace(first, **combined)


@dataclass(frozen=True, slots=True)
class SampledMeasurements:
    """Measurements of a sample of modules.

    Attributes:
        whole: Sums over all modules of the sample.
        groups: Sums over groups of these modules; empty if all modules of the pack were measured.
        sample: The sample.
        norms: Norm of each adapter over all modules of the subspace, in the order of `Measured.names`.
    """

    whole: Measured
    groups: Sequence[Measured]
    sample: ModuleSample
    norms: list[float]

    @classmethod
    def of(cls, groups: Sequence[Measured], sample: ModuleSample, norms: list[float]) -> "SampledMeasurements":
        """Combine the groups into which the modules of a sample were divided."""
        return cls(combine(groups), [] if sample.is_whole or len(groups) == 1 else groups, sample, norms)

    @property
    def has_errors(self) -> bool:
        """True if figures have standard errors."""
        return bool(self.groups)

    def replicates(self) -> Iterator[Measured]:
        """Yield the sums without each group in turn. Matrices of all pairs are large: one replicate at a time."""
        for index in range(len(self.groups)):
            yield combine([*self.groups[:index], *self.groups[index + 1 :]])

    def standard_error(self, figures: Sequence[float | None]) -> float | None:
        """Return the standard error of a figure from the sampling of modules.

        The delete-a-group jackknife (Kott, 2001, "The delete-a-group jackknife"), with the correction for a finite
        number of modules.

        Args:
            figures: The figure of each of the `replicates`; None where it could not be measured.

        Returns:
            The standard error, or None if fewer than two replicates have the figure.
        """
        known = [figure for figure in figures if figure is not None]
        g = len(known)
        if g < 2:
            return None
        mean = math.fsum(known) / g
        variance = (g - 1) / g * math.fsum((figure - mean) ** 2 for figure in known)
        return math.sqrt(variance * (1 - len(self.sample.modules) / self.sample.of))
