"""Populations: users whose rows do not overlap, differences coded within a number of bytes, and gains in the table."""

import math
import random
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import population_coding as coding  # noqa: E402
from harness import population_tables, population_training  # noqa: E402
from harness.population_training import Weights, added, difference  # noqa: E402
from harness.population_users import Hand, Reviews, Writers  # noqa: E402

SHAPES = {"first": (48, 64), "second": (56, 40)}
LABELS = 3
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def made(seed: int, size: float = 1.0) -> Weights:
    """Factors of rank 4 and a head."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (torch.randn(4, n_in, generator=generator), size * torch.randn(n_out, 4, generator=generator))
        for name, (n_out, n_in) in SHAPES.items()
    }
    return Weights(factors, torch.randn(LABELS, 11, generator=generator))


def dense(factors):
    return {name: up.double() @ down.double() for name, (down, up) in factors.items()}


@pytest.fixture
def population():
    """A common adapter and three users near it."""
    common = made(0)
    users = [
        Weights(added(common.factors, made(seed, 0.1).factors), common.head + 0.1 * made(seed).head)
        for seed in (1, 2, 3)
    ]
    return common, users


class TestCoding:
    def test_users_take_at_most_the_bytes_and_lose_less_with_more(self, population):
        common, users = population
        bases = coding.empty_bases(coding.svd_batches(users, common))
        errors = []
        for limit in (200, 400, 1200):
            coded = coding.code_users(users, common, bases, limit, head_error=0.2)
            for user, member in zip(users, coded, strict=True):
                assert 0.8 * limit < member.update_bytes + member.head_bytes <= limit
                exact = dense(difference(user.factors, common.factors))
                decoded = dense(member.weights.factors)
                lost = sum(float((decoded[name] - exact[name]).square().sum()) for name in SHAPES)
                assert member.error == pytest.approx(
                    (lost / sum(float(e.square().sum()) for e in exact.values())) ** 0.5
                )
                changed = (user.head - common.head).norm()
                assert (member.weights.head - user.head).norm() <= 0.2 * changed
            errors.append(np.mean([member.error for member in coded]))
        assert errors[0] > errors[1] > errors[2]

    def test_bytes_of_a_user_do_not_depend_on_the_others(self, population):
        common, users = population
        batches = coding.svd_batches(users, common)
        bases = coding.empty_bases(batches)
        together = coding.encode_within(batches, bases, torch.full((3,), 400))
        alone = coding.encode_within(coding.svd_batches(users[1:2], common), bases, torch.full((1,), 400))
        assert together[1] == alone[0]

    def test_bases_that_span_the_differences_leave_less_error(self, population):
        common, users = population
        batches = coding.svd_batches(users, common)
        adapters = [
            coding.ex.from_factors(f"user-{n}", coding.lora_factors(difference(user.factors, common.factors)))
            for n, user in enumerate(users)
        ]
        pack = coding.ex.fit(adapters, n_components=24, dtype="float32", warn_above=1.0)
        bases = coding.pack_bases(pack, batches, step_size=0.05, members=1000)
        assert coding.bases_size(bases) > 1000
        for name, factors in (("alone", coding.empty_bases(batches)), ("over bases", bases)):
            coded = coding.code_users(users, common, factors, 300, head_error=0.3)
            errors = [member.error for member in coded]
            if name == "alone":
                alone = np.mean(errors)
        assert np.mean(errors) < 0.8 * alone


def test_a_sum_and_a_difference_are_those_of_the_updates():
    left, right = made(4), made(5)
    for name in SHAPES:
        exact_left, exact_right = dense(left.factors)[name], dense(right.factors)[name]
        assert torch.allclose(dense(added(left.factors, right.factors))[name], exact_left + exact_right)
        assert torch.allclose(dense(difference(left.factors, right.factors))[name], exact_left - exact_right)


def test_every_row_is_drawn_once_before_any_is_drawn_again():
    drawn = [n for batch in population_training.batch_indices(10, (7, 4), seed=1) for n in batch]
    assert len(drawn) == 28
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))


def test_gains_and_shares_are_those_of_the_users():
    generator = np.random.default_rng(0)
    reference = generator.uniform(0.4, 0.6, 50)
    own = reference + 0.1
    methods = {
        name: {"accuracy": accuracies.tolist()}
        for name, accuracies in (("common", reference), ("own", own), ("coded-8000", reference + 0.098))
    }
    assert population_tables.gain(methods, "own") == "+10.00 ± 0.00"
    assert population_tables.share(methods, "coded-8000") == "98.0 ± 0.0"


def test_a_hand_turns_and_mirrors_a_digit():
    image = np.zeros((28, 28), dtype=np.float32)
    # right of the middle, a little below
    image[15:18, 20:24] = 1
    upright = Hand(angle=0.0, slant=0.0, size=1.0, is_mirrored=False, is_thick=False)
    assert np.allclose(upright.write(image), image, atol=0.01)
    mirrored = replace(upright, is_mirrored=True).write(image)
    assert np.allclose(mirrored, image[:, ::-1], atol=0.01)
    turned = replace(upright, angle=math.pi).write(image)
    assert np.allclose(turned, image[::-1, ::-1], atol=0.01)
    assert replace(upright, is_thick=True).write(image).sum() == pytest.approx(5 * 6, rel=0.01)
    assert replace(upright, size=0.5).write(image).sum() == pytest.approx(12 / 4, rel=0.1)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside this checkout")
@pytest.mark.parametrize("population", [Reviews(), Writers()], ids=["sst5", "mnist"])
def test_rows_of_test_users_are_not_among_those_of_others(population):
    spans = [population.train_spans[role] for role in ("common", "fit", "test")]
    assert all(before.stop <= after.start for before, after in pairwise(spans))
    assert population.train_spans["tuning"] == population.train_spans["fit"]
    assert population.held_out_spans["tuning"].stop <= population.held_out_spans["test"].start


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside this checkout")
def test_a_writer_has_one_hand_and_others_have_other_hands():
    population = Writers()
    user = population.user("test", 3)
    assert 50 <= user.n_rows == len(user.train) <= 200
    assert len(user.held_out) == 300
    again = population.user("test", 3)
    assert all(
        np.array_equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(user.train, again.train, strict=True)
    )
    assert {Hand.of(random.Random(f"mnist test {n}")).is_mirrored for n in range(8)} == {False, True}


def test_a_rater_is_lenient_in_two_topics_and_strict_in_two():
    taste = Reviews()._taste("test", 5)
    lenient, strict = list(taste.values())[:2], list(taste.values())[2:]
    assert len(set(lenient)) == len(set(strict)) == 1
    assert lenient[0] <= strict[0]
