"""The choice of signals and thresholds, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from eigenlorax.errors import OptionError
from eigenlorax.serving.routing import calibration
from eigenlorax.serving.routing.calibration import AbstentionTarget
from eigenlorax.serving.routing.standardisation import prototype_scores, standardise_on
from planted import generator, normal


def random_scores(seed, rows=40, adapters=5, noise=(1.0, 0.7, 1.5)):
    owners = torch.randint(adapters, (rows,), generator=generator(seed))
    right = one_hot(owners, adapters).float()
    scores = {
        signal: size * (right + level * normal(rows, adapters, seed=seed + place).float())
        for place, (signal, level, size) in enumerate(zip(calibration.SIGNALS, noise, (0.01, 1.0, 30.0), strict=True))
    }
    return scores, owners


def accuracy(scores, owners):
    return (scores.argmax(1) == owners).double().mean().item()


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_a_combination_is_never_worse_than_a_single_signal_on_its_rows(seed, n_signals):
    scores, owners = random_scores(seed)
    scores = dict(list(scores.items())[:n_signals])
    temperatures = {signal: calibration.fit_temperature(each, owners) for signal, each in scores.items()}
    weights = calibration.choose_weights(scores, temperatures, owners)
    assert sum(weights.values()) == pytest.approx(1)
    combined = calibration.combine(scores, temperatures, weights)
    assert accuracy(combined, owners) >= max(accuracy(each, owners) for each in scores.values())


def test_signals_that_know_different_adapters_are_combined():
    owners = torch.arange(4).repeat(25)
    knows = {"centroids": (0, 1), "classifier": (2, 3)}
    scores = {
        signal: torch.where(torch.isin(owners, torch.tensor(known))[:, None], 4.0 * one_hot(owners, 4), 0.0)
        + 0.1 * normal(100, 4, seed=place).float()
        for place, (signal, known) in enumerate(knows.items())
    }
    temperatures = {signal: calibration.fit_temperature(each, owners) for signal, each in scores.items()}
    weights = calibration.choose_weights(scores, temperatures, owners)
    assert weights == {"centroids": 0.5, "classifier": 0.5}
    assert accuracy(calibration.combine(scores, temperatures, weights), owners) == 1
    assert max(accuracy(each, owners) for each in scores.values()) < 0.8


def test_of_equally_good_ones_a_single_signal_is_taken():
    owners = torch.arange(4).repeat(5)
    scores = {signal: one_hot(owners, 4).float() for signal in calibration.SIGNALS}
    temperatures = dict.fromkeys(scores, 1.0)
    assert calibration.choose_weights(scores, temperatures, owners) == {"centroids": 1.0}


@pytest.mark.parametrize("signal", calibration.SIGNALS)
def test_temperatures_have_the_largest_likelihood(signal):
    scores, owners = random_scores(3)
    found = calibration.fit_temperature(scores[signal], owners)
    losses = [float(cross_entropy(scores[signal] / (found * factor), owners)) for factor in (0.8, 1.0, 1.25)]
    assert losses[1] == min(losses)


def brute_force(values, right, base_values, target):
    """The best value of a target over all thresholds between two values."""
    everything = sorted({*values.tolist(), *base_values.tolist()})
    best = None
    for threshold in [everything[0], *((a + b) / 2 for a, b in itertools.pairwise(everything))]:
        routed = [value >= threshold for value in values.tolist()]
        routed_right = sum(r and c for r, c in zip(routed, right.tolist(), strict=True)) / len(routed)
        accepted = sum(value >= threshold for value in base_values.tolist()) / max(len(base_values), 1)
        abstained = 1 - sum(routed) / len(routed)
        if target.max_false_accepts is not None:
            allowed, gain = accepted <= target.max_false_accepts and any(routed), routed_right
        elif target.max_abstentions is not None:
            allowed, gain = abstained <= target.max_abstentions, -accepted
        else:
            allowed, gain = True, (routed_right + 1 - accepted) / 2
        if allowed and (best is None or gain > best):
            best = gain
    return best


def figures(scores, combined, kind, threshold, owners):
    values = calibration.confidence(scores, combined, kind)
    routed = values >= threshold
    return (routed & (combined.argmax(1) == owners)).double().mean().item(), routed.double().mean().item()


@pytest.mark.parametrize(
    "target",
    [
        AbstentionTarget(),
        AbstentionTarget(max_false_accepts=0.1),
        AbstentionTarget(max_false_accepts=0.5),
        AbstentionTarget(max_abstentions=0.0),
        AbstentionTarget(max_abstentions=0.2),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_the_best_of_all(target, seed):
    scores, owners = random_scores(seed, noise=(0.4, 0.5, 0.6))
    base_scores = {signal: 0.5 * each for signal, each in random_scores(seed + 50)[0].items()}
    temperatures = {signal: calibration.fit_temperature(each, owners) for signal, each in scores.items()}
    weights = {"centroids": 0.5, "prototypes": 0.5}
    combined, base_combined = (calibration.combine(each, temperatures, weights) for each in (scores, base_scores))
    kind, threshold = calibration.choose_threshold(scores, combined, owners, (base_scores, base_combined), target)
    right = combined.argmax(1) == owners
    wanted = max(
        brute_force(
            calibration.confidence(scores, combined, each),
            right,
            calibration.confidence(base_scores, base_combined, each),
            target,
        )
        or -1
        for each in (*scores, "probability")
    )
    routed_right, routed = figures(scores, combined, kind, threshold, owners)
    _, accepted = figures(base_scores, base_combined, kind, threshold, owners)
    if target.max_false_accepts is not None:
        assert accepted <= target.max_false_accepts
        assert routed_right == pytest.approx(wanted)
    elif target.max_abstentions is not None:
        assert 1 - routed <= target.max_abstentions + 1e-12
        assert -accepted == pytest.approx(wanted)
    else:
        assert (routed_right + 1 - accepted) / 2 == pytest.approx(wanted)


def test_without_base_rows_as_many_rows_abstain_as_allowed():
    scores, owners = random_scores(1)
    combined = log_softmax(scores["centroids"], dim=1)
    kind, threshold = calibration.choose_threshold(scores, combined, owners, None, AbstentionTarget(None, 0.25))
    assert kind == "centroids"
    assert figures(scores, combined, kind, threshold, owners)[1] == 0.75


def test_a_share_of_false_accepts_that_no_threshold_reaches_is_an_error():
    scores, owners = random_scores(1)
    scores = {"centroids": scores["centroids"]}
    base = {"centroids": scores["centroids"] + 100}
    combined = [log_softmax(each["centroids"], dim=1) for each in (scores, base)]
    # no probability tells them apart, either
    with pytest.raises(OptionError, match=r"no threshold reaches max_false_accepts=0.01: .* all 40 rows"):
        calibration.choose_threshold(
            scores, combined[0], owners, (base, 0 * combined[1]), AbstentionTarget(max_false_accepts=0.01)
        )


class TestStandardisation:
    def test_prototypes_that_fit_everything_no_longer_win(self):
        owners = torch.arange(3).repeat(30)
        # adapter 0 fits all inputs well; in the second module all rows are alike
        cosines = torch.stack(
            [
                0.1 + 0.02 * one_hot(owners, 3) + torch.tensor([0.5, 0.0, 0.0]) + 0.001 * normal(90, 3, seed=1).float(),
                torch.full((90, 3), 0.3),
            ],
            dim=1,
        )
        has_module = torch.ones(2, 3, dtype=torch.bool)
        assert accuracy(prototype_scores(cosines, has_module, None), owners) < 0.4
        scores = prototype_scores(cosines, has_module, standardise_on(cosines))
        assert accuracy(scores, owners) == 1
        # rows that differ from the calibration's where those were all alike count for nothing
        moved = cosines + torch.tensor([0.0, 0.1])[:, None]
        torch.testing.assert_close(prototype_scores(moved, has_module, standardise_on(cosines)), scores)

    def test_the_mean_is_over_the_modules_of_each_adapter(self):
        cosines = torch.tensor([[[0.2, 0.6], [0.4, 0.0]]])
        has_module = torch.tensor([[True, True], [True, False]])
        torch.testing.assert_close(prototype_scores(cosines, has_module, None), torch.tensor([[0.3, 0.6]]))
