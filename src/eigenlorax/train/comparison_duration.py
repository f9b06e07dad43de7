"""Estimate of how long a comparison takes, from a few timed training steps of each method."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core.progress import Progress
from . import evaluate, method_comparison, models, run_plan
from .comparison_run import Recipe, make_optimizer
from .examples import Example
from .method_comparison import PreparedComparison

TIMED_STEPS = 5
"""Timed training steps per method: one period of SOAP's eigendecompositions. Another step before them warms up."""


@dataclass(frozen=True, slots=True)
class MethodTimes:
    """Measured times of one method.

    Attributes:
        loading: Seconds of loading the base model and adding the method's parameters.
        step: Mean seconds of a training step.
        evaluated_row: Mean seconds of evaluating a row.
    """

    loading: float
    step: float
    evaluated_row: float


def measure(prepared: PreparedComparison, progress: Progress | None = None) -> dict[str, MethodTimes]:
    """Time a few steps of each method that has runs left.

    The random state of the caller is kept, and runs seed their own, so that results do not depend on this.

    Args:
        prepared: Result of `method_comparison.prepare`.
        progress: Function that is called with ("timing first steps", methods done, number of methods).

    Raises:
        OptionError: The device has not enough memory.
    """
    unfinished = [name for name, left in prepared.runs_left_by_method.items() if left.search + left.final]
    times = {}
    with models.quiet(), models.preserved_random_state(), method_comparison.memory_errors():
        for done, name in enumerate(unfinished):
            if progress is not None:
                progress("timing first steps", done, len(unfinished))
            times[name] = _measure_method(prepared, name)
    return times


def total_seconds(prepared: PreparedComparison, times: Mapping[str, MethodTimes]) -> float:
    """Return the estimated seconds of all runs that are left.

    Args:
        prepared: Result of `method_comparison.prepare`.
        times: Result of `measure`.
    """
    left = prepared.runs_left_by_method
    return sum(
        left[name].search * run_seconds(prepared, method, is_search=True)
        + left[name].final * run_seconds(prepared, method, is_search=False)
        for name, method in times.items()
    )


def run_seconds(prepared: PreparedComparison, times: MethodTimes, *, is_search: bool) -> float:
    """Return the estimated seconds of one run.

    Args:
        prepared: Result of `method_comparison.prepare`.
        times: Times of the run's method.
        is_search: Whether the run serves to choose a learning rate.
    """
    options, rows = prepared.options, prepared.rows
    if is_search:
        # scored once during the training and once after it
        trained, evaluated = len(rows.search_train), 2 * len(rows.held_out)
    else:
        evaluations = run_plan.evaluations(prepared.epochs)
        trained, evaluated = len(rows.train), evaluations * len(rows.validation) + len(rows.test)
    steps = math.ceil(prepared.epochs * math.ceil(trained / options.batch_size))
    return times.loading + steps * times.step + evaluated * times.evaluated_row


def _measure_method(prepared: PreparedComparison, name: str) -> MethodTimes:
    """Load the model, and time training steps and evaluations on batches of all lengths."""
    options, preset, started = prepared.options, prepared.presets[name], time.perf_counter()
    model = preset.apply(prepared.load_base()).to(evaluate.device()).train()
    loading = time.perf_counter() - started
    optimizer = make_optimizer(model, Recipe(options.learning_rates(name)[0], preset.optimizer))
    batches = list(_batches_by_length(prepared.rows.train, options.batch_size))
    step_seconds, evaluation_seconds = [], []
    for batch in [batches[0], *batches]:
        inputs = prepared.collate([dict(row) for row in batch]).to(evaluate.device())
        started = time.perf_counter()
        with torch.autocast(evaluate.device().type, torch.bfloat16, enabled=options.bf16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # also waits for the device
        loss.item()
        step_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        with torch.inference_mode():
            model(**inputs).loss.item()
        evaluation_seconds.append((time.perf_counter() - started) / len(batch))
    return MethodTimes(loading, _mean_without_first(step_seconds), _mean_without_first(evaluation_seconds))


def _batches_by_length(rows: Sequence[Example], batch_size: int) -> Iterator[Sequence[Example]]:
    """Yield `TIMED_STEPS` batches of rows of similar length, evenly spaced from the shortest to the longest rows."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for n in range(TIMED_STEPS):
        middle = round((n + 0.5) / TIMED_STEPS * len(ordered))
        start = max(0, min(middle - batch_size // 2, len(ordered) - batch_size))
        yield ordered[start : start + batch_size]


def _mean_without_first(seconds: Sequence[float]) -> float:
    return sum(seconds[1:]) / (len(seconds) - 1)
