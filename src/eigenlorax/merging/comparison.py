"""Comparison of a merge with its sources: the share of each that it keeps, and the conflicts between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.adapter import Adapter, LoRAFactors, delta_square
from .coordinates import CommonCoordinates, common_coordinates
from .methods import METHODS, Method, MethodOptions, sum_is_zero, weighted_sum

MAX_RANDOM_MODULES = 8
"""Number of modules on which merges with random adapters are computed."""
RANDOM_COST = 2e7
"""Number of multiplications, about, that one decomposition in all merges with random adapters may take."""
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
        method: The method.
        seed: Seed of the random adapters.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        modules: Sequence[str],
        weights: Sequence[float],
        method: Method,
        seed: int,
    ) -> None:
        n = len(adapters)
        self._names, self._weights, self._seed = [adapter.name for adapter in adapters], weights, seed
        self._n_modules, self._method = len(modules), method
        # a difference of adapters has no weighted mean; the plain one stands beside it
        mean_weights = [1.0] * n if sum_is_zero(weights) else weights
        self._mean_weights = [weight / sum(mean_weights) for weight in mean_weights]
        self._random_pairs = _random_pairs(adapters, modules)
        self._products = torch.zeros(n, n, dtype=torch.float64)
        self._with_merge, self._with_mean = torch.zeros(2, n, dtype=torch.float64)
        self._with_random, self._random_squares = torch.zeros(2, n, dtype=torch.float64)
        self._agreeing, self._magnitudes = torch.zeros(2, n, dtype=torch.float64)
        self._merge_square = self._mean_square = 0.0
        self._overlaps = torch.zeros(2, n, n, dtype=torch.float64)
        self._overlapping_modules = torch.zeros(n, n, dtype=torch.float64)

    def add(self, module: str, coordinates: CommonCoordinates, options: MethodOptions, merged: LoRAFactors) -> None:
        """Add one module.

        Args:
            module: Name of the module.
            coordinates: Common coordinates of its updates in the sources.
            options: Options of the method.
            merged: Result of the method, cut to its rank.
        """
        cores, rank = coordinates.cores, merged.down.shape[0]
        flat = cores.flatten(1)
        self._products += flat @ flat.mT
        with_merge, merge_square = _products(merged, coordinates), delta_square(merged)
        self._with_merge += with_merge
        self._merge_square += merge_square
        total = weighted_sum(cores, self._weights)
        if self._method is METHODS["mean"]:
            with_mean, mean_square = with_merge, merge_square
        else:
            average = total if self._mean_weights == self._weights else weighted_sum(cores, self._mean_weights)
            with_mean, mean_square = _cut_products(average, cores, rank)
        self._with_mean += with_mean
        self._mean_square += mean_square
        elected, magnitudes = total.sign(), cores.abs()
        self._agreeing += (magnitudes * (cores.sign() == elected)).sum((1, 2))
        self._magnitudes += magnitudes.sum((1, 2))
        self._add_overlaps(coordinates.components)
        for place in (place for name, place in self._random_pairs if name == module):
            self._random_squares[place] += cores[place].square().sum()
            if len(coordinates.components[place][0]):
                self._with_random[place] += self._kept_among_random(module, place, coordinates, options, rank)

    def _add_overlaps(self, components: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the overlaps of the spans of each pair of sources."""
        ranks = [len(down) for down, _ in components]
        for side, rows in enumerate(zip(*components, strict=True)):
            spans = torch.cat([each / each.norm(dim=1, keepdim=True) for each in rows])
            squares = (spans @ spans.mT).square()
            by_pair = [[block.sum() for block in torch.split(row, ranks, dim=1)] for row in torch.split(squares, ranks)]
            smaller = torch.minimum(*torch.meshgrid(torch.tensor(ranks), torch.tensor(ranks), indexing="ij"))
            self._overlaps[side] += torch.tensor(by_pair, dtype=torch.float64) / smaller.clamp_min(1)
        self._overlapping_modules += smaller > 0

    def _kept_among_random(
        self, module: str, place: int, coordinates: CommonCoordinates, options: MethodOptions, rank: int
    ) -> float:
        """Return the inner product of a source with its merge with random adapters in the place of the others."""
        updates = random_others(
            coordinates, place, options.shape, self._method.needs_inputs, _numbers(self._seed, f"{module} {place}")
        )
        among_random = common_coordinates(updates)
        merged = LoRAFactors(*self._method.merge(among_random, options).cut(rank), 1.0)
        return float(_products(merged, among_random)[place])

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
    rows = sum(max(adapter.ranks, default=0) for adapter in adapters)
    cost = rows**3
    step = max(1, len(modules) // MAX_RANDOM_MODULES)
    sampled = modules[::step][:MAX_RANDOM_MODULES]
    pairs = [(module, place) for module in sampled for place in range(len(adapters))]
    return pairs[: max(MIN_RANDOM_MERGES, int(RANDOM_COST / max(cost, 1)), len(modules) // RANDOM_SHARE)]


def random_others(
    coordinates: CommonCoordinates, place: int, shape: tuple[int, int], needs_inputs: bool, numbers: np.random.Generator
) -> list[LoRAFactors | None]:
    """Return one update and random ones in the place of the others, of their ranks and norms.

    Factors of random updates have independent normal entries. No geometry depends on the axes, so that a side is given
    in an orthonormal basis of the few directions that occur: first those of the one update, then those that make the
    other factors a triangle. Its entries are normal, and on the diagonal χ (Bartlett 1933), so that the distribution is
    that of the wide factors.

    Args:
        coordinates: Common coordinates of the updates.
        place: Place of the update that is no random one.
        shape: Number of outputs and of inputs of the module.
        needs_inputs: Whether inputs are given in the axes of the layer.
        numbers: Source of the random numbers.
    """
    components = coordinates.components
    down, up = components[place]
    ranks = [0 if other == place else len(rows) for other, (rows, _) in enumerate(components)]
    roots, others = down.norm(dim=1), sum(ranks)
    if needs_inputs:
        one_down, downs = down @ coordinates.down, torch.from_numpy(numbers.standard_normal((others, shape[1])))
    else:
        downs = torch.from_numpy(normal_coordinates(others, shape[1], len(down), numbers))
        one_down = torch.diag(roots) @ torch.eye(len(down), downs.shape[1], dtype=torch.float64)
    ups = torch.from_numpy(normal_coordinates(others, shape[0], len(up), numbers))
    one_up = torch.diag(roots) @ torch.eye(len(up), ups.shape[1], dtype=torch.float64)
    updates: list[LoRAFactors | None] = []
    for other, (rows, columns) in enumerate(zip(torch.split(downs, ranks), torch.split(ups, ranks), strict=True)):
        if other == place:
            updates.append(LoRAFactors(one_down, one_up.mT, 1.0))
        elif not len(rows):
            updates.append(None)
        else:
            random = LoRAFactors(rows, columns.mT, 1.0)
            norm = math.sqrt(delta_square(random))
            updates.append(replace(random, scaling=float(coordinates.cores[other].norm()) / norm))
    return updates


def normal_coordinates(n: int, dimension: int, fixed: int, numbers: np.random.Generator) -> NDArray[np.float64]:
    """Return n rows of `dimension` independent standard normal numbers, in an orthonormal basis of their span.

    Args:
        n: Number of rows.
        dimension: Width of the rows.
        fixed: Number of basis vectors that are fixed beforehand; the rows need not lie in their span.
        numbers: Source of the random numbers.

    Returns:
        Rows of width `fixed` + n, which are lower triangular beyond the fixed vectors; or of width `dimension` if
        there are too many rows for that to be smaller.
    """
    free = dimension - fixed
    if n >= free:
        return numbers.standard_normal((n, dimension))
    triangle = np.tril(numbers.standard_normal((n, n)), -1)
    np.fill_diagonal(triangle, np.sqrt(numbers.chisquare(free - np.arange(n))))
    return np.concatenate([numbers.standard_normal((n, fixed)), triangle], axis=1)


def _numbers(seed: int, label: str) -> np.random.Generator:
    """Return the source of random numbers of a label."""
    return np.random.default_rng(np.frombuffer(sha256(f"{seed}\0{label}".encode()).digest(), dtype="<u4"))


def _cut_products(core: Tensor, cores: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return inner products of a core, cut to a rank, with other cores, (n,), and its squared norm."""
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    cut = (left[:, :rank] * values[:rank]) @ right[:rank]
    return cores.flatten(1) @ cut.flatten(), float(values[:rank].square().sum())


def _products(merged: LoRAFactors, coordinates: CommonCoordinates) -> Tensor:
    """Return the inner product of an update with the update of each source, (n,)."""
    up, down = coordinates.up @ merged.up.to(torch.float64), merged.down.to(torch.float64) @ coordinates.down.mT
    return merged.scaling * torch.einsum("qr,nqp,rp->n", up, coordinates.cores, down)


def _ratio(numerator: float | Tensor, denominator: float | Tensor) -> float | None:
    """Return a ratio, or None if the denominator is zero."""
    return float(numerator) / float(denominator) if denominator > 0 else None
