"""Packs for an error: every adapter, saved, opened and exported, is within it, by dense matrices in float64."""

import math

import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
from coded_collections import COLLECTIONS, changed, of_ranks, shared, true_errors
from eigenlorax.errors import NonFiniteError, OptionError
from planted import random_collection, tree

ERRORS = (1e-5, 0.001, 0.02, 0.1, 0.3, 0.5, 0.9)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::eigenlorax.errors.{name}")
    for name in ("UntrainedAdapterWarning", "DuplicateAdapterWarning")
]
# every error on one collection, and one error on each of the others, so that each error has its turn
SWEPT = "ranks that differ"
CASES = [(SWEPT, error) for error in ERRORS] + [
    (name, ERRORS[(2 * number) % len(ERRORS)]) for number, name in enumerate(COLLECTIONS) if name != SWEPT
]
# where whole components come and go, or all adapters are one: errors jump
JUMPING = 0.75


def tensor_bytes(folder):
    """All but heads."""
    found = [load_file(file) for file in folder.rglob("*.safetensors")]
    return sum(
        t.nbytes for file in found for key, t in file.items() if "classifier" not in key and key != "eigenlorax_heads"
    )


def size(pack):
    figures = pack.summary.bytes
    return figures.basis + figures.coefficients + figures.carried


@pytest.mark.slow
@pytest.mark.parametrize(("name", "error"), CASES)
def test_every_adapter_is_within_the_error(tmp_path, name, error):
    originals = COLLECTIONS[name]()
    ex.fit(originals, max_error=error).save(tmp_path / "pack")
    pack = ex.Pack.open(tmp_path / "pack")
    found = true_errors(pack, originals)
    assert max(found.values()) <= error
    assert max(found.values()) > JUMPING * error
    recorded = {name: record.delta_error for name, record in pack.records.items()}
    assert found == pytest.approx(recorded, abs=1e-6, rel=0)
    assert size(pack) == tensor_bytes(tmp_path / "pack")
    assert (pack.is_coded, pack.aim) == (True, error)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_export_in_another_dtype_loses_what_it_says(tmp_path, dtype):
    originals = shared(5)
    pack = ex.fit(originals, max_error=0.02)
    for one in originals:
        kept = pack.adapter(one.name, dtype)
        error = true_errors(ex.fit([kept], max_error=1e-5), [kept])[one.name]
        assert error <= 1e-5
        assert pack.export_rounding(one.name, dtype) < (1e-6 if dtype is torch.float32 else 1e-3)


def test_updates_that_are_orders_smaller_than_an_adapters_others_are_left_out():
    originals = [changed(one, down=1.0) for one in random_collection(3)]
    for one in originals:
        one.modules["encoder.0.query"].down.mul_(1e-9)
    pack = ex.fit(originals, max_error=0.01)
    assert max(true_errors(pack, originals).values()) <= 0.01
    for one in originals:
        assert not pack.packed(one.name).coefficients["encoder.0.query"].down.any()


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_it_is_the_same_bytes_in_any_order(tmp_path):
    originals = COLLECTIONS["three groups"]()
    orders = originals, originals[5::-1] + originals[6:]
    packs = [ex.fit(adapters, max_error=0.3) for adapters in orders]
    assert packs[0].notes == ["The adapters form 3 groups, each with its own bases."]
    first, second = (tree(pack.save(tmp_path / str(number))) for number, pack in enumerate(packs))
    assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_pack_that_was_opened_is_saved_elsewhere_as_the_same_bytes(tmp_path):
    for name in ("shared", "three groups", "convolutions", "an untrained one", "modules that some lack"):
        first = ex.fit(COLLECTIONS[name](), max_error=0.2).save(tmp_path / name / "first")
        second = ex.Pack.open(first).save(tmp_path / name / "second")
        assert tree(second) == tree(first)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_larger_error_takes_fewer_bytes():
    for name in ("shared", "unshared"):
        sizes = [size(ex.fit(COLLECTIONS[name](), max_error=error)) for error in (0.001, 0.1, 0.3, 0.9)]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("error", [1e-7, 1e-9])
def test_an_error_that_float32_cannot_keep_is_refused(error):
    with pytest.raises(OptionError, match=f"max_error={error:g} is less than numbers in float32 can keep: .*1e-6"):
        ex.fit(random_collection(2), max_error=error)


@pytest.mark.parametrize("size", [1e-45, 1e40])
def test_numbers_that_float32_cannot_hold_are_refused(size):
    originals = [changed(one, down=size, up=size) for one in of_ranks([2, 3], dtype=torch.float64)]
    message = r"Adapter 'a0-\d', module encoder.0.dense: .* outside the range of float32"
    with pytest.raises(NonFiniteError, match=message):
        ex.fit(originals, max_error=0.1)
    assert max(true_errors(ex.fit(originals, max_error=0.1, dtype="float64"), originals).values()) <= 0.1


def test_cores_have_the_rank_that_comes_back():
    """An adapter of rank 1 among others of rank 8 in five directions: what it loses is what rank 1 can give."""
    originals = of_ranks([1, 1, 1, 8, 8, 8, 8, 8])
    pack = ex.fit(originals, max_error=0.1)
    recorded = {name: record.delta_error for name, record in pack.records.items()}
    assert true_errors(pack, originals) == pytest.approx(recorded, abs=1e-7, rel=0)
    forms = {one.core_level > 0 for name in pack.names for one in codes_of(pack, name).modules.values()}
    assert True in forms


def codes_of(pack, name):
    return pack.packed(name).coefficients._codes


def test_errors_are_near_what_was_asked_for():
    pack = ex.fit(COLLECTIONS["unshared"](), max_error=0.1)
    for record in pack.records.values():
        assert 0.985 * 0.1 < record.delta_error <= 0.1
    assert math.isclose(max(p.error for p in pack.frontier if p.error <= 0.1), 0.1, rel_tol=0.005)
