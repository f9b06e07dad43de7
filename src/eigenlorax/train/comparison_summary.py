"""Summary of a method comparison: one row per method, differences with confidence intervals, and findings in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from .metrics import Metric

BOOTSTRAP_DRAWS = 10_000
RESAMPLES = 1000
"""Number of draws of the test rows for metrics other than accuracy, each of which computes the metric again."""
_REACHED = 0.98
"""Fraction of the baseline's score that counts as reached."""
_SUBSPACE_METHODS = ("core", "factors")
_SMALL_METHODS = ("lora-small", "vera", "vblora", "lora-xs")


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One run of a method; the field names are those of the results file.

    Attributes:
        method: Key of `search_space.LEARNING_RATES`.
        learning_rate: Learning rate of the method's parameters, or of the head if the method has no others.
        seed: Seed of the run; None if the run serves to choose the learning rate.
        numbers: Number of trained parameters of the method.
        head_numbers: Number of trained parameters of the head.
        file_bytes: Size of the saved adapter with its head, in bytes.
        score: Value of the chosen metric on the test rows; on the rows held out if `seed` is None. None if the run
            diverged.
        accuracy: Accuracy on the same rows, 0 to 1; None if the run diverged.
        f1_macro: Macro-F1 on the same rows, 0 to 1; None if the run diverged.
        loss: Mean cross-entropy on the same rows, in nats; None if the run diverged.
        right: One digit per test row: 1 if its class was predicted, 0 if not. Empty if `seed` is None.
        resampled: Score on each of `RESAMPLES` random draws of the test rows, the same draws for every run; None where
            the metric is undefined. Empty if `seed` is None, and for accuracy, which follows from `right`.
        steps: Steps after which the validation rows were scored.
        scores: Score on the validation rows after each of these steps.
        seconds: Seconds of training, without evaluation.
    """

    method: str
    learning_rate: float
    seed: int | None
    numbers: int
    head_numbers: int
    file_bytes: int
    score: float | None
    accuracy: float | None
    f1_macro: float | None
    loss: float | None
    right: str
    resampled: list[float | None]
    steps: list[int]
    scores: list[float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference between the mean scores of two methods, with its 95 % confidence interval.

    Attributes:
        value: Score of the first method minus that of the second.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """True if the interval contains zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """One row of the table; the field names are those of the results file.

    Attributes:
        method: Key of `search_space.LEARNING_RATES`.
        learning_rate: Chosen learning rate.
        rates: Learning rate → score on the rows held out; None if the run diverged or there was no search.
        numbers: Number of trained parameters without the head.
        head_numbers: Number of trained parameters of the head.
        file_bytes: Size of the saved adapter with its head, in bytes.
        scores: Score of each seed on all test rows, by the chosen metric.
        mean: Mean of the scores.
        spread: Standard deviation of the scores; None for one seed.
        accuracy: Mean accuracy of the seeds.
        f1_macro: Mean macro-F1 of the seeds.
        difference: Difference to the baseline; None for the baseline itself.
        curve: Mean score on the validation rows at each point during training.
        steps: Steps until 98 % of the baseline's final score on the validation rows; None if not reached.
        seconds: Mean duration of a training in seconds, without evaluation.
    """

    method: str
    learning_rate: float
    rates: dict[str, float | None]
    numbers: int
    head_numbers: int
    file_bytes: int
    scores: list[float]
    mean: float
    spread: float | None
    accuracy: float
    f1_macro: float
    difference: Difference | None
    curve: list[float]
    steps: int | None
    seconds: float

    @property
    def rate_is_at_edge(self) -> bool:
        """True if the chosen learning rate is the lowest or the highest of several."""
        rates = [float(rate) for rate in self.rates]
        return len(rates) > 1 and self.learning_rate in (min(rates), max(rates))


def difference(correct: Sequence[str], baseline_correct: Sequence[str]) -> Difference:
    """Return the difference of mean accuracies, with a paired bootstrap interval.

    Seeds and rows are both resampled, and each draw is applied to both methods. The generator's seed is fixed.

    Args:
        correct: For each seed, one digit per test row: 1 if its class was predicted, 0 if not.
        baseline_correct: Digits of the other method, for the same seeds and rows.
    """
    signs = _digits(correct) - _digits(baseline_correct)
    seeds, rows = signs.shape
    # rows with equal signs for all seeds are exchangeable: drawing counts of a few patterns replaces drawing rows
    patterns, counts = np.unique(signs, axis=1, return_counts=True)
    generator = np.random.default_rng(0)
    seed_weights = generator.multinomial(seeds, [1 / seeds] * seeds, size=BOOTSTRAP_DRAWS) / seeds
    pattern_weights = generator.multinomial(rows, counts / rows, size=BOOTSTRAP_DRAWS) / rows
    resampled = np.einsum("ds,sk,dk->d", seed_weights, patterns, pattern_weights, optimize=True)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Difference(float(signs.mean()), float(low), float(high))


def resample(metric: Metric, predictions: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Return the score on `RESAMPLES` draws of the rows, with replacement, which are the same for each call.

    Args:
        metric: The metric.
        predictions: Logits, (rows, classes).
        labels: Class numbers, (rows,).

    Returns:
        One score per draw, None where the metric is undefined, as some are if a class was not drawn.
    """
    generator, scores = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        draw = generator.integers(len(labels), size=len(labels))
        try:
            score = metric(predictions[draw], labels[draw])
        except ValueError:
            score = math.nan
        scores.append(round(score, 5) if math.isfinite(score) else None)
    return scores


def resampled_difference(runs: Sequence[MethodRun], baseline_runs: Sequence[MethodRun]) -> Difference:
    """Return the difference of mean scores, with a paired bootstrap interval, for metrics other than accuracy.

    Args:
        runs: Runs of one method, one per seed.
        baseline_runs: Runs of the other method, for the same seeds and rows.
    """
    pairs = list(zip(runs, baseline_runs, strict=True))
    draws = np.array([run.resampled for run, _ in pairs], dtype=np.float64)
    draws -= np.array([run.resampled for _, run in pairs], dtype=np.float64)
    # draws on which the metric is undefined for one of the runs do not count
    draws = draws[:, np.isfinite(draws).all(axis=0)]
    n_seeds, n_draws = draws.shape
    weights = np.random.default_rng(0).multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=n_draws) / n_seeds
    value = fmean(run.score - other.score for run, other in pairs if run.score is not None and other.score is not None)
    low, high = np.quantile((weights.T * draws).sum(axis=0), [0.025, 0.975]) if n_draws else (-math.inf, math.inf)
    return Difference(value, float(low), float(high))


def _digits(correct: Sequence[str]) -> np.ndarray:
    return np.array([[int(digit) for digit in row] for row in correct], dtype=np.float64)


def _method_difference(runs: Mapping[str, Sequence[MethodRun]], method: str, baseline: str) -> Difference:
    """Return the difference between a method and the baseline, which have runs of the same seeds."""
    if runs[method][0].resampled:
        return resampled_difference(runs[method], runs[baseline])
    return difference([run.right for run in runs[method]], [run.right for run in runs[baseline]])


def summarise(
    runs: Mapping[str, Sequence[MethodRun]],
    search_scores: Mapping[str, Mapping[float, float | None]],
    baseline: str,
) -> list[MethodSummary]:
    """Return one row of the table per method.

    Args:
        runs: Method → its runs at the chosen learning rate, one per seed.
        search_scores: Method → learning rate → score on the rows held out, or None.
        baseline: Method that the others are compared with.
    """
    final = fmean(run.scores[-1] for run in runs[baseline])
    # of scores below 0, such as neg_log_loss, 98 % would be a better score
    target = final - (1 - _REACHED) * abs(final)
    summaries = []
    for method, method_runs in runs.items():
        first = method_runs[0]
        scores = [run.score for run in method_runs if run.score is not None]
        curve = [fmean(run.scores[point] for run in method_runs) for point in range(len(first.steps))]
        summaries.append(
            MethodSummary(
                method=method,
                learning_rate=first.learning_rate,
                rates={f"{rate:g}": score for rate, score in search_scores[method].items()},
                numbers=first.numbers,
                head_numbers=first.head_numbers,
                file_bytes=first.file_bytes,
                scores=scores,
                mean=fmean(scores),
                spread=stdev(scores) if len(scores) > 1 else None,
                accuracy=fmean(run.accuracy for run in method_runs if run.accuracy is not None),
                f1_macro=fmean(run.f1_macro for run in method_runs if run.f1_macro is not None),
                difference=_method_difference(runs, method, baseline) if method != baseline else None,
                curve=curve,
                steps=next((step for step, score in zip(first.steps, curve, strict=True) if score >= target), None),
                seconds=fmean(run.seconds for run in method_runs),
            )
        )
    return summaries


def findings(
    runs: Mapping[str, Sequence[MethodRun]],
    summaries: Sequence[MethodSummary],
    baseline: str,
    majority: float,
    basis_bytes: int,
) -> list[str]:
    """Return sentences about the subspace methods. Each sentence is supported by figures of the table.

    Args:
        runs: Method → its runs at the chosen learning rate, one per seed.
        summaries: Rows of the table.
        baseline: Method that the others are compared with.
        majority: Fraction of the most frequent class among the test rows.
        basis_bytes: Size of the pack's bases, in bytes.
    """
    by_name = {summary.method: summary for summary in summaries}
    subspace_methods = [name for name in _SUBSPACE_METHODS if name in by_name]
    sentences = []
    untrained = [summary.method for summary in summaries if summary.accuracy <= majority]
    if untrained:
        sentences.append(
            f"no better than the most frequent class: {', '.join(untrained)}. Their rows say nothing about the "
            "method; try more training rows, more epochs or other learning rates."
        )
    for name in subspace_methods:
        if name != baseline:
            size = _size_ratio(by_name[name].numbers, by_name[baseline].numbers)
            sentences.append(f"{name}: {_describe(_method_difference(runs, name, baseline), baseline)}{size}.")
    if {"factors", "random"} <= by_name.keys():
        sentences.append(_random_basis_finding(_method_difference(runs, "factors", "random")))
    small_methods = [name for name in _SMALL_METHODS if name in by_name]
    if "factors" in by_name and small_methods:
        comparisons = [
            f"{name} ({by_name[name].numbers:,}) {_describe(_method_difference(runs, name, 'factors'))}"
            for name in small_methods
        ]
        size = f"{by_name['factors'].numbers:,} parameters"
        sentences.append(f"compared with factors ({size}): {join_words(comparisons)}.")
    if subspace_methods:
        verb = "need" if len(subspace_methods) > 1 else "needs"
        sentences.append(
            f"basis: {join_words(subspace_methods)} {verb} the pack's basis too, {basis_bytes:,} bytes, once for all "
            "adapters of the pack."
        )
    if len(summaries) > 1:
        seeds, rows = len(summaries[0].scores), len(runs[baseline][0].right)
        sample = f"{seeds} seeds and {rows:,} rows"
        if seeds == 1:
            sample = f"{rows:,} rows; with one seed, the spread between seeds is unknown"
        sentences.append(f"in brackets: 95 % intervals, over {sample}.")
    at_edge = [summary.method for summary in summaries if summary.rate_is_at_edge]
    if at_edge:
        sentences.append(
            f"learning rates: the chosen rate is the lowest or the highest one tried for {', '.join(at_edge)}. Try "
            "further rates: --learning-rates METHOD=A,B,C with --resume (rates=, resume=True)."
        )
    return sentences


def _random_basis_finding(advantage: Difference) -> str:
    """Return a sentence that compares the pack's subspace with a random subspace of the same size."""
    if advantage.is_noise:
        effect = "no clear effect of the pack's subspace on this task"
    elif advantage.value > 0:
        effect = "the pack's subspace helps on this task"
    else:
        effect = "the pack's subspace hurts on this task"
    return f"random basis: {effect}; factors are {_describe(advantage, 'factors over random components')}."


def join_words(phrases: Sequence[str]) -> str:
    """Join phrases to a list such as "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def format_points(change: Difference) -> str:
    """Return a difference in percentage points, signed, with its interval."""
    return f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def _describe(change: Difference, baseline: str = "") -> str:
    """Return a difference in words, such as "1.2 points below lora (-2.0 to -0.4)"."""
    size = abs(100 * change.value)
    if size >= 0.05:
        position = f"{size:.1f} points {'below' if change.value < 0 else 'above'} {baseline}".rstrip()
    else:
        position = f"level with {baseline}" if baseline else "level"
    noise = ", which may be noise" if change.is_noise else ""
    return f"{position} ({100 * change.low:+.1f} to {100 * change.high:+.1f}{noise})"


def _size_ratio(parameters: int, baseline_parameters: int) -> str:
    if parameters == 0 or baseline_parameters == 0:
        return ""
    if baseline_parameters >= 2 * parameters:
        return f", with 1/{baseline_parameters / parameters:.0f} of its parameters"
    if parameters == baseline_parameters:
        return ", with as many parameters"
    return f", with {parameters / baseline_parameters:.2g} times its parameters"
