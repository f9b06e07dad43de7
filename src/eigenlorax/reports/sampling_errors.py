"""Standard errors of a report's figures, where these were measured on a sample of modules."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import relations
from .analysis.pairs import cosines
from .comparison_data import Baseline, LeftOut, Null, Sampling, SideEnergy, SizePoint
from .data import Similarity
from .measured import Measured, SampledMeasurements


def sampling(
    sampled: SampledMeasurements | None, fields: Sequence[Mapping[str, Mapping[str, Any]]], seed: int
) -> Sampling | None:
    """Return the sample of modules, with the mean standard error of each figure of an adapter.

    Args:
        sampled: Measurements; None if there are no originals.
        fields: Fields of `AdapterFigures` by adapter, for each of the replicates.
        seed: Seed of the sample.
    """
    if sampled is None or sampled.sample.is_whole:
        return None
    errors: dict[str, float | None] = {}
    for field in ("left_out_error", "mean_error", "mean_scaled_error", "random_error", "truncated_error"):
        errors[field] = _mean_error(sampled, fields, field)
    for field in ("int8_error", "int4_error"):
        errors[field] = _mean_error(sampled, fields, field)
    return Sampling(len(sampled.sample.modules), sampled.sample.of, seed, errors)


def _mean_error(
    sampled: SampledMeasurements, fields: Sequence[Mapping[str, Mapping[str, Any]]], field: str
) -> float | None:
    """Return the mean over adapters of the standard error of one of their figures; None if no adapter has one."""
    names = [name for name in sampled.whole.names if all(figures[name][field] is not None for figures in fields)]
    errors = [sampled.standard_error([figures[name][field] for figures in fields]) for name in names]
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if known else None


def left_out(sampled: SampledMeasurements | None, figures_of: Callable[[Measured], LeftOut | None]) -> LeftOut | None:
    """Return leave-one-out figures with standard errors."""
    figures = figures_of(sampled.whole) if sampled is not None else None
    if sampled is None or figures is None or not sampled.has_errors:
        return figures
    others = [figures_of(replicate) for replicate in sampled.replicates()]
    of_modules = sampled.standard_error([other.errors.mean if other else None for other in others])
    return replace(
        figures,
        errors=replace(figures.errors, standard_error=of_modules),
        standard_error=(
            None
            if figures.standard_error is None or of_modules is None
            else math.hypot(figures.standard_error, of_modules)
        ),
        kept_standard_error=sampled.standard_error([other.kept if other else None for other in others]),
    )


def null(sampled: SampledMeasurements | None, figures_of: Callable[[Measured], Null | None]) -> Null | None:
    """Return the null model with standard errors."""
    figures = figures_of(sampled.whole) if sampled is not None else None
    if sampled is None or figures is None or not sampled.has_errors:
        return figures
    others = [other for replicate in sampled.replicates() if (other := figures_of(replicate)) is not None]

    def with_error(side: SideEnergy, replicates: Sequence[SideEnergy]) -> SideEnergy:
        differences = [replicate.energy - replicate.null for replicate in replicates]
        return replace(side, standard_error=sampled.standard_error(differences))

    of_mean = sampled.standard_error([other.errors.mean for other in others])
    return replace(
        figures,
        errors=replace(figures.errors, standard_error=of_mean),
        down=with_error(figures.down, [other.down for other in others]),
        up=with_error(figures.up, [other.up for other in others]),
    )


def baselines(
    sampled: SampledMeasurements | None, figures: Sequence[Baseline], others: Sequence[Sequence[Baseline]]
) -> list[Baseline]:
    """Return baselines with standard errors, given those of each replicate."""
    if sampled is None or not others:
        return list(figures)
    means = [{baseline.key: baseline.errors.mean for baseline in other} for other in others]
    return [
        replace(
            baseline,
            errors=replace(
                baseline.errors, standard_error=sampled.standard_error([mean.get(baseline.key) for mean in means])
            ),
        )
        for baseline in figures
    ]


def sizes(sampled: SampledMeasurements | None, figures_of: Callable[[Measured], list[SizePoint]]) -> list[SizePoint]:
    """Return the figures at other numbers of components, with standard errors."""
    points = figures_of(sampled.whole) if sampled is not None else []
    if sampled is None or not sampled.has_errors:
        return points
    others = [figures_of(replicate) for replicate in sampled.replicates()]
    with_errors = []
    for index, point in enumerate(points):
        at_size = [other[index] for other in others]
        left_out_error = sampled.standard_error([other.left_out for other in at_size])
        with_errors.append(
            replace(
                point,
                standard_error=sampled.standard_error([other.mean for other in at_size]),
                left_out_standard_error=left_out_error if point.left_out is not None else None,
            )
        )
    return with_errors


def similarity(sampled: SampledMeasurements | None, figures: Similarity, copies: Sequence[Sequence[int]]) -> Similarity:
    """Return the similarity between adapters with standard errors of its means."""
    if sampled is None or not sampled.has_errors:
        return figures
    distinct = relations.without_copies(len(figures.names), copies)
    means = [
        (relations.mean_cosine(cosines(replicate.pairs.delta)), relations.mean_energy(replicate.pairs, distinct))
        for replicate in sampled.replicates()
    ]
    return replace(
        figures,
        mean_cosine_error=sampled.standard_error([cosine for cosine, _ in means]),
        mean_energy_error=sampled.standard_error([energy for _, energy in means]),
    )
