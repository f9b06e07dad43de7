"""The rate allocation: estimates against the bytes that packs then take, and packs against tuned baselines."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoder import size

import eigenlorax as ex
from coded_collections import COLLECTIONS
from eigenlorax.codec import encoder
from eigenlorax.codec.rate_allocation import ModuleStatistics, estimate_rate
from eigenlorax.codec.svd_batch import SvdBatch
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.core.batch import pad_factors
from planted import factors_in, normal, orthonormal

# at the end: nothing there may hide a module of another name
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from tuned_baselines import KINDS, fewest, least

WIDE = {"layer.0": (96, 120)}


def statistics_of(factors):
    updates = SvdBatch.of(factors)
    return ModuleStatistics.of(updates, 1 / updates.s.square().sum(1).sqrt())


def many(n, *, k=6, noise=0.0, rank=4):
    """Factors of one wide module in k directions of either side."""
    ((n_out, n_in),) = WIDE.values()
    bases = orthonormal(k, n_in, 3), orthonormal(k, n_out, 4)
    return [factors_in(bases, rank, seed=50 + 10 * i, noise=noise) for i in range(n)]


def test_rows_of_rounding_errors_have_no_energy():
    """Such rows are left of coefficients that are decoded and decomposed again."""
    updates = SvdBatch.of(many(3, rank=3), dtype=torch.float32)
    updates.s[:, 2] = 1e-31
    module = ModuleStatistics.of(updates, 1 / updates.s.square().sum(1).sqrt())
    for side in (module.down, module.up):
        assert np.isfinite(side.energies).all()
        assert not side.energies.reshape(3, 3, -1)[:, 2].any()


def test_statistics_have_all_energy_in_few_components():
    module = statistics_of(many(12))
    assert [side.directions.shape for side in (module.down, module.up)] == [(6, 48), (6, 48)]
    assert (module.n, module.rank) == (12, 4)
    for side in (module.down, module.up):
        np.testing.assert_allclose(side.energies.sum(1), 1.0, atol=1e-9)
    np.testing.assert_allclose(np.bincount(module.owners, module.lengths**2), 1.0)


@pytest.mark.parametrize("n", [12, 40], ids=["fewer rows than columns", "more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_are_the_singular_vectors_of_all_rows(n, dtype):
    exact, updates = (SvdBatch.of(many(n, noise=0.02), dtype) for dtype in (torch.float64, dtype))
    norms = updates.s.square().sum(1).sqrt()
    module = ModuleStatistics.of(updates, 1 / norms)
    for side, name in ((module.down, "down"), (module.up, "up")):
        rows = exact.rows(name).flatten(0, 1)
        expected = torch.linalg.svd(rows * (exact.s / norms[:, None]).reshape(-1, 1), full_matrices=False).Vh[:6]
        components = side.components(updates.rows(name).flatten(0, 1), 6).double()
        torch.testing.assert_close(components @ components.mT, torch.eye(6).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close((components @ expected.mT).abs(), torch.eye(6).double(), atol=1e-4, rtol=0)
        energies = torch.from_numpy(side.energies[:, :6]).double()
        torch.testing.assert_close(energies, (rows @ expected.mT).square(), atol=1e-4, rtol=0)


def test_shared_components_are_chosen():
    for step_size in (0.1, 0.03, 0.01):
        assert estimate_rate(statistics_of(many(40)), step_size).k == (6, 6)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_smaller_step_sizes_lose_less_and_take_more_bits(noise):
    module = statistics_of(many(12, noise=noise))
    estimates = [estimate_rate(module, step_size) for step_size in (0.3, 0.1, 0.03, 0.01, 0.003)]
    bits = [estimate.basis_bits + estimate.bits.sum() for estimate in estimates]
    squared_errors = [estimate.squared_errors.sum() for estimate in estimates]
    assert bits == sorted(bits)
    assert squared_errors == sorted(squared_errors, reverse=True)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("error", [0.05, 0.4])
@pytest.mark.parametrize("name", ["shared", "unshared", "shared, with noise"])
def test_estimates_are_near_the_bytes_of_the_pack(name, error):
    pack = ex.fit(COLLECTIONS[name](), max_error=error)
    (own,) = (point for point in pack.frontier if point.error == max(r.delta_error for r in pack.records.values()))
    assert own.bytes == size(pack)
    smaller = min(pack.frontier, key=lambda point: point.error)
    taken = size(ex.fit(COLLECTIONS[name](), max_error=smaller.error))
    assert 0.75 * taken < smaller.bytes < 1.25 * taken


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_the_frontier_falls():
    for name in ("shared", "unshared", "ranks that differ"):
        points = sorted(ex.fit(COLLECTIONS[name](), max_error=0.2).frontier, key=lambda point: point.error)
        sizes = [point.bytes for point in points]
        assert len(points) == 5
        assert sizes == sorted(sizes, reverse=True)


def stacks(adapters):
    return {
        module: pad_factors([one.modules.get(module) for one in adapters], n_in, n_out)
        for module, (n_out, n_in) in adapters_shapes(adapters).items()
    }


def adapters_shapes(adapters):
    return {m: (s.out_features, s.in_features) for one in adapters for m, s in one.specs.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
class TestBaselines:
    """Never more bytes than a baseline of `benchmarks/tuned_baselines.py` with the same error bound."""

    @pytest.mark.parametrize("error", [0.02, 0.3])
    @pytest.mark.parametrize("name", ["shared", "unshared", "two", "ranks that differ", "an outlier"])
    def test_on_small_collections(self, name, error):
        adapters = COLLECTIONS[name]()
        best = fewest(least(stacks(adapters), [error], clusters=(1,), kinds=KINDS[:2]), 0)
        assert size(ex.fit(adapters, max_error=error)) <= 1.02 * best.stored_bytes

    def test_less_than_half_where_many_share(self):
        (name,) = WIDE
        adapters = [
            from_factors(f"a{i}", {name: LoRAFactors(f.down.float(), f.up.float(), f.scaling)})
            for i, f in enumerate(many(100, k=12, noise=0.02, rank=8))
        ]
        best = fewest(least(stacks(adapters), [0.15], clusters=(1,), kinds=KINDS[:1]), 0)
        assert 2 * size(ex.fit(adapters, max_error=0.15)) <= best.stored_bytes


def variants(n, noise, *, rank=8, first_seed=0):
    """All of them are one adapter, and a part of each factor is its own."""
    ((name, (n_out, n_in)),) = WIDE.items()
    base = normal(rank, n_in, seed=first_seed + 1), normal(rank, n_out, seed=first_seed + 2)
    found = []
    for i in range(n):
        own = normal(rank, n_in, seed=first_seed + 100 + i), normal(rank, n_out, seed=first_seed + 500 + i)
        down, up = (one + noise * other for one, other in zip(base, own, strict=True))
        found.append(from_factors(f"v{i}", {name: LoRAFactors(down.float(), up.mT.float().contiguous(), 1.0)}))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("noise", "errors"), [(0.2, (0.3, 0.4, 0.45)), (0.05, (0.1, 0.14, 0.2))])
def test_a_larger_error_takes_no_more_where_adapters_nearly_coincide(noise, errors):
    adapters = variants(20, noise)
    packs = [ex.fit(adapters, max_error=error) for error in errors]
    for error, pack in zip(errors, packs, strict=True):
        assert max(record.delta_error for record in pack.records.values()) <= error
    sizes = [size(pack) for pack in packs]
    assert all(after <= 1.02 * before for before, after in pairwise(sizes))
    # in fewer bits, of a module so small, others gain on what is written of each adapter beside its numbers
    best = fewest(least(stacks(adapters), errors, clusters=(1,), combinations=((16, 16),)), 2)
    assert sizes[-1] <= best.stored_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_a_few_modules_tell_the_plan_of_all(monkeypatch):
    modules = {f"layers.{index}": variants(6, 0.02, first_seed=1000 * index) for index in range(9)}
    (name,) = WIDE
    adapters = [
        from_factors(f"v{i}", {module: each[i].modules[name] for module, each in modules.items()}) for i in range(6)
    ]
    compared = ex.fit(adapters, max_error=0.1)
    assert max(record.delta_error for record in compared.records.values()) <= 0.1
    monkeypatch.setattr(encoder, "COMPARED_MODULES", len(modules))
    assert size(compared) <= 1.02 * size(ex.fit(adapters, max_error=0.1))
