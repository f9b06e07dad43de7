"""One module of the adapters that are in the fit: other sizes, chance, halves, and each adapter left out in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import LoRAFactors
from ..analysis import crowded, losses, spectra
from ..analysis.left_out import left_out
from ..basis import chooser
from ..stack import Stack, squares, stack
from ..subspace import FitOptions, ModuleStack
from .data import SPECTRUM


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of one side of one module; see `SideFigures`. most: components that a fit finds at most."""

    most: int
    null: list[float]
    angles: list[float]
    halves_overlap: float | None


@dataclass(frozen=True, slots=True)
class Members:
    """The adapters that have trained a module: their factors, the same as a stack, and their weights in the fit."""

    factors: list[LoRAFactors]
    one: Stack
    weights: Tensor

    @property
    def crowded(self) -> bool:
        """Whether they have too many rows to fit the module again for each of them."""
        return crowded.is_crowded(sum(self.one.ranks))


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of every module. k: components (down, up) of its bases. fixed: whether they are the same in a fit
    without an adapter. grid: other sizes, ascending. chosen: the members to leave out in turn."""

    options: FitOptions
    k: tuple[int, int]
    fixed: bool
    grid: Sequence[int]
    chosen: Sequence[int]


@dataclass(frozen=True, slots=True)
class Refit:
    """Squared norms: kept of each member by size, (n, g); lost of Gaussian adapters in their place, (n,); kept of each
    that was left out, (s,), and by size, (s, g), NaN where that was not measured."""

    by_k: Tensor
    null_lost: Tensor
    left_out: Tensor
    left_out_by_k: Tensor
    sides: tuple[Side, Side]


def of(members: Members, asked: Asked, generator: torch.Generator) -> Refit:
    """All of it for one module."""
    order = torch.randperm(len(members.one), generator=generator).tolist()
    half = len(order) // 2
    halves = sorted(order[:half]), sorted(order[half:])
    if members.crowded:
        return _crowded(members, asked, halves, generator)
    return _again(members, asked, halves, generator)


def _again(members: Members, asked: Asked, halves: tuple[list[int], list[int]], generator: torch.Generator) -> Refit:
    """By fits like the pack's own."""
    weighted = members.factors, members.weights.tolist()
    first = ModuleStack(*weighted, asked.options).first(chooser(asked.grid[-1], None))
    null = spectra.gaussian_like(members.factors, generator)
    null_stack = ModuleStack(null, weighted[1], asked.options)
    null_first = null_stack.first(chooser(max(*asked.k, 1), None))
    null_bases = null_stack.fit(null_first, asked.k)
    null_one = stack(list(null), members.one.down.shape[2], members.one.up.shape[2])
    null_kept = losses.kept(null_one, null_bases.down.components, null_bases.up.components)
    angles = spectra.halves(weighted, *halves, asked.k)
    size = asked.k if asked.fixed else None
    kept = left_out(weighted, members.one, asked.chosen, asked.options, size, asked.grid)
    down, up = (
        _side(whole.k, spectra.shares(leading.singular_values, SPECTRUM), cosines)
        for whole, leading, cosines in zip(first, null_first, angles, strict=True)
    )
    return Refit(
        by_k=losses.kept_by_k(members.one, first[0].components(), first[1].components(), asked.grid),
        null_lost=(squares(null_one) - null_kept).clamp_min(0),
        left_out=kept.fitted,
        left_out_by_k=kept.by_k,
        sides=(down, up),
    )


LEFT_OUT_MOST = 128
"""The largest size at which adapters are left out of a crowded module."""

SWEPT = 2048
"""Rows up to which the bases of Gaussian adapters are swept. Beyond, chance gains nothing by it."""


def _crowded(members: Members, asked: Asked, halves: tuple[list[int], list[int]], generator: torch.Generator) -> Refit:
    """By spectra that are found once, without sweeps."""
    one, weighting = members.one, asked.options.weighting
    first = crowded.weighted(one, members.weights, weighting)
    (down, *down_halves), (up, *up_halves) = (crowded.Spectrum.with_halves(rows, halves) for rows in first)
    null = crowded.gaussian(one, generator)
    chance = [crowded.Spectrum.of(rows) for rows in crowded.weighted(null, members.weights, weighting)]
    by_chance = chance[0].vectors[: asked.k[0]], chance[1].vectors[: asked.k[1]]
    if weighting == "delta" and sum(one.ranks) <= SWEPT:
        by_chance = crowded.swept(null, members.weights, by_chance, asked.options.sweeps)
    sides = []
    whole = (down, down_halves), (up, up_halves)
    for (side, (half, other)), spectrum, k in zip(whole, chance, asked.k, strict=True):
        cosines = spectra.cosines(half.vectors[:k], other.vectors[:k])
        sides.append(_side(len(side.values), spectra.shares(spectrum.values.sqrt(), SPECTRUM), cosines))
    grid = [k for k in asked.grid if k <= LEFT_OUT_MOST]
    kept = torch.zeros(len(asked.chosen), dtype=torch.float64)
    by_k = torch.full((len(asked.chosen), len(asked.grid)), torch.nan, dtype=torch.float64)
    for row, place in enumerate(asked.chosen):
        alone = one.of([place])
        others = [
            side.without(rows[place], max(k, *grid)) for side, rows, k in zip((down, up), first, asked.k, strict=True)
        ]
        kept[row] = losses.kept(alone, *(side[:k] for side, k in zip(others, asked.k, strict=True)))
        by_k[row, : len(grid)] = losses.kept_by_k(alone, others[0], others[1], grid)
    return Refit(
        by_k=losses.kept_by_k(one, down.vectors, up.vectors, asked.grid),
        null_lost=(squares(null) - losses.kept(null, *by_chance)).clamp_min(0),
        left_out=kept,
        left_out_by_k=by_k,
        sides=(sides[0], sides[1]),
    )


def _side(most: int, null: list[float], cosines: Tensor) -> Side:
    return Side(
        most=most,
        null=null,
        angles=spectra.degrees(cosines),
        halves_overlap=float(cosines.square().mean()) if len(cosines) else None,
    )
