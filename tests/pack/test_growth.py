"""A pack that grows: what is in it stays, to the byte; and what refers to it from elsewhere still does."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eigenlorax as ex
import reference
from adapters import MODULES, make_adapter, make_adapters
from eigenlorax.core import registry, subspace
from eigenlorax.core.adapter import LoRAFactors, delta_square, from_factors
from eigenlorax.errors import AdapterNameError, LossWarning, ModuleNameError, OptionError, UntrainedAdapterWarning
from outcomes import contents
from planted import MODULES as PLANTED
from planted import normal, random_adapter, random_collection, shared_collection

QUERY = "encoder.layer.0.query"
pytestmark = pytest.mark.filterwarnings("ignore::eigenlorax.errors.LossWarning")


@pytest.fixture
def sources(tmp_path):
    make_adapters(tmp_path / "in", "a b c", head=(2, 31))
    return tmp_path / "in"


@pytest.fixture
def saved(sources, tmp_path):
    return ex.fit(sources, n_components=4).save(tmp_path / "pack")


def factors_of(pack, name):
    return {module: (f.down, f.up) for module, f in pack.adapter(name, torch.float64).modules.items()}


def assert_same_factors(pack, name, before):
    for module, (down, up) in factors_of(pack, name).items():
        assert torch.equal(down, before[module][0])
        assert torch.equal(up, before[module][1])


def assert_orthonormal(pack, atol):
    for bases in pack.subspace.modules.values():
        for basis in (bases.down, bases.up):
            rows = basis.components.double()
            torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=torch.float64), atol=atol, rtol=0)


class TestWhatStays:
    def test_every_file_of_every_adapter(self, saved, sources, tmp_path):
        before = contents(saved / "adapters")
        (old_bases,) = saved.glob("subspace-*.safetensors")
        with ex.Pack.edit(saved) as pack:
            pack.add(make_adapter(tmp_path / "late", seed=9), extend=3)
        after = contents(saved / "adapters")
        assert {path: one for path, one in after.items() if path.partition("/")[0] != "late"} == before
        (bases,) = saved.glob("subspace-*.safetensors")
        assert bases.name != old_bases.name
        ex.Pack.open(saved).verify()

    def test_and_again_elsewhere(self, saved, tmp_path):
        pack = ex.Pack.open(saved)
        pack.add(make_adapter(tmp_path / "late", seed=9), extend=3)
        pack.save(tmp_path / "other")
        theirs = contents(tmp_path / "other" / "adapters")
        assert {p: one for p, one in theirs.items() if p.partition("/")[0] != "late"} == contents(saved / "adapters")

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
    def test_every_output_to_the_bit_and_every_record(self, sources, tmp_path, dtype):
        pack = ex.fit(sources, n_components=4, dtype=dtype)
        before, records = {name: factors_of(pack, name) for name in pack.names}, pack.records
        pack.add(make_adapter(tmp_path / "late", seed=9), extend=2)
        reopened = ex.Pack.open(pack.save(tmp_path / "pack"))
        for found in (pack, reopened):
            assert {name: found.records[name] for name in records} == records
            for name in records:
                assert_same_factors(found, name, before[name])
        assert_orthonormal(reopened, {"float64": 1e-13, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype])

    def test_what_was_exported_is_exported_to_the_byte(self, saved, tmp_path):
        ex.Pack.open(saved).export(tmp_path / "before")
        with ex.Pack.edit(saved) as pack:
            pack.add(make_adapter(tmp_path / "late", seed=9), extend=3)
        ex.Pack.open(saved).export(tmp_path / "after", ["a", "b", "c"])
        assert contents(tmp_path / "after") == contents(tmp_path / "before")

    def test_in_an_augmented_pack_too(self, saved, tmp_path):
        more = ex.Pack.open(saved).augment(3, seed=1).save(tmp_path / "more")
        assert contents(more / "adapters") == contents(saved / "adapters")

    @pytest.mark.slow
    @given(seed=st.integers(0, 10**6), n=st.integers(1, 3), extend=st.integers(1, 9))
    @settings(max_examples=15, deadline=None)
    def test_whatever_is_added(self, seed, n, extend):
        pack = ex.fit(random_collection(3), n_components=6)
        before, records = {name: factors_of(pack, name) for name in pack.names}, pack.records
        for i in range(n):
            new = random_adapter(f"new-{i}", seed + i, rank=1 + (seed + i) % 5)
            projected = ex.fit(random_collection(3), n_components=6)
            for j in range(i):
                projected.add(random_adapter(f"new-{j}", seed + j, rank=1 + (seed + j) % 5), extend=extend)
            alone = projected.add(new)
            assert pack.add(new, extend=extend).delta_error <= alone.delta_error * (1 + 1e-6)
        assert {name: pack.records[name] for name in records} == records
        for name in records:
            assert_same_factors(pack, name, before[name])


class TestWhatIsGained:
    def test_an_adapter_with_as_many_missing_directions_becomes_exact(self):
        adapters, _ = shared_collection(4)
        pack = ex.fit(adapters, n_components=6)
        new = outlier(pack, (1.0, 0.3))
        assert ex.fit(adapters, n_components=6).add(new).delta_error > 0.1
        record = pack.add(new, extend=2)
        assert record.delta_error < 1e-6
        assert reference.delta_error(new, pack.adapter("outlier")) == pytest.approx(record.delta_error, abs=1e-6)
        assert pack.info.n_extended == 2 * 2 * len(PLANTED)

    def test_with_fewer_what_is_lost_is_the_rest_of_its_spectrum(self):
        adapters, _ = shared_collection(4)
        pack = ex.fit(adapters, n_components=6)
        new = outlier(pack, (1.0, 0.3))
        total = sum(delta_square(one) for one in new.modules.values())
        assert pack.add(new, extend=1).delta_error == pytest.approx((len(PLANTED) * 0.3**2 / total) ** 0.5, rel=1e-4)

    def test_one_that_lies_in_the_span_adds_none(self, tmp_path):
        make_adapters(tmp_path / "in", "a b c", shared=4)
        pack = ex.fit([tmp_path / "in" / "a", tmp_path / "in" / "b"], n_components=4)
        fingerprint = pack.info.fingerprint
        assert pack.add(tmp_path / "in" / "c", extend=5).delta_error < 1e-5
        assert (pack.info.fingerprint, pack.info.growth, pack.info.n_extended) == (fingerprint, (), 0)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_nor_does_one_of_the_pack_but_for_rounding(self, dtype):
        pack = ex.fit(random_collection(3, dtype=getattr(torch, dtype)), n_components=50)
        pack.add(random_collection(3, dtype=getattr(torch, dtype))[1], name="again", extend=4)
        assert pack.info.n_extended == 0

    def test_several_at_once_share_the_directions(self):
        adapters, _ = shared_collection(4)
        pack = ex.fit(adapters, n_components=6)
        common = [outlier(pack, (1.0,), name=f"new-{i}", seed=50 + i, directions=7) for i in range(3)]
        records = pack.add_all(common, extend=1)
        assert max(record.delta_error for record in records.values()) < 1e-6
        assert pack.info.n_extended == 2 * len(PLANTED)

    def test_their_order_does_not_matter(self, tmp_path):
        packs = []
        for order in (1, -1):
            pack = ex.fit(random_collection(3), n_components=4)
            pack.add_all([random_adapter(f"new-{i}", 1000 + i) for i in range(3)][::order], extend=2)
            packs.append(contents(pack.save(tmp_path / str(order))))
        assert packs[0] == packs[1]

    def test_a_module_that_nobody_had_trained(self):
        zero = {m: LoRAFactors(normal(2, i, seed=1), torch.zeros(o, 2), 1.0) for m, (o, i) in PLANTED.items()}
        only = "encoder.0.dense"
        adapters = [
            from_factors(f"a{i}", {**zero, only: random_adapter("x", i).modules[only]}, base_model="org/base")
            for i in range(2)
        ]
        pack = ex.fit(adapters, n_components=4)
        assert pack.info.modules["encoder.0.query"]["down"].k == 0
        assert pack.add(random_adapter("new", 9, rank=3), extend=3).delta_error < 1e-5
        assert pack.info.modules["encoder.0.query"]["down"].grown == (3,)
        assert pack.summary.down.capped == ["encoder.0.query"]

    def test_modules_that_the_subspace_lacks_are_carried(self, sources, tmp_path):
        pack = ex.fit(sources, n_components=4, exclude_modules=[QUERY])
        new = make_adapter(tmp_path / "late", seed=9)
        with pytest.raises(ModuleNameError, match="carry_missing=True"):
            pack.add(new, extend=3)
        assert pack.info.n_extended == 0
        assert pack.add(new, extend=3, carry_missing=True).delta_error < 1e-5
        assert reference.delta_error(ex.read_adapter(new), pack.adapter("late")) < 1e-5

    def test_an_untrained_adapter_asks_for_nothing(self):
        pack = ex.fit(random_collection(3), n_components=4)
        zero = {m: LoRAFactors(normal(2, i, seed=1), torch.zeros(o, 2), 1.0) for m, (o, i) in PLANTED.items()}
        with pytest.warns(UntrainedAdapterWarning, match="every update is zero.*: zero"):
            pack.add(from_factors("zero", zero, base_model="org/base"), extend=2)
        assert pack.info.n_extended == 0

    def test_it_ends_at_the_dimension(self):
        pack = ex.fit(random_collection(3), n_components=28)
        pack.add_all([random_adapter(f"n{i}", 900 + i, rank=9) for i in range(5)], extend=40)
        sides = [side for pair in pack.info.modules.values() for side in pair.values()]
        assert all(side.k <= side.dimension for side in sides)
        assert pack.info.modules["encoder.0.query"]["down"].k == 29

    def test_losses_are_warned_of_after_it(self):
        pack = ex.fit(random_collection(3), n_components=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error", LossWarning)
            pack.add(random_adapter("new", 77, rank=3), extend=3)
        with pytest.warns(LossWarning, match="above 0.5 for other"):
            pack.add(random_adapter("other", 78, rank=5), extend=1)


def outlier(pack, sigmas, *, name="outlier", seed=7, directions=None):
    """An adapter of two random directions in a pack's spans, and others beside them with these singular values in
    every module. directions: the seed of those, if not `seed`."""
    modules = {}
    for place, (module, bases) in enumerate(pack.subspace.modules.items()):
        parts = []
        for side, basis in enumerate((bases.down, bases.up)):
            rows = basis.components.double()
            clean = torch.linalg.qr(rows.mT)[0].mT
            beside = normal(len(sigmas), basis.dimension, seed=(directions or seed) + 10 * place + side)
            beside = torch.linalg.qr((beside - (beside @ clean.mT) @ clean).mT)[0].mT
            scale = torch.tensor(sigmas, dtype=torch.float64)[:, None] if side else 1.0
            parts.append(torch.cat([normal(2, basis.k, seed=seed + 100 + place + side) @ rows, scale * beside]))
        modules[module] = LoRAFactors(parts[0].float(), parts[1].mT.float().contiguous(), 1.0)
    return from_factors(name, modules, base_model="org/base")


class TestSteps:
    def test_two_extensions(self, sources, tmp_path):
        pack = ex.fit(sources, n_components=4)
        one = pack.info.fingerprint
        pack.add(make_adapter(tmp_path / "late", seed=9), extend=2)
        two = pack.info.fingerprint
        pack.add(make_adapter(tmp_path / "later", seed=10), extend=3)
        opened = ex.Pack.open(pack.save(tmp_path / "pack"))
        assert opened.info == pack.info
        assert opened.info.lineage == opened.subspace.lineage == (one, two, pack.info.fingerprint)
        assert {opened.packed(name).subspace for name in "abc"} == {one}
        assert [opened.packed(name).coefficients[QUERY].down.shape for name in ("a", "late", "later")] == [
            (3, 4),
            (3, 6),
            (3, 9),
        ]
        assert opened.records["later"].delta_error < 1e-5

    def test_extension_after_augmentation_and_the_reverse(self, saved, tmp_path):
        late, later = make_adapter(tmp_path / "late", seed=9), make_adapter(tmp_path / "later", seed=10)
        pack = ex.Pack.open(saved)
        before = {name: factors_of(pack, name) for name in pack.names}
        pack = pack.augment(2, seed=3)
        pack.add(late, extend=2)
        before["late"] = factors_of(pack, "late")
        pack = pack.augment(1, seed=4)
        pack.add(later, extend=1)
        opened = ex.Pack.open(pack.save(tmp_path / "grown"))
        assert [step.seed for step in opened.info.growth] == [3, None, 4, None]
        assert opened.info.modules[QUERY]["down"].grown == (2, 2, 1, 1)
        assert (opened.summary.n_extra, opened.info.n_extended) == (3, 2 * 3 * 3)
        for name, bases in pack.subspace.modules.items():
            assert torch.equal(opened.subspace.modules[name].down.components, bases.down.components)
        assert_orthonormal(opened, 1e-6)
        for name, factors in before.items():
            assert_same_factors(opened, name, factors)
        # what is stored: the fitted rows, three of extensions, and one number for each augmented one
        data = sum(tensor.nbytes for tensor in stored(tmp_path / "grown").values())
        assert data == opened.info.stored_bytes == pack.subspace.stored_bytes

    @pytest.mark.parametrize("version", [1, 2])
    def test_of_a_pack_of_an_earlier_version(self, saved, tmp_path, version):
        from versions import write_older

        write_older(saved, version)
        before = contents(saved / "adapters")
        with ex.Pack.edit(saved) as pack:
            assert pack.add(make_adapter(tmp_path / "late", seed=9), extend=3).delta_error < 1e-5
        manifest = json.loads((saved / "subspace_config.json").read_text())
        assert (manifest["format_version"], len(manifest["subspace"]["growth"])) == (8, 1)
        after = contents(saved / "adapters")
        assert {p: one for p, one in after.items() if p.partition("/")[0] != "late"} == before

    def test_of_an_augmented_pack_of_version_2_what_was_is_known_again(self, saved, tmp_path):
        from versions import write_older

        pack = ex.Pack.open(saved).augment(2, seed=3)
        pack.remove("a", "b", "c")
        pack.add(make_adapter(tmp_path / "late", seed=9))
        wide = pack.save(tmp_path / "wide")
        write_older(wide, 2)
        assert ex.Pack.open(wide).info.lineage == (None, pack.info.fingerprint)
        with ex.Pack.edit(wide) as edited:
            edited.add(make_adapter(tmp_path / "later", seed=10), extend=1)
        # the fingerprint of the fit, which version 2 did not note
        assert ex.Pack.open(wide).info.lineage[:2] == pack.info.lineage

    def test_a_report_of_it(self, saved, sources, tmp_path):
        late = make_adapter(tmp_path / "late", seed=9)
        with ex.Pack.edit(saved) as pack:
            pack.add(late, extend=2)
        pack = ex.Pack.open(saved)
        report = ex.report(pack, [sources, late])
        rows = {row.name: row.delta_error for row in report.adapters}
        assert rows == pytest.approx({name: one.delta_error for name, one in pack.records.items()}, rel=1e-5)
        assert {module.down.k for module in report.modules} == {4}
        assert any("12 components were added for later adapters" in note for note in report.notes)
        # without their originals, another basis leaves bounds
        again = ex.refit(pack, n_components=3).pack
        assert again.summary.bounds == 3
        assert any("errors of a, b, c are upper bounds" in note for note in ex.report(again).notes)
        assert not any("bounds" in note for note in ex.report(again, [sources, late]).notes)

    def test_after_a_fit_that_lists_a_part_of_the_spectrum(self, sources, tmp_path):
        from dataclasses import replace

        from eigenlorax.core.subspace import ModuleBases, Subspace
        from eigenlorax.pack import manifest

        pack = ex.fit(sources, n_components=4)
        cut = Subspace({name: ModuleBases(short(b.down), short(b.up)) for name, b in pack.subspace.modules.items()})
        fit = replace(pack.fit_info, solver="iterative")
        adapters = {name: pack.packed(name) for name in pack.names}
        info = manifest.describe(cut)
        options = {"base_model": None, "revision": None, "coefficient_dtype": torch.float32}
        opened = ex.Pack.open(ex.Pack(cut, info, adapters, fit, **options).save(tmp_path / "pack"))
        assert opened.info == info
        assert opened.fit_info.solver == "iterative"
        for name, bases in opened.subspace.modules.items():
            for basis, whole in ((bases.down, pack.subspace.modules[name].down), (bases.up, None)):
                assert len(basis.singular_values) == 5
                assert basis.shortfall == 0.01
                if whole is not None:
                    assert basis.square == pytest.approx(whole.square, rel=1e-6)
        figures = {m.name: m for m in ex.report(opened, None).modules}
        for name, bases in pack.subspace.modules.items():
            squares = bases.down.singular_values.double().square()
            assert figures[name].down.spectrum == pytest.approx((squares / squares.sum())[:5].tolist(), rel=1e-6)


def short(basis):
    """The same with five singular values listed, and the rest summed."""
    from dataclasses import replace

    squares = basis.singular_values.double().square()
    return replace(
        basis, singular_values=basis.singular_values[:5].clone(), tail=float(squares[5:].sum()), shortfall=0.01
    )


def stored(folder):
    from safetensors.torch import load_file

    (path,) = folder.glob("subspace-*.safetensors")
    return load_file(path)


class TestLineage:
    def test_an_earlier_subspace_is_a_view_of_a_later_one(self, sources, tmp_path):
        pack = ex.fit(sources, n_components=4)
        before = pack.subspace
        pack.add(make_adapter(tmp_path / "late", seed=9), extend=2)
        again = pack.subspace.at(before.fingerprint)
        assert again.lineage == (before.fingerprint,)
        for name, bases in again.modules.items():
            assert torch.equal(bases.down.components, before.modules[name].down.components)
            whole = pack.subspace.modules[name].down.components
            assert bases.down.components.data_ptr() == whole.data_ptr()
        assert pack.subspace.at(pack.info.fingerprint) is pack.subspace
        assert pack.subspace.at("0" * 64) is None

    def test_it_is_known_by_all_its_fingerprints(self, saved, tmp_path, monkeypatch):
        monkeypatch.setattr(registry, "_pack_openers", {})
        monkeypatch.setattr(registry, "_alive", type(registry._alive)())
        before = ex.Pack.open(saved).subspace
        with ex.Pack.edit(saved) as pack:
            pack.add(make_adapter(tmp_path / "late", seed=9), extend=2)
        opened = ex.Pack.open(saved)
        now = opened.info.fingerprint
        found = {one: registry.find(one) for one in opened.info.lineage}
        assert [found[one].fingerprint for one in opened.info.lineage] == [before.fingerprint, now]
        assert found[before.fingerprint].modules[QUERY].down.k == 4
        assert registry.find_pack(before.fingerprint).info.fingerprint == now

    def test_sides_that_grew_apart_are_refused(self):
        plain = ex.fit(random_collection(2), n_components=3).subspace
        grown = subspace.augment(plain, 2, seed=1)
        with pytest.raises(
            OptionError, match="must have grown by the same steps; here they have 2 different histories"
        ):
            subspace.Subspace({**plain.modules, "encoder.0.query": grown.modules["encoder.0.query"]})

    def test_fingerprints_follow_what_was_appended_where(self):
        plain = ex.fit(random_collection(2), n_components=3).subspace
        name, bases = next(iter(plain.modules.items()))
        down = torch.linalg.svd(bases.down.components.double())[2][-2:]
        none = torch.zeros(0, bases.up.dimension)
        prints = {
            subspace.extend(plain, {name: (rows, none)}).fingerprint for rows in (down, down[:1], down.flip(0), -down)
        }
        assert len(prints) == 4
        with pytest.raises(OptionError, match="no component to append was passed"):
            subspace.extend(plain, {name: (down[:0], none)})


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("extend", "message"),
        [
            (0, r"extend=0: the number of components .* must be from 1 to 53"),
            (-3, "extend=-3: .* from 1 to 53"),
            (54, "extend=54: .* from 1 to 53, the largest dimension"),
            (True, "extend must be an integer, got True"),
        ],
    )
    def test_numbers_of_directions(self, extend, message):
        pack = ex.fit(random_collection(3), n_components=4)
        before = pack.info
        with pytest.raises(OptionError, match=message):
            pack.add(random_adapter("new", 9), extend=extend)
        assert (pack.info, pack.names) == (before, ["a0", "a1", "a2"])

    def test_of_several_adapters_none_is_added_if_one_is_refused(self, saved, tmp_path):
        pack = ex.Pack.open(saved)
        late = make_adapter(tmp_path / "late", seed=9)
        with pytest.raises(AdapterNameError, match="already has an adapter named 'a'"):
            pack.add_all({"late": late, "a": late}, extend=2)
        with pytest.raises(AdapterNameError, match="two adapters have the same name, 'Late'"):
            pack.add_all({"late": late, "Late": late}, extend=2)
        assert pack.names == ["a", "b", "c"]
        assert pack.info.growth == ()
        assert len(MODULES) == len(pack.info.modules)
