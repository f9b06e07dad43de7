"""Packs in integers of 8 and 4 bits: what is stored to the byte, what is lost, and every verb on them."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_read_pack import assert_reads_what_the_library_reads

import eigenlorax as ex
import reference
from adapters import MODULES, make_adapter, make_adapters
from eigenlorax.codec.storage.base import ModuleSlot
from eigenlorax.codec.storage.table import STORAGES, storage_by_name
from eigenlorax.core import atomic_files, keys
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import NonFiniteError, OptionError, PackDamagedError
from outcomes import contents
from planted import normal, random_adapter, random_collection, shared_collection
from rests import with_adapters
from versions import older, unfolded

pytestmark = pytest.mark.slow

QUERY = "encoder.layer.0.query"
KINDS = [("int8", None), ("int4", "int4"), ("float32", "int8")]
SHARE = {"int8": 0.02, "int4": 0.25}
"""What rounding takes of these small updates, at most."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three adapters that five directions a side hold whole, one with a head."""
    place = tmp_path_factory.mktemp("sources")
    make_adapters(place, "a b", shared=5)
    make_adapter(place / "c", seed=3, shared=5, head=(2, 31))
    return place


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind)), scope="module")
def kind(request):
    return dict(zip(("dtype", "coefficient_dtype"), request.param, strict=True))


@pytest.fixture(scope="module")
def made(sources, kind, tmp_path_factory):
    """A pack of them, and where it was saved."""
    pack = ex.fit(sources, n_components=5, **kind)
    return pack, pack.save(tmp_path_factory.mktemp("made") / "pack")


@pytest.fixture
def saved(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made[1], tmp_path / "pack")


def factors_of(pack, name):
    return {m: (f.down, f.up, f.scaling) for m, f in pack.adapter(name).modules.items()}


def assert_same_factors(one, other):
    assert one.keys() == other.keys()
    for module, (down, up, scaling) in one.items():
        assert torch.equal(down, other[module][0])
        assert torch.equal(up, other[module][1])
        assert scaling == other[module][2]


def loosest(kind):
    return max(SHARE.get(dtype, 0.0) for dtype in kind.values() if dtype)


class TestWritten:
    def test_and_opened_it_is_the_same_to_the_bit(self, made):
        pack, place = made
        opened = ex.Pack.open(place)
        opened.verify()
        assert opened.subspace.fingerprint == opened.info.fingerprint == pack.subspace.fingerprint
        assert opened.info == pack.info
        assert opened.records == pack.records
        assert opened.summary == pack.summary
        for name, bases in pack.subspace.modules.items():
            for side in keys.SIDES:
                one, other = bases.side(side), opened.subspace.modules[name].side(side)
                assert torch.equal(one.components, other.components)
                assert torch.equal(one.singular_values, other.singular_values)
                assert one.square == pytest.approx(other.square, rel=1e-12)
        for name in pack.names:
            assert_same_factors(factors_of(pack, name), factors_of(opened, name))

    def test_and_written_again_elsewhere_to_the_byte(self, made, tmp_path):
        pack, place = made
        before = contents(place)
        assert contents(pack.save(tmp_path / "again")) == before
        opened = ex.Pack.open(place)
        # with everything read, and with nothing
        assert contents(opened.save(tmp_path / "other")) == before
        loaded = with_adapters(opened, {name: opened.packed(name) for name in opened.names})
        assert contents(loaded.save(tmp_path / "loaded")) == before

    def test_in_the_bytes_that_it_says(self, made):
        pack, place = made
        (file,) = place.glob("subspace-*.safetensors")
        assert sum(tensor.nbytes for tensor in load_file(file).values()) == pack.info.stored_bytes
        for name, record in pack.records.items():
            tensors = load_file(place / "adapters" / name / keys.ADAPTER_WEIGHTS)
            own = {key: tensor for key, tensor in tensors.items() if "eigenlorax_" in key}
            assert sum(tensor.nbytes for tensor in own.values()) == record.coefficient_bytes
            assert record.head_bytes == sum(tensors[key].nbytes for key in tensors.keys() - own.keys())

    def test_the_order_of_adapters_does_not_matter(self, made, sources, kind, tmp_path):
        again = ex.fit([sources / name for name in ("c", "a", "b")], n_components=5, **kind)
        assert contents(again.save(tmp_path / "again")) == contents(made[1])

    def test_a_stranger_reads_what_the_library_reads(self, made):
        assert assert_reads_what_the_library_reads(made[1]) == 3 * len(MODULES)

    def test_what_it_is_called(self, made, kind):
        pack, place = made
        manifest = json.loads((place / keys.MANIFEST).read_text())
        coefficients = kind["coefficient_dtype"] or "int8"
        assert manifest["format_version"] == 8
        assert (manifest["subspace"]["dtype"], manifest["coefficient_dtype"]) == (kind["dtype"], coefficients)
        assert (pack.storage, pack.coefficient_storage) == (kind["dtype"], coefficients)
        assert (pack.summary.dtype, pack.summary.coefficient_dtype) == (kind["dtype"], coefficients)
        assert pack.dtype == torch.float32
        assert pack.coefficient_dtype == (torch.float16 if coefficients == "float16" else torch.float32)

    def test_ratios_are_of_loras_in_16_bits(self, made):
        pack, _ = made
        numbers = sum(record.lora_numbers for record in pack.records.values())
        assert pack.summary.bytes.lora == 2 * numbers


class TestErrors:
    """Against dense float64 matrices."""

    def test_are_those_of_what_comes_back(self, made, sources, kind):
        pack, _ = made
        for name, record in pack.records.items():
            original = ex.read_adapter(sources / name)
            wanted = reference.delta_error(original, pack.adapter(name, torch.float64))
            assert record.delta_error == pytest.approx(wanted, rel=1e-6)
            # five directions hold all of them: what is lost is rounding
            assert record.rounding_error == pytest.approx(record.delta_error, rel=1e-4)
            assert 1e-4 < record.delta_error < loosest(kind)

    def test_rounding_has_its_share_where_more_is_lost(self, sources, kind):
        pack = ex.fit(sources, n_components=3, warn_above=1.0, **kind)
        exact = ex.fit(sources, n_components=3, warn_above=1.0, dtype="float64")
        for name, record in pack.records.items():
            original, found, best = (
                one if isinstance(one, ex.Adapter) else one.adapter(name, torch.float64)
                for one in (ex.read_adapter(sources / name), pack, exact)
            )
            total = sum(np.square(reference.dense(f)).sum() for f in original.modules.values())
            moved = sum(
                np.square(reference.dense(found.modules[m]) - reference.dense(best.modules[m])).sum()
                for m in original.modules
            )
            assert record.delta_error == pytest.approx(reference.delta_error(original, found), rel=1e-6)
            assert record.rounding_error == pytest.approx((moved / total) ** 0.5, rel=1e-5)
            assert abs(record.delta_error - exact.records[name].delta_error) <= record.rounding_error
            assert 1e-4 < record.rounding_error < loosest(kind)

    def test_coefficients_are_found_against_the_rounded_basis(self, sources):
        """Rounded to 4 bits, rows are far from orthonormal: products with them would lose more than is needed."""
        pack = ex.fit(sources, n_components=5, dtype="int4", coefficient_dtype="float64")
        for name in pack.names:
            original = ex.read_adapter(sources / name)
            for module, factors in original.modules.items():
                right, left = (
                    np.linalg.qr(pack.subspace.modules[module].side(side).components.double().numpy().T)[0].T
                    for side in keys.SIDES
                )
                best = reference.projected(reference.dense(factors), right, left)
                back = reference.dense(pack.adapter(name, torch.float64).modules[module])
                np.testing.assert_allclose(back, best, atol=1e-9 * np.linalg.norm(best))

    def test_do_not_depend_on_the_factors_of_an_update(self):
        plain = random_collection(3, dtype=torch.float64)
        turned = []
        for index, one in enumerate(plain):
            modules = {}
            for module, f in one.modules.items():
                gauge = torch.diag(10.0 ** torch.linspace(-2, 1, f.down.shape[0], dtype=torch.float64))
                gauge = gauge @ torch.randn(*gauge.shape, generator=torch.Generator().manual_seed(index)).double()
                modules[module] = LoRAFactors(torch.linalg.solve(gauge, f.down), f.up @ gauge, f.scaling)
            turned.append(from_factors(one.name, modules, base_model="org/base"))
        errors = [
            [record.delta_error for record in ex.fit(adapters, n_components=9, dtype="int8").records.values()]
            for adapters in (plain, turned)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.05)

    def test_mixed_rows_lose_less_than_singular_vectors(self):
        adapters, _ = shared_collection(9, k_down=24, k_up=24, rank=8)
        pack = ex.fit(adapters, n_components=24, coefficient_dtype="int8")
        lost = [record.rounding_error for record in pack.records.values()]
        assert max(lost) < 0.01


class TestSizesOfUpdates:
    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    @pytest.mark.parametrize("size", [1e-9, 1e-4, 1e3, 1e8])
    def test_tiny_and_huge_ones_lose_what_others_lose(self, dtype, size, tmp_path):
        plain = [random_adapter(f"a{i}", 100 * i, dtype=torch.float64) for i in range(3)]
        scaled = [random_adapter(f"a{i}", 100 * i, dtype=torch.float64, size=size) for i in range(3)]
        wanted = ex.fit(plain, n_components=9, dtype=dtype)
        pack = ex.fit(scaled, n_components=9, dtype=dtype)
        opened = ex.Pack.open(pack.save(tmp_path / "pack"))
        assert_reads_what_the_library_reads(tmp_path / "pack")
        for original in scaled:
            found = opened.records[original.name].delta_error
            assert found == pytest.approx(wanted.records[original.name].delta_error, rel=0.1)
            assert found == pytest.approx(
                reference.delta_error(original, opened.adapter(original.name, torch.float64)), rel=1e-5
            )

    def test_a_quiet_adapter_among_loud_ones(self):
        loud, quiet = random_adapter("loud", 1, size=1e4), random_adapter("quiet", 2, size=1e-6)
        records = ex.fit([loud, quiet], n_components=6, dtype="int8").records
        assert all(record.delta_error < 0.02 for record in records.values())

    def test_beyond_float32_is_refused(self):
        huge = random_adapter("huge", 1, dtype=torch.float64, size=1e60)
        with pytest.raises(NonFiniteError, match="'huge'"):
            ex.fit([huge], n_components=4, dtype="int8")

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.UntrainedAdapterWarning")
    @pytest.mark.parametrize("dtype", ["int8", "int4"])
    def test_zero_ones(self, dtype, tmp_path):
        zeros = {f"base_model.model.{m}.lora_B.weight": torch.zeros(shape[0], 3) for m, shape in MODULES.items()}
        first = {f"base_model.model.{QUERY}.lora_B.weight": torch.zeros(17, 3)}
        make_adapter(tmp_path / "in" / "a", seed=1, tensors=first)
        make_adapter(tmp_path / "in" / "b", seed=2, tensors=first)
        make_adapter(tmp_path / "in" / "zero", seed=3, tensors=zeros)
        pack = ex.Pack.open(ex.fit(tmp_path / "in", n_components=6, dtype=dtype).save(tmp_path / "pack"))
        # nobody has trained this module: no components, no singular values, and an odd width
        assert pack.subspace.modules[QUERY].down.components.shape == (0, 11)
        assert pack.records["zero"].untrained
        assert pack.records["zero"].delta_error == 0
        assert not any(f.up.any() for f in pack.adapter("zero").modules.values())
        assert_reads_what_the_library_reads(tmp_path / "pack")
        assert contents(pack.save(tmp_path / "again")) == contents(tmp_path / "pack")

    @pytest.mark.parametrize("rank", [1, 9, 16])
    def test_ranks_above_and_below_the_components(self, tmp_path, rank):
        make_adapter(tmp_path / "in" / "a", seed=1, rank=rank)
        pack = ex.fit(tmp_path / "in", n_components=4, dtype="int8", warn_above=1.0)
        assert pack.packed("a").coefficients[QUERY].down.shape == (rank, min(4, rank))
        assert_reads_what_the_library_reads(pack.save(tmp_path / "pack"))

    def test_a_projection_much_smaller_than_its_factors(self, tmp_path):
        """Rows of equal norms may be shorter than the factors that were projected: nothing vanishes then."""
        make_adapters(tmp_path / "in", "a b")
        rounded, exact = (ex.fit(tmp_path / "in", n_components=1, dtype=dtype).records for dtype in ("int8", "float32"))
        for name, record in rounded.items():
            assert record.delta_error == pytest.approx(exact[name].delta_error, abs=1e-3)


class TestVerbs:
    def test_add(self, saved, tmp_path):
        late = make_adapter(tmp_path / "late", seed=9, shared=5)
        before = contents(saved / "adapters")
        with ex.Pack.edit(saved) as pack:
            record = pack.add(late)
        wanted = reference.delta_error(ex.read_adapter(late), pack.adapter("late", torch.float64))
        assert record.delta_error == pytest.approx(wanted, rel=1e-6)
        assert ex.Pack.open(saved).records["late"] == record
        assert before.items() <= contents(saved / "adapters").items()
        assert_reads_what_the_library_reads(saved)

    def test_growth_of_both_kinds_leaves_what_was_there_to_the_byte(self, saved, made, kind, tmp_path):
        before, old = contents(saved / "adapters"), ex.Pack.open(saved)
        factors = {name: factors_of(old, name) for name in old.names}
        pack = ex.Pack.open(saved)
        pack.add(make_adapter(tmp_path / "one", seed=20), extend=2)
        pack = pack.augment(2, seed=7)
        pack.add(make_adapter(tmp_path / "two", seed=21), extend=1)
        assert pack.storage == kind["dtype"]
        pack.save(tmp_path / "grown")
        opened = ex.Pack.open(tmp_path / "grown")
        assert opened.subspace.stored_bytes == opened.info.stored_bytes
        (file,) = (tmp_path / "grown").glob("subspace-*.safetensors")
        assert sum(tensor.nbytes for tensor in load_file(file).values()) == opened.info.stored_bytes
        assert opened.subspace.at(old.info.fingerprint).fingerprint == old.info.fingerprint
        assert before.items() <= contents(tmp_path / "grown" / "adapters").items()
        for name, wanted in factors.items():
            assert_same_factors(factors_of(opened, name), wanted)
        for name in ("one", "two"):
            assert_same_factors(factors_of(opened, name), factors_of(pack, name))
        assert assert_reads_what_the_library_reads(tmp_path / "grown") == 5 * len(MODULES)
        assert contents(opened.save(tmp_path / "again")) == contents(tmp_path / "grown")

    def test_what_it_has_grown_by_is_rounded_likewise(self, saved, kind, tmp_path):
        pack = ex.Pack.open(saved)
        pack.add(make_adapter(tmp_path / "late", seed=9), extend=3)
        grown = pack.subspace.modules[QUERY].down.growth[0]
        assert grown.n == 3
        assert (grown.payload is None) == (kind["dtype"] == "float32")
        # one row a rank: all of it is held, but for rounding
        assert pack.records["late"].delta_error < loosest(kind)

    def test_remove_and_save(self, saved):
        with ex.Pack.edit(saved) as pack:
            pack.remove("b")
        opened = ex.Pack.open(saved)
        opened.verify()
        assert opened.names == ["a", "c"]

    def test_some_of_it(self, saved, tmp_path):
        some = ex.Pack.from_pretrained(saved, adapters=["b"])
        some.save(tmp_path / "some")
        assert contents(tmp_path / "some" / "adapters" / "b") == contents(saved / "adapters" / "b")

    def test_export(self, saved, sources, tmp_path):
        pack = ex.Pack.open(saved)
        pack.export(tmp_path / "loras")
        for name in pack.names:
            assert_same_factors(
                {m: (f.down, f.up, f.scaling) for m, f in ex.read_adapter(tmp_path / "loras" / name).modules.items()},
                factors_of(pack, name),
            )
            assert (
                contents(tmp_path / "loras" / name)["adapter_config.json"]
                == (contents(sources / name)["adapter_config.json"])
            )
        assert pack.export_rounding("a", "float16") < 1e-3

    def test_refit_keeps_how_it_is_stored(self, saved, sources, kind):
        found = ex.refit(saved, sources, n_components=4).pack
        assert (found.storage, found.coefficient_storage) == (kind["dtype"], kind["coefficient_dtype"] or "int8")
        wanted = ex.fit(sources, n_components=4, warn_above=1.0, **kind)
        assert found.records == wanted.records

    def test_refit_for_an_error_finds_by_itself_how_to_store(self, saved):
        found = ex.refit(saved, max_error=0.4)
        assert found.pack.storage == "coded"
        assert all(change.moved < 0.4 for change in found.changes.values())

    def test_a_rest_that_is_given_by_hand_stays_beside_them(self, saved, kind, tmp_path):
        pack = ex.Pack.open(saved)
        one = pack.packed("a")
        c = one.coefficients[QUERY]
        rest = normal(c.rank, 11, seed=8, dtype=torch.float32)
        changed = {**one.coefficients, QUERY: replace(c, down_residual=rest)}
        adapters = {"a": replace(one, coefficients=changed, payload=None), "b": pack.packed("b")}
        made = with_adapters(pack, adapters)
        opened = ex.Pack.open(made.save(tmp_path / "made"))
        found = opened.packed("a").coefficients[QUERY]
        assert torch.equal(found.down_residual, rest)
        assert found.up_residual is None
        assert float((found.up.double() - c.up).norm() / c.up.double().norm()) < loosest(kind)
        assert contents(opened.save(tmp_path / "again")) == contents(tmp_path / "made")
        assert opened.packed("a").payload is None or keys.residual_key(QUERY, "down") in opened.packed("a").payload

    def test_refit_to_and_from_floats(self, saved, tmp_path):
        floats = ex.refit(saved, dtype="float32", coefficient_dtype="float32")
        assert all(change.moved < 1e-5 for change in floats.changes.values())
        assert_reads_what_the_library_reads(floats.pack.save(tmp_path / "floats"))
        back = ex.refit(floats.pack, dtype="int8", coefficient_dtype="int8")
        assert all(change.moved < 0.02 for change in back.changes.values())
        assert_reads_what_the_library_reads(back.pack.save(tmp_path / "back"))

    @pytest.mark.parametrize("kind", KINDS[1:2], indirect=True)
    def test_processes_make_the_same_pack(self, made, sources, kind, tmp_path):
        found = ex.fit(sources, n_components=5, engine="processes", workers=2, **kind)
        assert contents(found.save(tmp_path / "pack")) == contents(made[1])

    def test_a_fit_that_was_interrupted_goes_on(self, made, sources, kind, tmp_path):
        class StoppedError(Exception):
            pass

        def stop(stage, done, total):
            if stage == "fitting modules" and done == 2:
                raise StoppedError

        kept = {"checkpoint": tmp_path / "kept", "n_components": 5, **kind}
        with pytest.raises(StoppedError):
            ex.fit(sources, progress=stop, **kept)
        found = ex.fit(sources, **kept)
        assert any("2 of 3 modules" in note for note in found.notes)
        assert contents(found.save(tmp_path / "pack")) == contents(made[1])
        # of another storage, nothing is there
        other = ex.fit(sources, **{**kept, "dtype": "float16"})
        assert not any("modules" in note for note in other.notes)

    def test_one_fitted_by_iteration(self, tmp_path):
        shapes = {"layers.0.q": (400, 410)}
        adapters = [random_adapter(f"a{i:03d}", i, rank=4, modules=shapes) for i in range(110)]
        pack = ex.fit(adapters, n_components=8, dtype="int4", warn_above=1.0)
        assert pack.fit_info.solver == "iterative"
        opened = ex.Pack.open(pack.save(tmp_path / "pack"))
        assert opened.info == pack.info
        assert contents(opened.save(tmp_path / "again")) == contents(tmp_path / "pack")

    def test_spectra_say_as_much_as_they_did(self, made, sources, kind):
        pack, exact = made[0], ex.fit(sources, n_components=5)
        for name, sides in pack.info.modules.items():
            for side, one in sides.items():
                basis = pack.subspace.modules[name].side(side)
                assert one.square == pytest.approx(exact.info.modules[name][side].square, rel=1e-6)
                assert one.energy == pytest.approx(exact.info.modules[name][side].energy, rel=1e-6)
                assert len(basis.singular_values) == (5 if kind["dtype"] != "float32" else 9)


class TestRefused:
    @pytest.mark.parametrize("options", [{"dtype": "int8"}, {"coefficient_dtype": "int4"}])
    def test_sizes_by_error(self, sources, options):
        with pytest.raises(OptionError, match=r"max_error=0.1 chooses by itself how .* dtype int\d was"):
            ex.fit(sources, max_error=0.1, **options)

    @pytest.mark.parametrize("dtype", ["int2", torch.int32, "uint8"])
    def test_other_integers(self, sources, dtype):
        with pytest.raises(OptionError, match="dtype must be one of float64, .*, int8, int4, .*got u?int"):
            ex.fit(sources, dtype=dtype)

    def test_a_torch_dtype_will_do(self, sources):
        assert ex.fit(sources, n_components=2, dtype=torch.int8, warn_above=1.0).storage == "int8"

    def test_in_exports(self, saved, tmp_path):
        with pytest.raises(OptionError, match="dtype must be one of float64, float32, float16, bfloat16, got int8"):
            ex.Pack.open(saved).export(tmp_path / "loras", dtype="int8")

    def test_in_packs_of_earlier_versions(self, saved, kind):
        path = saved / keys.MANIFEST
        body = json.loads(path.read_text())
        del body["digest"]
        body = older(body, 4)
        path.write_text(json.dumps({**body, "digest": atomic_files.digest(_canonical(body))}))
        with pytest.raises(PackDamagedError, match="a dtype is not known"):
            ex.Pack.open(saved)


def _canonical(body):
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def changed(pack, pattern, change):
    """What a mistaken tool would write: other tensors in one file, with digests that fit."""
    (path,) = pack.glob(pattern)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = pack / keys.MANIFEST
    body = json.loads(manifest.read_text())
    del body["digest"]
    body["subspace"]["sha256"] = atomic_files.digest((pack / body["subspace"]["file"]).read_bytes())
    body = unfolded(body)
    for name, entry in body["adapters"].items():
        entry["files"] = {
            file: atomic_files.digest((pack / "adapters" / name / file).read_bytes()) for file in entry["files"]
        }
    manifest.write_text(json.dumps({**body, "digest": atomic_files.digest(_canonical(body))}))
    return ex.Pack.open(pack)


def put(name, tensor):
    return lambda found: found.__setitem__(name, tensor)


BASIS, OWN = f"{QUERY}.down.components", f"base_model.model.{QUERY}.eigenlorax_up"
FAULTS = {
    "no scales": (lambda key, n: lambda found: found.pop(f"{key}.scales"), "KeyError"),
    "no codes": (lambda key, n: lambda found: found.pop(f"{key}.codes"), "KeyError"),
    "scales of another shape": (lambda key, n: put(f"{key}.scales", torch.ones(n, 2).half()), "go with scales"),
    "scales of another dtype": (lambda key, n: put(f"{key}.scales", torch.ones(n, 1)), "torch.float32"),
    "codes of another width": (lambda key, n: put(f"{key}.codes", torch.ones(n, 4).to(torch.int8)), ""),
    "codes of another dtype": (lambda key, n: put(f"{key}.codes", torch.ones(n, 5).to(torch.uint8)), "torch.uint8"),
    "an exponent of another dtype": (lambda key, n: put(f"{key}.exponent", torch.tensor(1.0)), "exponent"),
    "a scale that is no number": (lambda key, n: put(f"{key}.scales", torch.full((n, 1), torch.nan).half()), "finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
class TestDamage:
    """Bytes that are those that were written, and are not what the format asks."""

    @pytest.fixture
    def saved(self, sources, tmp_path):
        return ex.fit(sources, n_components=5, dtype="int8").save(tmp_path / "pack")

    def test_in_a_basis(self, saved, fault):
        change, message = FAULTS[fault]
        pack = changed(saved, "subspace-*.safetensors", change(BASIS, 5))
        with pytest.raises(PackDamagedError, match=f"does not follow the pack format.*{message}"):
            pack.subspace  # noqa: B018
        with pytest.raises(PackDamagedError):
            pack.adapter("a")

    def test_in_coefficients(self, saved, fault):
        change, message = FAULTS[fault]
        pack = changed(saved, f"adapters/a/{keys.ADAPTER_WEIGHTS}", change(OWN, 3))
        with pytest.raises(PackDamagedError, match=f"adapters/a.*{message}"):
            pack.packed("a")
        assert pack.packed("b").coefficients[QUERY].down.shape == (3, 5)


def test_rows_of_an_extension_that_are_not_there(sources, tmp_path):
    pack = ex.fit(sources, n_components=4, dtype="int4", warn_above=1.0)
    pack.add(make_adapter(tmp_path / "late", seed=9), extend=1)
    saved = pack.save(tmp_path / "pack")
    found = changed(saved, "subspace-*.safetensors", lambda tensors: tensors.pop(f"{BASIS}.0.codes"))
    with pytest.raises(PackDamagedError, match=f"{BASIS}.0.codes"):
        found.subspace  # noqa: B018


@pytest.mark.parametrize("name", list(STORAGES))
def test_a_storage_travels_to_other_processes(name):
    assert pickle.loads(pickle.dumps(storage_by_name(name))) == storage_by_name(name)


def test_coefficients_without_a_payload_are_rounded_when_they_are_written():
    pack = ex.fit(random_collection(3), n_components=6, coefficient_dtype="float64")
    storage = storage_by_name("int8")
    coefficients = pack.packed("a1").coefficients
    tensors = storage.adapter_tensors(coefficients)
    slots = {m: ModuleSlot(m, c.rank, c.scaling, c.kernel) for m, c in coefficients.items()}
    found, payload = storage.read_adapter(dict(tensors), slots, lambda: pack.subspace)
    assert payload.keys() == tensors.keys()
    for module, c in coefficients.items():
        lost = found[module].up.double() @ found[module].down.double() - c.up @ c.down
        assert float(lost.norm() / (c.up @ c.down).norm()) < 0.02
