"""Calibration of a router on held-out rows: weights of its signals, and the threshold of its confidence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from ...core.options import to_float
from ...errors import OptionError

SIGNALS = ("centroids", "classifier", "prototypes")
"""The signals, in the order of preference where several are equally good, and before a calibration."""
PROBABILITY = "probability"
"""Name of the confidence that is the combined probability of the chosen adapter, instead of its score in a signal."""
# Weights of combinations of two and of three signals; each is tried for all orders of the signals
_WEIGHTS: Mapping[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.0,),),
    2: ((0.5, 0.5), (0.75, 0.25)),
    3: ((1 / 3, 1 / 3, 1 / 3), (0.5, 0.25, 0.25)),
}
_INVERSE_TEMPERATURES = torch.logspace(-2, 3, 61)
DEFAULT_MAX_ABSTENTIONS = 0.05


@dataclass(frozen=True, slots=True)
class Calibration:
    """Choices of a calibration.

    Attributes:
        temperatures: Divisor of the scores of each signal that was there.
        weights: Weights of the signals that are combined, which sum to 1.
        confidence: "probability", or the signal whose score of the chosen adapter is the confidence.
        threshold: Confidence from which on a row is routed.
    """

    temperatures: dict[str, float]
    weights: dict[str, float]
    confidence: str
    threshold: float


@dataclass(frozen=True, slots=True)
class AbstentionTarget:
    """Target of the threshold. At most one of the two shares is set.

    Attributes:
        max_false_accepts: Largest share of the base rows that may be routed.
        max_abstentions: Largest share of the rows of adapters that may not be routed.
    """

    max_false_accepts: float | None = None
    max_abstentions: float | None = None


def abstention_target(
    base_rows: Sequence[str] | None, max_false_accepts: float | None, max_abstentions: float | None
) -> AbstentionTarget:
    """Return the target of a calibration; arguments are those of `Router.calibrate`.

    Raises:
        OptionError: A share is outside its range, both are set, or there are too few base rows to measure it.
    """
    if max_false_accepts is not None and max_abstentions is not None:
        raise OptionError("max_false_accepts and max_abstentions determine the threshold each. Pass one of them.")
    if max_false_accepts is not None:
        share = to_float("max_false_accepts", max_false_accepts)
        if not 0 < share < 1:
            raise OptionError(f"max_false_accepts must be above 0 and below 1, got {share:g}.")
        if base_rows is None:
            raise OptionError("max_false_accepts needs base_rows: texts that belong to no adapter.")
        if len(base_rows) * share < 1:
            raise OptionError(
                f"max_false_accepts={share:g} cannot be measured on {len(base_rows)} base rows: pass at least "
                f"{math.ceil(1 / share)}, or allow more."
            )
        return AbstentionTarget(max_false_accepts=share)
    if max_abstentions is not None:
        share = to_float("max_abstentions", max_abstentions)
        if not 0 <= share < 1:
            raise OptionError(f"max_abstentions must be at least 0 and below 1, got {share:g}.")
        return AbstentionTarget(max_abstentions=share)
    return AbstentionTarget(max_abstentions=None if base_rows is not None else DEFAULT_MAX_ABSTENTIONS)


def combine(scores: Mapping[str, Tensor], temperatures: Mapping[str, float], weights: Mapping[str, float]) -> Tensor:
    """Return the log probabilities of the adapters, (rows, adapters): a weighted geometric mean of the signals'.

    Args:
        scores: Scores of each signal, (rows, adapters).
        temperatures: Divisor of the scores of each signal.
        weights: Weights of the signals that are combined.
    """
    terms = [weight * log_softmax(scores[signal] / temperatures[signal], dim=1) for signal, weight in weights.items()]
    return log_softmax(torch.stack(terms).sum(0), dim=1)


def confidence(scores: Mapping[str, Tensor], log_probabilities: Tensor, kind: str) -> Tensor:
    """Return the confidence in the most probable adapter of each row, (rows,) float64.

    Args:
        scores: Scores of each signal, (rows, adapters).
        log_probabilities: Combined log probabilities, (rows, adapters).
        kind: "probability" or a signal.
    """
    best = log_probabilities.argmax(1, keepdim=True)
    values = log_probabilities.exp() if kind == PROBABILITY else scores[kind]
    return values.gather(1, best)[:, 0].double()


def fit_temperature(scores: Tensor, owners: Tensor) -> float:
    """Return the divisor of the scores with the largest likelihood of the right adapters, on a grid.

    Args:
        scores: Scores of one signal, (rows, adapters).
        owners: Index of the right adapter of each row, (rows,).
    """
    scale = float((scores - scores.mean(1, keepdim=True)).square().mean().sqrt()) or 1.0
    losses = torch.stack([cross_entropy(scores * (inverse / scale), owners) for inverse in _INVERSE_TEMPERATURES])
    return scale / float(_INVERSE_TEMPERATURES[losses.argmin()])


def choose_weights(scores: Mapping[str, Tensor], temperatures: Mapping[str, float], owners: Tensor) -> dict[str, float]:
    """Return the combination of signals that is right on most rows, the single signals included.

    Of combinations that are right equally often, the one with the fewest signals and the largest likelihood is taken.

    Args:
        scores: Scores of each signal, (rows, adapters).
        temperatures: Divisor of the scores of each signal.
        owners: Index of the right adapter of each row, (rows,).
    """
    best: tuple[float, int, float] | None = None
    chosen: dict[str, float] = {}
    for weights in _candidates([signal for signal in SIGNALS if signal in scores]):
        log_probabilities = combine(scores, temperatures, weights)
        accuracy = float((log_probabilities.argmax(1) == owners).double().mean())
        key = accuracy, -len(weights), -float(cross_entropy(log_probabilities, owners))
        if best is None or key > best:
            best, chosen = key, weights
    return chosen


def _candidates(signals: list[str]) -> list[dict[str, float]]:
    found = []
    for size, choices in _WEIGHTS.items():
        for members in combinations(signals, size):
            # equal weights in another order are the same combination
            orders = dict.fromkeys(order for choice in choices for order in permutations(choice))
            found += [dict(zip(members, order, strict=True)) for order in orders]
    return found


def choose_threshold(
    scores: Mapping[str, Tensor],
    log_probabilities: Tensor,
    owners: Tensor,
    base: tuple[Mapping[str, Tensor], Tensor] | None,
    target: AbstentionTarget,
) -> tuple[str, float]:
    """Return the kind of confidence and the threshold that serve the target best.

    With base rows, all kinds are compared. Without, the score of the first signal is the confidence: how close a row is
    to what an adapter was trained on says more of unknown rows than how much closer it is than to other adapters.

    Args:
        scores: Scores of each signal, (rows, adapters).
        log_probabilities: Combined log probabilities of these rows.
        owners: Index of the right adapter of each row, (rows,).
        base: Scores and log probabilities of rows that belong to no adapter.
        target: What to reach.

    Raises:
        OptionError: No threshold reaches the target.
    """
    right = log_probabilities.argmax(1) == owners
    signals = [signal for signal in SIGNALS if signal in scores]
    best: tuple[float, str, float] | None = None
    for kind in (*signals, PROBABILITY) if base is not None else signals[:1]:
        values = confidence(scores, log_probabilities, kind)
        base_values = values[:0] if base is None else confidence(*base, kind)
        found = _best_threshold(values, right, base_values, target)
        if found is not None and (best is None or found[0] > best[0]):
            best = found[0], kind, found[1]
    if best is None:
        raise OptionError(
            f"no threshold reaches max_false_accepts={target.max_false_accepts:g}: it would send all "
            f"{len(owners)} rows of adapters to the base model. Allow more, or pass base_rows that differ from them."
        )
    return best[1], best[2]


def _best_threshold(
    values: Tensor, right: Tensor, base_values: Tensor, target: AbstentionTarget
) -> tuple[float, float] | None:
    """Return the value of the best threshold for a target, and the threshold; None if it is not reached."""
    distinct = torch.tensor(sorted({*values.tolist(), *base_values.tolist()}), dtype=values.dtype)
    # the smallest value routes all rows; the others lie in the middle of two values
    thresholds = torch.cat([distinct[:1], (distinct[1:] + distinct[:-1]) / 2])
    routed = values >= thresholds[:, None]
    routed_right = (routed & right).double().mean(1)
    false_accepts = (base_values >= thresholds[:, None]).double().mean(1) if len(base_values) else torch.zeros(1)
    abstentions = 1 - routed.double().mean(1)
    if target.max_abstentions is not None:
        # the highest threshold that is allowed
        allowed = abstentions <= target.max_abstentions + 1e-12
        gains = -false_accepts + 1e-9 * torch.arange(len(thresholds))
    elif target.max_false_accepts is not None:
        allowed = (false_accepts <= target.max_false_accepts + 1e-12) & (routed.any(1))
        gains = routed_right
    else:
        allowed = torch.ones(len(thresholds), dtype=torch.bool)
        gains = (routed_right + 1 - false_accepts) / 2
    if not bool(allowed.any()):
        return None
    index = int(torch.where(allowed, gains, -torch.inf).argmax())
    return float(gains[index]), float(thresholds[index])
