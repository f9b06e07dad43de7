"""Fits of one module again: with other sizes, of two halves, without an adapter; and the same for the null model."""

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
    """Measurements of one side of one module; see `SideFigures`. most: maximum number of components of a fit."""

    most: int = 0
    null: Sequence[float] = ()
    null_energy: float | None = None
    angles: Sequence[float] = ()
    null_angles: Sequence[float] = ()
    halves_overlap: float | None = None
    null_halves_overlap: float | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """The adapters that have trained a module: their factors, the same as a batch, and their weights in the fit."""

    factors: list[LoRAFactors]
    batch: ModuleBatch
    weights: Tensor

    @property
    def crowded(self) -> bool:
        """True if they have too many rows to fit the module again without each of them."""
        return crowded.is_crowded(sum(self.batch.ranks))


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """Options of the fits of every module.

    k: components (down, up) of the pack's bases. fixed: whether a fit without an adapter has as many.
    grid: other sizes, ascending. chosen: indices of the members to leave out in turn. draws: of the null model.
    """

    fit: FitOptions
    k: tuple[int, int]
    fixed: bool
    grid: Sequence[int]
    chosen: Sequence[int]
    draws: int


@dataclass(frozen=True, slots=True)
class NullFit:
    """The null model in a fit of its own.

    kept: squared norm that is kept of each adapter, (n,); by_k: without sweeps, by size, (n, g).
    energies: share of energy in the components (down, up); first_energies: in as many without sweeps.
    spectra: shares of the squared singular values of both sides.
    """

    kept: Tensor
    by_k: Tensor
    energies: tuple[float, float]
    first_energies: tuple[float, float]
    spectra: tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class NullKept:
    """Squared norms that are kept of the null model, by draw, (r, …).

    fitted, by_k: of all adapters in their own fit. left_out, left_out_by_k: of those to leave out, in as many random
    directions as the bases of the others have. energies: shares in the first k directions of both sides, (r, 2).
    """

    fitted: Tensor
    by_k: Tensor
    left_out: Tensor
    left_out_by_k: Tensor
    energies: Tensor


@dataclass(frozen=True, slots=True)
class Refit:
    """Squared norms that are kept of each member by size, (n, g), and of those left out; the same for the null model.

    Sizes at which nobody was left out are NaN.
    """

    by_k: Tensor
    left_out: Kept
    null: NullKept
    sides: tuple[Side, Side]


def refit_module(members: Members, options: RefitOptions, generator: torch.Generator) -> Refit:
    """Fit one module again in every way."""
    order = torch.randperm(len(members.batch), generator=generator).tolist()
    middle = len(order) // 2
    halves = sorted(order[:middle]), sorted(order[middle:])
    real = (_crowded_refit if members.crowded else _refit)(members, options, halves)
    model = NullModel.of(members.batch)
    fits, strangers = [], []
    for _ in range(options.draws):
        drawn = model.draw(generator)
        # the null model of crowded members is fitted in the same way as they are
        factors = [] if members.crowded else null.factors(drawn)
        fits.append(
            (_crowded_null_fit if members.crowded else _null_fit)(Members(factors, drawn, members.weights), options)
        )
        strangers.append(_kept_of_strangers(drawn.select(options.chosen), real.left_out, options.grid))
    down, up = (_side(side, real, fits, model.dimensions[side], generator) for side in (0, 1))
    return Refit(
        by_k=real.by_k,
        left_out=real.left_out,
        null=NullKept(
            fitted=torch.stack([fit.kept for fit in fits]),
            by_k=torch.stack([fit.by_k for fit in fits]),
            left_out=torch.stack([kept for kept, _ in strangers]),
            left_out_by_k=torch.stack([by_k for _, by_k in strangers]),
            energies=torch.tensor([fit.first_energies for fit in fits], dtype=torch.float64),
        ),
        sides=(down, up),
    )


@dataclass(frozen=True, slots=True)
class _RealFit:
    """Squared norms kept of the real adapters. most: components (down, up) of a fit that keeps everything."""

    by_k: Tensor
    left_out: Kept
    most: tuple[int, int]
    halves: tuple[Halves, Halves]


def _refit(members: Members, options: RefitOptions, halves: tuple[list[int], list[int]]) -> _RealFit:
    """Measure by fits like the pack's own."""
    weighted = members.factors, members.weights.tolist()
    down, up = ExactFit.stack(*weighted, options.fit).leading(component_rule(options.grid[-1], None))
    size = options.k if options.fixed else None
    return _RealFit(
        by_k=losses.kept_by_k(members.batch, down.components(), up.components(), options.grid),
        left_out=left_out(weighted, members.batch, options.chosen, options.fit, size, options.grid),
        most=(down.k, up.k),
        halves=spectra.halves(weighted, *halves, options.k),
    )


def _null_fit(members: Members, options: RefitOptions) -> NullFit:
    """Fit the null model like the pack, and with other sizes."""
    fit = ExactFit.stack(members.factors, members.weights.tolist(), options.fit)
    first = fit.leading(component_rule(max(options.grid[-1], *options.k), None))
    bases = fit.fit(first, options.k)
    down, up = (spectra.shares(leading.singular_values, SPECTRUM) for leading in first)
    return NullFit(
        kept=losses.kept(members.batch, bases.down.components, bases.up.components),
        by_k=losses.kept_by_k(members.batch, first[0].components(), first[1].components(), options.grid),
        energies=(bases.down.energy, bases.up.energy),
        first_energies=_leading_energies((first[0].singular_values, first[1].singular_values), options.k),
        spectra=(down, up),
    )


LEFT_OUT_MOST = 128
"""Maximum number of components at which adapters are left out of a crowded module."""

SWEPT = 2048
"""Rows up to which the null model's bases of a crowded module are swept. Beyond, sweeps change nothing for it."""


def _crowded_refit(members: Members, options: RefitOptions, halves: tuple[list[int], list[int]]) -> _RealFit:
    """Measure by spectra that are computed once, without sweeps."""
    batch = members.batch
    rows = crowded.weighted(batch, members.weights, options.fit.weighting)
    (down, *down_halves), (up, *up_halves) = (crowded.Spectrum.with_halves(side, halves) for side in rows)
    between = [
        Halves.of(first.vectors[:k], second.vectors[:k])
        for (first, second), k in zip((down_halves, up_halves), options.k, strict=True)
    ]
    grid = [k for k in options.grid if k <= LEFT_OUT_MOST]
    kept = torch.zeros(len(options.chosen), dtype=torch.float64)
    by_k = torch.full((len(options.chosen), len(options.grid)), torch.nan, dtype=torch.float64)
    sizes, most = [], []
    for row, member in enumerate(options.chosen):
        alone = batch.select([member])
        others = [
            spectrum.without(side[member], max(k, *grid))
            for spectrum, side, k in zip((down, up), rows, options.k, strict=True)
        ]
        bases = [vectors[:k] for vectors, k in zip(others, options.k, strict=True)]
        kept[row] = losses.kept(alone, bases[0], bases[1])
        by_k[row, : len(grid)] = losses.kept_by_k(alone, others[0], others[1], grid)
        sizes.append((len(bases[0]), len(bases[1])))
        most.append((len(others[0]), len(others[1])))
    return _RealFit(
        by_k=losses.kept_by_k(batch, down.vectors, up.vectors, options.grid),
        left_out=Kept(kept, by_k, sizes, most),
        most=(len(down.values), len(up.values)),
        halves=(between[0], between[1]),
    )


def _crowded_null_fit(members: Members, options: RefitOptions) -> NullFit:
    """Fit the null model by spectra, with sweeps where there are not very many rows."""
    batch, fit = members.batch, options.fit
    rows = crowded.weighted(batch, members.weights, fit.weighting)
    down, up = (crowded.Spectrum.of(side) for side in rows)
    bases = down.vectors[: options.k[0]], up.vectors[: options.k[1]]
    if fit.weighting == "delta" and sum(batch.ranks) <= SWEPT and all(options.k):
        bases = crowded.swept(batch, members.weights, bases, fit.sweeps)
    down_energy, up_energy = (
        float((side @ basis.mT).square().sum() / side.square().sum()) for side, basis in zip(rows, bases, strict=True)
    )
    sigmas = down.values.sqrt(), up.values.sqrt()
    return NullFit(
        kept=losses.kept(batch, *bases),
        by_k=losses.kept_by_k(batch, down.vectors, up.vectors, options.grid),
        energies=(down_energy, up_energy),
        first_energies=_leading_energies(sigmas, options.k),
        spectra=(spectra.shares(sigmas[0], SPECTRUM), spectra.shares(sigmas[1], SPECTRUM)),
    )


def _leading_energies(singular_values: tuple[Tensor, Tensor], k: tuple[int, int]) -> tuple[float, float]:
    """Return the shares of energy in the first k directions of both sides."""
    down, up = (
        float(values[:size].square().sum() / values.square().sum())
        for values, size in zip(singular_values, k, strict=True)
    )
    return down, up


def _kept_of_strangers(drawn: ModuleBatch, real: Kept, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what bases that know nothing of random adapters keep of them: at the pack's size, and by size.

    The bases have as many directions as those of the others had when the real adapters were left out. Since the
    adapters are random, the first coordinates serve as well as any other directions.
    """
    down_sizes, up_sizes = [down for down, _ in real.sizes], [up for _, up in real.sizes]
    down_most, up_most = [down for down, _ in real.most], [up for _, up in real.most]
    return (
        captured_squares(_first_coordinates(drawn.down, down_sizes), _first_coordinates(drawn.up, up_sizes)),
        losses.captured_by_k(_first_coordinates(drawn.down, down_most), _first_coordinates(drawn.up, up_most), grid),
    )


def _first_coordinates(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the first coordinates of each adapter's rows, as many as its count; zeros beyond."""
    most = max(counts, default=0)
    mask = torch.arange(most)[None, :] < torch.tensor(counts, dtype=torch.int64)[:, None]
    return rows[:, :, :most] * mask[:, None, :]


def _side(side: int, real: _RealFit, fits: Sequence[NullFit], dimension: int, generator: torch.Generator) -> Side:
    """Collect the measurements of one side, 0 for down or 1 for up."""
    halves = real.halves[side]
    by_chance = null.cosines(*halves.sizes, dimension, generator)
    is_known = len(halves.cosines) > 0
    null_spectra = [torch.tensor(fit.spectra[side], dtype=torch.float64) for fit in fits]
    return Side(
        most=real.most[side],
        null=pad_sequence(null_spectra).mean(1).tolist(),
        null_energy=sum(fit.energies[side] for fit in fits) / len(fits),
        angles=spectra.degrees(halves.cosines),
        null_angles=spectra.degrees(by_chance) if is_known else [],
        halves_overlap=float(halves.cosines.square().mean()) if is_known else None,
        null_halves_overlap=max(halves.sizes) / dimension if is_known else None,
    )
