"""Baselines of a trained adapter that need no training: the most frequent class, or the base model."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .evaluate import ClassificationFigures, Figures, LanguageModelFigures
from .examples import Example

T = TypeVar("T")

SIGNIFICANT = 0.05
"""Maximum p-value at which an accuracy above that of the most frequent class counts as better."""
MARGIN = 1e-3
"""Minimum difference to the base model's loss per token, in nats: a thousandth of the perplexity. An adapter that has
learned nothing differs by rounding."""
TRAINED_ROWS = 1000
"""Maximum number of training rows that are measured if there are no evaluation rows."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """Comparison of a trained adapter with its baseline.

    metric: "accuracy", with the most frequent class as baseline, or "perplexity", with the base model. rows: number of
    rows that were measured. trained_on: whether these are training rows. score, baseline: the metric of the adapter and
    of the baseline; None for a perplexity that overflows. p_value: of a binomial test, for accuracies. better: whether
    the adapter is better than the baseline, for accuracies by more than chance.
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
        """The comparison in words."""
        rows = f"the {self.rows:,} {'training' if self.trained_on else 'evaluation'} rows"
        if self.metric == "perplexity":
            return (
                f"the perplexity on {rows} is {_number(self.score)}, and that of the base model without the adapter "
                f"{_number(self.baseline)}: the adapter {'is better' if self.better else 'is not better'}."
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


def _number(perplexity: float | None) -> str:
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
        rows: Evaluation rows; training rows, of which at most `TRAINED_ROWS` are measured, if `trained_on`.
        figures: Figures of the model on these rows, if they are known.
        measure: Function (model, rows) that returns figures.
    """
    measured = sample(rows, TRAINED_ROWS) if trained_on else rows
    figures = figures or measure(model, measured)
    if isinstance(figures, ClassificationFigures):
        return classification_baseline(figures, trained_on=trained_on)
    with model.disable_adapter():
        base_figures = measure(model, measured)
    assert isinstance(base_figures, LanguageModelFigures)
    return language_model_baseline(figures, base_figures, trained_on=trained_on)


def sample(rows: Sequence[T], maximum: int) -> Sequence[T]:
    """Return at most `maximum` of the rows, always the same ones."""
    return random.Random(0).sample(rows, maximum) if len(rows) > maximum else rows  # noqa: S311


def classification_baseline(figures: ClassificationFigures, *, trained_on: bool) -> Baseline:
    """Compare a classification with the most frequent class."""
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
    """Compare a language model with the base model.

    Both predict the same tokens, so that chance plays little part, and a small margin is enough.
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
