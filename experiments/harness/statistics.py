"""Means over tasks and seeds, with intervals from the spread of seeds and from the choice of test rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Run:
    """A score, and the scores on fixed draws of the same test rows (`record.resampled`)."""

    score: float
    resampled: tuple[float, ...]

    def minus(self, baseline: "Run") -> "Run":
        """Return the difference of two runs on the same rows, draw by draw."""
        pairs = zip(self.resampled, baseline.resampled, strict=True)
        return Run(self.score - baseline.score, tuple(score - baseline_score for score, baseline_score in pairs))


@dataclass(frozen=True)
class Mean:
    """A mean, and the half-width of its 95 % interval."""

    value: float
    half_width: float

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width


@dataclass(frozen=True)
class Variance:
    """A contribution to the variance of a mean, and the degrees of freedom of its estimate."""

    value: float
    freedom: int


def mean(runs: Sequence[Run]) -> Mean:
    """Return the mean over seeds of one task. With one seed, its interval is that of the choice of rows alone."""
    return over_tasks({"": runs})


def over_tasks(tasks: Mapping[str, Sequence[Run]]) -> Mean:
    """Return the mean over tasks of the means over seeds. Its interval says nothing about other tasks.

    Student's t, with the degrees of freedom of Satterthwaite (1946): a task whose seeds differ much counts as the few
    seeds it has.
    """
    means = [float(np.mean([run.score for run in runs])) for runs in tasks.values()]
    variances = [variance for runs in tasks.values() for variance in variances_of(runs)]
    total = sum(variance.value for variance in variances)
    if total == 0:
        return Mean(float(np.mean(means)), 0.0)
    freedom = total**2 / sum(variance.value**2 / variance.freedom for variance in variances)
    return Mean(float(np.mean(means)), float(t.ppf(0.975, freedom)) * math.sqrt(total) / len(means))


def variances_of(runs: Sequence[Run]) -> list[Variance]:
    """Return the variances of one task's mean over seeds: from the choice of rows, and from the seeds."""
    draws = np.array([run.resampled for run in runs]).mean(axis=0)
    variances = [Variance(float(draws.var(ddof=1)), len(draws) - 1)]
    if len(runs) > 1:
        variances.append(Variance(float(np.var([run.score for run in runs], ddof=1)) / len(runs), len(runs) - 1))
    return variances


def median_task(tasks: Mapping[str, Sequence[Run]]) -> float:
    """Return the median over tasks of the means over seeds, which a single task does not move far."""
    return float(np.median([np.mean([run.score for run in runs]) for runs in tasks.values()]))


def differences(
    tasks: Mapping[str, Mapping[int, Run]], baseline: Mapping[str, Mapping[int, Run]]
) -> dict[str, list[Run]]:
    """Return, by task, the differences of runs with the same seed, which had the same training rows."""
    return {
        task: [run.minus(baseline[task][seed]) for seed, run in runs.items() if seed in baseline[task]]
        for task, runs in tasks.items()
        if task in baseline
    }
