"""One module of the adapters of the fit: other sizes, halves, each left out in turn; and the same of the null model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.adapter import LoRAFactors
from ..core.basis import component_rule
from ..core.batch import ModuleBatch, captured_squares
from ..core.exact_fit import ExactFit
from ..core.fit_options import FitOptions
from .analysis import crowded, losses, null, spectra
from .analysis.left_out import Kept, left_out
from .analysis.null import NullModel
from .analysis.spectra import Halves
from .data import SPECTRUM


@dataclass(frozen=True, slots=True)
class Side:
    """What was measured of one side of one module; see `SideFigures`. most: components that a fit finds at most."""

    most: int = 0
    null: Sequence[float] = ()
    null_energy: float | None = None
    angles: Sequence[float] = ()
    null_angles: Sequence[float] = ()
    halves_overlap: float | None = None
    null_halves_overlap: float | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """The adapters that have trained a module: their factors, the same as a stack, and their weights in the fit."""

    factors: list[LoRAFactors]
    one: ModuleBatch
    weights: Tensor

    @property
    def crowded(self) -> bool:
        """Whether they have too many rows to fit the module again for each of them."""
        return crowded.is_crowded(sum(self.one.ranks))


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of every module. k: components (down, up) of its bases. fixed: whether they are the same in a fit
    without an adapter. grid: other sizes, ascending. chosen: the members to leave out in turn. draws: of the null
    model."""

    options: FitOptions
    k: tuple[int, int]
    fixed: bool
    grid: Sequence[int]
    chosen: Sequence[int]
    draws: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """Adapters in their own fit: squared norms that are kept of each, (n,), and without sweeps by size, (n, g); the
    share of energy in its directions, (down, up), and in as many without sweeps; and the spectra of both sides."""

    kept: Tensor
    by_k: Tensor
    energies: tuple[float, float]
    first_energies: tuple[float, float]
    shares: tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class NullKept:
    """Squared norms that are kept of the null model by draw, (r, …): of all in their fit, and by size; of those to be
    left out, in as many random directions as the others have, and by size. energies: (r, 2), shares in the first k
    directions of both sides."""

    fitted: Tensor
    by_k: Tensor
    left_out: Tensor
    left_out_by_k: Tensor
    energies: Tensor


@dataclass(frozen=True, slots=True)
class Refit:
    """Squared norms kept of each member by size, (n, g); what was kept of those that were left out, by size NaN where
    that was not measured; the same for the null model."""

    by_k: Tensor
    left_out: Kept
    null: NullKept
    sides: tuple[Side, Side]


def of(members: Members, asked: Asked, generator: torch.Generator) -> Refit:
    """All of it for one module."""
    order = torch.randperm(len(members.one), generator=generator).tolist()
    half = len(order) // 2
    halves = sorted(order[:half]), sorted(order[half:])
    if members.crowded:
        by_k, kept, most, between = _crowded(members, asked, halves)
    else:
        by_k, kept, most, between = _again(members, asked, halves)
    model = NullModel.of(members.one)
    fitted, without = [], []
    for _ in range(asked.draws):
        drawn = model.draw(generator)
        # the crowded adapters go the same way in both
        like = Members([] if members.crowded else null.factors(drawn), drawn, members.weights)
        fitted.append((_crowded_fit if members.crowded else _fit)(like, asked))
        without.append(_strangers(drawn.select(asked.chosen), kept, asked.grid))
    sides = [
        _side(
            most[side],
            [one.shares[side] for one in fitted],
            [one.energies[side] for one in fitted],
            between[side],
            model.dimensions[side],
            generator,
        )
        for side in (0, 1)
    ]
    return Refit(
        by_k=by_k,
        left_out=kept,
        null=NullKept(
            fitted=torch.stack([one.kept for one in fitted]),
            by_k=torch.stack([one.by_k for one in fitted]),
            left_out=torch.stack([one for one, _ in without]),
            left_out_by_k=torch.stack([by_k for _, by_k in without]),
            energies=torch.tensor([one.first_energies for one in fitted], dtype=torch.float64),
        ),
        sides=(sides[0], sides[1]),
    )


Measured = tuple[Tensor, Kept, tuple[int, int], tuple[Halves, Halves]]
"""Of real adapters: kept by size, kept of those left out, directions that there are, and halves."""


def _again(members: Members, asked: Asked, halves: tuple[list[int], list[int]]) -> Measured:
    """By fits like the pack's own."""
    weighted = members.factors, members.weights.tolist()
    first = ExactFit(*weighted, asked.options).leading(component_rule(asked.grid[-1], None))
    size = asked.k if asked.fixed else None
    return (
        losses.kept_by_k(members.one, first[0].components(), first[1].components(), asked.grid),
        left_out(weighted, members.one, asked.chosen, asked.options, size, asked.grid),
        (first[0].k, first[1].k),
        spectra.halves(weighted, *halves, asked.k),
    )


def _fit(members: Members, asked: Asked) -> Fitted:
    """A fit like the pack's own, and those of other sizes."""
    everyone = ExactFit(members.factors, members.weights.tolist(), asked.options)
    first = everyone.leading(component_rule(max(asked.grid[-1], *asked.k), None))
    bases = everyone.fit(first, asked.k)
    down, up = (spectra.shares(leading.singular_values, SPECTRUM) for leading in first)
    return Fitted(
        kept=losses.kept(members.one, bases.down.components, bases.up.components),
        by_k=losses.kept_by_k(members.one, first[0].components(), first[1].components(), asked.grid),
        energies=(bases.down.energy, bases.up.energy),
        first_energies=_leading((first[0].singular_values, first[1].singular_values), asked.k),
        shares=(down, up),
    )


LEFT_OUT_MOST = 128
"""The largest size at which adapters are left out of a crowded module."""

SWEPT = 2048
"""Rows up to which the bases of the null model are swept. Beyond, chance gains nothing by it."""


def _crowded(members: Members, asked: Asked, halves: tuple[list[int], list[int]]) -> Measured:
    """By spectra that are found once, without sweeps."""
    one = members.one
    first = crowded.weighted(one, members.weights, asked.options.weighting)
    (down, *down_halves), (up, *up_halves) = (crowded.Spectrum.with_halves(rows, halves) for rows in first)
    between = [
        Halves.of(half.vectors[:k], other.vectors[:k])
        for (half, other), k in zip((down_halves, up_halves), asked.k, strict=True)
    ]
    grid = [k for k in asked.grid if k <= LEFT_OUT_MOST]
    kept = torch.zeros(len(asked.chosen), dtype=torch.float64)
    by_k = torch.full((len(asked.chosen), len(asked.grid)), torch.nan, dtype=torch.float64)
    sizes, there = [], []
    for row, place in enumerate(asked.chosen):
        alone = one.select([place])
        others = [
            side.without(rows[place], max(k, *grid)) for side, rows, k in zip((down, up), first, asked.k, strict=True)
        ]
        fitted = [side[:k] for side, k in zip(others, asked.k, strict=True)]
        kept[row] = losses.kept(alone, fitted[0], fitted[1])
        by_k[row, : len(grid)] = losses.kept_by_k(alone, others[0], others[1], grid)
        sizes.append((len(fitted[0]), len(fitted[1])))
        there.append((len(others[0]), len(others[1])))
    return (
        losses.kept_by_k(one, down.vectors, up.vectors, asked.grid),
        Kept(kept, by_k, sizes, there),
        (len(down.values), len(up.values)),
        (between[0], between[1]),
    )


def _crowded_fit(members: Members, asked: Asked) -> Fitted:
    """The same of a fit, swept where rows are not very many."""
    one, options = members.one, asked.options
    rows = crowded.weighted(one, members.weights, options.weighting)
    sides = [crowded.Spectrum.of(side) for side in rows]
    bases = sides[0].vectors[: asked.k[0]], sides[1].vectors[: asked.k[1]]
    if options.weighting == "delta" and sum(one.ranks) <= SWEPT and all(asked.k):
        bases = crowded.swept(one, members.weights, bases, options.sweeps)
    down, up = (
        float((side @ basis.mT).square().sum() / side.square().sum()) for side, basis in zip(rows, bases, strict=True)
    )
    return Fitted(
        kept=losses.kept(one, *bases),
        by_k=losses.kept_by_k(one, sides[0].vectors, sides[1].vectors, asked.grid),
        energies=(down, up),
        first_energies=_leading((sides[0].values.sqrt(), sides[1].values.sqrt()), asked.k),
        shares=(
            spectra.shares(sides[0].values.sqrt(), SPECTRUM),
            spectra.shares(sides[1].values.sqrt(), SPECTRUM),
        ),
    )


def _leading(singular_values: tuple[Tensor, Tensor], k: tuple[int, int]) -> tuple[float, float]:
    """Shares of energy in the first k directions of both sides."""
    down, up = (
        float(values[:size].square().sum() / values.square().sum())
        for values, size in zip(singular_values, k, strict=True)
    )
    return down, up


def _strangers(drawn: ModuleBatch, real: Kept, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What is kept of adapters in random directions by bases that know nothing of them: in the first coordinates, as
    many as the bases of the real adapters have that were left out; and by size."""
    return (
        captured_squares(
            _first(drawn.down, [down for down, _ in real.sizes]), _first(drawn.up, [up for _, up in real.sizes])
        ),
        losses.captured_by_k(
            _first(drawn.down, [down for down, _ in real.most]), _first(drawn.up, [up for _, up in real.most]), grid
        ),
    )


def _first(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The first coordinates of each adapter's rows, as many as are counted for it; zero beyond."""
    most = max(counts, default=0)
    there = torch.arange(most)[None, :] < torch.tensor(counts, dtype=torch.int64)[:, None]
    return rows[:, :, :most] * there[:, None, :]


def _side(
    most: int,
    shares: Sequence[list[float]],
    energies: Sequence[float],
    halves: Halves,
    dimension: int,
    generator: torch.Generator,
) -> Side:
    """shares, energies: of the null model, by draw."""
    by_chance = null.cosines(*halves.sizes, dimension, generator)
    known = len(halves.cosines) > 0
    return Side(
        most=most,
        null=pad_sequence([torch.tensor(one, dtype=torch.float64) for one in shares]).mean(1).tolist(),
        null_energy=sum(energies) / len(energies),
        angles=spectra.degrees(halves.cosines),
        null_angles=spectra.degrees(by_chance) if known else [],
        halves_overlap=float(halves.cosines.square().mean()) if known else None,
        null_halves_overlap=max(halves.sizes) / dimension if known else None,
    )
