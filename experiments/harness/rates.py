"""Choice of a method's learning rate by its runs on development tasks."""

import statistics
from collections.abc import Iterable, Mapping

from . import record
from .jobs import Job

NEAR = 0.005
"""Difference of scores within which `steadiest` prefers a lower learning rate."""

MOST_RATES = 5
"""Largest number of rates of a method, where `best` chooses. Further ones are tried beyond an edge that wins."""


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


def best(means: Mapping[float, float]) -> float:
    """Return the rate of the best mean; of equals, the lowest."""
    return max(sorted(means), key=lambda rate: means[rate])


def check_edges(name: str, means: Mapping[float, float]) -> None:
    """Exit if the best of a method's rates is the lowest or the highest, and further ones may be tried."""
    ordered = sorted(means)
    if len(ordered) < MOST_RATES and best(means) in (ordered[0], ordered[-1]):
        raise SystemExit(
            f"{name}: the best of its rates {', '.join(f'{rate:g}' for rate in ordered)} is {best(means):g}, at the "
            "edge. Add one rate beyond it to the config, and run the stage rates again."
        )
