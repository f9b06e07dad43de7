"""Comparison of a merge with its sources: the share of each that it keeps, and the conflicts between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import Adapter, LoRAFactors, delta_square
from ..core.basis import seeded_normal_rows
from .coordinates import CommonCoordinates, common_coordinates, significant
from .methods import Merger, MethodOptions, mean, sum_is_zero, weighted_sum

MAX_RANDOM_MODULES = 8
"""Number of modules on which merges with random adapters are computed."""
RANDOM_COST = 2e9
"""Number of multiplications, about, that all merges with random adapters may take: each is one more merge."""
RANDOM_SHARE = 4
"""A merge of more modules may take as many merges with random adapters as a quarter of its modules."""
MIN_RANDOM_MERGES = 2


@dataclass(frozen=True, slots=True)
class SourceShare:
    """Share of one source that a merge keeps.

    The share kept is ⟨merge, update⟩ / ‖update‖², over all modules: 1 if the merge contains the update as it is.

    Attributes:
        name: Name of the source.
        norm: Frobenius norm of its update.
        cosine: Cosine of its update and the merge, −1 to 1; None if one of the two is zero.
        kept: Share that the merge keeps; None if the update is zero.
        kept_by_mean: Share that the mean of the sources keeps, cut to the same rank: the weighted one, or the plain
            one if the weights add up to zero.
        kept_among_random: Share that the method keeps of this source if all others are random adapters of the same
            ranks and norms, on `Comparison.random_modules` modules; None for sources of large models beyond the first.
        sign_agreement: Share of its entries in the common coordinates, weighted by magnitude, whose sign is that of
            the weighted sum. 1 if no other source outweighs it with the other sign.
    """

    name: str
    norm: float
    cosine: float | None
    kept: float | None
    kept_by_mean: float | None
    kept_among_random: float | None
    sign_agreement: float | None


@dataclass(frozen=True, slots=True)
class PairRelation:
    """Overlap of the updates of two sources.

    Attributes:
        first: Name of one source.
        second: Name of the other.
        cosine: Cosine of the two updates over all modules; None if one is zero.
        input_overlap: Share of the smaller input span that lies in the other, 0 to 1: the mean of squared cosines of
            principal angles, over modules that both have. None if there is no such module.
        output_overlap: The same for the output spans.
    """

    first: str
    second: str
    cosine: float | None
    input_overlap: float | None
    output_overlap: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A merge beside its sources.

    Attributes:
        sources: What the merge keeps of each source, in the order of the sources.
        pairs: Relation of each pair of sources.
        norm: Frobenius norm of the merge.
        mean_norm: Frobenius norm of the mean of the sources, cut to the same rank.
        modules: Number of modules.
        random_modules: Number of modules on which `kept_among_random` was computed.
    """

    sources: Sequence[SourceShare]
    pairs: Sequence[PairRelation]
    norm: float
    mean_norm: float
    modules: int
    random_modules: int


class ComparisonBuilder:
    """Sums over the modules of a merge.

    Args:
        adapters: The sources.
        modules: Names of all modules.
        weights: Weight of each source.
        seed: Seed of the random adapters.
    """

    def __init__(
        self, adapters: Sequence[Adapter], modules: Sequence[str], weights: Sequence[float], seed: int
    ) -> None:
        n = len(adapters)
        self._names, self._weights, self._seed = [adapter.name for adapter in adapters], weights, seed
        self._n_modules = len(modules)
        # a difference of adapters has no weighted mean; the plain one stands beside it
        mean_weights = [1.0] * n if sum_is_zero(weights) else weights
        self._mean_options = MethodOptions(mean_weights, 1.0, torch.Generator())
        self._random_pairs = _random_pairs(adapters, modules)
        self._products = torch.zeros(n, n, dtype=torch.float64)
        self._with_merge, self._with_mean = torch.zeros(2, n, dtype=torch.float64)
        self._with_random, self._random_squares = torch.zeros(2, n, dtype=torch.float64)
        self._agreeing, self._magnitudes = torch.zeros(2, n, dtype=torch.float64)
        self._merge_square = self._mean_square = 0.0
        self._overlaps = torch.zeros(2, n, n, dtype=torch.float64)
        self._overlapping_modules = torch.zeros(n, n, dtype=torch.float64)

    def add(
        self,
        module: str,
        updates: Sequence[LoRAFactors | None],
        coordinates: CommonCoordinates,
        merger: Merger,
        options: MethodOptions,
        merged: LoRAFactors,
    ) -> None:
        """Add one module.

        Args:
            module: Name of the module.
            updates: Its update in each source; None where a source lacks the module.
            coordinates: Their common coordinates.
            merger: The method.
            options: Options of the method.
            merged: Result of the method, cut to its rank.
        """
        cores, rank = coordinates.cores, merged.down.shape[0]
        self._products += torch.einsum("iqp,jqp->ij", cores, cores)
        average = LoRAFactors(*mean(coordinates, self._mean_options).cut(rank), 1.0)
        self._with_merge += _products(merged, coordinates)
        self._with_mean += _products(average, coordinates)
        self._merge_square += delta_square(merged)
        self._mean_square += delta_square(average)
        elected = weighted_sum(cores, self._weights).sign()
        magnitudes = cores.abs()
        self._agreeing += (magnitudes * (cores.sign() == elected)).sum((1, 2))
        self._magnitudes += magnitudes.sum((1, 2))
        self._add_overlaps(cores)
        if places := [place for name, place in self._random_pairs if name == module]:
            self._add_random(module, places, updates, cores, merger, options, rank)

    def _add_overlaps(self, cores: Tensor) -> None:
        """Add the overlaps of the spans of each pair of sources."""
        spans = [_spans(core) for core in cores]
        for i, first in enumerate(spans):
            for j, second in enumerate(spans[:i]):
                smaller = min(first[0].shape[0], second[0].shape[0])
                if smaller:
                    for side in range(2):
                        self._overlaps[side, i, j] += (first[side] @ second[side].mT).square().sum() / smaller
                    self._overlapping_modules[i, j] += 1

    def _add_random(
        self,
        module: str,
        places: Sequence[int],
        updates: Sequence[LoRAFactors | None],
        cores: Tensor,
        merger: Merger,
        options: MethodOptions,
        rank: int,
    ) -> None:
        """Add merges of the sources at `places` with random adapters in the place of the others."""
        random = [
            None if update is None else random_update(update, self._seed, f"{module} {place}")
            for place, update in enumerate(updates)
        ]
        for place in places:
            update = updates[place]
            self._random_squares[place] += cores[place].square().sum()
            if update is not None:
                coordinates = common_coordinates([*random[:place], update, *random[place + 1 :]])
                merged = LoRAFactors(*merger(coordinates, options).cut(rank), 1.0)
                self._with_random[place] += _products(merged, coordinates)[place]

    def result(self) -> Comparison:
        """Return the comparison."""
        squares = self._products.diagonal()
        shares = [
            SourceShare(
                name=name,
                norm=math.sqrt(squares[i]),
                cosine=_ratio(self._with_merge[i], math.sqrt(squares[i] * self._merge_square)),
                kept=_ratio(self._with_merge[i], squares[i]),
                kept_by_mean=_ratio(self._with_mean[i], squares[i]),
                kept_among_random=_ratio(self._with_random[i], self._random_squares[i]),
                sign_agreement=_ratio(self._agreeing[i], self._magnitudes[i]),
            )
            for i, name in enumerate(self._names)
        ]
        pairs = [
            PairRelation(
                first=self._names[j],
                second=self._names[i],
                cosine=_ratio(self._products[i, j], math.sqrt(squares[i] * squares[j])),
                input_overlap=_ratio(self._overlaps[0, i, j], self._overlapping_modules[i, j]),
                output_overlap=_ratio(self._overlaps[1, i, j], self._overlapping_modules[i, j]),
            )
            for i in range(len(self._names))
            for j in range(i)
        ]
        return Comparison(
            sources=shares,
            pairs=pairs,
            norm=math.sqrt(self._merge_square),
            mean_norm=math.sqrt(self._mean_square),
            modules=self._n_modules,
            random_modules=len({module for module, _ in self._random_pairs}),
        )


def _random_pairs(adapters: Sequence[Adapter], modules: Sequence[str]) -> list[tuple[str, int]]:
    """Return the modules and places of sources for which merges with random adapters are computed.

    All sources on several modules, or as many as `RANDOM_COST` allows, so that they do not take longer than the merge.
    """
    specs = [adapter.specs[module] for adapter in adapters for module in adapter.specs]
    rows = sum(max(adapter.ranks, default=0) for adapter in adapters)
    cost = rows**2 * max((spec.in_features + spec.out_features for spec in specs), default=1)
    step = max(1, len(modules) // MAX_RANDOM_MODULES)
    sampled = modules[::step][:MAX_RANDOM_MODULES]
    pairs = [(module, place) for module in sampled for place in range(len(adapters))]
    return pairs[: max(MIN_RANDOM_MERGES, int(RANDOM_COST / max(cost, 1)), len(modules) // RANDOM_SHARE)]


def random_update(update: LoRAFactors, seed: int, label: str) -> LoRAFactors:
    """Return a random update of the same shape, rank and Frobenius norm.

    Args:
        update: The update.
        seed: Seed of the random numbers.
        label: Name of the update: other names have other numbers.
    """
    r = update.down.shape[0]
    down = torch.from_numpy(seeded_normal_rows(r, update.down.shape[1], seed, f"merge down {label}"))
    up = torch.from_numpy(seeded_normal_rows(r, update.up.shape[0], seed, f"merge up {label}"))
    random = LoRAFactors(down, up.mT.contiguous(), 1.0)
    return LoRAFactors(down, random.up, math.sqrt(delta_square(update) / delta_square(random)))


def _products(merged: LoRAFactors, coordinates: CommonCoordinates) -> Tensor:
    """Return the inner product of an update with the update of each source, (n,)."""
    up, down = coordinates.up @ merged.up.to(torch.float64), merged.down.to(torch.float64) @ coordinates.down.mT
    return merged.scaling * torch.einsum("qr,nqp,rp->n", up, coordinates.cores, down)


def _spans(core: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows of the input span and of the output span of a core, in the common coordinates."""
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    rank = significant(values)
    return right[:rank], left[:, :rank].mT


def _ratio(numerator: float | Tensor, denominator: float | Tensor) -> float | None:
    """Return a ratio, or None if the denominator is zero."""
    return float(numerator) / float(denominator) if denominator > 0 else None
