"""Metrics by name: macro-F1 against scikit-learn, names that are found, and names and rows that are refused."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from eigenlorax.errors import OptionError
from eigenlorax.train import metrics

CLASSES = 4
LABELS = [0, 1, 2, 3, 3, 1, 0, 2, 1]


def logits(predicted, n_classes=CLASSES):
    """Logits whose largest one is that of the predicted class."""
    chance = np.random.default_rng(0).uniform(size=(len(predicted), n_classes))
    return chance + 3 * np.eye(n_classes)[list(predicted)]


def probabilities(numbers):
    powers = np.exp(numbers)
    return powers / powers.sum(axis=1, keepdims=True)


@given(st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1))
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs):
    labels, predicted = map(np.array, zip(*pairs, strict=True))
    scores = metrics.all_scores(logits(predicted), labels, metrics.ACCURACY)
    wanted = sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert scores["f1_macro"] == pytest.approx(wanted, rel=1e-12)
    assert scores["accuracy"] == sklearn.metrics.accuracy_score(labels, predicted)
    assert scores.keys() == {"accuracy", "f1_macro"}


PREDICTED = [0, 1, 1, 3, 2, 1, 0, 2, 0]
OF_CLASSES = {
    "balanced_accuracy": sklearn.metrics.balanced_accuracy_score,
    "matthews_corrcoef": sklearn.metrics.matthews_corrcoef,
    "cohen_kappa_score": sklearn.metrics.cohen_kappa_score,
    "f1_weighted": lambda labels, predicted: sklearn.metrics.f1_score(labels, predicted, average="weighted"),
    "f1_score": lambda labels, predicted: sklearn.metrics.f1_score(labels, predicted, average="macro"),
    "recall_score": lambda labels, predicted: sklearn.metrics.recall_score(labels, predicted, average="macro"),
}
OF_PROBABILITIES = {
    "neg_log_loss": lambda labels, chances: -sklearn.metrics.log_loss(labels, chances),
    "roc_auc_ovr": lambda labels, chances: sklearn.metrics.roc_auc_score(labels, chances, multi_class="ovr"),
}


@pytest.mark.parametrize("name", [*OF_CLASSES, *OF_PROBABILITIES])
def test_a_name_of_scikit_learn(name):
    metric, numbers = metrics.find(name, CLASSES, LABELS), logits(PREDICTED)
    if name in OF_CLASSES:
        wanted = OF_CLASSES[name](LABELS, PREDICTED)
    else:
        wanted = OF_PROBABILITIES[name](LABELS, probabilities(numbers))
    assert metric.name == name
    assert metric.score(numbers.astype(np.float32), np.array(LABELS)) == pytest.approx(wanted, rel=1e-6)
    assert math.isnan(metric.score(np.full((9, CLASSES), np.nan), np.array(LABELS)))


@pytest.mark.parametrize("name", ["f1", "roc_auc", "average_precision"])
def test_of_two_classes_scores_are_those_of_the_second(name):
    labels, numbers = np.array([0, 1, 1, 0, 1]), logits([0, 1, 0, 1, 1], 2)
    second = probabilities(numbers)[:, 1]
    wanted = {
        "f1": sklearn.metrics.f1_score(labels, numbers.argmax(axis=1)),
        "roc_auc": sklearn.metrics.roc_auc_score(labels, second),
        "average_precision": sklearn.metrics.average_precision_score(labels, second),
    }
    assert metrics.find(name, 2, labels).score(numbers, labels) == pytest.approx(wanted[name])


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("f1_makro", LABELS, r"there is no metric 'f1_makro' of predicted classes. Did you mean 'f1_macro'\?"),
        ("matthews_corcoef", LABELS, "Did you mean 'matthews_corrcoef'"),
        (
            "confusion_matrix",
            LABELS,
            r"its value has the shape \(4, 4\); one number was expected. Metrics",
        ),
        ("roc_auc_score", LABELS, "no metric 'roc_auc_score' of predicted classes"),
        # in old releases of scikit-learn, its parameters have the names of those of losses of predicted classes
        (
            "log_loss",
            LABELS,
            r"no metric 'log_loss' .* Did you mean 'neg_log_loss'\?|lower is better of the metric log_loss",
        ),
        ("hamming_loss", LABELS, "lower is better of the metric hamming_loss"),
        ("f1", LABELS, r"cannot be computed on 9 rows of 4 of 4 classes: .*multiclass.* such as f1_macro, take any"),
        # of the two classes of these rows it can, but a model may predict another one
        ("f1", [0, 1, 1, 0], "f1 cannot be computed on 4 rows of 2 of 4 classes"),
        ("roc_auc_ovr", [0, 1, 2, 2], "roc_auc_ovr cannot be computed on 4 rows of 3 of 4 classes"),
        ("os", LABELS, "there is no metric 'os'"),
    ],
)
def test_what_is_refused_before_a_training(name, labels, message):
    with pytest.raises(OptionError, match=message):
        metrics.find(name, CLASSES, labels)


def test_the_most_frequent_class_alone():
    labels = np.array([2, 2, 2, 0, 1])
    assert metrics.constant_score(metrics.ACCURACY, labels, 3) == 0.6
    assert metrics.constant_score(metrics.find("f1_macro", 3, labels), labels, 3) == pytest.approx(2 * 3 / 8 / 3)
    # the best that one distribution can reach is the entropy of the classes
    entropy = -sum(share * math.log(share) for share in (0.6, 0.2, 0.2))
    assert metrics.constant_score(metrics.find("neg_log_loss", 3, labels), labels, 3) == pytest.approx(-entropy)


METRIC = """
import datasets
import evaluate


class Hits(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        hits = sum(one == other for one, other in zip(predictions, references))
        return {KEYS}
"""


def test_a_metric_of_evaluate_in_a_folder(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed: pip install evaluate")
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    for folder, keys in (("hits", '{"hits": hits, "rows": len(references)}'), ("pair", '{"a": hits, "b": hits}')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.py").write_text(METRIC.replace("{KEYS}", keys))
    metric = metrics.find(f"evaluate:{tmp_path / 'hits'}", CLASSES, LABELS)
    assert metric.score(logits(PREDICTED), np.array(LABELS)) == 6
    with pytest.raises(OptionError, match="it has several values, a, b, and none is called hits"):
        metrics.find(f"evaluate:{tmp_path / 'pair'}", CLASSES, LABELS)
    with pytest.raises(OptionError, match="evaluate cannot load the metric .*nowhere.*: .* Check the name. Without"):
        metrics.find(f"evaluate:{tmp_path / 'nowhere'}", CLASSES, LABELS)
