"""Figures of a model on rows: of a classification, with tests against chance, and of a language model."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import metrics
from .data import Labels
from .metrics import NamedMetric
from .options import METRIC

CONFUSION_CLASSES = 20
"""Maximum number of classes for which a confusion matrix is computed."""
PERMUTATIONS = 999
"""Number of permutations of a test, with which p-values of 0.05 have a standard error of 0.007."""


@dataclass(frozen=True, slots=True)
class ClassificationFigures:
    """Figures of a classification.

    Attributes:
        rows: Number of rows.
        loss: Mean cross-entropy per row, in nats.
        accuracy: Fraction of rows whose class was predicted.
        f1_macro: Mean of F1 over the classes that are among the rows or predicted.
        metric: Name of the metric that decides.
        score: Value of that metric.
        majority: Fraction of the most frequent class among the rows.
        majority_score: Value of the metric if the most frequent class is always predicted; None if it has none.
        p_value: p-value of the score against predictions that do not depend on the row: of a one-sided binomial test
            against `majority` for accuracy, of a permutation test for other metrics.
        labels: Class names in the order of the head.
        confusion: Confusion matrix: row i, column j is the number of rows of class i that were predicted as class j.
            None for more than `CONFUSION_CLASSES` classes.
    """

    rows: int
    loss: float
    accuracy: float
    f1_macro: float
    metric: str
    score: float
    majority: float
    majority_score: float | None
    p_value: float
    labels: list[str]
    confusion: list[list[int]] | None


@dataclass(frozen=True, slots=True)
class LanguageModelFigures:
    """Figures of a language model.

    Attributes:
        rows: Number of rows.
        tokens: Number of predicted tokens.
        loss: Mean cross-entropy per predicted token of all rows, in nats.
        perplexity: Exponential of the loss; None if it overflows.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float | None


Figures = ClassificationFigures | LanguageModelFigures


def classification_figures(
    targets: np.ndarray, predictions: np.ndarray, loss: float, labels: Labels, metric: NamedMetric
) -> ClassificationFigures:
    """Return the figures of a classification.

    Args:
        targets: Class numbers, (rows,).
        predictions: Logits, (rows, classes).
        loss: Mean cross-entropy per row.
        labels: Classes of the head.
        metric: The chosen metric.
    """
    counts = Counter(zip(targets.tolist(), predictions.argmax(axis=-1).tolist(), strict=True))
    n, classes = len(targets), range(len(labels.names))
    correct = sum(counts[index, index] for index in classes)
    majority = max(Counter(targets.tolist()).values()) / n
    scores = metrics.all_scores(predictions, targets, metric)
    confusion = None
    if len(classes) <= CONFUSION_CLASSES:
        confusion = [[counts[target, prediction] for prediction in classes] for target in classes]
    is_accuracy = metric.name == METRIC
    return ClassificationFigures(
        rows=n,
        loss=loss,
        accuracy=scores["accuracy"],
        f1_macro=scores["f1_macro"],
        metric=metric.name,
        score=scores[metric.name],
        majority=majority,
        majority_score=majority if is_accuracy else metrics.constant_score(metric, targets, len(classes)),
        p_value=binomial_test(correct, n, majority) if is_accuracy else permutation_test(metric, predictions, targets),
        labels=list(labels.names),
        confusion=confusion,
    )


def binomial_test(correct: int, rows: int, rate: float) -> float:
    """Return the p-value of a one-sided binomial test: P(X ≥ correct) for X ~ Binomial(rows, rate).

    If `rate` is the fraction of the most frequent class, this tests an accuracy against the no-information rate.

    Args:
        correct: Number of correct predictions.
        rows: Number of predictions.
        rate: Probability of a correct prediction under the null hypothesis, above 0 and at most 1.
    """
    if correct == 0 or rate == 1:
        return 1.0
    log_rate, log_complement = math.log(rate), math.log1p(-rate)
    # binomial coefficients of thousands of rows overflow, so compute their logarithms
    log_factorial = math.lgamma(rows + 1)
    return min(
        1.0,
        math.fsum(
            math.exp(
                log_factorial
                - math.lgamma(k + 1)
                - math.lgamma(rows - k + 1)
                + k * log_rate
                + (rows - k) * log_complement
            )
            for k in range(correct, rows + 1)
        ),
    )


def permutation_test(metric: NamedMetric, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the p-value of a one-sided permutation test: how often the score is as high if rows are shuffled.

    Shuffled predictions do not depend on the rows, and predict each class as often as before. The generator's seed is
    fixed.

    Args:
        metric: The metric.
        predictions: Logits, (rows, classes).
        labels: Class numbers, (rows,).
    """
    generator, score = np.random.default_rng(0), metric.score(predictions, labels)
    shuffled = (metric.score(predictions, generator.permutation(labels)) for _ in range(PERMUTATIONS))
    # the observed order counts as a permutation, so that no p-value is 0
    return (1 + sum(other >= score for other in shuffled)) / (1 + PERMUTATIONS)


def perplexity(loss: float) -> float | None:
    """Return the exponential of a mean loss, or None if it would overflow."""
    # exp(709.8) overflows float64
    return math.exp(loss) if loss < 700 else None
