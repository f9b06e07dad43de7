"""Metrics of classifications by name: accuracy and macro-F1, and those of scikit-learn and of the package `evaluate`.

Each maps logits, (rows, classes), and class numbers, (rows,), to a score. Higher is better.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.options import suggestion
from ..errors import MissingExtraError, OptionError, reason
from .options import METRIC

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Function (predictions, labels) that returns a score, with one prediction per row. Higher is better."""

_EVALUATE = "evaluate:"
"""Prefix of the names of `evaluate`'s metrics, many of which scikit-learn has too."""
_LOWER_IS_BETTER = ("_loss", "_error", "_deviance")
"""Ends of the names of scikit-learn's functions of which lower is better."""
_OF_CLASSES = (["y_true", "y_pred"], ["y1", "y2"])
"""First parameters of scikit-learn's functions of predicted classes."""
_PERFECT_LOGIT = 10.0
"""Logit of the right class, with which a metric is tried before the training; the others are 0."""


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of rows whose class is predicted.

    Args:
        predictions: Logits, (rows, classes).
        labels: Class numbers, (rows,).
    """
    return float((predictions.argmax(axis=-1) == labels).mean())


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over classes of F1, the harmonic mean of precision and recall.

    As in scikit-learn, F1 of a class is 0 if none of its rows is predicted as such, and classes that are neither among
    the labels nor predicted do not count.

    Args:
        predictions: Logits, (rows, classes).
        labels: Class numbers, (rows,).
    """
    predicted, n_classes = predictions.argmax(axis=-1), predictions.shape[-1]
    correct = np.bincount(labels[predicted == labels], minlength=n_classes)
    # rows of a class plus predictions of it, which is 2 · true positives + false positives + false negatives
    total = np.bincount(labels, minlength=n_classes) + np.bincount(predicted, minlength=n_classes)
    is_present = total > 0
    return float((2 * correct[is_present] / total[is_present]).mean())


METRICS: Mapping[str, Metric] = {METRIC: accuracy, "f1_macro": macro_f1}
"""Name → metric that needs no other package. Both are in every report on a classification."""


@dataclass(frozen=True, slots=True)
class NamedMetric:
    """A metric with its name.

    Attributes:
        name: Name that the user passed.
        score: The metric.
    """

    name: str
    score: Metric


ACCURACY = NamedMetric(METRIC, accuracy)


def find(name: str, n_classes: int, *row_labels: Sequence[int]) -> NamedMetric:
    """Return the metric of a name, and try it on right and wrong predictions of the rows that it will be computed on.

    Args:
        name: "accuracy" or "f1_macro"; a scorer (`sklearn.metrics.get_scorer_names()`) or a function of
            `sklearn.metrics`; or "evaluate:" followed by the name or the folder of a metric of `evaluate`.
        n_classes: Number of classes.
        row_labels: Class numbers of each set of rows.

    Raises:
        OptionError: There is no such metric, or it cannot be computed on these rows.
        MissingExtraError: The metric needs a package that is not installed.
    """
    if name in METRICS:
        return NamedMetric(name, METRICS[name])
    score = _evaluate_metric(name) if name.startswith(_EVALUATE) else _scikit_learn_metric(name)
    metric = NamedMetric(name, _on_finite_logits(score))
    for labels in row_labels:
        classes = np.asarray(labels)
        perfect = _PERFECT_LOGIT * np.eye(n_classes)[classes]
        try:
            best = metric.score(perfect, classes)
            # a model may predict classes that no row has
            metric.score(_PERFECT_LOGIT * np.eye(n_classes)[np.arange(len(classes)) % n_classes], classes)
        except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
            raise OptionError(
                f"the metric {name} cannot be computed on {len(classes)} rows of {len(set(labels))} of {n_classes} "
                f"classes: {reason(error).rstrip('.')}. Metrics that average over classes, such as f1_macro, take any "
                "number of classes."
            ) from error
        if not math.isfinite(best):
            raise OptionError(
                f"the metric {name} is {best} on {len(classes)} rows of {len(set(labels))} classes that are all "
                "predicted. Pass another metric= (--metric), or more rows."
            )
    return metric


def all_scores(predictions: np.ndarray, labels: np.ndarray, metric: NamedMetric) -> dict[str, float]:
    """Return accuracy, macro-F1 and the chosen metric, by name.

    Args:
        predictions: Logits, (rows, classes).
        labels: Class numbers, (rows,).
        metric: The chosen metric.
    """
    metrics = {**METRICS, metric.name: metric.score}
    return {name: score(predictions, labels) for name, score in metrics.items()}


def constant_score(metric: NamedMetric, labels: np.ndarray, n_classes: int) -> float | None:
    """Return the score of a model that predicts the most frequent class; None if the metric has none for it.

    Args:
        metric: The metric.
        labels: Class numbers, (rows,).
        n_classes: Number of classes.
    """
    frequencies = np.bincount(labels, minlength=n_classes) / len(labels)
    # log-frequencies, so that metrics of probabilities see the best constant prediction too
    logits = np.log(np.maximum(frequencies, np.finfo(np.float64).tiny))
    try:
        score = metric.score(np.tile(logits, (len(labels), 1)), labels)
    except ValueError:
        return None
    return score if math.isfinite(score) else None


def _on_finite_logits(score: Callable[[np.ndarray, np.ndarray], Any]) -> Metric:
    """Return a metric that is NaN for logits that are not finite, which scikit-learn would reject by an error.

    A score that is no number raises `TypeError`. Warnings, such as of classes that are never predicted, are not shown.

    Args:
        score: Function (probabilities, labels).
    """

    def metric(predictions: np.ndarray, labels: np.ndarray) -> float:
        logits = np.asarray(predictions, dtype=np.float64)
        if not np.isfinite(logits).all():
            return math.nan
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            number = score(powers / powers.sum(axis=-1, keepdims=True), labels)
        if np.ndim(number) != 0:
            raise TypeError(f"its value has the shape {np.shape(number)}; one number was expected.")
        return float(number)

    return metric


def _scikit_learn_metric(name: str) -> Callable[[np.ndarray, np.ndarray], Any]:
    """Return a scorer or a function of `sklearn.metrics` as a function of (probabilities, labels)."""
    try:
        from sklearn import metrics as sklearn_metrics
    except ImportError as error:
        raise MissingExtraError(
            f"the metric {name!r} needs scikit-learn: pip install 'eigenlorax[metrics]'. Without it, there are: "
            f"{', '.join(METRICS)}."
        ) from error
    scorers = sklearn_metrics.get_scorer_names()
    if name in scorers:
        scorer, estimator_class = sklearn_metrics.get_scorer(name), _stored_probabilities_class()
        return lambda probabilities, labels: scorer(estimator_class(probabilities.shape[-1]), probabilities, labels)
    function = getattr(sklearn_metrics, name, None) if name in sklearn_metrics.__all__ else None
    parameters = list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
    if function is None or parameters[:2] not in _OF_CLASSES:
        names = [*METRICS, *scorers, *(other for other in sklearn_metrics.__all__ if other.endswith("_score"))]
        raise OptionError(
            f"there is no metric {name!r} of predicted classes.{suggestion(name, names)} There are "
            f"{', '.join(METRICS)}; scorers and functions of scikit-learn, such as balanced_accuracy, roc_auc_ovr or "
            "matthews_corrcoef; and metrics of the package evaluate, such as evaluate:f1."
        )
    if name.endswith(_LOWER_IS_BETTER):
        raise OptionError(
            f"lower is better of the metric {name}, and the highest score is chosen. Pass a metric of which higher is "
            "better, such as accuracy."
        )
    # the default, "binary", is the score of the second class alone
    options = {"average": "macro"} if "average" in parameters else {}
    return lambda probabilities, labels: function(labels, probabilities.argmax(axis=-1), **options)


def _stored_probabilities_class() -> Any:
    """Return the class of a classifier whose input is its predicted probabilities, (rows, classes), for scorers."""
    from sklearn.base import BaseEstimator, ClassifierMixin

    class StoredProbabilities(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        def __init__(self, n_classes: int) -> None:
            self.n_classes = n_classes
            self.classes_ = np.arange(n_classes)

        def predict(self, probabilities: np.ndarray) -> np.ndarray:
            classes: np.ndarray = probabilities.argmax(axis=-1)
            return classes

        def predict_proba(self, probabilities: np.ndarray) -> np.ndarray:
            return probabilities

    return StoredProbabilities


def _evaluate_metric(name: str) -> Callable[[np.ndarray, np.ndarray], Any]:
    """Load a metric of the package `evaluate`, as a function of (probabilities, labels)."""
    try:
        import evaluate
    except ImportError as error:
        raise MissingExtraError(f"the metric {name!r} needs the package evaluate: pip install evaluate.") from error
    source = name.removeprefix(_EVALUATE)
    try:
        module = evaluate.load(source)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise OptionError(
            f"evaluate cannot load the metric {source!r}: {reason(error)} Check the name. Without a network, pass the "
            f"folder of the metric: {_EVALUATE}PATH."
        ) from error

    def score(probabilities: np.ndarray, labels: np.ndarray) -> Any:
        scores = module.compute(predictions=probabilities.argmax(axis=-1), references=labels)
        if len(scores) > 1 and module.name not in scores:
            raise ValueError(f"it has several values, {', '.join(scores)}, and none is called {module.name}.")
        return scores.get(module.name, next(iter(scores.values())))

    return score
