"""Means over tasks and seeds, and how sure they are: from the spread of seeds, and from the choice of test rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


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


def mean(runs: Sequence[Run]) -> Mean:
    """Of one task's seeds. The variance is that of the rows' draws, of the mean over seeds, and that of seeds."""
    scores = np.array([run.score for run in runs])
    rows = np.array([run.resampled for run in runs]).mean(axis=0)
    variance = float(rows.var(ddof=1))
    if len(runs) > 1:
        variance += float(scores.var(ddof=1)) / len(runs)
    return Mean(float(scores.mean()), 1.96 * math.sqrt(variance))


def over_tasks(tasks: Mapping[str, Sequence[Run]]) -> Mean:
    """The mean over tasks of the means over seeds. Tasks are taken as given: nothing is said of others."""
    means = [mean(runs) for runs in tasks.values()]
    half = math.sqrt(sum(one.half_width**2 for one in means)) / len(means)
    return Mean(float(np.mean([one.value for one in means])), half)


def differences(
    tasks: Mapping[str, Mapping[int, Run]], others: Mapping[str, Mapping[int, Run]]
) -> dict[str, list[Run]]:
    """By task, run minus run of the same seed, which had the same training rows."""
    return {
        task: [run.minus(others[task][seed]) for seed, run in runs.items() if seed in others[task]]
        for task, runs in tasks.items()
        if task in others
    }
