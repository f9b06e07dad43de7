"""Learning rates: which one a method gets, of those that it was run with on development tasks."""

import statistics
from collections.abc import Iterable, Mapping

from . import record
from .jobs import Job

NEAR = 0.005


def means(jobs: Iterable[Job]) -> dict[float, float]:
    """Rate → the mean of what its runs scored."""
    scores: dict[float, list[float]] = {}
    for job in jobs:
        if not job.done():
            raise SystemExit(f"{job.name} has no record: run the stage rates first.")
        scores.setdefault(job.config["learning_rate"], []).append(record.read(job.path)["test"]["score"])
    return {rate: statistics.fmean(found) for rate, found in scores.items()}


def steadiest(found: Mapping[float, float]) -> float:
    """The lowest rate within `NEAR` of the best: what is near the best by chance is steadier on other tasks if it is
    lower."""
    return min(rate for rate, mean in found.items() if mean >= max(found.values()) - NEAR)
