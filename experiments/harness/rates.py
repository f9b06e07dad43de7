"""Choice of a method's learning rate by its runs on development tasks."""

import statistics
from collections.abc import Iterable, Mapping

from . import record
from .jobs import Job

NEAR = 0.005
"""Difference of scores within which a lower learning rate is preferred."""


def means(jobs: Iterable[Job]) -> dict[float, float]:
    """Return the mean score of each learning rate."""
    scores: dict[float, list[float]] = {}
    for job in jobs:
        if not job.done():
            raise SystemExit(f"{job.name} has no record: run the stage rates first.")
        scores.setdefault(job.config["learning_rate"], []).append(record.read(job.path)["test"]["score"])
    return {rate: statistics.fmean(rate_scores) for rate, rate_scores in scores.items()}


def steadiest(means: Mapping[float, float]) -> float:
    """Return the lowest rate within `NEAR` of the best: on other tasks, a lower rate is steadier."""
    return min(rate for rate, mean in means.items() if mean >= max(means.values()) - NEAR)
