"""Coded packs with a basis for training: beside planted subspaces, and through everything that writes a pack."""

import json
import re
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_read_pack import read_pack

import eigenlorax as ex
from coded_collections import true_errors
from eigenlorax.core import keys, registry
from eigenlorax.errors import OptionError, PackDamagedError
from eigenlorax.pack import basis_adapters
from planted import MODULES, assert_same_span, random_adapter, random_collection, shared_collection, tree

pytestmark = pytest.mark.usefixtures("without_shape_checks")
K = 8


@pytest.fixture(scope="module")
def originals():
    """Adapters that share five and six directions, and one that does not."""
    return [*shared_collection(9)[0], random_adapter("far", 7, rank=6)]


@pytest.fixture(scope="module")
def fitted(originals):
    return ex.fit(originals, max_error=0.05, basis=K)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("saved") / "pack")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pack")


def files(folder):
    """The files of bases in a folder: the subspace's, and the basis's."""
    manifest = json.loads((folder / keys.MANIFEST).read_text())
    return [folder / manifest["subspace"]["file"], folder / manifest["basis"]["subspace"]["file"]]


def shared_names(pack):
    return [name for name in pack.names if name != "far"]


class TestFit:
    def test_is_that_of_a_pack_of_so_many_components(self, originals, fitted):
        alone = ex.fit(originals, n_components=K, dtype="int8")
        assert fitted.basis.info == alone.info
        assert fitted.basis.names == []
        assert fitted.basis.storage == "int8"
        assert fitted.is_coded

    def test_leaves_the_coded_adapters_as_they_are_without_it(self, originals, fitted):
        without = ex.fit(originals, max_error=0.05)
        assert without.basis is None
        assert without.info == fitted.info
        assert all(torch.equal(without.codes(name), fitted.codes(name)) for name in without.names)

    def test_spans_what_was_planted(self):
        adapters, bases = shared_collection(9)
        pack = ex.fit(adapters, max_error=0.05, basis=6)
        for module, (down, up) in bases.items():
            found = pack.basis.subspace.modules[module]
            # eight bits of a row are exact to about a hundredth
            for planted, side in ((down, found.down), (up, found.up)):
                rows = torch.linalg.qr(side.components[: len(planted)].double().mT)[0].mT
                assert_same_span(rows, planted, atol=0.05)

    def test_is_counted_and_stated(self, fitted, folder):
        sizes, opened = fitted.summary.bytes, ex.Pack.open(folder)
        assert sizes.training_basis == sum(tensor.nbytes for tensor in load_file(files(folder)[1]).values())
        assert sizes.pack == sizes.basis + sizes.training_basis + sizes.coefficients
        assert sizes.ratio == pytest.approx(sizes.lora / sizes.pack)
        assert opened.summary == fitted.summary
        written = sum(len(data) for name, data in tree(folder).items() if name != ".lock")
        assert opened.summary.files.pack == written
        assert fitted.summary.basis.down.max == K
        note = next(note for note in fitted.notes if "basis for training" in note)
        assert f"{sizes.training_basis:,} bytes" in note

    def test_counts_in_a_size(self, originals):
        limit = int(1.5 * ex.fit(originals, max_error=0.05, basis=K).summary.bytes.pack)
        pack = ex.fit(originals, max_bytes=limit, basis=K)
        assert 0.9 * limit <= pack.summary.bytes.pack <= limit
        with pytest.raises(OptionError, match="cannot be reached: .* and the basis for training"):
            ex.fit(originals, max_bytes=pack.basis.info.stored_bytes, basis=K)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_components": 4}, "basis=8 adds a basis to an entropy-coded pack"),
            ({"max_error": 0.1, "dtype": "float32"}, "coefficients in a basis already.*fit without a dtype"),
            ({"purpose": "training"}, r"Remove basis \(--basis\), or remove purpose='training' \(--for training\)\.$"),
            ({"max_error": 0.1, "basis": 0}, "basis=0: the number of components per side must be from 1 to 53"),
            ({"max_error": 0.1, "basis": 54}, "basis=54: .* from 1 to 53"),
            ({"max_error": 0.1, "basis": "x"}, "basis must be an integer"),
        ],
    )
    def test_refuses(self, originals, options, message):
        with pytest.raises(OptionError, match=message):
            ex.fit(originals, **{"basis": K, **options})


class TestOnBasis:
    def test_has_those_that_share_the_subspace(self, originals, fitted):
        served = fitted.on_basis(0.2)
        assert served.names == shared_names(fitted)
        assert served.info == fitted.basis.info
        errors = true_errors(served, [one for one in originals if one.name in served.names])
        for name, record in served.records.items():
            assert errors[name] <= record.delta_error <= 0.2
            assert record.bound
            # the triangle inequality is no more than the two errors and their product
            assert record.delta_error >= fitted.records[name].delta_error

    def test_far_ones_are_bounded_too(self, originals, fitted):
        served = fitted.on_basis(0.999)
        assert served.names == fitted.names
        errors = true_errors(served, originals)
        assert 0.2 < errors["far"] <= served.records["far"].delta_error

    def test_of_adapters_that_share_nothing(self):
        originals = random_collection(6)
        pack = ex.fit(originals, max_error=0.05, basis=3)
        errors = [basis_adapters.project(pack, name).record.delta_error for name in pack.names]
        within = sorted(errors)[2]
        with pytest.raises(OptionError, match="represents none of 6 adapters with an error of at most 0.1") as refused:
            pack.on_basis()
        assert f"the smallest upper bound is {min(errors):.3f}" in str(refused.value)
        assert "AdapterBank(model, pack)" in str(refused.value)
        enough = float(re.search(r"within=([\d.]+)", str(refused.value))[1])
        assert pack.on_basis(enough).names != []
        assert len(pack.on_basis(within).names) == 3

    def test_default(self, originals, fitted):
        assert fitted.on_basis().names == fitted.on_basis(0.1).names
        coarse = ex.fit(originals, max_error=0.3, basis=K)
        assert coarse.on_basis().names == coarse.on_basis(0.6).names == shared_names(coarse)

    def test_can_be_saved(self, fitted, tmp_path):
        served = fitted.on_basis(0.2)
        opened = ex.Pack.open(served.save(tmp_path / "served"))
        opened.verify()
        assert opened.summary == served.summary
        for name in served.names:
            for module, factors in served.adapter(name).modules.items():
                assert torch.equal(opened.adapter(name).modules[module].down, factors.down)

    def test_refuses(self, originals, fitted):
        with pytest.raises(OptionError, match="no basis beside its subspace. Fit it with basis=32"):
            ex.fit(originals, max_error=0.1).on_basis()
        with pytest.raises(OptionError, match="coefficients in it already"):
            ex.fit(originals, n_components=4).on_basis()
        with pytest.raises(OptionError, match="^within must be above 0 and below 1, got 1.0"):
            fitted.on_basis(1)


class TestOnDisk:
    def test_round_trip_to_the_byte(self, folder, tmp_path):
        opened = ex.Pack.open(folder)
        assert tree(opened.save(tmp_path / "copy")) == tree(folder)
        before = tree(folder)
        opened.save()
        assert tree(folder) == before

    def test_is_read_by_the_specification(self, folder):
        opened = ex.Pack.open(folder)
        found = read_pack.training_basis(folder)
        assert set(found) == set(MODULES)
        for module, rows in found.items():
            bases = opened.basis.subspace.modules[module]
            for side, expected in zip((bases.down, bases.up), rows, strict=True):
                np.testing.assert_array_equal(side.components.double().numpy(), expected)

    def test_is_a_pack_to_be_saved(self, originals, folder, tmp_path):
        path = ex.Pack.open(folder).basis.save(tmp_path / "basis")
        alone = ex.fit(originals, n_components=K, dtype="int8").save(tmp_path / "alone")
        (file,) = path.glob("subspace-*")
        assert file.read_bytes() == (alone / file.name).read_bytes() == files(folder)[1].read_bytes()
        with pytest.raises(OptionError, match="Only a part of the pack"):
            ex.Pack.open(folder).basis.save(folder, overwrite=True)

    @pytest.mark.parametrize("damage", ["changed", "missing", "cut"])
    def test_damage_is_noticed(self, folder, damage):
        path = files(folder)[1]
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
        opened = ex.Pack.open(folder)
        with pytest.raises(PackDamagedError, match=path.name):
            opened.verify()
        with pytest.raises(PackDamagedError, match=path.name):
            _ = opened.basis.subspace
        # adapters do not need it
        assert opened.adapter("far").modules

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda body: body.pop("basis"), "basis"),
            (lambda body: body["basis"].update(more=1), "basis has the fields"),
            (lambda body: body["basis"].update(coefficient_dtype="coded"), "one dtype is coded"),
            (lambda body: body["basis"]["subspace"].update(file="../x"), "subspace.file is"),
            (lambda body: body["basis"]["subspace"].update(sha256="0"), "a digest is not"),
            (lambda body: body["basis"]["subspace"].update(file=body["subspace"]["file"]), "the file of the subspace"),
            (lambda body: body["basis"]["subspace"]["modules"].popitem(), "other modules than the subspace"),
            (lambda body: body["basis"]["fit"].update(n_components=None), "fit must have one of"),
            (lambda body: body.update(basis=[]), "basis"),
        ],
    )
    def test_a_wrong_manifest(self, folder, change, message):
        path = folder / keys.MANIFEST
        body = json.loads(path.read_text())
        del body["digest"]
        change(body)
        _sign(path, body)
        with pytest.raises(PackDamagedError, match=message):
            ex.Pack.open(folder)

    def test_only_coded_packs_have_one(self, originals, saved, tmp_path):
        folder = ex.fit(originals, n_components=K).save(tmp_path / "plain")
        path = folder / keys.MANIFEST
        body = json.loads(path.read_text())
        assert body.pop("digest")
        body["basis"] = json.loads((saved / keys.MANIFEST).read_text())["basis"]
        _sign(path, body)
        with pytest.raises(PackDamagedError, match="a pack that is not coded has a basis"):
            ex.Pack.open(folder)

    def test_another_basis_under_the_same_digests(self, originals, folder, tmp_path):
        """The rows must have the fingerprint of the manifest, whatever the digest says."""
        other = ex.fit(originals, n_components=K, dtype="int8", weighting="factors").save(tmp_path / "other")
        (file,) = other.glob("subspace-*")
        body = json.loads((folder / keys.MANIFEST).read_text())
        del body["digest"]
        body["basis"]["subspace"] |= {
            "file": file.name,
            "sha256": json.loads((other / keys.MANIFEST).read_text())["subspace"]["sha256"],
        }
        shutil.copy(file, folder)
        _sign(folder / keys.MANIFEST, body)
        opened = ex.Pack.open(folder)
        with pytest.raises(PackDamagedError, match="its rows have the fingerprint"):
            _ = opened.basis.subspace


def _sign(path, body):
    canonical = json.dumps(body, indent=1, sort_keys=True) + "\n"
    path.write_text(json.dumps({**body, "digest": sha256(canonical.encode()).hexdigest()}))


class TestChanges:
    def test_add_and_remove_keep_it(self, originals, folder):
        data = files(folder)[1].read_bytes()
        with ex.Pack.edit(folder) as pack:
            pack.remove("far")
            assert pack.add(random_adapter("near", 3)).delta_error <= 0.05
        assert files(folder)[1].read_bytes() == data
        assert sorted(folder.glob("subspace-*")) == sorted(files(folder))
        opened = ex.Pack.open(folder)
        opened.verify()
        assert basis_adapters.project(opened, "near").record.delta_error > 0.5

    def test_augment_augments_the_basis_alone(self, folder, tmp_path):
        before, opened = tree(folder), ex.Pack.open(folder)
        wider = opened.augment(3, seed=11)
        assert wider.info == opened.info
        assert wider.basis.info.n_extra == 3
        wider.save(folder, overwrite=True)
        after = tree(folder)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert {name for name in changed if name.startswith("adapters")} == set()
        assert len(list(folder.glob("subspace-*"))) == 2
        again = ex.Pack.open(folder)
        again.verify()
        assert again.basis.info.lineage[0] == opened.basis.info.fingerprint
        assert again.basis.subspace.fingerprint == again.basis.info.fingerprint
        assert again.summary.basis.n_extra == 3

    def test_refit_keeps_it(self, originals, fitted):
        refitted = ex.refit(fitted, originals).pack
        assert refitted.basis.info == fitted.basis.info
        assert ex.refit(fitted, originals, basis=3).pack.summary.basis.down.max == 3
        assert ex.refit(fitted, originals, n_components=4).pack.basis is None
        plain = ex.fit(originals, max_error=0.1)
        assert ex.refit(plain, basis=4).pack.summary.basis.down.max == 4

    def test_selected_adapters_come_with_it(self, folder):
        some = ex.Pack.from_pretrained(folder, adapters=["far"])
        assert some.names == ["far"]
        assert some.basis.subspace.fingerprint == some.basis.info.fingerprint
        some.verify()
        some.basis.verify()

    def test_a_pack_in_its_place_leaves_nothing_of_it(self, originals, folder):
        ex.fit(originals, max_error=0.05).save(folder, overwrite=True)
        assert ex.Pack.open(folder).basis is None
        assert len(list(folder.glob("subspace-*"))) == 1

    def test_is_found_by_its_fingerprint(self, folder):
        registry.clear()
        opened = ex.Pack.open(folder)
        assert registry.find(opened.basis.info.fingerprint).fingerprint == opened.basis.info.fingerprint
        assert registry.find(opened.info.fingerprint).fingerprint == opened.info.fingerprint
        assert opened.with_subspace(opened.basis.info.fingerprint) is opened.basis
        assert opened.with_subspace("0") is None
