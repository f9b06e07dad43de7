"""Refits of one module: with other sizes, to two halves of the adapters, without an adapter, and to the null model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.basis import component_rule
from ..core.batch import ModuleBatch, captured_squares, in_row_spaces, unpadded
from ..core.exact_fit import ExactFit
from ..core.fit_options import FitOptions
from .analysis import crowded, losses, null, spectra
from .analysis.left_out import Kept, left_out
from .analysis.null import NullModel
from .analysis.spectra import Halves, Weighted
from .data import SPECTRUM

MAX_SWEPT = 2048
"""Maximum number of rows for sweeps of the null model in a crowded module. With more rows, sweeps change nothing."""


@dataclass(frozen=True, slots=True)
class Side:
    """Measurements of one side of one module; the fields not listed here are as in `SideFigures`.

    Attributes:
        max_components: Maximum number of components of a fit.
    """

    max_components: int = 0
    null: Sequence[float] = ()
    null_energy: float | None = None
    angles: Sequence[float] = ()
    null_angles: Sequence[float] = ()
    halves_overlap: float | None = None
    null_halves_overlap: float | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """The n adapters that have trained a module.

    Attributes:
        batch: Factors of all adapters.
        weights: Weight of each adapter in the fit, (n,).
    """

    batch: ModuleBatch
    weights: Tensor

    @property
    def weighted(self) -> Weighted:
        """Factors of each adapter, and its weight."""
        return unpadded(self.batch), self.weights.tolist()

    @property
    def crowded(self) -> bool:
        """True if there are too many rows to refit the module without each adapter."""
        return crowded.is_crowded(sum(self.batch.ranks))


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """Options of the refits of every module.

    Attributes:
        fit: Options with which the pack was fitted.
        k: Numbers of components (down, up) of the pack's bases.
        fixed: True if a fit without an adapter has the same numbers; else they are chosen from its spectrum.
        grid: Other numbers of components, ascending.
        chosen: Indices of the members to leave out in turn.
        draws: Number of draws of the null model.
    """

    fit: FitOptions
    k: tuple[int, int]
    fixed: bool
    grid: Sequence[int]
    chosen: Sequence[int]
    draws: int


@dataclass(frozen=True, slots=True)
class NullFit:
    """One draw of the null model, in bases fitted to it.

    Attributes:
        kept: Squared norm that is kept of each adapter, (n,).
        by_k: The same without sweeps for each number of components, (n, g).
        energies: Share of energy in the components (down, up).
        first_energies: Share of energy in equally many components without sweeps.
        spectra: σ²/Σσ² of both sides.
    """

    kept: Tensor
    by_k: Tensor
    energies: tuple[float, float]
    first_energies: tuple[float, float]
    spectra: tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class NullKept:
    """Squared norms that are kept of the null model, for r draws.

    Attributes:
        fitted: Squared norm of each adapter in bases fitted to the draw, (r, n).
        by_k: The same for each number of components, (r, n, g).
        left_out: Squared norm of each adapter to leave out, in as many random components as the bases of the other
            adapters have, (r, s).
        left_out_by_k: The same for each number of components, (r, s, g).
        energies: Share of energy in the first k components (down, up), (r, 2).
    """

    fitted: Tensor
    by_k: Tensor
    left_out: Tensor
    left_out_by_k: Tensor
    energies: Tensor


@dataclass(frozen=True, slots=True)
class Refit:
    """Results of all refits of one module.

    Attributes:
        by_k: Squared norm kept of each member for each number of components, (n, g).
        left_out: Squared norms kept of the members that were left out; NaN for sizes at which none was left out.
        null: Squared norms kept of the null model.
        sides: Measurements of both sides.
    """

    by_k: Tensor
    left_out: Kept
    null: NullKept
    sides: tuple[Side, Side]


def refit_module(members: Members, narrow: ModuleBatch, options: RefitOptions, generator: torch.Generator) -> Refit:
    """Refit one module: with other sizes, to halves, without an adapter, and to the null model.

    Args:
        members: The adapters that have trained the module.
        narrow: The same adapters in coordinates of a space that contains all their rows (`in_row_spaces`).
        options: Options of the refits.
        generator: Generator of the division into halves, and of the null model.
    """
    order = torch.randperm(len(members.batch), generator=generator).tolist()
    middle = len(order) // 2
    halves = sorted(order[:middle]), sorted(order[middle:])
    # these figures depend on inner products of rows alone
    real = (_crowded_refit if members.crowded else _refit)(Members(narrow, members.weights), options, halves)
    model = NullModel.of(members.batch)
    fits, random_kept = [], []
    for _ in range(options.draws):
        drawn = model.draw(generator)
        # the null model of a crowded module is fitted by the same method as the module
        null_fit = _crowded_null_fit if members.crowded else _null_fit
        fits.append(null_fit(Members(in_row_spaces(drawn), members.weights), options))
        random_kept.append(_kept_by_random(drawn.select(options.chosen), real.left_out, options.grid))
    down, up = (_side(side, real, fits, model.dimensions[side], generator) for side in (0, 1))
    return Refit(
        by_k=real.by_k,
        left_out=real.left_out,
        null=NullKept(
            fitted=torch.stack([fit.kept for fit in fits]),
            by_k=torch.stack([fit.by_k for fit in fits]),
            left_out=torch.stack([kept for kept, _ in random_kept]),
            left_out_by_k=torch.stack([by_k for _, by_k in random_kept]),
            energies=torch.tensor([fit.first_energies for fit in fits], dtype=torch.float64),
        ),
        sides=(down, up),
    )


@dataclass(frozen=True, slots=True)
class _RealFit:
    """Refits to the real adapters.

    Attributes:
        by_k: Squared norm kept of each adapter for each number of components, (n, g).
        left_out: Squared norms kept of the adapters that were left out.
        max_components: Numbers of components (down, up) that keep everything.
        halves: Comparison of the subspaces of two halves, (down, up).
    """

    by_k: Tensor
    left_out: Kept
    max_components: tuple[int, int]
    halves: tuple[Halves, Halves]


def _refit(members: Members, options: RefitOptions, halves: tuple[list[int], list[int]]) -> _RealFit:
    """Refit with the options of the pack's fit."""
    weighted = members.weighted
    down, up = ExactFit.stack(*weighted, options.fit).leading(component_rule(options.grid[-1], None))
    size = options.k if options.fixed else None
    return _RealFit(
        by_k=losses.kept_by_k(members.batch, down.components(), up.components(), options.grid),
        left_out=left_out(weighted, members.batch, options.chosen, options.fit, size, options.grid),
        max_components=(down.k, up.k),
        halves=spectra.halves(weighted, *halves, options.k),
    )


def _null_fit(members: Members, options: RefitOptions) -> NullFit:
    """Fit the null model with the options of the pack's fit, and with other sizes."""
    fit = ExactFit.stack(*members.weighted, options.fit)
    first = fit.leading(component_rule(max(options.grid[-1], *options.k), None))
    bases = fit.fit(first, options.k)
    down, up = (spectra.explained_ratios(leading.singular_values, SPECTRUM) for leading in first)
    return NullFit(
        kept=losses.kept(members.batch, bases.down.components, bases.up.components),
        by_k=losses.kept_by_k(members.batch, first[0].components(), first[1].components(), options.grid),
        energies=(bases.down.energy, bases.up.energy),
        first_energies=_leading_energies((first[0].singular_values, first[1].singular_values), options.k),
        spectra=(down, up),
    )


def _crowded_refit(members: Members, options: RefitOptions, halves: tuple[list[int], list[int]]) -> _RealFit:
    """Refit a crowded module from spectra that are computed once, without sweeps."""
    batch = members.batch
    rows = crowded.weighted(batch, members.weights, options.fit.weighting)
    (down, *down_halves), (up, *up_halves) = (
        crowded.Spectrum.with_halves(side, halves, k) for side, k in zip(rows, options.k, strict=True)
    )
    between = [Halves.of(first, second) for first, second in (down_halves, up_halves)]
    grid = [k for k in options.grid if k <= crowded.MAX_COMPONENTS]
    kept = torch.zeros(len(options.chosen), dtype=torch.float64)
    by_k = torch.full((len(options.chosen), len(options.grid)), torch.nan, dtype=torch.float64)
    sizes, max_components = [], []
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
        max_components.append((len(others[0]), len(others[1])))
    return _RealFit(
        by_k=losses.kept_by_k(batch, down.vectors, up.vectors, options.grid),
        left_out=Kept(kept, by_k, sizes, max_components),
        max_components=(len(down.values), len(up.values)),
        halves=(between[0], between[1]),
    )


def _crowded_null_fit(members: Members, options: RefitOptions) -> NullFit:
    """Fit the null model of a crowded module by spectra, with sweeps up to `MAX_SWEPT` rows."""
    batch, fit = members.batch, options.fit
    rows = crowded.weighted(batch, members.weights, fit.weighting)
    down, up = (crowded.Spectrum.of(side) for side in rows)
    bases = down.vectors[: options.k[0]], up.vectors[: options.k[1]]
    if fit.weighting == "delta" and sum(batch.ranks) <= MAX_SWEPT and all(options.k):
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
        spectra=(spectra.explained_ratios(sigmas[0], SPECTRUM), spectra.explained_ratios(sigmas[1], SPECTRUM)),
    )


def _leading_energies(singular_values: tuple[Tensor, Tensor], k: tuple[int, int]) -> tuple[float, float]:
    """Return the share of energy in the first k components of each side."""
    down, up = (
        float(values[:size].square().sum() / values.square().sum())
        for values, size in zip(singular_values, k, strict=True)
    )
    return down, up


def _kept_by_random(drawn: ModuleBatch, real: Kept, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the squared norm of random adapters in unrelated bases: at the pack's size, (s,), and by size, (s, g).

    The bases have as many components as those that were fitted without the real adapters. Since the adapters are
    random, the first coordinate axes can be used as components.
    """
    down_sizes, up_sizes = [down for down, _ in real.sizes], [up for _, up in real.sizes]
    max_down, max_up = [down for down, _ in real.max_components], [up for _, up in real.max_components]
    return (
        captured_squares(_first_coordinates(drawn.down, down_sizes), _first_coordinates(drawn.up, up_sizes)),
        losses.captured_by_k(_first_coordinates(drawn.down, max_down), _first_coordinates(drawn.up, max_up), grid),
    )


def _first_coordinates(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the first coordinates of each adapter's rows, (s, r, max(counts)), with zeros beyond its count."""
    width = max(counts, default=0)
    mask = torch.arange(width)[None, :] < torch.tensor(counts, dtype=torch.int64)[:, None]
    return rows[:, :, :width] * mask[:, None, :]


def _side(side: int, real: _RealFit, fits: Sequence[NullFit], dimension: int, generator: torch.Generator) -> Side:
    """Collect the measurements of one side, 0 for down or 1 for up."""
    halves = real.halves[side]
    by_chance = null.cosines(*halves.sizes, dimension, generator)
    is_known = len(halves.cosines) > 0
    null_spectra = [torch.tensor(fit.spectra[side], dtype=torch.float64) for fit in fits]
    return Side(
        max_components=real.max_components[side],
        null=pad_sequence(null_spectra).mean(1).tolist(),
        null_energy=sum(fit.energies[side] for fit in fits) / len(fits),
        angles=spectra.degrees(halves.cosines),
        null_angles=spectra.degrees(by_chance) if is_known else [],
        halves_overlap=float(halves.cosines.square().mean()) if is_known else None,
        null_halves_overlap=max(halves.sizes) / dimension if is_known else None,
    )
