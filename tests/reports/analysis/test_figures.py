"""Every figure of a whole report, once more from dense float64 matrices: of real dtypes, with all that is awkward."""

import math
import statistics
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, from_factors
from planted import MODULES, factors_in, orthonormal
from reference import dense, fit_delta, objective, projected, top_rows

QUERY, DENSE = MODULES
K = 7
PROJECTED, UNTRAINED = ("p0", "p1"), "zero"


def made():
    """By name: adapters near a subspace. Two began as one A; ranks, signs and sizes differ, some lack a module or have
    not trained it."""
    bases = {
        m: (orthonormal(5, n_in, 11 + i), orthonormal(6, n_out, 77 + i))
        for i, (m, (n_out, n_in)) in enumerate(MODULES.items())
    }
    found = {}
    for i, name in enumerate(("a0", "a1", "a2", "a3", "a4", "a5", *PROJECTED, UNTRAINED)):
        found[name] = {
            m: factors_in(bases[m], 2 + i % 3, seed=100 * i + 10 * j, scaling=(-1.5) ** i, noise=0.15)
            for j, m in enumerate(MODULES)
        }
    found["a3"] = {m: replace(f, down=found["a0"][m].down.clone()) for m, f in found["a3"].items()}
    del found["a1"][QUERY]
    found["a2"][DENSE] = replace(found["a2"][DENSE], up=torch.zeros_like(found["a2"][DENSE].up))
    found[UNTRAINED] = {m: replace(f, up=torch.zeros_like(f.up)) for m, f in found[UNTRAINED].items()}
    return {
        name: {m: LoRAFactors(f.down.float(), f.up.float(), f.scaling) for m, f in one.items()}
        for name, one in found.items()
    }


@pytest.fixture(scope="module")
def collection():
    return made()


@pytest.fixture(scope="module")
def adapters(collection):
    return {name: from_factors(name, one, base_model="org/base") for name, one in collection.items()}


@pytest.fixture(scope="module")
def pack(adapters):
    with pytest.warns(ex.errors.UntrainedAdapterWarning, match="untrained .*: zero"):
        found = ex.fit([one for name, one in adapters.items() if name not in PROJECTED], n_components=K)
    for name in PROJECTED:
        found.add(adapters[name])
    return found


@pytest.fixture(scope="module")
def report(pack, adapters):
    return ex.report(pack, list(adapters.values()))


@pytest.fixture(scope="module")
def updates(collection):
    """Dense updates by name; without the untrained."""
    names = [name for name in collection if name != UNTRAINED]
    return dict(zip(names, oracle.updates([collection[name] for name in names]), strict=True))


@pytest.fixture(scope="module")
def fitted(updates):
    return [name for name in updates if name not in PROJECTED]


def norm(update):
    return float(np.linalg.norm(oracle.flat(update)))


def by_name(report, field):
    return {one.name: getattr(one, field) for one in report.adapters if not one.untrained}


def stacked(updates, names, module):
    """Dense updates of a module of those that have trained it, and their weights in the fit."""
    have = [name for name in names if updates[name][module].any()]
    return [updates[name][module] for name in have], [1 / norm(updates[name]) for name in have]


class TestAdapters:
    def test_all_are_there_the_worst_first(self, report, collection):
        assert {one.name for one in report.adapters} == set(collection)
        errors = [one.delta_error for one in report.adapters]
        assert errors == sorted(errors, reverse=True)
        assert report.untrained == [UNTRAINED]

    def test_norms_and_errors(self, report, pack, collection, updates):
        for name, update in updates.items():
            back = oracle.updates([pack.adapter(name).modules])[0]
            error = oracle.relative_error(update, back)
            assert by_name(report, "norm")[name] == pytest.approx(norm(update), rel=1e-6)
            assert by_name(report, "delta_error")[name] == pytest.approx(error, rel=1e-5)
            assert by_name(report, "energy_kept")[name] == pytest.approx(1 - error**2, rel=1e-5)
            for side in ("down", "up"):
                lost = total = 0.0
                for m, f in collection[name].items():
                    rows, its = oracle.rows(f, side), oracle.rows(pack.adapter(name).modules[m], side)
                    lost, total = lost + np.square(rows - its).sum(), total + np.square(rows).sum()
                expected = math.sqrt(lost / total)
                assert by_name(report, f"factor_error_{side}")[name] == pytest.approx(expected, rel=1e-5)

    def test_left_out(self, report, adapters, fitted):
        expected = {}
        for name in fitted:
            others = ex.fit([adapters[one] for one in fitted if one != name], n_components=K)
            expected[name] = others.add(adapters[name]).delta_error
        found = {name: error for name, error in by_name(report, "left_out_error").items() if error is not None}
        assert found == pytest.approx(expected, abs=1e-5)
        got = report.left_out
        assert (got.sampled, got.of) == (len(fitted), len(fitted))
        assert got.errors.mean == pytest.approx(statistics.fmean(expected.values()), abs=1e-5)
        assert got.errors.worst == pytest.approx(max(expected.values()), abs=1e-5)
        assert got.errors.worst_adapter == max(expected, key=expected.get)
        squares = [value**2 for value in expected.values()]
        assert got.errors.rms == pytest.approx(math.sqrt(statistics.fmean(squares)), abs=1e-5)
        error = statistics.stdev(expected.values()) / math.sqrt(len(expected))
        assert got.standard_error == pytest.approx(error, rel=1e-3)

    def test_of_the_mean(self, report, updates, fitted):
        vectors = {name: oracle.flat(updates[name]) for name in fitted}
        mean = np.mean(list(vectors.values()), axis=0)
        direction = np.mean([one / np.linalg.norm(one) for one in vectors.values()], axis=0)
        for name, own in vectors.items():
            plain = np.linalg.norm(own - mean) / np.linalg.norm(own)
            multiple = (own @ direction) / (direction @ direction)
            scaled = np.linalg.norm(own - multiple * direction) / np.linalg.norm(own)
            assert by_name(report, "mean_error")[name] == pytest.approx(plain, rel=1e-6)
            assert by_name(report, "mean_scaled_error")[name] == pytest.approx(scaled, rel=1e-6)

    def test_rounded(self, report, collection, updates):
        for bits in (8, 4):
            for name, update in updates.items():
                back = {m: np.zeros_like(one) for m, one in update.items()}
                for m, f in collection[name].items():
                    # what is rounded are singular directions, each factor with the roots of their values
                    rank = f.down.shape[0]
                    left, sigma, right = np.linalg.svd(update[m], full_matrices=False)
                    roots = np.sqrt(sigma[:rank, None])
                    up, down = roots * left[:, :rank].T, roots * right[:rank]
                    back[m] = oracle.rounded(up, bits).T @ oracle.rounded(down, bits)
                expected = oracle.relative_error(update, back)
                assert by_name(report, f"int{bits}_error")[name] == pytest.approx(expected, rel=1e-6)

    def test_cut_to_the_same_bytes(self, report, pack, collection, updates):
        """Directions of the most squared norm a byte, until the share of the pack's bytes is spent."""
        numbers = {name: sum(f.down.numel() + f.up.numel() for f in collection[name].values()) for name in updates}
        spent = sum(4 * basis.fitted.numel() + 4 * len(basis.singular_values) for basis in sides_of(pack))
        spent += sum(
            4 * (c.down.numel() + c.up.numel()) for name in pack.names for c in pack.packed(name).coefficients.values()
        )
        for name, update in updates.items():
            budget, kept = spent * numbers[name] / sum(numbers.values()), 0.0
            offers = []
            for one in update.values():
                cost = 4 * sum(one.shape)
                offers += [(value**2 / cost, value**2, cost) for value in np.linalg.svd(one, compute_uv=False)]
            for _, value, cost in sorted(offers, reverse=True):
                if cost <= budget and value > 1e-12:
                    kept, budget = kept + value, budget - cost
            expected = math.sqrt(max(1 - kept / norm(update) ** 2, 0))
            assert by_name(report, "truncated_error")[name] == pytest.approx(expected, abs=1e-6)

    def test_in_random_bases(self, report, pack, updates):
        """By chance, and not by a seed: of the order of what so many directions of so many keep."""
        kept = [1 - error**2 for error in by_name(report, "random_error").values()]
        expected = []
        for update in updates.values():
            shares = {
                m: math.prod(pack.subspace.modules[m].side(side).k / d for side, d in (("up", n_out), ("down", n_in)))
                for m, (n_out, n_in) in MODULES.items()
            }
            total = norm(update) ** 2
            expected.append(sum(shares[m] * np.square(one).sum() / total for m, one in update.items()))
        assert statistics.fmean(kept) == pytest.approx(statistics.fmean(expected), rel=0.5)

    def test_nearest_and_overlap(self, report, updates):
        for name, update in updates.items():
            cosines = {one: oracle.cosine(update, other) for one, other in updates.items() if one != name}
            nearest = max(cosines, key=lambda one: abs(cosines[one]))
            assert by_name(report, "nearest")[name] == nearest
            assert by_name(report, "nearest_cosine")[name] == pytest.approx(cosines[nearest], abs=1e-6)
            mean = statistics.fmean(oracle.overlap(update, other) for one, other in updates.items() if one != name)
            assert by_name(report, "overlap")[name] == pytest.approx(mean, abs=1e-6)


def sides_of(pack):
    return [basis for pair in pack.subspace.modules.values() for basis in (pair.down, pair.up)]


def rank_of(sigma):
    return int((sigma > 1e-5 * sigma[0]).sum())


class TestModules:
    def test_spectra_and_energies(self, report, pack, updates, fitted):
        for module in report.modules:
            deltas, weights = stacked(updates, fitted, module.name)
            bases = pack.subspace.modules[module.name]
            for side, turned in ((module.down, deltas), (module.up, [one.T for one in deltas])):
                rows = np.concatenate([w * one for w, one in zip(weights, turned, strict=True)])
                _, sigma = top_rows(rows, K)
                shares = np.square(sigma) / np.square(sigma).sum()
                assert side.spectrum == pytest.approx(shares[: len(side.spectrum)].tolist(), abs=1e-6)
                assert side.rank == rank_of(sigma)
                components = (bases.down if side is module.down else bases.up).components.double().numpy()
                kept = np.square(rows @ components.T).sum() / np.square(rows).sum()
                assert (side.k, side.energy) == (K, pytest.approx(kept, abs=1e-5))

    def test_errors(self, report, pack, updates, fitted):
        weights = {name: 1 / norm(updates[name]) for name in fitted}
        for column, module in enumerate(report.modules):
            bases = pack.subspace.modules[module.name]
            right, left = (basis.components.double().numpy() for basis in (bases.down, bases.up))
            deltas, its = stacked(updates, fitted, module.name)
            total = sum(w**2 * np.square(one).sum() for one, w in zip(deltas, its, strict=True))
            lost = objective(deltas, its, right, left)
            assert module.delta_error == pytest.approx(math.sqrt(lost / total), rel=1e-5)
            errors = {}
            for name, update in updates.items():
                one = update[module.name]
                if one.any():
                    errors[name] = np.linalg.norm(one - projected(one, right, left)) / np.linalg.norm(one)
            worst = max(errors, key=errors.get)
            assert (module.worst, module.worst_error) == (worst, pytest.approx(errors[worst], rel=1e-5))
            for one, row in zip(report.adapters, report.module_errors, strict=True):
                if one.name in errors:
                    assert row[column] == pytest.approx(errors[one.name], rel=1e-5)
                else:
                    assert row[column] is None
            assert set(weights) - set(errors) == ({"a1"} if module.name == QUERY else {"a2"})


class TestCollection:
    def test_spreads(self, report, fitted):
        errors = by_name(report, "delta_error")
        for spread, names in ((report.in_fit, fitted), (report.projected, PROJECTED)):
            values = {name: errors[name] for name in names}
            assert spread.adapters == len(names)
            assert spread.mean == pytest.approx(statistics.fmean(values.values()))
            assert spread.rms == pytest.approx(math.sqrt(statistics.fmean([one**2 for one in values.values()])))
            assert (spread.worst, spread.worst_adapter) == (max(values.values()), max(values, key=values.get))

    def test_baselines_are_means_over_the_fit(self, report, fitted):
        fields = {
            "pack": "delta_error",
            "left-out": "left_out_error",
            "mean": "mean_error",
            "mean-scaled": "mean_scaled_error",
            "random": "random_error",
            "truncated": "truncated_error",
            "int8": "int8_error",
            "int4": "int4_error",
        }
        found = {one.key: one for one in report.baselines}
        assert set(found) == {*fields, "null"}
        for key, field in fields.items():
            values = by_name(report, field)
            assert found[key].errors.mean == pytest.approx(statistics.fmean(values[name] for name in fitted))
        # k of so many directions keep less of adapters that share nothing than of those of a subspace
        assert found["null"].errors.mean > found["pack"].errors.mean + 0.1
        assert found["null"].errors == report.null.errors

    def test_bytes(self, report, pack, collection, adapters):
        # those that change nothing have no factors that anybody needs
        trained = [one for name, one in collection.items() if name != UNTRAINED]
        numbers = sum(f.down.numel() + f.up.numel() for one in trained for f in one.values())
        basis = sum(4 * one.components.numel() + 4 * len(one.singular_values) for one in sides_of(pack))
        coefficients = sum(
            4 * (c.down.numel() + c.up.numel()) for name in pack.names for c in pack.packed(name).coefficients.values()
        )
        got, n = report.bytes, len(adapters)
        assert (got.lora, got.lora_float16) == (4 * numbers, 2 * numbers)
        assert (got.basis, got.coefficients, got.carried, got.heads) == (basis, coefficients, 0, 0)
        assert got.ratio == pytest.approx(4 * numbers / (basis + coefficients))
        assert got.limit == pytest.approx(4 * numbers / coefficients)
        smaller = next(m for m in range(1, 10**4) if m * 4 * numbers / n > basis + m * coefficients / n)
        assert got.break_even == smaller
        for count, ratio in got.over_n:
            expected = count * 4 * numbers / n / (basis + count * coefficients / n)
            assert ratio == pytest.approx(expected)

    def test_sizes(self, report, updates, fitted):
        """Mean and worst error in bases of each size, without sweeps; of all, and of the others."""
        assert len(report.sizes) > 5
        for point in report.sizes:
            errors, left_out = [], []
            for name in fitted:
                for names, found in ((fitted, errors), ([one for one in fitted if one != name], left_out)):
                    lost = 0.0
                    for m, one in updates[name].items():
                        right, left, sigma, its = fit_delta(*stacked(updates, names, m), point.k, 0)
                        # beyond the rank, any direction would be one
                        right, left = right[: rank_of(sigma)], left[: rank_of(its)]
                        lost += np.square(one - projected(one, right, left)).sum()
                    found.append(math.sqrt(lost) / norm(updates[name]))
            assert point.mean == pytest.approx(statistics.fmean(errors), abs=1e-5)
            assert point.worst == pytest.approx(max(errors), abs=1e-5)
            assert point.left_out == pytest.approx(statistics.fmean(left_out), abs=1e-5)

    def test_left_out_by_chance(self, report, updates, fitted):
        """The shares of the dimensions that as many directions have as the others', in expectation."""
        errors = []
        for name in fitted:
            kept = 0.0
            for m, one in updates[name].items():
                deltas, weights = stacked(updates, [other for other in fitted if other != name], m)
                spectra = fit_delta(deltas, weights, K, 0)[2:]
                sizes = [min(K, rank_of(sigma)) for sigma in spectra]
                kept += np.square(one).sum() * sizes[0] * sizes[1] / one.size
            errors.append(math.sqrt(1 - kept / norm(updates[name]) ** 2))
        got = report.left_out
        assert got.chance == pytest.approx(statistics.fmean(errors), abs=1e-6)
        squares = statistics.fmean(error**2 for error in errors)
        assert got.kept == pytest.approx(1 - got.errors.rms**2 / squares, abs=1e-6)
        assert next(point.random for point in report.sizes if point.k == K) == pytest.approx(got.chance, abs=1e-6)
        assert 0 < got.kept_spread < 0.2
        # near a subspace, all keep more than half of what random directions would not
        assert got.sharing == [name for name in fitted if by_name(report, "left_out_error")[name] < 0.7]

    def test_starts(self, report, collection, updates):
        (group,) = report.starts.groups
        assert group.adapters == ["a0", "a3"]
        for side, got in (("down", group.cosine_down), ("up", group.cosine_up)):
            one, other = collection["a0"], collection["a3"]
            products = [oracle.rows_alike(*pair, side) for pair in ((one, other), (one, one), (other, other))]
            assert got == pytest.approx(products[0] / math.sqrt(products[1] * products[2]), abs=1e-6)
        assert [one.who for one in report.starts.energies] == ["all", "group 1", "others"]
        names = {"all": list(updates), "group 1": ["a0", "a3"]}
        names["others"] = [name for name in updates if name not in names["group 1"]]
        for row in report.starts.energies:
            assert row.k == 4
            sums = np.zeros(4)
            for m in MODULES:
                have = [name for name in names[row.who] if updates[name][m].any()]
                for place, side in enumerate(("down", "up")):
                    factors = [oracle.rows(collection[name][m], side) for name in have]
                    sums[place] += energy([one / np.linalg.norm(one) for one in factors], row.k)
                    deltas = [updates[name][m] / np.linalg.norm(updates[name][m]) for name in have]
                    sums[2 + place] += energy([one if side == "down" else one.T for one in deltas], row.k)
            got = (row.factors_down, row.factors_up, row.delta_down, row.delta_up)
            assert got == pytest.approx((sums / len(MODULES)).tolist(), abs=1e-6)

    def test_similarity(self, report, updates):
        got = report.similarity
        assert sorted(got.names) == sorted(updates)
        ordered = [updates[name] for name in got.names]
        cosines = oracle.table(ordered, oracle.cosine)
        np.testing.assert_allclose(got.cosine, cosines, atol=1e-6)
        np.testing.assert_allclose(got.overlap, oracle.table(ordered, oracle.overlap), atol=1e-6)
        n = len(ordered)
        assert got.mean_cosine == pytest.approx((cosines.sum() - n) / (n * (n - 1)), abs=1e-6)
        units = np.array([oracle.flat(one) / norm(one) for one in ordered])
        shares = []
        for i, unit in enumerate(units):
            mean = np.delete(units, i, axis=0).mean(0)
            shares.append(max(unit @ mean, 0.0) ** 2 / (mean @ mean))
        assert got.mean_energy == pytest.approx(statistics.fmean(shares), abs=1e-6)
        assert report.duplicates == []


def energy(rows, k):
    _, sigma = top_rows(np.concatenate(rows), k)
    return float(np.square(sigma[:k]).sum() / np.square(sigma).sum())


def test_dense_updates_are_those_of_the_adapters(collection, updates):
    for name, update in updates.items():
        for m, f in collection[name].items():
            np.testing.assert_array_equal(update[m], dense(f))
