"""Comparison of a trained adapter with a baseline without training: the most frequent class, or the base model."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .evaluate import ClassificationFigures, Figures, LanguageModelFigures
from .examples import Example

T = TypeVar("T")

SIGNIFICANT = 0.05
"""Maximum p-value at which an accuracy counts as better than that of the most frequent class."""
MARGIN = 1e-3
"""Minimum difference to the base model's loss per token, in nats: about a thousandth of the perplexity. Rounding alone
causes smaller differences."""
TRAINED_ROWS = 1000
"""Maximum number of training rows for the comparison if there are no evaluation rows."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Comparison of a trained adapter with its baseline.

    Attributes:
        metric: "accuracy", with the most frequent class as baseline, or "perplexity", with the base model as baseline.
        rows: Number of rows of the comparison.
        trained_on: Whether these are training rows.
        score: Metric of the adapter; None for a perplexity that overflows.
        baseline: Metric of the baseline; None for a perplexity that overflows.
        p_value: p-value of a binomial test of the accuracy; None for perplexities.
        better: Whether the adapter is better than the baseline. For accuracies, `p_value` must be at most
            `SIGNIFICANT`.
    """

    metric: str
    rows: int
    trained_on: bool
    score: float | None
    baseline: float | None
    p_value: float | None
    better: bool

    @property
    def sentence(self) -> str:
        """Sentence that states the comparison."""
        rows = f"the {self.rows:,} {'training' if self.trained_on else 'evaluation'} rows"
        if self.metric == "perplexity":
            return (
                f"the perplexity on {rows} is {_format_perplexity(self.score)}, and that of the base model without the "
                f"adapter {_format_perplexity(self.baseline)}: the adapter "
                f"{'is better' if self.better else 'is not better'}."
            )
        accuracies = (
            f"the accuracy on {rows} is {self.score:.4f}, and the most frequent class alone would reach "
            f"{self.baseline:.4f}"
        )
        if self.better:
            return f"{accuracies}: the adapter is better."
        if self.score is None or self.baseline is None or self.score <= self.baseline:
            return f"{accuracies}: the adapter is not better."
        return (
            f"{accuracies}: with so few rows, that may be chance (p = {self.p_value:.2g}; at most {SIGNIFICANT} counts "
            "as better)."
        )


def _format_perplexity(perplexity: float | None) -> str:
    return "too large to represent" if perplexity is None else f"{perplexity:,.4g}"


def compare_with_baseline(
    model: Any,
    rows: Sequence[Example],
    figures: Figures | None,
    measure: Callable[[Any, Sequence[Example]], Figures],
    *,
    trained_on: bool,
) -> Baseline:
    """Compare a trained PEFT model with its baseline.

    Args:
        model: Trained PEFT model.
        rows: Evaluation rows, or training rows if `trained_on`.
        figures: Figures of the model on these rows; None to measure them.
        measure: Function (model, rows) that returns figures.
        trained_on: Whether the rows are training rows. At most `TRAINED_ROWS` of them are used.
    """
    compared_rows = sample(rows, TRAINED_ROWS) if trained_on else rows
    figures = figures or measure(model, compared_rows)
    if isinstance(figures, ClassificationFigures):
        return classification_baseline(figures, trained_on=trained_on)
    with model.disable_adapter():
        base_figures = measure(model, compared_rows)
    assert isinstance(base_figures, LanguageModelFigures)
    return language_model_baseline(figures, base_figures, trained_on=trained_on)


def sample(rows: Sequence[T], maximum: int) -> Sequence[T]:
    """Return all rows, or a random sample with a fixed seed if there are more than `maximum` rows."""
    return random.Random(0).sample(rows, maximum) if len(rows) > maximum else rows  # noqa: S311


def classification_baseline(figures: ClassificationFigures, *, trained_on: bool) -> Baseline:
    """Compare a classifier's accuracy with that of the most frequent class.

    Args:
        figures: Figures of the classifier.
        trained_on: Whether the rows are training rows.
    """
    return Baseline(
        metric="accuracy",
        rows=figures.rows,
        trained_on=trained_on,
        score=figures.accuracy,
        baseline=figures.majority,
        p_value=figures.p_value,
        better=figures.accuracy > figures.majority and figures.p_value <= SIGNIFICANT,
    )


def language_model_baseline(figures: LanguageModelFigures, base: LanguageModelFigures, *, trained_on: bool) -> Baseline:
    """Compare a language model's loss with that of the base model.

    Both models predict the same tokens, so the difference has little variance and a small margin is enough.

    Args:
        figures: Figures of the model with the adapter.
        base: Figures of the base model on the same rows.
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
