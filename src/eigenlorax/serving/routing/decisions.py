"""From the scores of signals to decisions: the most probable adapter of each row, and whether the row is routed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .calibration import SIGNALS, Calibration, combine, confidence
from .routes import Route, RoutingFigures


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions on some rows.

    Attributes:
        probabilities: Combined probabilities, (rows, adapters).
        confidences: Confidence in the most probable adapter, (rows,).
        calibration: What the decisions follow; None for those of a single signal that never abstain.
        signals: The signals that are combined.
    """

    probabilities: Tensor
    confidences: Tensor
    calibration: Calibration | None
    signals: tuple[str, ...]

    @property
    def best(self) -> Tensor:
        """Index of the most probable adapter, (rows,)."""
        return self.ranking[:, 0]

    @property
    def ranking(self) -> Tensor:
        """Indices of the adapters by probability, the most probable first, (rows, adapters).

        Among equally probable ones, the order is that of the adapters.
        """
        return self.probabilities.argsort(dim=1, descending=True, stable=True)

    @property
    def routed(self) -> Tensor:
        """True for rows that are routed to their most probable adapter, (rows,)."""
        return self.confidences >= (-math.inf if self.calibration is None else self.calibration.threshold)

    def routes(self, names: tuple[str, ...], top: int) -> list[Route]:
        """Return the route of each row.

        Args:
            names: Names of the adapters.
            top: Number of adapters whose probabilities are returned.
        """
        indices = self.ranking[:, :top]
        largest = self.probabilities.gather(1, indices)
        found = []
        for row, (value, is_routed) in enumerate(zip(self.confidences.tolist(), self.routed.tolist(), strict=True)):
            best = [names[index] for index in indices[row].tolist()]
            scores = dict(zip(best, largest[row].tolist(), strict=True))
            found.append(Route(best[0] if is_routed else None, value, scores, self._reason(value, is_routed)))
        return found

    def _reason(self, value: float, is_routed: bool) -> str:
        signals = "+".join(self.signals)
        if self.calibration is None:
            return f"{signals} {value:.3f}; not calibrated, so that it never abstains"
        relation = "is at least" if is_routed else "is below"
        compared = f"{self.calibration.confidence} {value:.3f} {relation} {self.calibration.threshold:.3f}"
        return f"{signals}: {compared}" if is_routed else f"abstains: {compared}"


def decide(scores: Mapping[str, Tensor], calibration: Calibration | None) -> Decisions:
    """Return the decisions that follow from the scores of each signal, (rows, adapters)."""
    if calibration is None:
        first = next(signal for signal in SIGNALS if signal in scores)
        combined = combine(scores, {first: 1.0}, {first: 1.0})
        return Decisions(combined.exp(), confidence(scores, combined, first), None, (first,))
    combined = combine(scores, calibration.temperatures, calibration.weights)
    confidences = confidence(scores, combined, calibration.confidence)
    return Decisions(combined.exp(), confidences, calibration, tuple(calibration.weights))


def routing_figures(
    scores: Mapping[str, Tensor],
    owners: Tensor,
    base_scores: Mapping[str, Tensor] | None,
    calibration: Calibration | None,
) -> RoutingFigures:
    """Return the figures of decisions on rows whose adapters are known.

    Args:
        scores: Scores of each signal, (rows, adapters).
        owners: Index of the right adapter of each row, (rows,).
        base_scores: Scores of rows that belong to no adapter.
        calibration: What the decisions follow.
    """
    decisions = decide(scores, calibration)
    right = decisions.best == owners
    base = None if base_scores is None else decide(base_scores, calibration).routed
    return RoutingFigures(
        rows=len(owners),
        signals={signal: _share(each.argmax(1) == owners) for signal, each in scores.items()},
        accuracy=_share(right),
        routed_right=_share(right & decisions.routed),
        abstentions=_share(~decisions.routed),
        base_rows=0 if base is None else len(base),
        false_accepts=None if base is None else _share(base),
    )


def _share(values: Tensor) -> float:
    return float(values.double().mean())
