"""What a process holds between the stages of a fit."""

import pickle

import pytest
import torch

from eigenlorax.codec.held_updates import HeldUpdates
from eigenlorax.codec.module_updates import ModuleUpdates, UpdateSource
from eigenlorax.core.adapter import LoRAFactors
from planted import normal

N, SHAPE, RANK = 4, (11, 7), 2


class Reads:
    """Counts how often the factors of an adapter are read."""

    def __init__(self):
        self.count = 0

    def source(self, index):
        def read():
            self.count += 1
            return LoRAFactors(normal(RANK, SHAPE[1], seed=index), normal(SHAPE[0], RANK, seed=100 + index), 1.0)

        return UpdateSource(index, read)


@pytest.fixture
def reads():
    return Reads()


@pytest.fixture
def module(reads):
    return ModuleUpdates("layer", SHAPE, tuple(reads.source(index) for index in range(N)))


def test_a_module_is_decomposed_once(module, reads):
    held = HeldUpdates(2**20)
    first = held.svd_batch(module)
    assert held.svd_batch(module) is first
    assert reads.count == N


def test_clusters_select_their_updates(module, reads):
    held = HeldUpdates(2**20)
    whole = held.svd_batch(module)
    for cluster, part in enumerate(module.split([0, 1, 0, 1])):
        torch.testing.assert_close(held.svd_batch(part).s, whole.s[[cluster, cluster + 2]])
    assert reads.count == N


@pytest.mark.parametrize("max_bytes", [0, 100])
def test_without_room_it_is_decomposed_each_time(module, reads, max_bytes):
    held = HeldUpdates(max_bytes)
    assert torch.equal(held.svd_batch(module).u, held.svd_batch(module).u)
    assert reads.count == 2 * N


def test_another_process_holds_its_own(module, reads):
    held = HeldUpdates(2**20)
    held.svd_batch(module)
    pickled = pickle.dumps(held)
    # here in place of the other process
    other = pickle.loads(pickled)
    other.svd_batch(module)
    assert reads.count == 2 * N
    pickle.loads(pickled).svd_batch(module)
    assert reads.count == 2 * N


def test_another_fit_frees_what_was_held(module, reads):
    first, second = (pickle.dumps(HeldUpdates(2**20)) for _ in range(2))
    pickle.loads(first).svd_batch(module)
    pickle.loads(second)
    pickle.loads(first).svd_batch(module)
    assert reads.count == 2 * N
