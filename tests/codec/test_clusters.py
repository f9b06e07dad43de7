"""Groups of adapters: planted ones are found, and used where that saves bytes; where there are none, none are."""

from dataclasses import replace

import pytest
import torch
from test_encoder import size

import eigenlorax as ex
from coded_collections import grouped, of_ranks, shared
from eigenlorax.codec import clusters, encoder
from eigenlorax.codec.svd_batch import SvdBatch
from planted import MODULES, random_collection

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_shape_checks")]

NOTE = "The adapters form {} groups, each with its own bases."


def similarity_of(adapters):
    """The similarity over all modules, and the adapters that were sampled."""
    sampled = clusters.sample_adapters(len(adapters))
    similarity = torch.zeros(len(adapters), len(sampled), dtype=torch.float64)
    for module in MODULES:
        updates = SvdBatch.of([adapter.modules[module] for adapter in adapters])
        similarity += clusters.similarities(updates, 1 / updates.s.square().sum(1).sqrt(), sampled)
    return similarity, sampled


def test_similarities_are_those_of_dense_matrices():
    adapters = of_ranks([2, 3, 1, 2])
    similarity, sampled = similarity_of(adapters)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for module in MODULES:
        dense = [f.scaling * f.up.double() @ f.down.double() for f in (one.modules[module] for one in adapters)]
        dense = [one / one.norm() for one in dense]
        for i, one in enumerate(dense):
            for j, other in enumerate(dense):
                left, s, right = torch.linalg.svd(one, full_matrices=False)
                other_left, t, other_right = torch.linalg.svd(other, full_matrices=False)
                wanted[i, j] += ((left * s).mT @ (other_left * t)).square().sum()
                wanted[i, j] += ((right * s[:, None]) @ (other_right * t[:, None]).mT).square().sum()
    assert sampled == [0, 1, 2, 3]
    torch.testing.assert_close(similarity, wanted)


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_planted_groups_are_found(groups):
    adapters = grouped(groups, 6, noise=0.05)
    found = clusters.candidate_groupings(*similarity_of(adapters))
    assert [number // 6 for number in range(6 * groups)] in found


def test_no_groups_are_found_where_there_are_none():
    for adapters in (shared(12), random_collection(12), of_ranks([3] * 12, noise=0.2)):
        for labels in clusters.candidate_groupings(*similarity_of(adapters)):
            assert max(labels) < 12 // clusters.MIN_GROUP
        assert ex.fit(adapters, max_error=0.2).notes == []


def test_many_adapters_are_compared_with_a_sample():
    assert clusters.sample_adapters(1000) == sorted(set(clusters.sample_adapters(1000)))
    assert len(clusters.sample_adapters(1000)) == clusters.MAX_SAMPLE
    assert clusters.sample_adapters(3) == [0, 1, 2]


@pytest.mark.parametrize(("groups", "options"), [(4, {"max_error": 0.05}), (3, {"ratio": 6.0})])
def test_clusters_save_bytes(monkeypatch, groups, options):
    adapters = grouped(groups, 5, noise=0.02)
    apart = ex.fit(adapters, **options)
    assert apart.notes == [NOTE.format(groups)]
    monkeypatch.setattr(encoder, "split_into_clusters", lambda whole, *_: whole)
    together = ex.fit(adapters, **options)
    assert together.notes == []
    if "ratio" in options:
        assert apart.aim < 0.9 * together.aim
    else:
        assert size(apart) < 0.9 * size(together)


@pytest.mark.parametrize("related", [15, 25])
def test_unrelated_adapters_are_a_group_apart_from_related_ones(related):
    """In one pack, the two take the bytes of two packs."""
    adapters = shared(related, noise=0.02), random_collection(20)
    mixed = ex.fit([*adapters[0], *(replace(one, name=f"other-{one.name}") for one in adapters[1])], max_error=0.1)
    assert mixed.notes == [NOTE.format(2)]
    assert size(mixed) < 1.02 * sum(size(ex.fit(each, max_error=0.1)) for each in adapters)


def test_an_adapter_has_nothing_on_the_bases_of_others():
    pack = ex.fit(grouped(3, 6), max_error=0.05)
    blocks = set()
    for name in pack.names:
        for one in pack.packed(name).coefficients.values():
            used = one.down.any(0).nonzero()[:, 0]
            blocks.add((int(used.min()) // 4, int(used.max()) // 4))
    assert blocks == {(0, 0), (1, 1), (2, 2)}
