"""Versions of one run among adapters: by their names, or by the path of their updates."""

from pathlib import Path

import pytest
import torch

from eigenlorax import read_adapter
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis import runs
from eigenlorax.reports.analysis.pairs import products
from eigenlorax.train import demo
from made import WIDE, one_start, pairs_of, random, with_a_mean
from planted import generator

LINEAGES = Path(__file__).parents[4] / "shared" / "zoo" / "lineages"


def walk(n, d=4000, *, seed=0, start=3.0):
    """Inner products of n points of a random walk in d dimensions that begins at a distance of `start` steps from 0."""
    steps = torch.randn(n, d, generator=generator(seed), dtype=torch.float64) / d**0.5
    steps[0] *= start
    points = steps.cumsum(0)
    return points @ points.mT


def shuffled(matrix, seed=1):
    order = torch.randperm(len(matrix), generator=generator(seed)).tolist()
    return matrix[order][:, order], order


def strangers(n):
    return [f"{chr(97 + index)}-adapter" for index in range(n)]


@pytest.mark.parametrize("n", [5, 9, 40, 300])
def test_a_random_walk_is_found_without_names_and_in_its_order(n):
    matrix, order = shuffled(walk(n))
    (run,) = runs.find_runs(matrix, ["x"] * n)
    assert [order[index] for index in run] == list(range(n))


def test_two_runs_are_two():
    first, second = walk(8, seed=1), walk(6, seed=2)
    (longer, shorter) = runs.find_runs(torch.block_diag(second, first), strangers(14))
    assert (longer, shorter) == (list(range(6, 14)), list(range(6)))


def test_names_are_the_order():
    matrix, order = shuffled(walk(12))
    (run,) = runs.find_runs(matrix, [f"run-{index}" for index in order])
    assert [order[index] for index in run] == list(range(12))


@pytest.mark.parametrize("stem", ["checkpoint-", "my_run_step", "epoch_", "Epoch", "ckpt"])
def test_three_with_names_of_steps_are_enough(stem):
    names = [f"{stem}{number}" for number in (500, 1500, 1000)]
    assert runs.find_runs(walk(3)[[0, 2, 1]][:, [0, 2, 1]], names) == [[0, 2, 1]]
    assert runs.find_runs(walk(3), strangers(3)) == []


@pytest.mark.parametrize("names", [strangers(9), [f"checkpoint-{index}" for index in range(9)]])
@pytest.mark.parametrize("collection", [random(9), one_start(9, trained=0.4)], ids=["random", "one start"])
def test_independent_adapters_are_no_versions_whatever_their_names_are(collection, names):
    assert runs.find_runs(pairs_of(collection, WIDE).delta, names) == []


@pytest.mark.parametrize("n", [5, 9, 30])
def test_adapters_with_a_common_mean_are_no_versions(n):
    assert runs.find_runs(pairs_of(with_a_mean(n, share=0.8), WIDE).delta, [f"user-{i}" for i in range(n)]) == []


def test_copies_are_no_path():
    two = walk(2)
    matrix = two[[0, 0, 0, 1, 1, 1]][:, [0, 0, 0, 1, 1, 1]]
    assert runs.find_runs(matrix, strangers(6)) == []


def test_changes_are_distances_of_consecutive_ones_to_the_larger_norm():
    points = torch.tensor([[3.0, 0.0], [3.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
    assert runs.changes(points @ points.mT, [0, 1, 2]).tolist() == pytest.approx([0.8, 0.8])


def inner_products(folders):
    adapters = [read_adapter(folder) for folder in folders]
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for module in adapters[0].specs:
        factors = [adapter.modules[module] for adapter in adapters]
        total += products(pad_factors(factors, factors[0].down.shape[1], factors[0].up.shape[0]))
    return total


def test_real_adapters_that_were_trained_separately():
    folders = [*(demo.data() / "one_seed" / "adapters").iterdir()]
    assert runs.find_runs(inner_products(folders), [f"checkpoint-{i}" for i in range(len(folders))]) == []


@pytest.mark.skipif(not LINEAGES.is_dir(), reason=f"{LINEAGES} is not there")
@pytest.mark.parametrize("named", [True, False])
def test_real_checkpoints(named):
    folders = sorted((LINEAGES / "roberta-portuguese").glob("checkpoint-*"))
    steps = [int(folder.name.partition("-")[2]) for folder in folders]
    (run,) = runs.find_runs(inner_products(folders), [folder.name for folder in folders] if named else ["x"] * 18)
    # the learning rate ends at 0: the last two are equal but for 0.001 of their norm, and either may be the last
    ordered = len(steps) if named else len(steps) - 2
    assert [steps[index] for index in run][:ordered] == sorted(steps)[:ordered]
    assert len(run) == len(steps)
