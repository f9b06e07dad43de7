"""Adapters with the update of another one: encoded once, stored as a reference, and read as if they had codes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_encoder import size, tensor_bytes
from test_read_pack import assert_reads_what_the_library_reads

import eigenlorax as ex
from coded_collections import shared, true_errors, untrained
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import DuplicateAdapterWarning, PackDamagedError, UntrainedAdapterWarning
from hostile import change_json, changed
from make_reference_packs import PACKS, shared_adapters
from planted import MODULES, random_adapter, random_collection, tree
from signing import signed_again
from versions import entries_of, older

MANIFEST, WEIGHTS = "subspace_config.json", "adapter_model.safetensors"
QUERY = "encoder.0.query"
HEAD = {"base_model.model.classifier.weight": torch.ones(3, 31)}
ignored = pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")


def copied(adapter, name, **fields):
    return from_factors(name, dict(adapter.modules), base_model="org/base", **fields)


def updates(pack, name):
    return {module: factors.weights for module, factors in pack.adapter(name).modules.items()}


def assert_same_updates(found, expected):
    assert found.keys() == expected.keys()
    for module, weights in expected.items():
        assert all(map(torch.equal, found[module], weights))


def parents(pack):
    return {name: pack.packed(name).parent for name in pack.names}


def entries(folder):
    return entries_of(json.loads((folder / MANIFEST).read_text()))


@pytest.fixture
def originals():
    return [random_adapter("a", 1), random_adapter("b", 2)]


@pytest.fixture
def folder(originals, tmp_path):
    """A pack of a, b, and the copies a-head and a-more of a."""
    copies = [copied(originals[0], "a-head", heads=HEAD), copied(originals[0], "a-more")]
    with pytest.warns(DuplicateAdapterWarning):
        pack = ex.fit([*originals, *copies], max_error=0.1)
    return pack.save(tmp_path / "pack")


class TestFit:
    @pytest.mark.parametrize("kind", ["one alone", "some that share"])
    def test_copies_take_no_codes(self, tmp_path, kind):
        adapters = [random_adapter("a", 1)] if kind == "one alone" else shared(6, noise=0.1)
        alone = ex.fit(adapters, max_error=0.1)
        first = adapters[0]
        with pytest.warns(
            DuplicateAdapterWarning,
            match=f"z1, z2 have the same update as {first.name}; they are stored as references.",
        ):
            pack = ex.fit([copied(first, "z2"), *adapters, copied(first, "z1")], max_error=0.1)
        assert size(pack) == size(alone)
        path = pack.save(tmp_path / "pack")
        assert tensor_bytes(path) == size(pack)
        weights = path / "adapters" / "z1" / WEIGHTS
        assert load_file(weights) == {}
        assert weights.stat().st_size <= 64
        assert entries(path)["z1"]["parent"] == first.name
        opened = ex.Pack.open(path)
        for name in ("z1", "z2"):
            assert_same_updates(updates(opened, name), updates(opened, first.name))
            assert opened.records[name].delta_error == opened.records[first.name].delta_error
        assert max(true_errors(opened, [copied(first, "z1"), *adapters]).values()) <= 0.1
        assert assert_reads_what_the_library_reads(path) == len(MODULES) * (len(adapters) + 2)

    @ignored
    def test_a_size_counts_them_once(self):
        originals = random_collection(3)
        copies = [copied(originals[0], f"z{number}") for number in range(3)]
        pack = ex.fit([*originals, *copies], max_bytes=1500)
        assert 0.97 * 1500 <= size(pack) <= 1500
        assert pack.records["z0"].delta_error == pack.records[originals[0].name].delta_error

    @ignored
    def test_the_order_of_adapters_does_not_matter(self, tmp_path):
        adapters = [*shared(3, noise=0.1), copied(shared(3, noise=0.1)[1], "z")]
        first = ex.fit(adapters, max_error=0.1).save(tmp_path / "first")
        second = ex.fit(adapters[::-1], max_error=0.1).save(tmp_path / "second")
        assert tree(first) == tree(second)
        assert entries(first)["z"]["parent"] == "adapter-1"

    def test_a_note_of_many_is_short(self):
        """At most five adapters, and five copies of each, are named."""
        adapters = random_collection(7)
        copies = [
            copied(one, f"{one.name}-{number}") for one in adapters for number in range(7 if one.name == "a0" else 1)
        ]
        with pytest.warns(DuplicateAdapterWarning) as caught:
            ex.fit([*adapters, *copies], max_error=0.5)
        text = str(caught[0].message)
        assert text.startswith("a0-0, a0-1, a0-2, a0-3, a0-4 and 2 more have the same update as a0; they are stored as")
        assert text.endswith("There are copies of 2 more adapters.")
        assert "a4-0 has the same update as a4" in text
        assert "a5" not in text

    def test_names_of_modules_may_differ(self, originals):
        modules = {f"bert.{name}": factors for name, factors in originals[0].modules.items()}
        other = from_factors("long", modules, base_model="org/base")
        with pytest.warns(DuplicateAdapterWarning, match="long has the same update as a; it is stored as a reference"):
            pack = ex.fit([*originals, other], max_error=0.1)
        assert pack.packed("long").parent == "a"

    @pytest.mark.parametrize("change", ["a number", "scaling", "dtype"])
    def test_what_differs_a_little_is_encoded(self, originals, change):
        factors = dict(originals[0].modules)
        one = factors[QUERY]
        if change == "a number":
            up = one.up.clone()
            up[0, 0] = torch.nextafter(up[0, 0], torch.tensor(torch.inf))
            factors[QUERY] = replace(one, up=up)
        elif change == "scaling":
            factors[QUERY] = replace(one, scaling=one.scaling * 2)
        else:
            factors = {name: replace(f, down=f.down.double(), up=f.up.double()) for name, f in factors.items()}
        pack = ex.fit([*originals, from_factors("c", factors, base_model="org/base")], max_error=0.01)
        assert pack.packed("c").record.delta_error <= 0.01

    def test_untrained_ones_are_no_news(self):
        zeros = [untrained(random_adapter(name, 3), *MODULES) for name in ("y", "z")]
        with pytest.warns(UntrainedAdapterWarning):
            pack = ex.fit([*shared(3), *zeros], max_error=0.1)
        assert not any(factors.up.any() for factors in pack.adapter("z").modules.values())

    def test_a_pack_of_floats_says_so_too(self, originals):
        with pytest.warns(DuplicateAdapterWarning, match=r"^z has the same update as a\.$"):
            pack = ex.fit([*originals, copied(originals[0], "z")], n_components=4)
        assert pack.records["z"].coefficient_bytes == pack.records["a"].coefficient_bytes > 0

    @ignored
    def test_a_refit_finds_them_again(self, folder, originals):
        rebuilt, fitted = (ex.refit(folder, adapters, max_error=0.2).pack for adapters in (None, originals))
        assert parents(rebuilt) == {"a": None, "a-head": "a", "a-more": "a", "b": None}
        # a-head is not the file that was passed, so it is fitted from what the pack reconstructs
        assert parents(fitted) == {"a": None, "a-head": None, "a-more": "a", "b": None}
        for pack in (rebuilt, fitted):
            errors = true_errors(pack, originals)
            assert all(errors[name] <= pack.records[name].delta_error + 1e-6 for name in errors)


class TestAdd:
    def test_a_copy_gets_the_codes_that_are_there(self, folder, originals):
        before = tree(folder)
        with (
            ex.Pack.edit(folder) as pack,
            pytest.warns(DuplicateAdapterWarning, match="^c has the same update as b; it is stored as a reference.$"),
        ):
            record = pack.add(originals[1], name="c")
        assert (record.coefficient_bytes, record.in_fit) == (0, False)
        assert record.delta_error == pack.records["b"].delta_error
        after = tree(folder)
        assert {name for name in after if after[name] != before.get(name)} == {
            MANIFEST,
            "README.md",
            *(f"adapters/c/{file}" for file in ("adapter_config.json", WEIGHTS, "source_config.json")),
        }
        opened = ex.Pack.open(folder)
        assert_same_updates(updates(opened, "c"), updates(opened, "b"))

    def test_of_one_that_is_a_reference_itself(self, folder, originals):
        copy = copied(originals[0], "a-head", heads=HEAD)
        with ex.Pack.edit(folder) as pack, pytest.warns(DuplicateAdapterWarning):
            pack.add(copy, name="z")
        assert entries(folder)["z"]["parent"] == "a"

    def test_two_new_ones(self, folder):
        new = random_adapter("n", 5)
        with ex.Pack.edit(folder) as pack, pytest.warns(DuplicateAdapterWarning, match="o has the same update as n"):
            pack.add_all({"n": new, "o": new})
        assert entries(folder)["o"]["parent"] == "n"
        assert max(true_errors(ex.Pack.open(folder), [new]).values()) <= 0.1

    @ignored
    def test_after_the_bases_have_grown(self, folder, originals, tmp_path):
        pack = ex.Pack.open(folder).augment(2, seed=5)
        pack.add(originals[1], name="c")
        assert_same_updates(updates(pack, "c"), updates(pack, "b"))
        path = pack.save(tmp_path / "grown")
        assert_reads_what_the_library_reads(path)
        assert_same_updates(updates(ex.Pack.open(path), "c"), updates(pack, "c"))

    @ignored
    def test_one_whose_error_is_a_bound_is_encoded(self, folder, originals):
        refitted = ex.refit(folder, max_error=0.2).pack
        refitted.add(originals[1], name="c")
        assert refitted.packed("c").parent is None
        assert true_errors(refitted, [copied(originals[1], "c")])["c"] <= 0.2

    def test_in_a_pack_of_floats(self, originals):
        pack = ex.fit(originals, n_components=4)
        with pytest.warns(DuplicateAdapterWarning, match=r"^c has the same update as b\.$"):
            pack.add(originals[1], name="c")

    def test_in_a_pack_of_format_5(self, tmp_path):
        path = shutil.copytree(PACKS / "coded-terms", tmp_path / "pack")
        before = {name: updates(ex.Pack.open(path), name) for name in ex.Pack.open(path).names}
        with ex.Pack.edit(path) as pack, pytest.warns(DuplicateAdapterWarning, match="copy has the same update as a1"):
            pack.add(shared_adapters(8, noise=0.1)[1], name="copy")
        opened = ex.Pack.open(path)
        opened.verify()
        assert json.loads((path / MANIFEST).read_text())["format_version"] == 8
        assert tensor_bytes(path) == size(opened)
        for name, expected in {**before, "copy": before["a1"]}.items():
            assert_same_updates(updates(opened, name), expected)
        for name in before:
            assert tree(path / "adapters" / name) == tree(PACKS / "coded-terms" / "adapters" / name)


class TestRemove:
    def test_one_of_those_left_gets_the_codes(self, folder):
        before = ex.Pack.open(folder)
        expected = {name: updates(before, name) for name in before.names}
        codes = before.codes("a")
        with ex.Pack.edit(folder) as pack:
            pack.remove("a")
            for name in pack.names:
                assert_same_updates(updates(pack, name), expected[name])
        opened = ex.Pack.open(folder)
        opened.verify()
        assert {name: entry["parent"] for name, entry in entries(folder).items()} == {
            "a-head": None,
            "a-more": "a-head",
            "b": None,
        }
        assert torch.equal(load_file(folder / "adapters" / "a-head" / WEIGHTS)["eigenlorax_coded"], codes)
        assert opened.records["a-head"].coefficient_bytes == before.records["a"].coefficient_bytes
        assert {name: record.delta_error for name, record in opened.records.items()} == {
            name: record.delta_error for name, record in before.records.items() if name != "a"
        }
        for name in opened.names:
            assert_same_updates(updates(opened, name), expected[name])
        assert_reads_what_the_library_reads(folder)
        # nothing is left of the one that was removed
        assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["a-head", "a-more", "b"]

    def test_with_a_reference(self, folder):
        with ex.Pack.edit(folder) as pack:
            pack.remove("a", "a-head")
        assert entries(folder)["a-more"]["parent"] is None

    def test_and_another_adapter_of_its_name(self, folder):
        expected = updates(ex.Pack.open(folder), "a-more")
        with ex.Pack.edit(folder) as pack:
            pack.remove("a")
            pack.add(random_adapter("a", 9))
        assert_same_updates(updates(ex.Pack.open(folder), "a-more"), expected)

    def test_a_reference_alone_changes_no_other(self, folder):
        before = tree(folder)
        with ex.Pack.edit(folder) as pack:
            pack.remove("a-more")
        after = tree(folder)
        kept = {name for name in after if name.startswith(("adapters", "subspace-"))}
        assert all(before[name] == after[name] for name in kept)


class TestPart:
    @pytest.mark.parametrize("names", [["a-more"], ["a-more", "a-head"], ["a-head", "a", "b"]])
    def test_of_a_pack_has_the_codes(self, folder, tmp_path, names):
        whole = ex.Pack.open(folder)
        part = ex.Pack.from_pretrained(folder, adapters=names)
        part.verify()
        assert part.names == sorted(names)
        for name in names:
            assert_same_updates(updates(part, name), updates(whole, name))
            assert part.digest(name) == whole.digest(name)
        path = part.save(tmp_path / "part")
        opened = ex.Pack.open(path)
        opened.verify()
        for name in names:
            assert_same_updates(updates(opened, name), updates(whole, name))
        # the codes of all three are there once
        assert size(opened) == whole.info.stored_bytes + sum(
            whole.records[name].coefficient_bytes for name in {"a", *(name for name in names if name == "b")}
        )

    def test_counts_the_codes(self, folder):
        whole, part = ex.Pack.open(folder), ex.Pack.from_pretrained(folder, adapters="a-more")
        assert part.records["a-more"].coefficient_bytes == whole.records["a"].coefficient_bytes


class TestRead:
    def test_a_copy_of_the_pack_has_the_same_bytes(self, folder, tmp_path):
        copy = ex.Pack.open(folder).save(tmp_path / "copy")
        assert tree(copy) == tree(folder)

    def test_the_digest_covers_the_parent(self, folder, tmp_path):
        pack = ex.Pack.open(folder)
        digest = pack.digest("a-more")
        with ex.Pack.edit(folder) as edited:
            edited.remove("b")
        assert ex.Pack.open(folder).digest("a-more") == digest
        parent = folder / "adapters" / "a" / "source_config.json"
        parent.write_text(parent.read_text() + "\n")
        signed_again(folder)
        assert ex.Pack.open(folder).digest("a-more") != digest

    def test_every_export(self, folder, tmp_path):
        paths = ex.Pack.open(folder).export(tmp_path / "out")
        assert load_file(paths["a-more"] / WEIGHTS).keys() == load_file(paths["a"] / WEIGHTS).keys()


def of_parent(name, parent, **fields):
    """Return what gives an adapter another parent in the manifest."""

    def change(body):
        body["adapters"][name].update(parent=parent, **fields)

    return change_json(MANIFEST, change)


def of_config(adapter, **parent):
    """Return what gives an adapter another parent in its config."""

    def change(body):
        if body.get("parent"):
            body["parent"].update(parent)

    return change_json(f"adapters/{adapter}/adapter_config.json", change)


class TestDamage:
    @pytest.mark.parametrize(
        ("parent", "message"),
        [
            ("none", "'none', which is not in the pack"),
            ("a-more", "'a-more', which is the adapter itself"),
            ("a-head", "'a-head', which has a parent too"),
            (7, r"parent is 7"),
            ("../b", r"'\.\./b', which is not in the pack"),
        ],
    )
    def test_a_parent_that_cannot_be(self, folder, tmp_path, parent, message):
        bad = changed(folder, tmp_path / "bad", of_parent("a-more", parent))
        with pytest.raises(PackDamagedError, match=message):
            ex.Pack.open(bad)

    def test_a_cycle(self, folder, tmp_path):
        bad = changed(folder, tmp_path / "bad", of_parent("a", "a-more", coefficient_bytes=0))
        with pytest.raises(PackDamagedError, match="which has a parent too"):
            ex.Pack.open(bad)

    def test_bytes_of_its_own(self, folder, tmp_path):
        bad = changed(folder, tmp_path / "bad", of_parent("a-more", "a", coefficient_bytes=5))
        with pytest.raises(PackDamagedError, match="'a-more' has a parent, and coefficient_bytes of its own"):
            ex.Pack.open(bad)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (of_parent("a-more", "b"), "the parent is 'b' in the manifest, and 'a' in"),
            (of_config("a-more", name="b"), "the parent is 'a' in the manifest, and 'b' in"),
            (of_config("a-more", sha256="0" * 64), "the parent 'a' has other codes"),
            (of_parent("a-more", None), "the parent is None in the manifest, and 'a' in"),
            (of_parent("b", "a", coefficient_bytes=0), "the parent is 'a' in the manifest, and None in"),
        ],
    )
    def test_what_does_not_go_together(self, folder, tmp_path, change, message):
        pack = ex.Pack.open(changed(folder, tmp_path / "bad", change))
        with pytest.raises(PackDamagedError, match=message):
            [pack.packed(name) for name in pack.names]

    def test_no_codes_in_the_parent(self, folder, tmp_path):
        weights = (folder / "adapters" / "a-more" / WEIGHTS).read_bytes()
        bad = changed(
            folder, tmp_path / "bad", lambda pack: (pack / "adapters" / "a" / WEIGHTS).write_bytes(weights) and None
        )
        with pytest.raises(PackDamagedError, match="eigenlorax_coded"):
            ex.Pack.open(bad).packed("a-more")

    def test_a_parent_that_was_changed_is_named(self, folder):
        weights = folder / "adapters" / "a" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(PackDamagedError, match=f"{weights} was changed"):
            ex.Pack.open(folder).packed("a-more")

    def test_formats_do_not_mix(self, folder, originals, tmp_path):
        def with_parent_in_format_5(body):
            body.update(older(body, 6), format_version=5)

        with_parent = changed(folder, tmp_path / "older", change_json(MANIFEST, with_parent_in_format_5))
        with pytest.raises(PackDamagedError, match="parent"):
            ex.Pack.open(with_parent)
        floats = ex.fit(originals, n_components=3).save(tmp_path / "floats")

        def newer(body):
            body["fit"].pop("purpose", None)
            body["fit"].pop("head_error", None)
            for entry in body["adapters"].values():
                entry["parent"] = None
            body.update(older(body, 6))

        with pytest.raises(PackDamagedError, match="format 6 is one of coded packs"):
            ex.Pack.open(changed(floats, tmp_path / "newer", change_json(MANIFEST, newer)))
        old_bases = changed(PACKS / "coded-terms", tmp_path / "old", change_json(MANIFEST, newer))
        with pytest.raises(PackDamagedError, match="the bases are not in the form of format 6"):
            _ = ex.Pack.open(old_bases).subspace
