"""A linear classifier of embeddings: multinomial logistic regression of scikit-learn, kept as two tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import MissingExtraError

# Inverse strength of the regularisation, for embeddings that are scaled to a mean squared norm of 1
_INVERSE_REGULARISATION = 10.0
_MAX_ITERATIONS = 1000


@dataclass(frozen=True, slots=True)
class LinearClassifier:
    """A linear classifier of unit embeddings.

    Attributes:
        weight: Weights, (adapters, d) float32.
        bias: Biases, (adapters,).
    """

    weight: Tensor
    bias: Tensor

    def scores(self, embeddings: Tensor) -> Tensor:
        """Return the logits, (rows, adapters)."""
        return embeddings @ self.weight.mT + self.bias


def fit_classifier(embeddings: Sequence[Tensor]) -> LinearClassifier:
    """Fit a classifier. Adapters with many rows count as much as adapters with few.

    Args:
        embeddings: Unit rows of each adapter's texts, (rows, d) each; at least two adapters.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(
            "Router.train needs scikit-learn, which is not installed: pip install 'eigenlorax[routing]'. Centroids "
            "(Router.add_centroids) need nothing more."
        ) from error
    rows = torch.cat(list(embeddings))
    owners = torch.arange(len(embeddings)).repeat_interleave(torch.tensor([len(each) for each in embeddings]))
    mean = rows.mean(0)
    scale = float((rows - mean).square().sum(1).mean().sqrt()) or 1.0
    model = LogisticRegression(
        C=_INVERSE_REGULARISATION, class_weight="balanced", max_iter=_MAX_ITERATIONS, random_state=0
    )
    model.fit(((rows - mean) / scale).double().numpy(), owners.numpy())
    weight = torch.from_numpy(model.coef_) / scale
    bias = torch.from_numpy(model.intercept_) - weight @ mean.double()
    if len(embeddings) == 2:
        # scikit-learn keeps one row for two classes, the logit of the second
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return LinearClassifier(weight.float(), bias.float())
