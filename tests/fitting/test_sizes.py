"""`max_error`: as few bytes as keep every adapter within the bound, held against all there are."""

import bisect
import itertools
import json
import math

import numpy as np
import pytest
import torch

import eigenlorax as ex
import reference
from eigenlorax.core import metrics, projection, subspace
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.core.exact_fit import fit_module
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.errors import LossWarning, OptionError, UntrainedAdapterWarning
from eigenlorax.fitting import knapsack, sizes
from eigenlorax.fitting.knapsack import Choices
from planted import factors_in, normal, orthonormal, random_collection, tree

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_shape_checks")]

MODULES = {"m.0": (17, 13), "m.1": (19, 12), "m.2": (14, 23)}  # (out, in)
BOUNDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def random(n, modules, seed):
    """Adapters that share nothing, of ranks 1, 2, 3, 1, …: the fewer rows, the fewer combinations there are to try."""
    return collection(
        n,
        modules,
        lambda i, j, out, width: (
            normal(1 + i % 3, width, seed=seed + 100 * i + 10 * j),
            normal(out, 1 + i % 3, seed=seed + 100 * i + 10 * j + 5),
        ),
    )


def shared(n, modules, seed, least=1):
    """Adapters that mostly share a subspace, of another dimension on each side of each module; of three ranks, from the
    least on."""

    def factors(i, j, out, width):
        bases = orthonormal(3 + 2 * j, width, seed + 7 * j), orthonormal(4 + j, out, seed + 7 * j + 3)
        one = factors_in(bases, least + i % 3, seed=seed + 100 * i + 10 * j, noise=0.15)
        return one.down, one.up

    return collection(n, modules, factors)


def collection(n, modules, factors):
    return [
        from_factors(
            f"a{i}",
            {
                name: LoRAFactors(*(t.float() for t in factors(i, j, *shape)), scaling=0.5 + i + j)
                for j, (name, shape) in enumerate(modules.items())
            },
            base_model="org/base",
        )
        for i in range(n)
    ]


def stored_bytes(pack):
    """Components and coefficients: what the numbers of components decide."""
    sides = [side for pair in pack.info.modules.values() for side in pair.values()]
    coefficients = sum(record.coefficient_bytes for record in pack.records.values())
    return coefficients + sum(side.k * side.dimension for side in sides) * pack.dtype.itemsize


def numbers(pack):
    return {name: (sides["down"].k, sides["up"].k) for name, sides in pack.info.modules.items()}


def all_cells(adapters, dtype, weighting):
    """Of each module, every pair (k_down, k_up): bytes, and each adapter's share of squared norm that it loses."""
    totals = [sum(np.square(reference.dense(f)).sum() for f in a.modules.values()) for a in adapters]
    options = FitOptions(n_components=1, weighting=weighting)
    found = []
    for name in adapters[0].modules:
        factors = [a.modules[name] for a in adapters]
        weights = [total**-0.5 for total in totals]
        rows, spec = sum(f.spec.rank for f in factors), factors[0].spec
        prices, losses = [], []
        most = [min(rows, width) for width in (spec.in_features, spec.out_features)]
        for k in [(0, 0), *itertools.product(*(range(1, m + 1) for m in most))]:
            stored = subspace.round_bases(fit_module(factors, weights, options, k), dtype)
            down, up = stored.down.k, stored.up.k
            prices.append(dtype.itemsize * (down * spec.in_features + up * spec.out_features + rows * (down + up)))
            losses.append(
                [
                    metrics.module_error(f, projection.project(f, stored, dtype), stored).squared_error / total
                    for f, total in zip(factors, totals, strict=True)
                ]
            )
        found.append((np.array(prices), np.array(losses)))
    return found


def fewest_bytes(cells, bound):
    """Over all combinations, one cell a module, in which no adapter loses more than the bound."""
    best = math.inf

    def extend(depth, spent, lost):
        nonlocal best
        prices, losses = cells[depth]
        fits = np.flatnonzero((lost + losses <= bound**2).all(axis=1) & (spent + prices < best))
        if depth == len(cells) - 1:
            best = min(best, *(spent + prices[fits])) if len(fits) > 1 else min([best, *(spent + prices[fits])])
            return
        for cell in fits[np.argsort(prices[fits])]:
            if spent + prices[cell] < best:
                extend(depth + 1, spent + prices[cell], lost + losses[cell])

    extend(0, 0, np.zeros(cells[0][1].shape[1]))
    return best


def of_one_number(adapters, bound, most):
    """The pack of a number of components, one for all, that keeps to the bound where one less does not."""
    packs = {}

    def keeps(k):
        packs[k] = ex.fit(adapters, n_components=k, warn_above=1.0)
        return max(record.delta_error for record in packs[k].records.values()) <= bound

    assert keeps(most)
    return packs[1 + bisect.bisect_left(range(1, most), True, key=keeps)]


class TestBytes:
    def assert_fewest(self, adapters, dtype=torch.float32, weighting="delta", bounds=BOUNDS):
        cells = all_cells(adapters, dtype, weighting)
        for bound in bounds:
            pack = ex.fit(adapters, max_error=bound, dtype=dtype, weighting=weighting)
            assert max(record.delta_error for record in pack.records.values()) <= bound
            assert stored_bytes(pack) <= 1.15 * fewest_bytes(cells, bound)
            # no side is empty alone
            assert all((down == 0) == (up == 0) for down, up in numbers(pack).values())

    @pytest.mark.parametrize("make", [random])
    def test_are_the_fewest_over_two_modules(self, make):
        self.assert_fewest(make(3, dict(list(MODULES.items())[:2]), seed=3000))

    def test_are_the_fewest_in_float16(self):
        self.assert_fewest(shared(3, dict(list(MODULES.items())[1:]), seed=77), dtype=torch.float16)

    def test_are_the_fewest_of_the_factors_weighting(self):
        self.assert_fewest(shared(3, dict(list(MODULES.items())[:2]), seed=78), weighting="factors")

    def test_are_no_more_than_those_of_one_number_for_all(self):
        # twelve modules: too many to try everything
        modules = {f"m.{j}": (29 + j, 23 + 2 * j) for j in range(12)}
        adapters = shared(5, modules, seed=9)
        pack = ex.fit(adapters, max_error=0.4, dtype="float32")
        assert max(record.delta_error for record in pack.records.values()) <= 0.4
        assert stored_bytes(pack) < 0.95 * stored_bytes(of_one_number(adapters, 0.4, most=20))

    @pytest.mark.parametrize("bound", [0.5])
    def test_where_rows_outnumber_dimensions(self, bound):
        # more cells than can be tried, and predictions that sweeps and other bases put off
        modules = {f"m.{j}": (47 + 3 * j, 61 - 2 * j) for j in range(3)}
        adapters = shared(25, modules, seed=11, least=2)
        pack = ex.fit(adapters, max_error=bound, dtype="float32")
        worst = max(record.delta_error for record in pack.records.values())
        assert 0.97 * bound < worst <= bound
        assert stored_bytes(pack) < stored_bytes(of_one_number(adapters, bound, most=61))

    def test_progress_is_told_stage_by_stage(self):
        seen = []
        ex.fit(shared(3, MODULES, seed=5), max_error=0.3, dtype="float32", progress=lambda *step: seen.append(step))
        stages = list(dict.fromkeys(stage for stage, _, _ in seen))
        assert stages[:3] == ["reading adapters", sizes.SPECTRA, sizes.TRIALS]
        assert stages[-1] == "fitting modules"
        for stage in stages:
            steps = [(done, total) for name, done, total in seen if name == stage]
            assert steps == sorted(steps)
            assert steps[-1][0] == steps[-1][1]


class TestNumbers:
    def test_planted_dimensions_are_found(self):
        planted = {"m.0": (3, 5), "m.1": (6, 2), "m.2": (4, 7)}

        def factors(i, j, out, width):
            down, up = planted[f"m.{j}"]
            bases = orthonormal(down, width, 7 * j), orthonormal(up, out, 7 * j + 3)
            one = factors_in(bases, 3, seed=100 * i + 10 * j)
            return one.down, one.up

        adapters = collection(6, MODULES, factors)
        assert numbers(ex.fit(adapters, max_error=0.01, dtype="float32")) == planted

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")
    def test_a_hardly_trained_module_is_dropped_and_comes_back_as_zero(self, tmp_path):
        def factors(i, j, out, width):
            size = 1e-3 if j == 1 else 1.0
            return size * normal(2, width, seed=100 * i + j), normal(out, 2, seed=100 * i + j + 50)

        adapters = collection(3, MODULES, factors)
        ex.fit(adapters, max_error=0.2, dtype="float32").save(tmp_path / "pack")
        pack = ex.Pack.open(tmp_path / "pack")
        assert numbers(pack)["m.1"] == (0, 0)
        assert min(numbers(pack)["m.0"]) > 0
        assert pack.info.modules["m.1"]["up"].energy == 0.0
        assert pack.info.modules["m.1"]["up"].square > 0
        assert pack.summary.down.energy < 1
        for adapter in adapters:
            back = ex.read_adapter(pack.export(tmp_path / adapter.name, [adapter.name])[adapter.name])
            assert not reference.dense(back.modules["m.1"]).any()
            assert reference.delta_error(adapter, back) == pytest.approx(
                pack.records[adapter.name].delta_error, rel=1e-4
            )
        # and further directions may be put there
        more = pack.augment(3, seed=1)
        assert numbers(more)["m.1"] == (3, 3)
        assert more.add(adapters[0], name="again").delta_error < pack.records[adapters[0].name].delta_error

    def test_nothing_is_capped(self):
        assert ex.fit(random(3, MODULES, seed=3), max_error=0.5, dtype="float32").summary.down.capped == []

    def test_modules_that_an_adapter_lacks_and_modules_that_nobody_trained(self):
        adapters = random(3, MODULES, seed=3)
        still = adapters[0].modules["m.1"]
        zero = LoRAFactors(still.down, torch.zeros_like(still.up), still.scaling)
        adapters = [
            from_factors(a.name, {**a.modules, "m.1": zero} if i else {"m.1": zero, "m.2": a.modules["m.2"]})
            for i, a in enumerate(adapters)
        ]
        pack = ex.fit(adapters, max_error=0.4, dtype="float32")
        assert numbers(pack)["m.1"] == (0, 0)
        for adapter in adapters:
            assert reference.delta_error(adapter, pack.adapter(adapter.name)) <= 0.4 * (1 + 1e-6)

    def test_an_untrained_adapter_does_not_count(self):
        adapters = random(3, MODULES, seed=3)
        zero = {m: LoRAFactors(f.down, torch.zeros_like(f.up), f.scaling) for m, f in adapters[0].modules.items()}
        with pytest.warns(UntrainedAdapterWarning):
            pack = ex.fit(
                [*adapters, from_factors("zero", zero, base_model="org/base")], max_error=0.3, dtype="float32"
            )
        trained = [record.delta_error for name, record in pack.records.items() if name != "zero"]
        assert 0.2 < max(trained) <= 0.3

    def test_the_order_of_adapters_does_not_matter_to_the_byte(self, tmp_path):
        adapters = shared(4, MODULES, seed=5)
        for name, order in {"one": adapters, "two": adapters[::-1], "three": adapters[2:] + adapters[:2]}.items():
            ex.fit(order, max_error=0.3, dtype="float32").save(tmp_path / name)
        assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")

    def test_the_pack_says_what_was_asked_for(self, tmp_path):
        ex.fit(random(3, MODULES, seed=3), max_error=0.5, dtype="float32").save(tmp_path / "pack")
        fit = json.loads((tmp_path / "pack" / "subspace_config.json").read_text())["fit"]
        assert (fit["max_error"], fit["energy"], fit["n_components"], fit["auto"]) == (0.5, None, None, False)
        assert "every adapter's delta error at most 0.5" in (tmp_path / "pack" / "README.md").read_text()


class TestOutOfReach:
    def test_says_which_adapter_and_what_can_be_reached(self):
        adapters = random(3, MODULES, seed=3)
        full = ex.fit(adapters, energy=1.0, dtype="float16")
        worst = max(full.records, key=lambda name: full.records[name].delta_error)
        with pytest.raises(OptionError, match=rf"max_error=1e-05 cannot be reached.*{worst}.*--dtype float32") as error:
            ex.fit(adapters, max_error=1e-5, dtype="float16")
        reachable = float(str(error.value).rpartition("max_error=")[2].rstrip("."))
        assert full.records[worst].delta_error <= reachable < 1.2 * full.records[worst].delta_error
        pack = ex.fit(adapters, max_error=reachable, dtype="float16")
        assert max(record.delta_error for record in pack.records.values()) <= reachable

    def test_float32_asks_for_float64(self):
        with pytest.raises(OptionError, match="cannot be reached.*--dtype float64"):
            ex.fit(random(3, MODULES, seed=3), max_error=1e-9, dtype="float32")

    @pytest.mark.parametrize("bound", [0.0, 1.0, -0.5, float("nan")])
    def test_a_bound_is_between_0_and_1(self, bound):
        with pytest.raises(OptionError, match="max_error is a relative error, above 0 and below 1"):
            ex.fit(random(3, MODULES, seed=3), max_error=bound)


class TestWarnings:
    def test_name_the_worst_and_a_number_that_keeps_them(self):
        adapters = shared(7, MODULES, seed=5)
        with pytest.warns(LossWarning, match=r"The delta error is above 0.5 for .* and 2 more\. About -k") as caught:
            records = ex.fit(adapters, n_components=1).records
        (warning,) = caught
        text = str(warning.message)
        worst = sorted(records, key=lambda name: -records[name].delta_error)[:5]
        assert [text.index(f"{name} ({records[name].delta_error:.2f})") for name in worst] == sorted(
            text.index(f"{name} (") for name in worst
        )
        assert "--max-error 0.5" in text
        k = int(text.partition("-k ")[2].partition(" ")[0])
        # by bases without sweeps
        errors = [r.delta_error for r in ex.fit(adapters, n_components=k, sweeps=0).records.values()]
        before = [r.delta_error for r in ex.fit(adapters, n_components=k - 1, sweeps=0).records.values()]
        assert max(errors) <= 0.5 < max(before)

    def test_say_so_where_loras_would_be_smaller(self):
        with pytest.warns(LossWarning, match="more bytes than the LoRAs take: keep such adapters as ordin"):
            ex.fit(random(3, MODULES, seed=3), n_components=1, warn_above=0.1)

    @pytest.mark.parametrize("warn_above", [0.95, 1.0])
    def test_are_given_above_the_share_only(self, recwarn, warn_above):
        pack = ex.fit(shared(4, MODULES, seed=5), n_components=2, warn_above=warn_above)
        assert 0.5 < max(record.delta_error for record in pack.records.values()) < 0.95
        assert not recwarn.list

    def test_of_what_is_added(self):
        pack = ex.fit(shared(4, MODULES, seed=5), n_components=6)
        odd = random(1, MODULES, seed=99)[0]
        with pytest.warns(LossWarning, match=r"above 0.5 for odd \(0\.\d\d\)\. To store all of an adapter"):
            pack.add(odd, name="odd")

    def test_of_what_is_added_are_given_above_the_share_only(self, recwarn):
        pack = ex.fit(shared(4, MODULES, seed=5), n_components=6)
        pack.add(random(1, MODULES, seed=99)[0], name="odd", warn_above=1.0)
        assert not recwarn.list

    @pytest.mark.parametrize("warn_above", [-0.1, 1.5, float("nan")])
    def test_a_share_is_between_0_and_1(self, warn_above):
        with pytest.raises(OptionError, match="warn_above must be a relative error from 0 to 1"):
            ex.fit(random_collection(), n_components=2, warn_above=warn_above)


class TestKnapsack:
    def items(self, seed, choices=(11, 7, 9, 5), n=3):
        generator = np.random.default_rng(seed)
        return [Choices(generator.integers(0, 60, c).astype(float), generator.random((c, n))) for c in choices]

    def best(self, items, bound):
        found = math.inf
        for picks in itertools.product(*(range(len(item.prices)) for item in items)):
            if (knapsack.totals(items, picks) <= bound).all():
                found = min(found, knapsack.price(items, picks))
        return found

    def dearest(self, items, bound):
        within = [
            picks
            for picks in itertools.product(*(range(len(item.prices)) for item in items))
            if (knapsack.totals(items, picks) <= bound).all()
        ]
        return max(within, key=lambda picks: knapsack.price(items, picks))

    @pytest.mark.parametrize("seed", range(5))
    def test_multipliers_bound_the_price_from_below_and_closely(self, seed):
        items, bound = self.items(seed, choices=(40, 50, 60)), 1.2
        worth = knapsack.multipliers(items, bound)
        least = sum((item.prices + item.losses @ worth).min() for item in items) - bound * worth.sum()
        wanted = self.best(items, bound)
        assert 0 < least <= wanted

    @pytest.mark.parametrize("seed", range(5))
    def test_no_exchange_improves_a_selection(self, seed):
        items, bound = self.items(seed), 1.6
        picks = knapsack.select(items, bound, self.dearest(items, bound))
        assert (knapsack.totals(items, picks) <= bound).all()
        for index, item in enumerate(items):
            for pick in range(len(item.prices)):
                other = [*picks[:index], pick, *picks[index + 1 :]]
                fits = (knapsack.totals(items, other) <= bound).all()
                assert not fits or knapsack.price(items, other) >= knapsack.price(items, picks)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_selection_is_little_dearer_than_the_cheapest(self, seed):
        items, bound = self.items(seed, choices=(40, 30, 20)), 1.2
        picks = knapsack.select(items, bound, self.dearest(items, bound))
        assert knapsack.price(items, picks) <= 1.4 * self.best(items, bound)


def test_counts_reach_the_rank_and_are_all_where_they_are_few():
    assert sizes._counts(5, 24) == [1, 2, 3, 4, 5]
    counts = sizes._counts(700, 24)
    assert (counts[0], counts[-1]) == (1, 700)
    assert 15 < len(counts) <= 24
