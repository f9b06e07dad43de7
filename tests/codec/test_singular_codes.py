"""Updates as integers: against dense matrices in float64, and against what Gaussian numbers must cost."""

import math
from decimal import Context, Decimal

import numpy as np
import pytest
import torch
from torch import Tensor

from eigenlorax.codec import basis_bytes, bitstream, dead_zone, singular_codes
from eigenlorax.codec.adapter_codes import UNTRAINED, AdapterCodes, ModuleLayout, dequantise_module
from eigenlorax.codec.packed_codes import PackedCodes
from eigenlorax.codec.quantised_basis import QuantisedBasis, quantise_basis
from eigenlorax.codec.step_sizes import as_written
from eigenlorax.codec.svd_batch import SvdBatch
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.core.basis import Basis
from eigenlorax.core.projection import reconstruct
from eigenlorax.core.subspace import ModuleBases

SHAPE = (40, 56)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int, rank: int = 4, scaling: float = 1.5, shape: tuple[int, int] = SHAPE) -> LoRAFactors:
    decay = torch.arange(1, rank + 1).double().rsqrt()[:, None]
    return LoRAFactors(decay * random(rank, shape[1], seed=seed), random(shape[0], rank, seed=seed + 500), scaling)


def delta(update: LoRAFactors) -> Tensor:
    return update.scaling * update.up.double() @ update.down.double()


def shared(n: int, k: int, noise: float, rank: int = 4) -> list[LoRAFactors]:
    """Updates in the span of k components on either side, apart from some noise."""
    v, u = (torch.linalg.qr(random(d, k, seed=seed)).Q for d, seed in ((SHAPE[1], 1), (SHAPE[0], 2)))
    return [
        LoRAFactors(
            random(rank, k, seed=10 + i) @ v.mT + noise * random(rank, SHAPE[1], seed=200 + i),
            u @ random(k, rank, seed=400 + i) + noise * random(SHAPE[0], rank, seed=600 + i),
            0.5,
        )
        for i in range(n)
    ]


def empty_bases() -> tuple[QuantisedBasis, QuantisedBasis]:
    return QuantisedBasis.empty(SHAPE[1]), QuantisedBasis.empty(SHAPE[0])


def basis_of(updates: list[LoRAFactors], k: int, fineness: float) -> tuple[QuantisedBasis, QuantisedBasis]:
    batch = SvdBatch.of(updates)
    bases = []
    for side in ("down", "up"):
        rows = (batch.rows(side) * batch.s[..., None]).flatten(0, 1)
        components = torch.linalg.svd(rows, full_matrices=False).Vh[:k]
        energy = (rows @ components.mT).square().mean(0)
        bases.append(quantise_basis(components, torch.full((k,), fineness, dtype=torch.float64), energy))
    return bases[0], bases[1]


def dense(codes: singular_codes.UpdateCodes, bases: tuple[QuantisedBasis, QuantisedBasis], row: int) -> Tensor:
    """Decode an update by loops."""
    down, up = (basis.rows.double() for basis in bases)
    step_size, update = float(codes.step_sizes[row]), torch.zeros(SHAPE, dtype=torch.float64)
    if codes.core_levels[row]:
        u, s, v = torch.linalg.svd(codes.cores[row].double())
        rank = min(codes.scales.shape[1], len(s))
        return step_size * up.mT @ (u[:, :rank] * s[:rank]) @ v[:rank] @ down
    for j in range(int(codes.counts[row])):
        right = codes.down.coefficients[row, j].double() @ down + codes.down.residuals[row, j].double()
        left = codes.up.coefficients[row, j].double() @ up + codes.up.residuals[row, j].double()
        update += step_size * 2.0 ** (-float(codes.scales[row, j]) / 8) * torch.outer(left, right)
    return update


def test_components_are_the_singular_ones_of_every_rank() -> None:
    updates = [factors(1), factors(2, rank=2, scaling=-0.7), factors(3, rank=6)]
    batch = SvdBatch.of(updates)
    for row, update in enumerate(updates):
        sigma = torch.linalg.svdvals(delta(update))
        assert torch.allclose(batch.s[row], sigma[:6].where(sigma[:6] > 1e-9, torch.zeros(6).double()), atol=1e-9)
        again = (batch.u[row] * batch.s[row][:, None]).mT @ batch.v[row]
        assert torch.allclose(again, delta(update), atol=1e-9)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("k", [0, 3, 9])
def test_squared_errors_are_those_of_dense_matrices(k: int, share: float) -> None:
    updates = shared(6, 3, 0.2)
    bases = basis_of(updates, k, 200.0) if k else empty_bases()
    step_sizes = torch.tensor([share * float(delta(update).norm()) for update in updates], dtype=torch.float64)
    codes = singular_codes.encode_updates(SvdBatch.of(updates), step_sizes, *bases)
    for row, update in enumerate(updates):
        exact = float((delta(update) - dense(codes, bases, row)).square().sum())
        assert float(codes.squared_errors[row]) == pytest.approx(
            exact, rel=1e-6, abs=1e-12 * float(delta(update).square().sum())
        )


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("share", [0.005, 0.1])
@pytest.mark.parametrize("k", [0, 3])
def test_measured_errors_are_those_of_decoded_updates(
    k: int, share: float, dtype: torch.dtype, precision: float
) -> None:
    updates = [*shared(6, 3, 0.2), factors(7, rank=3)]
    bases = basis_of(updates, k, 200.0) if k else empty_bases()
    step_sizes = torch.tensor([share * float(delta(update).norm()) for update in updates], dtype=torch.float64)
    batch = SvdBatch.of(updates, dtype)
    codes = singular_codes.encode_updates(batch, step_sizes, *bases)
    assert (codes.counts < 4).any()
    bits, squared_errors = singular_codes.measure_updates(batch, step_sizes, *(b.numbers(dtype) for b in bases))
    assert bits.tolist() == codes.bits.tolist()
    torch.testing.assert_close(squared_errors, codes.squared_errors, rtol=precision, atol=0)


def test_without_a_basis_the_error_is_that_of_a_uniform_quantiser() -> None:
    update = factors(5, rank=4, shape=(300, 400))
    step = 1e-4 * float(delta(update).norm())
    codes = singular_codes.encode_updates(
        SvdBatch.of([update]), torch.tensor([step]).double(), QuantisedBasis.empty(400), QuantisedBasis.empty(300)
    )
    # each of the numbers of the down side is off by a uniform share of a step and the dead zone's; of the up side too,
    # but for what it makes up for
    numbers = 4 * (300 + 400)
    assert float(codes.squared_errors[0]) < 1.02 * numbers * step**2 * (1 / 12 + dead_zone.DEAD_ZONE**2)
    assert float(codes.squared_errors[0]) > 0.9 * numbers * step**2 / 12


def test_a_core_is_taken_where_it_has_fewer_numbers() -> None:
    updates = shared(12, 4, 0.0)
    bases = basis_of(updates, 4, 3000.0)
    step_sizes = torch.tensor([0.004 * float(delta(update).norm()) for update in updates], dtype=torch.float64)
    codes = singular_codes.encode_updates(SvdBatch.of(updates), step_sizes, *bases)
    assert (codes.core_levels > 0).all()
    alone = singular_codes.encode_updates(SvdBatch.of(updates), step_sizes, *empty_bases())
    assert float(codes.bits.sum()) < 0.2 * float(alone.bits.sum())


def test_residuals_are_kept_beside_the_coefficients() -> None:
    updates = shared(6, 3, 0.3)
    bases = basis_of(updates, 3, 100.0)
    step_sizes = torch.tensor([0.002 * float(delta(update).norm()) for update in updates], dtype=torch.float64)
    codes = singular_codes.encode_updates(SvdBatch.of(updates), step_sizes, *bases)
    assert (codes.down.residual_levels > 0).any()
    assert (codes.down.coefficient_levels > 0).any()
    errors = codes.squared_errors.sqrt() / torch.tensor([float(delta(update).norm()) for update in updates]).double()
    assert float(errors.max()) < 0.02


def test_rows_are_quantised_as_finely_as_they_are_important() -> None:
    components = torch.linalg.qr(random(60, 3, seed=1)).Q.mT
    basis = quantise_basis(components, torch.tensor([1000.0, 100.0, 0.5]).double(), torch.ones(3).double())
    assert basis.k == 2
    off = (basis.rows.double() - components[:2]).square().mean(1).sqrt()
    assert off.tolist() == pytest.approx([1e-3 / math.sqrt(12), 1e-2 / math.sqrt(12)], rel=0.2)


def test_rows_are_exact_products_of_codes_and_step_sizes() -> None:
    fineness = np.arange(256)
    codes = torch.arange(1, 257)[:, None] * 77_777
    basis = QuantisedBasis(codes, fineness, np.zeros(256, dtype=np.int64))
    exact = [float(Context(prec=40).power(Decimal(2), Decimal(-int(f)) / 4)) for f in fineness]
    wanted = torch.tensor([[code * step] for code, step in zip(codes[:, 0].tolist(), exact, strict=True)], dtype=float)
    assert torch.equal(basis.rows, wanted.float())


def test_gaussian_numbers_cost_what_their_entropy_says() -> None:
    spreads = np.array([0.5, 3.0, 40.0, 3e5])
    bits, errors = dead_zone.gaussian_cost(spreads)
    high_rate = np.log2(spreads * math.sqrt(2 * math.pi * math.e))
    assert bits[1:] == pytest.approx(high_rate[1:], abs=0.08)
    x = np.random.default_rng(0).normal(size=400_000)
    for spread, error in zip(spreads[:3], errors[:3], strict=True):
        codes = dead_zone.quantise(torch.from_numpy(x * spread)).numpy()
        assert float(((x * spread - codes) ** 2).mean()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("share", [0.0005, 0.02, 0.3])
def test_bytes_give_the_codes_back(share: float, clusters: int) -> None:
    updates = shared(5, 3, 0.2)
    pairs = [basis_of(updates, k, 200.0) for k in (3, 0, 5)[:clusters]]
    joined = tuple(QuantisedBasis.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    data = basis_bytes.encode(joined)
    shapes = [(basis.k, width) for basis, width in zip(joined, (SHAPE[1], SHAPE[0]), strict=True)]
    read = list(basis_bytes.decode(list(zip(data, shapes, strict=True))))
    for basis, decoded in zip(joined, read, strict=True):
        assert torch.equal(basis.rows, decoded.rows)
        assert (basis.profile == decoded.profile).all()
        assert basis.blocks == decoded.blocks
    cluster = clusters - 1
    layout = ModuleLayout.of((read[0], read[1]), cluster)
    step_sizes = torch.tensor([share * float(delta(update).norm()) for update in updates], dtype=torch.float64)
    step_sizes = as_written(step_sizes)
    codes = singular_codes.encode_updates(SvdBatch.of(updates), step_sizes, *pairs[cluster])
    adapters = [
        AdapterCodes(float(step_sizes[row]), cluster, {"a": PackedCodes.of(codes).codes(row), "b": UNTRAINED})
        for row in range(len(updates))
    ]
    blobs = bitstream.encode_adapters([(codes, {"a": layout, "b": layout}) for codes in adapters])
    all_bases = ModuleBases(*(Basis(basis.rows, torch.zeros(0), 1.0) for basis in read))
    for row, (update, blob) in enumerate(zip(updates, blobs, strict=True)):
        assert bitstream.read_cluster(blob) == cluster
        decoded = bitstream.decode_adapter(blob, {"a": layout, "b": layout}, {"a": 4, "b": 4})
        for module, wanted in (("a", dense(codes, pairs[cluster], row)), ("b", torch.zeros(SHAPE).double())):
            coefficients = dequantise_module(
                decoded.modules[module], decoded.step_size, layout, rank=4, scaling=update.scaling
            )
            assert coefficients.rank == 4
            got = delta(reconstruct(coefficients, all_bases))
            assert torch.allclose(got, wanted, rtol=0, atol=1e-6 * float(delta(update).norm()))
