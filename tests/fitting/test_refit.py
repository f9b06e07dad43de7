"""Another basis for the adapters of a pack: what is measured, what is followed, and what is said of it."""

from dataclasses import replace

import pytest
import torch

import eigenlorax as ex
import reference
from adapters import MODULES, make_adapter, make_adapters
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import FormatError, LossWarning, OptionError, SkippedAdapterWarning
from eigenlorax.fitting import refit_errors
from eigenlorax.pack import loss_warnings
from outcomes import contents
from planted import MODULES as PLANTED
from planted import normal, random_adapter, random_collection, shared_collection

QUERY = "encoder.layer.0.query"
pytestmark = pytest.mark.filterwarnings("ignore::eigenlorax.errors.LossWarning")


def true_errors(pack, originals):
    return {one.name: reference.delta_error(one, pack.adapter(one.name)) for one in originals}


def errors_after(found):
    return {name: change.error_after for name, change in found.changes.items()}


class TestFromOriginals:
    def test_it_is_a_fit_of_them(self, tmp_path):
        originals = random_collection(4)
        pack = ex.fit(originals[:3], n_components=4)
        pack.add(originals[3], extend=2)
        before = pack.records
        found = ex.refit(pack, originals, n_components=7)
        wanted = ex.fit(originals, n_components=7)
        assert contents(found.pack.save(tmp_path / "a")) == contents(wanted.save(tmp_path / "b"))
        assert pack.records == before
        assert errors_after(found) == pytest.approx(true_errors(found.pack, originals), rel=1e-5)
        for name, change in found.changes.items():
            assert (change.from_original, change.bound) == (True, False)
            assert change.error_before == before[name].delta_error
            assert (change.bytes_before, change.bytes_after) == (
                before[name].coefficient_bytes,
                found.pack.records[name].coefficient_bytes,
            )

    def test_by_default_as_the_pack_was_fitted(self):
        originals = random_collection(4)
        pack = ex.fit(originals, n_components=5, weighting="factors", dtype="float16", coefficient_dtype="float32")
        found = ex.refit(pack, originals)
        assert found.pack.info == pack.info
        assert found.pack.fit_info == pack.fit_info
        assert max(change.moved for change in found.changes.values()) < 1e-7
        assert found.worse == []

    def test_who_gets_worse_is_named_worst_first(self):
        originals = random_collection(5)
        pack = ex.fit(originals, n_components=9)
        found = ex.refit(pack, originals, n_components=3)
        rises = [found.changes[n].error_after - found.changes[n].error_before for n in found.worse]
        assert len(rises) == 5
        assert rises == sorted(rises, reverse=True)

    def test_what_moved_is_what_is_given_back(self):
        originals = random_collection(3)
        pack = ex.fit(originals, n_components=6)
        found = ex.refit(pack, originals, n_components=4)
        for name, change in found.changes.items():
            before, after = pack.adapter(name), found.pack.adapter(name)
            assert change.moved == pytest.approx(reference.delta_error(before, after), rel=1e-4)

    def test_files_of_others_are_passed_over_and_said(self, tmp_path):
        make_adapters(tmp_path / "in", "a b")
        pack = ex.fit(tmp_path / "in", n_components=4)
        other = make_adapter(tmp_path / "other", seed=77)
        with pytest.warns(SkippedAdapterWarning, match="left out, because their content is not in the pack: other"):
            found = ex.refit(pack, [tmp_path / "in" / "a", other])
        assert {name: change.from_original for name, change in found.changes.items()} == {"a": True, "b": False}

    @pytest.mark.filterwarnings("ignore:left out, because")
    def test_files_of_others_alone_are_an_error(self, tmp_path):
        pack = ex.fit(make_adapters(tmp_path / "in", "a b"), n_components=4)
        with pytest.raises(FormatError, match="none of the adapters that were passed is in the pack"):
            ex.refit(pack, [make_adapter(tmp_path / "other", seed=77)])


class TestFromThePack:
    def test_at_the_same_size_nothing_changes(self):
        originals, _ = shared_collection(5, noise=0.3)
        pack = ex.fit(originals, n_components=4)
        found = ex.refit(pack)
        assert max(change.moved for change in found.changes.values()) < 1e-5
        assert errors_after(found) == pytest.approx({n: r.delta_error for n, r in pack.records.items()}, rel=1e-6)
        assert found.worse == []

    @pytest.mark.parametrize("options", [{"n_components": 3}, {"energy": 0.7}, {"max_error": 0.4, "dtype": "float32"}])
    def test_in_a_smaller_one_errors_are_followed_exactly(self, options):
        originals = random_collection(5)
        pack = ex.fit(originals, n_components=7)
        found = ex.refit(pack, **options)
        assert errors_after(found) == pytest.approx(true_errors(found.pack, originals), rel=1e-5)
        assert not any(change.bound or change.from_original for change in found.changes.values())
        assert {name: record.delta_error for name, record in found.pack.records.items()} == errors_after(found)
        for name in pack.names:
            assert found.pack.records[name].source_sha256 == pack.records[name].source_sha256

    def test_where_the_pack_has_grown_they_are_bounded_for_those_before(self):
        originals = random_collection(6)
        pack = ex.fit(originals[:3], n_components=6)
        pack.add_all(originals[3:], extend=3)
        found = ex.refit(pack, n_components=7)
        real = true_errors(found.pack, originals)
        for name, change in found.changes.items():
            assert change.bound == (name in ("a0", "a1", "a2"))
            assert found.pack.records[name].bound == change.bound
            if change.bound:
                assert real[name] - 1e-6 <= change.error_after <= real[name] + 0.5
            else:
                assert change.error_after == pytest.approx(real[name], rel=1e-5)

    def test_with_some_originals_the_others_are_bounded(self):
        originals = random_collection(4)
        pack = ex.fit(originals, n_components=6)
        found = ex.refit(pack, originals[:2], n_components=5)
        real = true_errors(found.pack, originals)
        for one in originals:
            change = found.changes[one.name]
            assert change.bound is not change.from_original
            assert change.error_after >= real[one.name] - 1e-6

    def test_a_target_without_originals_is_said_to_hold_against_the_old_pack(self):
        originals = random_collection(4)
        pack = ex.fit(originals, n_components=2, warn_above=1.0)
        (note,) = ex.refit(pack, max_error=0.1, warn_above=1.0).pack.notes
        refitted = ex.refit(pack, max_error=0.1, warn_above=1.0).pack
        worst = max(record.delta_error for record in refitted.records.values())
        assert worst > 0.1
        assert "max_error=0.1 holds against the adapters as the old pack reconstructs them" in note
        assert f"up to {worst:.4f}" in note
        assert ex.refit(pack, originals, max_error=0.1).pack.notes == []

    def test_a_pack_of_floats_for_an_error_says_it_too(self):
        """Its adapters' errors are known, not bounded, where they are in the old basis alone."""
        pack = ex.fit(shared_collection(12, noise=0.1)[0], purpose="serving")
        refitted = ex.refit(pack, warn_above=1.0).pack
        worst = max(record.delta_error for record in refitted.records.values())
        assert worst > 0.1
        assert f"up to {worst:.4f}" in " ".join(refitted.notes)

    def test_a_bound_stays_one_when_it_is_fitted_again_and_goes_with_the_original(self, tmp_path):
        originals = random_collection(4)
        pack = ex.fit(originals, n_components=6)
        once = ex.refit(pack, originals[:2], n_components=5).pack
        opened = ex.Pack.open(once.save(tmp_path / "once"))
        twice = ex.refit(opened, n_components=4)
        real = true_errors(twice.pack, originals)
        assert [twice.changes[name].bound for name in ("a0", "a1", "a2", "a3")] == [False, False, True, True]
        assert all(twice.changes[name].error_after >= real[name] - 1e-6 for name in real)
        assert not any(change.bound for change in ex.refit(opened, originals).changes.values())
        assert "| `a3` | 2 | 2 | ≤ 0." in (tmp_path / "once" / "README.md").read_text()

    def test_modules_that_were_carried_come_into_the_subspace(self, tmp_path):
        make_adapters(tmp_path / "in", "a b", head=(2, 31))
        # c alone has one more module
        longer = {**MODULES, "encoder.layer.9.key": (31, 37)}
        late = make_adapter(tmp_path / "late", seed=5, modules=longer)
        pack = ex.fit(tmp_path / "in", n_components=6)
        pack.add(late, carry_missing=True)
        found = ex.refit(pack, n_components=5)
        assert "encoder.layer.9.key" in found.pack.info.modules
        real = reference.delta_error(ex.read_adapter(late), found.pack.adapter("late"))
        assert found.changes["late"].error_after == pytest.approx(real, rel=1e-5)
        for key, head in pack.adapter("a").heads.items():
            assert torch.equal(head, found.pack.adapter("a").heads[key])

    def test_histories_stay(self, tmp_path):
        make_adapters(tmp_path / "in", "a b")
        pack = ex.fit(tmp_path / "in", n_components=3)
        for number in (1, 2):
            pack.append(tmp_path / "in" / "ab"[number - 1], name="run")
        path = pack.save(tmp_path / "pack")
        refitted = ex.refit(path, n_components=2).pack
        refitted.save(path, overwrite=True)
        opened = ex.Pack.open(path)
        opened.verify()
        assert dict(opened.histories) == dict(pack.histories)
        assert torch.equal(opened["run@2"].modules[QUERY].down, pack["run@2"].modules[QUERY].down)

    def test_modules_kept_out_by_request_stay_out(self, tmp_path):
        make_adapters(tmp_path / "in", "a b")
        pack = ex.fit(tmp_path / "in", n_components=6, exclude_modules=[QUERY])
        found = ex.refit(pack, n_components=3)
        assert sorted(found.pack.info.modules) == sorted(set(MODULES) - {QUERY})
        before, after = (p.adapter("a").modules[QUERY] for p in (pack, found.pack))
        assert torch.equal(before.down, after.down)

    @pytest.mark.parametrize("options", [{"n_components": 4}, {"max_error": 0.3}])
    def test_errors_do_not_count_modules_kept_out(self, options):
        originals = random_collection(3)
        pack = ex.fit(originals, exclude_modules=["encoder.0.dense"], **options)
        again = ex.refit(pack, n_components=3).pack
        assert ex.verify(again, originals).holds
        assert ex.refit(again, max_error=0.4).changes["a0"].moved < 1

    def test_bounds_include_the_rounding_of_modules_that_come_into_the_subspace(self):
        # a0 has one more module, with most of its update
        modules = {**PLANTED, "encoder.1.key": (23, 31)}
        late = random_adapter("late", 50, modules=modules)
        large = {**late.modules, "encoder.1.key": replace(late.modules["encoder.1.key"], scaling=1000.0)}
        late = from_factors("late", large, base_model="org/base")
        pack = ex.fit(random_collection(3), max_error=0.01)
        pack.add(late, carry_missing=True)
        assert pack.records["late"].head_error > 0.001
        again = ex.refit(pack, max_error=1e-4).pack
        assert ex.verify(again, [late]).holds
        assert again.records["late"].delta_error < 0.01

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.UntrainedAdapterWarning")
    def test_one_that_is_untrained_and_one_that_was_lost_as_a_whole(self):
        zero = {m: LoRAFactors(normal(2, i, seed=1), torch.zeros(o, 2), 1.0) for m, (o, i) in PLANTED.items()}
        originals, bases = shared_collection(3)
        # five directions hold all of one side, and nothing of what lies beside them
        pack = ex.fit([*originals, from_factors("zero", zero, base_model="org/base")], n_components=5)
        apart = {}
        for module, (n_out, n_in) in PLANTED.items():
            down = normal(2, n_in, seed=3)
            clean = bases[module][0]
            apart[module] = LoRAFactors(down - (down @ clean.mT) @ clean, normal(n_out, 2, seed=4), 1.0)
        assert pack.add(from_factors("apart", apart, base_model="org/base")).delta_error == pytest.approx(1)
        found = ex.refit(pack, n_components=4)
        assert (found.changes["zero"].error_before, found.changes["zero"].error_after) == (None, None)
        assert found.pack.records["zero"].untrained
        assert found.changes["apart"].error_after == pytest.approx(1, abs=1e-6)
        assert not found.pack.records["apart"].untrained

    def test_losses_are_warned_of(self):
        pack = ex.fit(random_collection(5), n_components=7)
        with pytest.warns(LossWarning, match="Refit from the originals, or with more components"):
            ex.refit(pack, n_components=1, warn_above=0.5)


class TestBounds:
    @pytest.mark.parametrize("seed", range(8))
    def test_is_the_worst_that_an_original_allows(self, seed):
        """All originals D with ‖D − before‖ = error · ‖D‖, by angles in the plane of the worst one, and others."""
        generator = torch.Generator().manual_seed(seed)
        error = (0.02, 0.2, 0.5, 0.8)[seed % 4]
        before, after, outside = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
        outside = outside if seed > 3 else torch.zeros(5)
        moved_outside = outside * torch.rand(5, generator=generator, dtype=torch.float64)
        squares = [one.square().sum().item() for one in (before, after, before - after, outside, moved_outside)]
        centre = before / (1 - error**2)
        plane = torch.linalg.qr(torch.stack([before, after]).mT).Q.mT
        angles = torch.linspace(0, 2 * torch.pi, 100_001, dtype=torch.float64)
        units = torch.randn(100_000, 5, generator=generator, dtype=torch.float64)
        found = []
        for directions in (
            torch.stack([angles.cos(), angles.sin()], dim=1) @ plane,
            units / units.norm(dim=1)[:, None],
        ):
            originals = centre + error * centre.norm() * directions
            assert torch.allclose((originals - before).norm(dim=1), error * originals.norm(dim=1))
            lost = (originals - after).square().sum(1) + squares[4]
            found.append(float((lost / (originals.square().sum(1) + squares[3])).max()) ** 0.5)
        bound = refit_errors.worst_error(error, refit_errors.UpdateSquares(*squares))
        assert bound == pytest.approx(found[0], rel=1e-6)
        assert found[1] <= bound

    def test_of_a_pack_of_chosen_bytes(self):
        originals = random_collection(5)
        pack = ex.fit(originals, max_error=0.3, warn_above=1.0)
        with pytest.warns(LossWarning) as noted:
            found = ex.refit(pack, n_components=6)
        real = true_errors(found.pack, originals)
        by_norms = {}
        for name, change in found.changes.items():
            before = pack.records[name].delta_error
            by_norms[name] = before + change.moved * (1 + before)
            assert change.bound
            assert real[name] <= change.error_after < min(by_norms[name], 1)
        assert max(by_norms.values()) > 1.2
        (message,) = (str(warning.message) for warning in noted)
        assert "may be above 0.5, since the pack was refitted without the originals" in message
        assert f"a0 (at most {found.changes['a0'].error_after:.2f})" in message
        assert "is lost" not in message

    def test_of_1_or_more_says_nothing(self):
        record = ex.fit(random_collection(2), n_components=3).records["a0"]
        records = {"a": replace(record, bound=True, delta_error=1.29), "b": replace(record, delta_error=0.7)}
        said = loss_warnings.describe_losses(records, 0.5)
        assert "is above 0.5 for b (0.70). " in said
        assert said.endswith("is known, for a (perhaps all of it).")
        assert "1.29" not in said


class TestWhatIsRefused:
    def test_a_pack_without_adapters(self):
        pack = ex.fit([random_adapter("a", 1)], n_components=2)
        pack.remove("a")
        with pytest.raises(OptionError, match="has no adapter to fit.*eigenlorax add"):
            ex.refit(pack)

    def test_options_of_reading_without_anything_to_read(self):
        with pytest.raises(OptionError, match="allow_pickle: options of reading"):
            ex.refit(ex.fit(random_collection(2), n_components=2), allow_pickle=True)

    def test_sizes(self):
        with pytest.raises(OptionError, match="n_components must be at least 1"):
            ex.refit(ex.fit(random_collection(2), n_components=2), n_components=0)
