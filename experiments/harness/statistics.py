"""Means over tasks and seeds, and how sure they are: from the spread of seeds, and from the choice of test rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Run:
    """A score, and those on fixed draws of the same test rows (`record.resampled`)."""

    score: float
    resampled: tuple[float, ...]

    def minus(self, other: "Run") -> "Run":
        """The difference of two runs on the same rows, draw by draw."""
        pairs = zip(self.resampled, other.resampled, strict=True)
        return Run(self.score - other.score, tuple(one - two for one, two in pairs))


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
class Part:
    """A share of a mean's variance, and how many degrees of freedom it is known with."""

    variance: float
    freedom: int


def mean(runs: Sequence[Run]) -> Mean:
    """Of one task's seeds. The variance is that of the rows' draws, of the mean over seeds, and that of seeds; of one
    seed, of rows alone."""
    return over_tasks({"": runs})


def over_tasks(tasks: Mapping[str, Sequence[Run]]) -> Mean:
    """The mean over tasks of the means over seeds. Tasks are taken as given: nothing is said of others.

    Student's t, with degrees of freedom as Satterthwaite (1946) has them: one task whose seeds differ much counts as
    the few seeds it has.
    """
    values = [float(np.mean([run.score for run in runs])) for runs in tasks.values()]
    found = [part for runs in tasks.values() for part in parts(runs)]
    variance = sum(part.variance for part in found)
    if variance == 0:
        return Mean(float(np.mean(values)), 0.0)
    freedom = variance**2 / sum(part.variance**2 / part.freedom for part in found)
    return Mean(float(np.mean(values)), float(t.ppf(0.975, freedom)) * math.sqrt(variance) / len(values))


def parts(runs: Sequence[Run]) -> list[Part]:
    """What one task's mean over seeds varies by."""
    rows = np.array([run.resampled for run in runs]).mean(axis=0)
    found = [Part(float(rows.var(ddof=1)), len(rows) - 1)]
    if len(runs) > 1:
        found.append(Part(float(np.var([run.score for run in runs], ddof=1)) / len(runs), len(runs) - 1))
    return found


def median_task(tasks: Mapping[str, Sequence[Run]]) -> float:
    """The median over tasks of the means over seeds: one task alone does not move it far."""
    return float(np.median([np.mean([run.score for run in runs]) for runs in tasks.values()]))


def differences(
    tasks: Mapping[str, Mapping[int, Run]], others: Mapping[str, Mapping[int, Run]]
) -> dict[str, list[Run]]:
    """By task, run minus run of the same seed, which had the same training rows."""
    return {
        task: [run.minus(others[task][seed]) for seed, run in runs.items() if seed in others[task]]
        for task, runs in tasks.items()
        if task in others
    }
