"""The scores of prototypes, on the same scale in all modules and for all adapters."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Mean and standard deviation of the squared cosines on calibration rows.

    Prototypes differ in how well any input fits them, because the inputs of a transformer's modules have a large common
    part. Without these figures the prototypes that are closest to it win most rows.

    Attributes:
        mean: Means, (modules, adapters).
        deviation: Standard deviations, (modules, adapters).
    """

    mean: Tensor
    deviation: Tensor

    def apply(self, cosines: Tensor) -> Tensor:
        """Return standardised squared cosines, (rows, modules, adapters); 0 where all calibration rows are equal."""
        standardised = (cosines - self.mean) / self.deviation.clamp_min(torch.finfo(cosines.dtype).tiny)
        return torch.where(self.deviation > 0, standardised, 0.0)


def standardise_on(cosines: Tensor) -> Standardisation:
    """Return the figures of squared cosines, (rows, modules, adapters)."""
    return Standardisation(cosines.mean(0), cosines.std(0, correction=0))


def prototype_scores(cosines: Tensor, has_module: Tensor, standardisation: Standardisation | None) -> Tensor:
    """Return the mean score over the modules that each adapter changes, (rows, adapters).

    Args:
        cosines: Squared cosines, (rows, modules, adapters).
        has_module: Whether each adapter changes each module, (modules, adapters).
        standardisation: Figures of calibration rows; None averages the squared cosines as they are.
    """
    values = cosines if standardisation is None else standardisation.apply(cosines)
    counts = has_module.sum(0).clamp_min(1)
    scores: Tensor = (values * has_module).sum(1) / counts
    return scores
