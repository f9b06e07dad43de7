"""Metrics of runs: each maps predictions, one row each, and their labels to a score. Higher is better."""

import numpy as np
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import cross_entropy

from eigenlorax.train.examples import IGNORED
from eigenlorax.train.metrics import Metric, accuracy, macro_f1


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Pearson's correlation, or 0 if all predictions are equal."""
    predictions = predictions.reshape(-1)
    if predictions.std() == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Spearman's rank correlation, or 0 if all predictions are equal."""
    return pearson(rankdata(predictions.reshape(-1)), rankdata(labels))


def mean_log_likelihood(losses: np.ndarray, _: np.ndarray) -> float:
    """Return the mean log-likelihood of a row's tokens, in nats."""
    return -float(losses.mean())


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean next-token loss of each row; tokens labelled `IGNORED` do not count."""
    next_tokens = labels[:, 1:]
    token_losses = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), next_tokens.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return token_losses.view(next_tokens.shape).sum(-1) / (next_tokens != IGNORED).sum(-1)


def mean_matches(matches: np.ndarray, _: np.ndarray) -> float:
    """Return the fraction of rows that match."""
    return float(matches.mean())


METRICS: dict[str, Metric] = {"accuracy": accuracy, "pearson": pearson}
"""Name in records → metric of classifications and of regressions."""

FURTHER_METRICS: dict[str, dict[str, Metric]] = {"accuracy": {"macro_f1": macro_f1}, "pearson": {"spearman": spearman}}
"""Name in records → metrics that are recorded beside it, by their names."""
