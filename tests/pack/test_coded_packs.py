"""A pack whose bytes were chosen, from its fit to its last adapter: sizes, saving, adding, refits, the Hub, damage."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_encoder import size, tensor_bytes

import eigenlorax as ex
from coded_collections import COLLECTIONS, NARROW, grouped, shared, true_errors, untrained
from eigenlorax.core import keys
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import LossWarning, OptionError, PackDamagedError, UntrainedAdapterWarning
from eigenlorax.fitting.verify import verify
from make_reference_packs import PACKS
from planted import MODULES, random_adapter, random_collection, tree
from signing import signed_again

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("without_shape_checks"),
    pytest.mark.filterwarnings("ignore::eigenlorax.errors.UntrainedAdapterWarning"),
]
QUERY = "encoder.0.query"


def lora_bytes(originals):
    return 2 * sum(spec.numbers for one in originals for spec in one.specs.values())


def named(adapter, name, **fields):
    return from_factors(name, dict(adapter.modules), base_model="org/base", **fields)


def distance(tensor, original):
    """The relative error of a tensor."""
    return float((tensor.double() - original.double()).norm() / original.double().norm())


class TestASize:
    @pytest.mark.parametrize(
        ("name", "share"),
        [
            ("shared", 0.9),
            ("shared, with noise", 0.3),
            ("unshared", 0.5),
            ("one alone", 0.5),
            ("an untrained one", 0.5),
            ("three groups", 0.4),
            ("ranks that differ", 0.5),
        ],
    )
    def test_is_kept_and_used(self, tmp_path, name, share):
        originals = COLLECTIONS[name]()
        limit = int(share * size(ex.fit(originals, max_error=0.001)))
        pack = ex.fit(originals, max_bytes=limit)
        assert 0.97 * limit <= size(pack) <= limit
        assert tensor_bytes(pack.save(tmp_path / "pack")) == size(pack)
        errors = true_errors(ex.Pack.open(tmp_path / "pack"), originals)
        assert errors == pytest.approx({n: r.delta_error for n, r in pack.records.items()}, abs=1e-6)
        trained = [errors[n] for n, record in pack.records.items() if not record.untrained]
        assert min(trained) > 0.8 * max(trained)
        assert pack.aim == max(r.delta_error for r in pack.records.values())

    @pytest.mark.parametrize("ratio", [2.0, 12.5])
    def test_as_a_ratio_is_that_of_the_summary(self, ratio):
        found = ex.fit(shared(8), ratio=ratio).summary.bytes.ratio
        assert ratio <= found <= 1.03 * ratio

    def test_larger_than_what_all_digits_take_is_not_filled(self):
        originals = random_collection(2)
        pack = ex.fit(originals, max_bytes=10**9)
        assert size(pack) < lora_bytes(originals) * 1.5
        assert max(true_errors(pack, originals).values()) < 1e-6

    def test_what_is_carried_counts(self):
        originals = random_collection(4)
        carried = sum(4 * one.specs[QUERY].numbers for one in originals)
        pack = ex.fit(originals, max_bytes=carried + 1000, head_error=0, exclude_modules=QUERY)
        assert pack.summary.bytes.carried == carried
        assert carried + 970 <= size(pack) <= carried + 1000
        pack = ex.fit(originals, ratio=1.25, head_error=0, exclude_modules=QUERY)
        assert 1.25 <= pack.summary.bytes.ratio < 1.29
        with pytest.raises(OptionError, match=f"max_bytes={carried} cannot be reached: heads .* take {carried:,} b"):
            ex.fit(originals, max_bytes=carried, head_error=0, exclude_modules=QUERY)
        with pytest.raises(OptionError, match=rf"ratio=9, which is .*, cannot be reached: heads .* {carried:,} b"):
            ex.fit(originals, ratio=9.0, head_error=0, exclude_modules=QUERY)

    def test_counts_heads(self):
        head = {"base_model.model.classifier.weight": torch.ones(50, 31)}
        plain = ex.fit([random_adapter("a", 1)], max_bytes=300)
        pack = ex.fit([random_adapter("a", 1, heads=head)], max_bytes=6500, head_error=0)
        assert (size(pack), pack.summary.bytes.heads) == (size(plain), 6200)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_bytes": 1}, r"max_bytes=1 cannot be reached: with the largest possible errors, it takes \d+ bytes"),
            ({"ratio": 1e6}, r"ratio=1e\+06, which is 0 bytes, cannot be reached: with the largest possible errors"),
            ({"ratio": float("inf")}, "at least 1, got inf"),
            ({"ratio": float("nan")}, "at least 1, got nan"),
            ({"ratio": 0.5}, "at least 1, got 0.5"),
            ({"max_bytes": 0}, "at least 1, got 0"),
            (
                {"max_bytes": 900, "dtype": "float16"},
                "max_bytes=900 chooses by itself how numbers are stored, but dtype",
            ),
            ({"ratio": 3.0, "dtype": "int8"}, "ratio=3 chooses by itself how numbers are stored, but dtype int8 was"),
            ({"max_error": 0.1, "dtype": "int4"}, "but dtype int4 was passed. Remove it, or pass a float dtype"),
            ({"max_error": 0.1, "dtype": "coded", "coefficient_dtype": "float16"}, "but dtype coded was passed"),
            ({"n_components": 3, "dtype": "coded"}, "dtype 'coded' goes with max_error, max_bytes or ratio"),
            ({"ratio": 3.0, "n_components": 3}, "pass exactly one of .*: got n_components=3, ratio=3.0"),
            ({"max_bytes": 900, "energy": 0.9}, "pass exactly one of .*: got energy=0.9, max_bytes=900"),
            ({"max_bytes": 900, "max_error": 0.1}, "pass exactly one of .*: got max_error=0.1, max_bytes=900"),
            ({"ratio": 3.0, "n_components": "auto"}, "'auto' chooses a number by itself, and so does ratio=3"),
            ({"ratio": 3.0, "weighting": "factors"}, "ratio=3 needs weighting='delta', got 'factors'"),
        ],
    )
    def test_that_cannot_be_is_one_sentence(self, options, message):
        with pytest.raises(OptionError, match=message) as caught:
            ex.fit(random_collection(3), **options)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def originals():
    return [*shared(6), untrained(random_adapter("zero", 3), *MODULES)]


@pytest.fixture(scope="module")
def made(originals, tmp_path_factory):
    with pytest.warns(UntrainedAdapterWarning):
        return ex.fit(originals, max_error=0.1).save(tmp_path_factory.mktemp("made") / "pack")


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pack")


class TestGrowth:
    def test_what_is_added_keeps_the_error(self, path, originals):
        far, near = random_adapter("far", 777, rank=5), named(shared(9)[8], "near")
        with ex.Pack.edit(path) as pack:
            before = pack.subspace.fingerprint
            records = pack.add_all([far, near])
        pack = ex.Pack.open(path)
        assert pack.subspace.fingerprint == before
        errors = true_errors(pack, [*originals, far, near])
        assert max(errors.values()) <= 0.1
        for name in ("far", "near"):
            assert errors[name] == pytest.approx(records[name].delta_error, abs=1e-6)
            assert not pack.records[name].in_fit
        # what the subspace holds of it is not paid for again
        assert 2 * records["near"].coefficient_bytes < records["far"].coefficient_bytes
        assert tensor_bytes(path) == size(pack)

    def test_an_order_of_magnitude_of_other_sizes(self, path):
        tiny, huge = (random_adapter(name, 5, size=s) for name, s in (("tiny", 1e-15), ("huge", 1e14)))
        pack = ex.Pack.open(path)
        pack.add_all([tiny, huge])
        pack.save()
        assert max(true_errors(ex.Pack.open(path), [tiny, huge]).values()) <= 0.1

    def test_heads_and_modules_that_it_lacks_are_carried(self, path):
        head = torch.randn(3, 17)
        modules = {**MODULES, "other": (19, 7)}
        new = random_adapter("new", 8, modules=modules, heads={"base_model.model.classifier.weight": head})
        pack = ex.Pack.open(path)
        record = pack.add(new, carry_missing=True)
        pack.save()
        kept = ex.Pack.open(path).adapter("new", torch.float64)
        assert 0 < distance(kept.heads["base_model.model.classifier.weight"], head) <= 0.1
        assert 0 < distance(kept.modules["other"].down, new.modules["other"].down) <= 0.002
        assert record.modules == 2
        assert 0 < record.head_bytes < record.source_head_bytes == head.nbytes
        assert size(ex.Pack.open(path)) == tensor_bytes(path)

    @pytest.mark.parametrize("extend", [1, 4])
    def test_it_is_not_extended(self, path, originals, extend):
        pack = ex.Pack.open(path)
        for new in (random_adapter("far", 777), named(originals[0], "again")):
            with pytest.raises(OptionError, match="the subspace of this pack is not extended: .* without extend"):
                pack.add(new, extend=extend)
        assert len(pack) == len(originals)

    def test_in_the_cluster_that_it_is_of(self, tmp_path):
        groups = grouped(2, 7)
        pack = ex.fit([*groups[:6], *groups[7:13]], max_error=0.05)
        assert pack.notes == ["The adapters form 2 groups, each with its own bases."]
        pack.save(tmp_path / "pack")
        for index in (6, 13):
            record = pack.add(groups[index])
            # the bases may be too coarse for it: they are as fine as those that they were made of ask
            sizes = [pack.records[one.name].coefficient_bytes for one in groups[index - 6 : index]]
            assert record.coefficient_bytes < 2.5 * max(sizes)
        pack.save()
        assert max(true_errors(ex.Pack.open(tmp_path / "pack"), groups).values()) <= 0.05

    def test_after_random_directions_were_added(self, path, originals):
        new = random_adapter("new", 99)
        pack = ex.Pack.open(path).augment(4, 7)
        pack.save(path, overwrite=True)
        pack = ex.Pack.open(path)
        pack.add(new)
        pack.save()
        again = ex.Pack.open(path)
        assert max(true_errors(again, [*originals, new]).values()) <= 0.1
        k_down = again.subspace.modules[QUERY].down.k
        assert again.packed("new").coefficients[QUERY].down.shape == (3, k_down)
        assert again.packed("adapter-0").coefficients[QUERY].down.shape == (3, k_down - 4)

    def test_what_is_removed_leaves_the_others_as_they_are(self, path, originals):
        before = {name: tree(path / "adapters" / name) for name in ("adapter-1", "zero")}
        with ex.Pack.edit(path) as pack:
            pack.remove("adapter-0", "adapter-3")
        assert {name: tree(path / "adapters" / name) for name in before} == before
        assert not (path / "adapters" / "adapter-0").exists()
        left = [one for one in originals if one.name not in ("adapter-0", "adapter-3")]
        assert max(true_errors(ex.Pack.open(path), left).values()) <= 0.1

    def test_a_size_without_an_adapter_is_no_error_to_keep(self):
        pack = ex.fit(random_collection(2), ratio=4.0)
        first = pack.add(random_adapter("new", 9))
        pack.remove("a0", "a1")
        assert pack.add(random_adapter("newer", 10)).delta_error <= first.delta_error
        pack.remove("new", "newer")
        with pytest.raises(OptionError, match="fitted for a size, and no adapter is left in it"):
            pack.add(random_adapter("newest", 11))


class TestRefits:
    def test_from_originals_is_a_fit_of_them(self, path, originals, tmp_path):
        found = ex.refit(path, originals)
        assert tree(found.pack.save(tmp_path / "again")) == tree(path)
        assert found.worse == []

    @pytest.mark.parametrize(
        "options", [{}, {"max_error": 0.2}, {"ratio": 6.0}, {"n_components": 4}, {"dtype": "int8"}]
    )
    def test_from_the_pack_itself_is_no_worse_than_it_says(self, path, originals, options):
        options = {"energy": 0.99, **options} if "dtype" in options else options
        found = ex.refit(path, **options)
        true = true_errors(found.pack, originals)
        for name, record in found.pack.records.items():
            if not record.untrained:
                assert record.bound
                assert true[name] <= record.delta_error + 1e-6

    def test_of_some_of_them(self, path, originals):
        found = ex.refit(path, originals[:3], max_error=0.05)
        true = true_errors(found.pack, originals)
        for place, one in enumerate(originals[:-1]):
            record = found.pack.records[one.name]
            assert record.bound == (place >= 3)
            assert true[one.name] <= record.delta_error + 1e-6
        assert max(true[one.name] for one in originals[:3]) <= 0.05
        checked = verify(found.pack, originals)
        assert checked.holds

    def test_of_floats_by_a_size(self, originals):
        pack = ex.fit(originals, n_components=4)
        found = ex.refit(pack, ratio=8.0)
        assert (found.pack.storage, found.pack.coefficient_storage) == ("coded", "coded")
        assert found.pack.summary.bytes.ratio >= 8
        true = true_errors(found.pack, originals)
        assert all(true[name] <= record.delta_error + 1e-6 for name, record in found.pack.records.items())

    def test_to_floats_is_in_those_of_the_originals_or_of_memory(self, path, originals):
        assert ex.refit(path, n_components=4).pack.storage == "float32"
        assert ex.refit(path, originals, n_components=4).pack.storage == "float32"
        assert ex.refit(path, n_components=4, dtype="bfloat16").pack.storage == "bfloat16"


class TestVerified:
    def test_every_adapter_as_recorded(self, path, originals):
        found = verify(ex.Pack.open(path), originals[1:])
        assert (found.holds, found.unknown) == (True, ["adapter-0"])
        for name, one in found.adapters.items():
            assert one.bound == 0.1
            assert one.delta_error == pytest.approx(one.recorded, abs=1e-6)
            assert one.recorded == ex.Pack.open(path).records[name].delta_error


class TestLosses:
    def test_are_warned_of_where_they_were_asked_for(self):
        with pytest.warns(LossWarning, match="above 0.25 .* The target allows such errors: a smaller max_error"):
            ex.fit(random_collection(2), max_error=0.4, warn_above=0.25)


def changed(folder, pattern, change):
    """The pack with the tensors of one file changed, and digests that are right."""
    (file,) = folder.glob(pattern)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    signed_again(folder)
    return file


def replaced(part, new):
    def change(tensors):
        (key,) = (key for key in tensors if key.endswith(part))
        tensors[key] = new(tensors[key])

    return change


CHANGES = {
    "cut by one": lambda t: t[:-1].clone(),
    "cut to its head": lambda t: t[:5].clone(),
    "cut to one": lambda t: t[:1].clone(),
    "empty": lambda t: t[:0].clone(),
    "longer by one": lambda t: torch.cat([t, t[:1]]),
    "much longer": lambda t: torch.cat([t] * 3),
    "all zeros": torch.zeros_like,
    "all ones": lambda t: torch.full_like(t, 255),
    "of another dtype": lambda t: t.view(torch.int8),
    "floats": lambda t: t.float(),
    "of two dimensions": lambda t: t[None].clone(),
}


class TestDamage:
    """What a mistaken tool wrote, with digests that are right."""

    # an arithmetic code has so little redundancy that one byte less may stand for other numbers
    @pytest.mark.parametrize("case", sorted(CHANGES.keys() - {"cut by one"}))
    def test_an_adapter_is_named(self, path, case):
        changed(path, "adapters/adapter-2/*.safetensors", replaced(keys.CODED, CHANGES[case]))
        pack = ex.Pack.open(path)
        assert pack.packed("adapter-1").name == "adapter-1"
        with pytest.raises(PackDamagedError, match=f"{path / 'adapters' / 'adapter-2'}.*Write the pack again"):
            pack.packed("adapter-2")

    @pytest.mark.parametrize("case", CHANGES)
    def test_a_basis_is_named(self, path, case):
        file = changed(path, "subspace-*", replaced(keys.CODED_COMPONENTS, CHANGES[case]))
        with pytest.raises(PackDamagedError, match=f"{file}.*Write the pack again"):
            _ = ex.Pack.open(path).packed("adapter-2").coefficients[QUERY].down

    def test_what_is_missing_is_named(self, path, made):
        changed(path, "adapters/adapter-2/*.safetensors", lambda tensors: tensors.pop(keys.CODED))
        with pytest.raises(PackDamagedError, match=str(path / "adapters" / "adapter-2")):
            ex.Pack.open(path).packed("adapter-2")
        file = changed(path, "subspace-*", lambda tensors: tensors.pop(keys.CODED_COMPONENTS))
        with pytest.raises(PackDamagedError, match=str(file)):
            _ = ex.Pack.open(path).subspace

    def test_bytes_by_chance_are_read_or_refused(self, path):
        """Numbers may be wrong then, but nothing else happens."""
        (file,) = path.glob("adapters/adapter-2/*.safetensors")
        whole = load_file(file)[keys.CODED]
        g, refused = np.random.default_rng(3), 0
        for _ in range(60):
            bad = whole.clone()
            bad[int(g.integers(len(bad)))] ^= int(g.integers(1, 256))
            changed(
                path, "adapters/adapter-2/*.safetensors", lambda tensors, bad=bad: tensors.update({keys.CODED: bad})
            )
            try:
                _ = [(one.down, one.up) for one in ex.Pack.open(path).packed("adapter-2").coefficients.values()]
            except PackDamagedError:
                refused += 1
        assert refused > 30


class TestOptionsThatMeanNothing:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ratio": 9.0, "sweeps": 2}, "sweeps=2 has no effect with ratio=9, which chooses bytes.* Remove it.$"),
            ({"max_bytes": 900, "solver": "exact"}, "solver='exact' has no effect with max_bytes=900"),
            ({"max_error": 0.3, "sweeps": 0}, "sweeps=0 has .* Or pass a float dtype: then only"),
            ({"ratio": 9.0, "workers": 2}, "workers=2 requires engine='processes'"),
        ],
    )
    def test_are_refused_by_name(self, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(OptionError, match=message):
            ex.fit(random_collection(2), **options)
        assert not list(tmp_path.iterdir())

    def test_count_where_numbers_stay_floats(self, tmp_path):
        kept = tmp_path / "kept"
        options = {"max_error": 0.5, "dtype": "float32", "sweeps": 1, "solver": "exact", "checkpoint": kept}
        pack = ex.fit(random_collection(2), **options)
        assert (pack.fit_info.sweeps, len(list(kept.glob("*.safetensors")))) == (1, len(MODULES))

    def test_a_refit_does_not_pass_on_sweeps_that_nobody_asked_for(self):
        pack = ex.fit(random_collection(2, modules=NARROW), n_components=4, sweeps=1)
        coded = ex.refit(pack, max_error=0.1).pack
        assert coded.is_coded
        assert ex.refit(pack, n_components=3).pack.fit_info.sweeps == 1
        assert ex.refit(pack, max_error=0.5, dtype="float32").pack.fit_info.sweeps == 1
        assert ex.refit(coded).pack.is_coded
        with pytest.raises(OptionError, match="sweeps=1 has no effect with max_error=0.1"):
            ex.refit(coded, sweeps=1)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            {"weighting": "factors"},
            "Numbers are float32, with weighting 'factors', so only numbers of components were chosen for the error "
            "bound: with weighting 'delta' and without a dtype the pack takes fewer bytes.",
        ),
        (
            {"dtype": "float16", "coefficient_dtype": "float32"},
            "Numbers are float16 and float32, as asked, so only numbers of components were chosen for the error bound: "
            "without a dtype the pack takes fewer bytes.",
        ),
    ],
)
def test_an_error_in_floats_is_said_to_be_one(options, note):
    notes = ex.fit(random_collection(2, modules=NARROW), max_error=0.5, **options).notes
    # two adapters may be larger in a pack of floats, which is said in a note of its own
    assert [text for text in notes if not text.startswith("The pack is ")] == [note]


class TestRatios:
    def test_the_largest_is_told_and_can_be_had(self):
        adapters = random_collection(2)
        with pytest.raises(
            OptionError, match=r"it takes [\d,]+ bytes; the largest ratio is about [\d.]+\.$"
        ) as refused:
            ex.fit(adapters, ratio=1e5)
        largest = float(str(refused.value).rstrip(".").rsplit(" ", 1)[1])
        assert largest <= ex.fit(adapters, ratio=largest, warn_above=1.0).summary.bytes.ratio < 1.02 * largest

    def test_what_is_carried_bounds_it(self):
        adapters = random_collection(2)
        carried = sum(4 * one.specs[QUERY].numbers for one in adapters)
        bound = carried + sum(2 * one.specs[name].numbers for one in adapters for name in one.specs if name != QUERY)
        with pytest.raises(OptionError, match=f"head_error or a ratio below {bound / carried:.3g}"):
            ex.fit(adapters, ratio=9.0, head_error=0, exclude_modules=QUERY)

    @pytest.mark.parametrize(
        "options", [{"ratio": 2.0}, {"n_components": 4, "dtype": "float16"}], ids=["coded", "floats"]
    )
    def test_adapters_that_change_nothing_do_not_raise_it(self, options):
        adapters = random_collection(2, modules=NARROW)
        idle = [untrained(random_adapter(f"zero-{i}", 3, modules=NARROW), *NARROW) for i in range(4)]
        alone, beside = (ex.fit(several, **options).summary.bytes for several in (adapters, [*adapters, *idle]))
        assert beside.lora == alone.lora == lora_bytes(adapters)
        assert beside.lora_files == alone.lora_files
        # what is kept of them counts all the same
        assert beside.ratio == pytest.approx(beside.lora / (beside.basis + beside.coefficients))
        assert 2.0 <= beside.ratio < 2.2 if "ratio" in options else beside.ratio < alone.ratio


def test_a_side_of_more_numbers_than_its_bytes_may_stand_for(tmp_path):
    """What is sure to be zero takes a hundredth of a bit: fifteen kilobytes would take half a gigabyte to decode."""
    pack = tmp_path / "pack"
    shutil.copytree(PACKS / "coded-cores", pack)
    body = json.loads((pack / "subspace_config.json").read_text())
    body["subspace"]["modules"]["encoder.0.query"]["down"].update(k=6, dimension=4_000_000)
    (pack / "subspace_config.json").write_text(json.dumps(body))
    signed_again(pack)
    said = r"the rows of the bases would have 24,000,\d+ numbers, from .* bytes; at most 10,000,000"
    with pytest.raises(PackDamagedError, match=said):
        assert ex.Pack.open(pack).subspace


@pytest.mark.parametrize(("smallest", "threads"), [(1, 3), (10**9, 1)])
def test_small_modules_are_coded_by_one_thread(monkeypatch, smallest, threads):
    """Threads that wait for small operations spin: three adapters of 1.5 MB took minutes of processor time."""
    seen = set()
    before = torch.get_num_threads()
    monkeypatch.setattr("eigenlorax.core.threads.SMALL", smallest)
    torch.set_num_threads(3)
    try:
        pack = ex.fit(random_collection(3), max_error=0.3, progress=lambda *_: seen.add(torch.get_num_threads()))
        pack.add(random_adapter("new", 7))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads in seen
    assert seen <= {3, threads}


def test_bases_of_all_clusters_may_have_more_rows_than_columns(tmp_path):
    """Such a pack could not be saved."""
    originals = grouped(5, 6, noise=0.02)
    pack = ex.fit(originals, max_error=0.03)
    sides = [basis for bases in pack.subspace.modules.values() for basis in (bases.down, bases.up)]
    assert any(basis.k > basis.dimension for basis in sides)
    pack.save(tmp_path / "pack")
    errors = true_errors(ex.Pack.open(tmp_path / "pack"), originals)
    assert max(errors.values()) <= 0.03
