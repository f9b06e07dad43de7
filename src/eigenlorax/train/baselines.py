"""What a trained adapter is worth beside what needs no training: the most frequent class, or the base model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..fitting.fit import Progress
from . import evaluate
from .data import Labels
from .evaluate import Classified, Figures, Modelled
from .examples import Collate, Example

T = TypeVar("T")

SIGNIFICANT = 0.05
"""The highest p-value at which an accuracy above that of the most frequent class is not taken for chance."""
MARGIN = 1e-3
"""By how many nats a token's loss has to be below the base model's: a thousandth of the perplexity. An adapter that has
learned nothing is off by its rounding."""
TRAINED_ROWS = 1000
"""Rows of the training that are measured, at most, where there are none for evaluation."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """A result beside its baseline.

    metric: "accuracy", whose baseline is that of the most frequent class of these rows; or "perplexity", whose baseline
    is that of the base model (None where it is no longer a number). rows: how many both were measured on; trained_on:
    whether these were rows of the training. p_value: of accuracies, by a binomial test. better: whether the result is
    better than the baseline, by more than chance where it is an accuracy.
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
        """What this says of the result."""
        where = f"the {self.rows:,} rows {'of the training' if self.trained_on else 'for evaluation'}"
        if self.metric == "perplexity":
            return (
                f"the perplexity on {where} is {_number(self.score)}, and that of the base model without the adapter "
                f"{_number(self.baseline)}: the adapter {'helps' if self.better else 'is of no use'}."
            )
        said = (
            f"the accuracy on {where} is {self.score:.4f}, and the most frequent class alone would reach "
            f"{self.baseline:.4f}"
        )
        if self.better:
            return f"{said}: the adapter helps."
        if self.score is None or self.baseline is None or self.score <= self.baseline:
            return f"{said}: the adapter is of no use."
        return f"{said}: on so few rows, that may be chance (p = {self.p_value:.2g}, {SIGNIFICANT} at most was wanted)."


def _number(perplexity: float | None) -> str:
    return "too large for a number" if perplexity is None else f"{perplexity:,.4g}"


def of_trained(
    model: Any,
    rows: Sequence[Example],
    figures: Figures | None,
    evaluation: Sequence[Example] | None,
    collate: Collate,
    labels: Labels | None,
    batch_size: int,
    progress: Progress | None = None,
) -> Baseline:
    """Measure a trained model's baseline on the rows for evaluation, which gave `figures`; without them, both on rows
    of the training, at most `TRAINED_ROWS` of them.
    """
    trained_on = evaluation is None
    measured = sample(rows, TRAINED_ROWS) if evaluation is None else evaluation
    found = figures or evaluate.measure(model, measured, collate, labels, batch_size, progress)
    if isinstance(found, Classified):
        return classified(found, trained_on=trained_on)
    with model.disable_adapter():
        base = evaluate.measure(model, measured, collate, labels, batch_size, progress)
    assert isinstance(base, Modelled)
    return modelled(found, base, trained_on=trained_on)


def sample(rows: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of the rows, the same ones each time."""
    return random.Random(0).sample(rows, most) if len(rows) > most else rows  # noqa: S311


def classified(figures: Classified, *, trained_on: bool) -> Baseline:
    """A classification beside the most frequent class."""
    return Baseline(
        metric="accuracy",
        rows=figures.rows,
        trained_on=trained_on,
        score=figures.accuracy,
        baseline=figures.majority,
        p_value=figures.p_value,
        better=figures.accuracy > figures.majority and figures.p_value <= SIGNIFICANT,
    )


def modelled(figures: Modelled, base: Modelled, *, trained_on: bool) -> Baseline:
    """A language model beside the base model. Both predict the same tokens, so that chance has little part in it, and
    a small margin is enough."""
    return Baseline(
        metric="perplexity",
        rows=figures.rows,
        trained_on=trained_on,
        score=figures.perplexity,
        baseline=base.perplexity,
        p_value=None,
        # losses are there where the perplexity is no longer a number
        better=figures.loss < base.loss - MARGIN,
    )
