"""Runs of a comparison: which ones choose a learning rate, which ones follow at that rate, and which are left."""

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import NonFiniteError
from .comparison_summary import MethodRun
from .options import MAX_POINTS
from .search_space import ComparisonOptions


class RunKey(NamedTuple):
    """Identity of one run.

    Attributes:
        method: Key of `search_space.LEARNING_RATES`.
        learning_rate: Learning rate of the method's parameters.
        seed: Seed of the run; None if the run serves to choose the learning rate.
    """

    method: str
    learning_rate: float
    seed: int | None


Runs = Mapping[RunKey, MethodRun]


class RunsLeft(NamedTuple):
    """Numbers of a method's runs that are not finished.

    Attributes:
        search: Runs that choose the learning rate.
        final: Runs at the chosen learning rate.
    """

    search: int
    final: int


def search_keys(options: ComparisonOptions, method: str) -> list[RunKey]:
    """Return the runs that choose the method's learning rate; empty if there is only one rate."""
    if not options.searches(method):
        return []
    return [RunKey(method, rate, None) for rate in options.learning_rates(method)]


def final_keys(options: ComparisonOptions, method: str, runs: Runs) -> list[RunKey]:
    """Return the runs at the chosen learning rate. `runs` must contain the finished search."""
    rate = chosen_rate(options, method, runs)
    return [RunKey(method, rate, seed) for seed in range(options.seeds)]


def chosen_rate(options: ComparisonOptions, method: str, runs: Runs) -> float:
    """Return the learning rate with the highest score on the rows held out. The lowest loss breaks ties.

    Raises:
        NonFiniteError: The method diverged at every rate.
    """
    rates = options.learning_rates(method)
    if not options.searches(method):
        return rates[0]
    tried = [runs[key] for key in search_keys(options, method)]
    ranking = [
        (-run.score, run.loss, run.learning_rate) for run in tried if run.score is not None and run.loss is not None
    ]
    if not ranking:
        raise NonFiniteError(
            f"{method} diverged at each of the learning rates {', '.join(f'{rate:g}' for rate in rates)}. Try lower "
            f"rates (rates={{{method!r}: [A, B, C]}}, --learning-rates {method}=A,B,C), or remove it from methods= "
            "(--methods). resume=True (--resume) keeps the finished runs."
        )
    return min(ranking)[2]


def evaluations(epochs: float) -> int:
    """Return the number of scores during one run at the chosen learning rate: at most `MAX_POINTS`.

    There are two per epoch, or one, where that is not more.
    """
    return next((max(1, round(n * epochs)) for n in (2, 1) if n * epochs <= MAX_POINTS), MAX_POINTS)


def runs_left(options: ComparisonOptions, method: str, runs: Runs) -> RunsLeft:
    """Return the numbers of the method's runs that are not in `runs`."""
    search_left = sum(key not in runs for key in search_keys(options, method))
    if search_left:
        # the search may choose another rate, for which all runs must be done
        return RunsLeft(search_left, options.seeds)
    return RunsLeft(0, sum(key not in runs for key in final_keys(options, method, runs)))
