"""`n_components="auto"`: the planted number is found, and what is measured on the way is what a slow oracle finds."""

import json

import numpy as np
import pytest
import torch

import eigenlorax as ex
import reference
from eigenlorax.codec.storage.table import storage_by_name
from eigenlorax.core.adapter import LoRAFactors, ModuleSpec, from_factors
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.errors import OptionError, UntrainedAdapterWarning
from eigenlorax.fitting import auto_rank
from eigenlorax.fitting.module_fitter import ModuleFitter, ModuleUpdate
from planted import factors_in, orthonormal, random_adapter, tree

MODULES = {"m.0": (97, 89), "m.1": (101, 83), "m.2": (79, 107)}  # (out, in)


def planted(n, k, noise, *, rank=3, modules=MODULES, seed=0):
    """Adapters whose updates lie in `k` directions on each side of each module, but for noise."""
    bases = {
        name: (orthonormal(k, n_in, seed + 11 + j), orthonormal(k, n_out, seed + 77 + j))
        for j, (name, (n_out, n_in)) in enumerate(modules.items())
    }
    return [
        from_factors(
            f"a{i}",
            {
                name: factors_in(bases[name], rank + i % 2, seed=seed + 1000 * i + 10 * j, noise=noise)
                for j, name in enumerate(modules)
            },
            base_model="org/base",
        )
        for i in range(n)
    ]


def unrelated(n, modules=MODULES):
    return [random_adapter(f"a{i}", 1000 * i + 7, modules=modules, rank=3) for i in range(n)]


def fitted(adapters, **options):
    return ex.fit(adapters, n_components="auto", warn_above=1.0, **options)


def choice(adapters, **options):
    """What `fit` chooses from."""
    fitter = ModuleFitter(
        FitOptions(n_components=1, **options),
        {a.name: sum(np.square(reference.dense(f)).sum() for f in a.modules.values()) ** -0.5 for a in adapters},
        storage_by_name("float64"),
        storage_by_name("float64"),
        torch.device("cpu"),
    )
    modules = sorted({name for a in adapters for name in a.modules})

    def reading(name):
        return lambda: [ModuleUpdate(a.name, a.modules[name], True) for a in adapters if name in a.modules]

    loaders = {name: reading(name) for name in modules}
    outlines = {
        name: auto_rank.ModuleOutline([m.factors.spec for m in read()], [m.adapter for m in read()])
        for name, read in loaders.items()
    }
    return auto_rank.choose(loaders, outlines, fitter, lambda *step: None)


@pytest.mark.slow
class TestChosen:
    @pytest.mark.parametrize("seed", [0, 50_000, 90_000])
    @pytest.mark.parametrize(("k", "noise"), [(6, 0.1), (6, 0.3), (11, 0.1), (11, 0.2)])
    def test_the_planted_number_or_the_next_step(self, k, noise, seed):
        pack = fitted(planted(14, k, noise, seed=seed))
        steps = choice(planted(14, k, noise, seed=seed)).grid
        assert pack.fit_info.n_components in (k, steps[steps.index(k) + 1])
        assert pack.fit_info.auto

    def test_the_planted_number_of_the_factors_weighting(self):
        assert fitted(planted(14, 6, 0.1), weighting="factors").fit_info.n_components in (6, 8)

    def test_nothing_shared(self):
        pack = fitted(unrelated(12))
        (note,) = pack.notes
        assert "they share hardly anything" in note
        assert pack.fit_info.n_components <= 3

    def test_something_shared_is_not_nothing(self):
        (note,) = fitted(planted(14, 6, 0.3)).notes
        assert "hardly anything" not in note
        assert "further components keep little more of them than random ones would" in note

    def test_why_is_said_in_numbers_that_are_true(self):
        adapters = planted(14, 6, 0.1)
        pack, found = fitted(adapters), choice(adapters)
        k = pack.fit_info.n_components
        (note,) = pack.notes
        assert note.startswith(f"n_components={k} was chosen: adapters left out of the fit one at a time")
        assert f"a mean delta error of {found.errors[found.grid.index(k)]:.2f} with {k} components" in note
        # one of them left out by hand, with the basis that the others have without sweeps
        others = ex.fit(adapters[1:], n_components=k, sweeps=0)
        by_hand = others.add(adapters[0], warn_above=1.0).delta_error
        assert by_hand == pytest.approx(found.errors[found.grid.index(k)], abs=0.1)

    @pytest.mark.parametrize("n", [3, 4])
    def test_few_adapters(self, n):
        pack = fitted(planted(n, 4, 0.1, rank=4))
        assert 1 < pack.fit_info.n_components <= 8

    def test_a_pack_that_is_smaller_than_the_loras(self):
        # more directions than would pay
        adapters = planted(7, 29, 0.02, rank=4)
        pack = fitted(adapters)
        k = pack.fit_info.n_components
        assert pack.summary.bytes.ratio > 1
        assert ex.fit(adapters, n_components=k + 1, warn_above=1.0).summary.bytes.ratio <= 1
        assert "components (the LoRAs' size allows no more)" in pack.notes[0]
        assert "further components would keep even more of them" in pack.notes[0]

    def test_where_no_pack_is_smaller(self):
        adapters = [random_adapter(f"a{i}", 90 * i, rank=1, modules={"m.0": (3, 2)}) for i in range(3)]
        pack = fitted(adapters)
        assert pack.summary.bytes.ratio < 1
        assert 1 <= pack.fit_info.n_components <= 3

    def test_the_order_of_adapters_does_not_matter_to_the_byte(self, tmp_path):
        adapters = planted(7, 6, 0.2)
        notes = []
        for name, order in {"one": adapters, "two": adapters[::-1], "three": adapters[3:] + adapters[:3]}.items():
            pack = fitted(order)
            pack.save(tmp_path / name)
            notes.append(pack.notes)
        assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")
        assert notes[0] == notes[1] == notes[2]

    def test_the_fit_is_that_of_the_number(self, tmp_path):
        adapters = planted(14, 6, 0.1)
        pack = fitted(adapters)
        by_hand = ex.fit(adapters, n_components=pack.fit_info.n_components)
        assert pack.info == by_hand.info
        assert pack.records == by_hand.records

    def test_the_pack_says_that_it_was_found_and_not_why(self, tmp_path):
        pack = fitted(planted(14, 6, 0.1))
        pack.save(tmp_path / "pack")
        fit = json.loads((tmp_path / "pack" / "subspace_config.json").read_text())["fit"]
        assert (fit["n_components"], fit["auto"]) == (pack.fit_info.n_components, True)
        assert ex.Pack.open(tmp_path / "pack").notes == []
        assert f"at most {fit['n_components']} components (auto)" in (tmp_path / "pack" / "README.md").read_text()

    def test_a_number_that_was_given_has_nothing_to_say(self):
        assert ex.fit(planted(3, 4, 0.1), n_components=4).notes == []

    def test_modules_that_adapters_lack(self):
        whole = planted(8, 6, 0.1)
        # m.1 is that of one adapter alone, and another one has nothing but m.2
        adapters = [
            from_factors(
                a.name,
                {name: f for name, f in a.modules.items() if (name != "m.1" or i == 0) and (i != 3 or name == "m.2")},
                base_model="org/base",
            )
            for i, a in enumerate(whole)
        ]
        assert fitted(adapters).fit_info.n_components in (6, 8)

    def test_progress_is_told(self):
        seen = []
        fitted(planted(4, 4, 0.1), progress=lambda *step: seen.append(step))
        assert [step for step in seen if step[0] == auto_rank.STAGE][-1] == (auto_rank.STAGE, 3, 3)
        assert seen[-1][0] == "fitting modules"


class TestRefused:
    @pytest.mark.parametrize("n", [1, 2])
    def test_too_few_adapters(self, n):
        with pytest.raises(OptionError, match=rf"needs at least 3 trained ones, got {n}\. Pass a number"):
            fitted(planted(n, 4, 0.1))

    def test_an_untrained_adapter_does_not_count(self):
        adapters = planted(3, 4, 0.1)
        still = {m: LoRAFactors(f.down, torch.zeros_like(f.up), f.scaling) for m, f in adapters[0].modules.items()}
        with (
            pytest.warns(UntrainedAdapterWarning, match="a0"),
            pytest.raises(OptionError, match="at least 3 trained ones, got 2"),
        ):
            fitted([from_factors("a0", still, base_model="org/base"), *adapters[1:]])

    @pytest.mark.parametrize("other", [{"energy": 0.5}, {"max_error": 0.5}])
    def test_another_size_beside_it(self, other):
        with pytest.raises(OptionError, match=r"n_components='auto' chooses a number by itself.*Pass one of them"):
            fitted(planted(3, 4, 0.1), **other)

    def test_another_word(self):
        with pytest.raises(OptionError, match="n_components must be an integer, or 'auto', got 'automatic'"):
            ex.fit(planted(3, 4, 0.1), n_components="automatic")


def leave_one_out(adapters, grid):
    """(errors, outside) of every adapter, (n, g), by dense updates and their eigenvectors."""
    dense = [{name: reference.dense(f) for name, f in a.modules.items()} for a in adapters]
    totals = [sum(np.square(d).sum() for d in one.values()) for one in dense]
    lost, outside = np.zeros((len(adapters), len(grid))), np.zeros((len(adapters), len(grid)))
    for i, one in enumerate(dense):
        for name, update in one.items():
            others = [(other[name], totals[j]) for j, other in enumerate(dense) if j != i]
            v = np.linalg.eigh(sum(d.T @ d / total for d, total in others))[1][:, ::-1]
            u = np.linalg.eigh(sum(d @ d.T / total for d, total in others))[1][:, ::-1]
            for g, k in enumerate(grid):
                right, left = v[:, :k] @ v[:, :k].T, u[:, :k] @ u[:, :k].T
                lost[i, g] += np.square(update - left @ update @ right).sum()
                for rest, width in zip((update - left @ update, update - update @ right), update.shape, strict=True):
                    outside[i, g] += np.square(rest).sum() * width / (width - k) / 2
    totals = np.array(totals)[:, None]
    return np.sqrt(lost / totals), outside / totals


@pytest.mark.parametrize(
    ("n", "modules"),
    [(7, MODULES), (9, {"m.0": (23, 19), "m.1": (17, 29)})],
    ids=["fewer rows than dimensions", "more"],
)
def test_what_is_measured_is_what_dense_updates_have(n, modules):
    adapters = planted(n, 5, 0.2, modules=modules)
    found = choice(adapters)
    errors, outside = leave_one_out(adapters, found.grid)
    np.testing.assert_allclose(found.errors, errors.mean(axis=0), rtol=1e-8)
    np.testing.assert_allclose(found.outside, outside.mean(axis=0), rtol=1e-8)
    assert found.errors == sorted(found.errors, reverse=True)


def test_random_directions_leave_what_is_outside_as_dense_as_it_was():
    """Where nothing is shared: 1 at every number of components, though the error falls."""
    found = choice(unrelated(12))
    assert np.abs(np.array(found.outside) - 1).max() < 0.05
    assert found.errors[-1] < 0.97


class TestSamples:
    def sampled(self, adapters, modules, *, rank=8, width=768, sweeps=2):
        names = [f"a{i:03d}" for i in range(adapters)]
        outline = auto_rank.ModuleOutline([ModuleSpec(rank, width, width + 1, 1.0, torch.float32)] * adapters, names)
        outlines = {f"m.{j:02d}": outline for j in range(modules)}
        fitter = ModuleFitter(
            FitOptions(n_components=1, sweeps=sweeps),
            dict.fromkeys(names, 1.0),
            storage_by_name("float32"),
            storage_by_name("float32"),
            torch.device("cpu"),
        )
        sample = auto_rank._sample(outlines, fitter)
        return outlines, (sample.modules, sample.adapters)

    def test_all_where_that_is_little_work(self):
        all_modules, (modules, adapters) = self.sampled(17, 12, rank=4, width=384)
        assert modules == list(all_modules)
        assert len(adapters) == 17

    def test_no_more_work_than_the_fit(self):
        all_modules, (modules, adapters) = self.sampled(200, 24)
        assert len(set(adapters)) == 12
        assert 3 <= len(modules) < 24
        assert len(adapters) * len(modules) <= 3 * len(all_modules)

    def test_one_module_at_least(self):
        _, (modules, adapters) = self.sampled(200, 1, width=4096)
        assert (len(modules), len(set(adapters))) == (1, 12)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning")
    def test_those_who_have_trained_what_is_looked_at(self, monkeypatch):
        # two groups of adapters with no module in common, of which one module alone is looked at
        monkeypatch.setattr(auto_rank, "CHEAP", 0)
        one = planted(14, 6, 0.1, modules={"m.0": MODULES["m.0"]})
        two = planted(14, 6, 0.1, modules={"m.2": MODULES["m.2"]}, seed=50_000)
        renamed = [from_factors(f"b{i}", a.modules, base_model="org/base") for i, a in enumerate(two)]
        pack = fitted([*one, *renamed], sweeps=0)
        assert pack.notes[0].startswith(f"n_components={pack.fit_info.n_components} was chosen: 12 of 28 adapters left")
        assert pack.fit_info.n_components in (6, 8)
