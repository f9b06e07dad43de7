"""Comparison of a trained adapter with a baseline without training: the most frequent class, the base model, or the
reference from which it was trained.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .examples import Example
from .figures import ClassificationFigures, Figures, LanguageModelFigures

T = TypeVar("T")

SIGNIFICANT = 0.05
"""Maximum p-value at which a score counts as better than that of the most frequent class."""
MARGIN = 1e-3
"""Minimum difference to the base model's loss per token, in nats: about a thousandth of the perplexity. Rounding alone
causes smaller differences."""
TRAINED_ROWS = 1000
"""Maximum number of training rows for the comparison if there are no evaluation rows."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Comparison of a trained adapter with its baseline.

    Attributes:
        metric: "accuracy" or the metric that was chosen, with the most frequent class as baseline; or "perplexity",
            with the base model as baseline. For an adapter that was trained from a reference, the reference is the
            baseline of all.
        rows: Number of rows of the comparison.
        trained_on: Whether these are training rows.
        score: Metric of the adapter; None for a perplexity that overflows.
        baseline: Metric of the baseline; None for a perplexity that overflows, and for metrics that the most frequent
            class alone does not have.
        p_value: p-value of the score against the most frequent class: of a binomial test of the accuracy, or of a
            permutation test of another metric; None for other baselines.
        better: Whether the adapter is better than the baseline. Where there is a `p_value`, it must be at most
            `SIGNIFICANT`.
    """

    metric: str
    rows: int
    trained_on: bool
    score: float | None
    baseline: float | None
    p_value: float | None
    better: bool

    def sentence(self, reference: str | None = None) -> str:
        """Return a sentence that states the comparison.

        Args:
            reference: Name of the adapter that is the baseline; None for another baseline.
        """
        rows = f"the {self.rows:,} {'training' if self.trained_on else 'evaluation'} rows"
        verdict = f"the adapter {'is better' if self.better else 'is not better'}."
        if self.metric == "perplexity":
            other = f"the reference {reference}" if reference is not None else "the base model without the adapter"
            return (
                f"the perplexity on {rows} is {_format_perplexity(self.score)}, and that of {other} "
                f"{_format_perplexity(self.baseline)}: {verdict}"
            )
        score = f"the {self.metric} on {rows} is {self.score:.4f}"
        if reference is not None:
            return f"{score}, and that of the reference {reference} {self.baseline:.4f}: {verdict}"
        scores = score
        if self.baseline is not None:
            scores = f"{score}, and the most frequent class alone would reach {self.baseline:.4f}"
        if self.better or self.score is None or (self.baseline is not None and self.score <= self.baseline):
            return f"{scores}: {verdict}"
        return (
            f"{scores}: with so few rows, that may be chance (p = {self.p_value:.2g}; at most {SIGNIFICANT} counts "
            "as better)."
        )


def _format_perplexity(perplexity: float | None) -> str:
    return "too large to represent" if perplexity is None else f"{perplexity:,.4g}"


def compare_with_baseline(
    model: Any,
    rows: Sequence[Example],
    figures: Figures,
    measure: Callable[[Any, Sequence[Example]], Figures],
    *,
    trained_on: bool,
) -> Baseline:
    """Compare a trained PEFT model with the most frequent class, or with the base model.

    Args:
        model: Trained PEFT model.
        rows: Rows of the comparison.
        figures: Figures of the model on these rows.
        measure: Function (model, rows) that returns figures.
        trained_on: Whether the rows are training rows.
    """
    if isinstance(figures, ClassificationFigures):
        return classification_baseline(figures, trained_on=trained_on)
    with model.disable_adapter():
        base_figures = measure(model, rows)
    assert isinstance(base_figures, LanguageModelFigures)
    return language_model_baseline(figures, base_figures, trained_on=trained_on)


def compare_with_reference(figures: Figures, reference: Figures, *, trained_on: bool) -> Baseline:
    """Compare an adapter with the reference from which it was trained.

    There is no test of chance, which the few rows of one user would hardly ever pass.

    Args:
        figures: Figures of the adapter.
        reference: Figures of the reference on the same rows.
        trained_on: Whether the rows are training rows.
    """
    if isinstance(figures, LanguageModelFigures):
        assert isinstance(reference, LanguageModelFigures)
        return language_model_baseline(figures, reference, trained_on=trained_on)
    assert isinstance(reference, ClassificationFigures)
    return Baseline(
        metric=figures.metric,
        rows=figures.rows,
        trained_on=trained_on,
        score=figures.score,
        baseline=reference.score,
        p_value=None,
        better=figures.score > reference.score,
    )


def sample(rows: Sequence[T], maximum: int = TRAINED_ROWS) -> Sequence[T]:
    """Return all rows, or a random sample with a fixed seed if there are more than `maximum` rows."""
    return random.Random(0).sample(rows, maximum) if len(rows) > maximum else rows  # noqa: S311


def classification_baseline(figures: ClassificationFigures, *, trained_on: bool) -> Baseline:
    """Compare a classifier's score with that of the most frequent class.

    Args:
        figures: Figures of the classifier.
        trained_on: Whether the rows are training rows.
    """
    is_higher = figures.majority_score is None or figures.score > figures.majority_score
    return Baseline(
        metric=figures.metric,
        rows=figures.rows,
        trained_on=trained_on,
        score=figures.score,
        baseline=figures.majority_score,
        p_value=figures.p_value,
        better=is_higher and figures.p_value <= SIGNIFICANT,
    )


def language_model_baseline(figures: LanguageModelFigures, base: LanguageModelFigures, *, trained_on: bool) -> Baseline:
    """Compare a language model's loss with that of the base model or of a reference.

    Both models predict the same tokens, so the difference has little variance and a small margin is enough.

    Args:
        figures: Figures of the model with the adapter.
        base: Figures of the base model or of the reference on the same rows.
        trained_on: Whether the rows are training rows.
    """
    return Baseline(
        metric="perplexity",
        rows=figures.rows,
        trained_on=trained_on,
        score=figures.perplexity,
        baseline=base.perplexity,
        p_value=None,
        # compare losses, because perplexities may overflow
        better=figures.loss < base.loss - MARGIN,
    )
