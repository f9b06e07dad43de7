"""What scores say: intervals whose answer is known, lines of the table, and words that carry no more than these."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from eigenlorax.reports.numbers import plural
from eigenlorax.train import comparison_summary, metrics
from eigenlorax.train.comparison_summary import Difference, MethodRun, difference

ROWS = 1000


def right(share, seed, n=ROWS):
    """A character a row, of which exactly this share is 1, in an order drawn by the seed."""
    digits = ["1"] * round(share * n) + ["0"] * (n - round(share * n))
    random.Random(seed).shuffle(digits)
    return "".join(digits)


class TestADifference:
    def test_of_the_same_predictions_is_none_at_all(self):
        same = [right(0.8, 0), right(0.7, 1)]
        found = difference(same, same)
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
        assert found.is_noise

    def test_is_paired_by_rows(self):
        """Rows that both get wrong are as good as not there: 5 % that one alone has right stand for themselves."""
        theirs = right(0.7, 0)
        places = [place for place, one in enumerate(theirs) if one == "0"][:50]
        mine = "".join("1" if place in places else one for place, one in enumerate(theirs))
        found = difference([mine], [theirs])
        assert found.value == pytest.approx(0.05)
        # what a binomial share of 5 % among as many rows has
        half = 1.96 * math.sqrt(0.05 * 0.95 / ROWS)
        assert found.low == pytest.approx(0.05 - half, abs=0.002)
        assert found.high == pytest.approx(0.05 + half, abs=0.002)
        assert not found.is_noise

    def test_of_chance_alone_is_noise(self):
        found = difference([right(0.80, 0)], [right(0.79, 1)])
        assert found.value == pytest.approx(0.01)
        assert found.is_noise

    def test_counts_what_seeds_make_of_it(self):
        all_right, all_wrong = "1" * ROWS, "0" * ROWS
        found = difference([all_right, all_wrong], [all_wrong, all_right])
        assert (found.value, found.low, found.high) == (0.0, -1.0, 1.0)

    def test_is_the_same_each_time_and_the_other_way_round(self):
        mine, theirs = [right(0.8, 0), right(0.82, 2)], [right(0.75, 1), right(0.77, 3)]
        one, other = difference(mine, theirs), difference(theirs, mine)
        assert difference(mine, theirs) == one
        assert one.value == pytest.approx(-other.value) == pytest.approx(0.05)
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.003)

    def test_in_points(self):
        assert comparison_summary.format_points(Difference(0.0123, -0.004, 0.03)) == "+1.2 (-0.4 to +3.0)"


def made(method, share, *, numbers, scores=((0.5, 0.6, 0.7, 0.7),), rate=0.01):
    return [
        MethodRun(
            method=method,
            learning_rate=rate,
            seed=seed,
            numbers=numbers,
            head_numbers=9,
            file_bytes=4 * numbers,
            score=one.count("1") / ROWS,
            accuracy=one.count("1") / ROWS,
            f1_macro=0.7 + 0.1 * seed,
            loss=0.5,
            right=one,
            resampled=[],
            steps=[5, 10, 15, 20],
            scores=list(scores[seed % len(scores)]),
            seconds=2.0 + seed,
        )
        for seed in range(2)
        for one in [right(share, 0)]
    ]


TRIED = {"lora": {0.001: 0.7, 0.01: 0.8, 0.1: None}, "core": {0.01: 0.8, 0.1: 0.7}}


def table_of(runs, tried=None):
    tried = tried or {name: {0.01: None} for name in runs}
    return comparison_summary.summarise(runs, tried, next(iter(runs)))


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1 epoch"), (1.0, "1 epoch"), (1.5, "1.5 epochs"), (12345, "12,345 epochs")]
)
def test_some(number, text):
    assert plural(number, "epoch") == text


class TestAnotherMetric:
    """The interval of accuracies by resampling is that of `difference`, which draws rows in another way."""

    def test_has_an_interval_of_resampled_rows_and_seeds(self):
        labels = np.arange(ROWS) % 2
        mine, theirs = ([right(share, seed) for seed in (0, 1)] for share in (0.8, 0.7))

        def runs_of(rows):
            runs = []
            for run, digits in zip(made("core", 0.5, numbers=9), rows, strict=True):
                hits = np.array([digit == "1" for digit in digits])
                logits = np.eye(2)[np.where(hits, labels, 1 - labels)]
                resampled = comparison_summary.resample(metrics.accuracy, logits, labels)
                runs.append(replace(run, score=float(hits.mean()), resampled=resampled))
            return runs

        found, wanted = (
            comparison_summary.resampled_difference(runs_of(mine), runs_of(theirs)),
            difference(mine, theirs),
        )
        assert found.value == pytest.approx(wanted.value)
        # the ends of 1,000 draws have a standard error of about 0.001
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.005)

    def test_is_undefined_on_some_draws(self):
        labels = np.array([0] * 20 + [1])

        def both_classes(logits, drawn):
            if len(set(drawn)) < 2:
                raise ValueError("one class")
            return 0.5

        draws = comparison_summary.resample(both_classes, np.eye(2)[labels], labels)
        # the class of one row is left out with the probability (20/21)^21
        assert draws.count(None) / len(draws) == pytest.approx((20 / 21) ** 21, abs=0.05)
        run = replace(made("core", 0.5, numbers=9)[0], score=0.5, resampled=draws)
        assert comparison_summary.resampled_difference([run], [run]) == Difference(0.0, 0.0, 0.0)

    def test_below_zero_reaches_two_per_cent_below_the_baseline(self):
        runs = {
            "lora": made("lora", 0.9, numbers=100, scores=((-0.9, -0.8, -0.7, -0.5),)),
            "core": made("core", 0.9, numbers=20, scores=((-0.9, -0.52, -0.509, -0.4),)),
        }
        lora, core = table_of(runs)
        assert (lora.steps, core.steps) == (20, 15)


class TestTheTable:
    def test_of_means_and_steps(self):
        curves = ((0.2, 0.79, 0.9, 1.0), (0.4, 0.79, 1.0, 1.0))
        runs = {
            "lora": made("lora", 0.9, numbers=100, scores=((0.1, 0.2, 0.3, 0.8),)),
            "core": [
                replace(one, score=0.8 + 0.1 * seed)
                for seed, one in enumerate(made("core", 0.85, numbers=20, scores=curves))
            ],
        }
        lora, core = table_of(runs, TRIED)
        assert (lora.method, lora.difference, lora.steps, lora.curve) == ("lora", None, 20, [0.1, 0.2, 0.3, 0.8])
        # 98 % of 0.8 are 0.784
        assert (core.steps, core.curve) == (10, pytest.approx([0.3, 0.79, 0.95, 1.0]))
        assert (core.numbers, core.head_numbers, core.file_bytes, core.seconds) == (20, 9, 80, 2.5)
        assert core.scores == pytest.approx([0.8, 0.9])
        assert (core.mean, core.spread) == pytest.approx((0.85, math.sqrt(0.005)))
        assert (core.accuracy, core.f1_macro) == pytest.approx((0.85, 0.75))
        assert core.rates == {"0.01": 0.8, "0.1": 0.7}
        assert core.difference.value == pytest.approx(-0.05)

    def test_of_what_never_gets_there(self):
        runs = {
            "lora": made("lora", 0.9, numbers=100, scores=((0.1, 0.2, 0.3, 0.8),)),
            "core": made("core", 0.9, numbers=20, scores=((0.1, 0.2, 0.3, 0.78),)),
        }
        assert [line.steps for line in table_of(runs)] == [20, None]


def said(runs, tried=None, majority=0.5):
    return comparison_summary.findings(runs, table_of(runs, tried), next(iter(runs)), majority, 5000)


class TestWords:
    def test_call_a_difference_one_and_noise_noise(self):
        runs = {
            "lora": made("lora", 0.90, numbers=1200),
            "core": made("core", 0.80, numbers=100),
            "factors": [replace(one, method="factors") for one in made("lora", 0.90, numbers=1200)],
        }
        core, factors, basis, brackets = said(runs)
        assert core.startswith("core: 10.0 points below lora (-1")
        assert core.endswith("), with 1/12 of its parameters.")
        assert "noise" not in core
        assert factors == "factors: level with lora (+0.0 to +0.0, which may be noise), with as many parameters."
        assert (
            basis
            == "basis: core and factors need the pack's basis too, 5,000 bytes, once for all adapters of the pack."
        )
        assert brackets == "in brackets: 95 % intervals, over 2 seeds and 1,000 rows."

    @pytest.mark.parametrize(
        ("share", "part"),
        [
            (0.70, "the pack's subspace helps on this task; factors are 15.0 points above factors over"),
            (
                0.95,
                "the pack's subspace hurts on this task; factors are 10.0 points below factors over random",
            ),
            (
                0.849,
                "no clear effect of the pack's subspace on this task; factors are 0.1 points above factors over",
            ),
        ],
    )
    def test_of_a_random_basis(self, share, part):
        runs = {"lora": made("lora", 0.9, numbers=9), "factors": made("factors", 0.85, numbers=3)}
        runs["random"] = [replace(one, right=right(share, 5)) for one in made("random", share, numbers=3)]
        (found,) = [one for one in said(runs) if one.startswith("random basis: ")]
        assert part in found
        assert found.endswith(").")

    def test_of_small_methods_and_of_rates_at_an_edge(self):
        runs = {
            name: made(name, share, numbers=numbers)
            for name, share, numbers in [
                ("lora", 0.9, 96),
                ("factors", 0.8, 40),
                ("vera", 0.6, 30),
                ("lora-xs", 0.9, 36),
            ]
        }
        tried = {name: {0.001: 0.5, 0.01: 0.7, 0.1: 0.6} for name in runs} | {"vera": {0.01: 0.7, 0.1: 0.6}}
        found = said(runs, tried)
        assert found[0].endswith("with 1/2 of its parameters.")
        assert found[1].startswith("compared with factors (40 parameters): vera (30) 20.0 points below (-2")
        assert " and lora-xs (36) 10.0 points above (+" in found[1]
        assert found[-1].startswith("learning rates: the chosen rate is the lowest or the highest one tried for vera. ")

    def test_of_a_method_alone(self):
        runs = {"lora": made("lora", 0.9, numbers=96)}
        assert said(runs) == []

    def test_of_what_has_learned_nothing(self):
        runs = {"lora": made("lora", 0.9, numbers=96), "head": made("head", 0.6, numbers=0)}
        start = "no better than the most frequent class: "
        assert said(runs, majority=0.6)[0].startswith(f"{start}head. Their rows say nothing about the method")
        assert said(runs, majority=0.95)[0].startswith(f"{start}lora, head. ")
        assert not any(one.startswith(start) for one in said(runs, majority=0.59))
