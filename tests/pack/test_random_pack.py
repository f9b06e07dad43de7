"""Random packs: the shapes of another pack, components that depend on the seed alone, and all that a pack can do."""

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import OptionError
from planted import random_factors

K = 4
SHAPES = {"layer.0.query": (17, 23), "layer.1.dense": (29, 11)}
"""(out, in) of each module."""


def adapters(n=4, rank=3):
    return [
        from_factors(
            f"a{seed}",
            {name: random_factors(rank, *shape, seed=seed, dtype=torch.float32) for name, shape in SHAPES.items()},
        )
        for seed in range(n)
    ]


@pytest.fixture(scope="module")
def pack():
    return ex.fit(adapters(), n_components=K)


def sizes(pack):
    return {name: (bases.down.k, bases.up.k) for name, bases in pack.subspace.modules.items()}


def sides(pack):
    """Module and side → components, float64."""
    return {
        (name, side): bases.side(side).components.double()
        for name, bases in pack.subspace.modules.items()
        for side in ("down", "up")
    }


def test_it_has_the_shapes_of_the_pack_and_nothing_of_its_components(pack):
    control = ex.random_pack(like=pack, seed=0)
    assert len(control) == 0
    assert (control.base_model, control.revision, control.dtype) == (pack.base_model, pack.revision, pack.dtype)
    for key, rows in sides(control).items():
        fitted = sides(pack)[key]
        assert rows.shape == fitted.shape
        torch.testing.assert_close(rows @ rows.mT, torch.eye(K, dtype=torch.float64), atol=1e-6, rtol=0)
        # spans of 4 in 11 or more dimensions share something, but nothing like all
        assert float((rows @ fitted.mT).square().sum()) < 0.8 * K


def test_it_depends_on_the_seed_alone(pack):
    other = ex.fit(adapters(n=7), n_components=K)
    fingerprint = ex.random_pack(pack).info.fingerprint
    assert ex.random_pack(other, seed=0).info.fingerprint == fingerprint
    assert ex.random_pack(pack, seed=1).info.fingerprint != fingerprint
    # packs of other machines and of later versions have this number too
    first = sides(ex.random_pack(pack))["layer.0.query", "down"][0, 0]
    assert float(first) == pytest.approx(0.1119318, abs=1e-6)


def test_no_two_matrices_have_the_same_rows():
    square = {name: random_factors(3, 13, 13, seed=0, dtype=torch.float32) for name in ("a", "b")}
    rows = list(sides(ex.random_pack(ex.fit([from_factors("x", square)], n_components=3))).values())
    for n, one in enumerate(rows):
        assert all(float((one @ other.mT).square().sum()) < 2 for other in rows[:n])


def test_spans_are_uniformly_distributed():
    """The mean projector of many uniform spans of 4 in 11 dimensions is 4/11 of the identity."""
    small = ex.fit([from_factors("x", {"a": random_factors(4, 12, 11, seed=0, dtype=torch.float64)})], n_components=4)
    projectors = [(rows := sides(ex.random_pack(small, seed=seed))["a", "down"]).mT @ rows for seed in range(400)]
    mean = torch.stack(projectors).mean(dim=0)
    # each entry has a standard deviation of about 0.2 in one projector, hence 0.01 in the mean
    torch.testing.assert_close(mean, torch.eye(11, dtype=torch.float64) * 4 / 11, atol=0.05, rtol=0)


def test_it_has_other_sizes_where_the_pack_has():
    pack = ex.fit(adapters(), energy=0.6)
    assert len({k for pair in sizes(pack).values() for k in pair}) > 1
    assert sizes(ex.random_pack(pack)) == sizes(pack)


def test_a_number_of_components_replaces_that_of_the_pack(pack):
    assert sizes(ex.random_pack(pack, n_components=13)) == {"layer.0.query": (13, 13), "layer.1.dense": (11, 13)}


def test_it_is_saved_augmented_and_added_to_as_any_pack_is(pack, tmp_path):
    control = ex.random_pack(pack, seed=5)
    control.save(tmp_path / "pack")
    opened = ex.Pack.open(tmp_path / "pack")
    assert opened.info == control.info
    assert opened.fit_info == control.fit_info
    assert ex.random_pack(tmp_path / "pack", seed=5).info.fingerprint == control.info.fingerprint
    # the same seed gives other rows to the augmentation than to the pack
    grown = opened.augment(3, seed=5)
    for rows in sides(grown).values():
        torch.testing.assert_close(rows @ rows.mT, torch.eye(K + 3, dtype=torch.float64), atol=1e-6, rtol=0)
    error = opened.add(adapters()[0], warn_above=1).delta_error
    assert 0.5 < error < 1
    opened.save()


def test_of_an_entropy_coded_pack_the_basis_counts():
    coded = ex.fit(adapters(), max_error=0.1, basis=3)
    control = ex.random_pack(coded)
    assert set(sizes(control).values()) == {(3, 3)}
    assert (control.storage, control.coefficient_storage) == ("float32", "float32")
    without = ex.fit([from_factors("x", {"a": random_factors(2, 12, 11, seed=0)})], max_error=0.1)
    with pytest.raises(OptionError, match=r"no components whose number could be copied. Pass n_components="):
        ex.random_pack(without)
    assert sizes(ex.random_pack(without, n_components=2)) == {"a": (2, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(pack, options, message):
    with pytest.raises(OptionError, match=message):
        ex.random_pack(pack, **options)
