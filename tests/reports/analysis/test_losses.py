"""What an adapter loses, against dense matrices; and the ways of storing it that a pack is compared with."""

import itertools

import numpy as np
import oracle
import pytest
import torch

from eigenlorax.core import projection
from eigenlorax.core import subspace as spaces
from eigenlorax.core.adapter import LoRAFactors, delta_square
from eigenlorax.core.batch import coefficients_as_batch, delta_squares, pad_factors, stack_factors
from eigenlorax.core.exact_fit import fit_module
from eigenlorax.core.fit_options import FitOptions
from eigenlorax.reports.analysis import losses
from made import awkward
from planted import MODULES, normal, orthonormal, random_factors
from reference import dense

QUERY = next(iter(MODULES))
N_OUT, N_IN = MODULES[QUERY]


@pytest.fixture
def factors():
    """Of one module: some adapters lack it, some have not trained it."""
    return [one.get(QUERY) for one in awkward()]


def fitted(factors, k=7, **options):
    members = [f for f in factors if f is not None and delta_square(f) > 0]
    weights = [delta_square(f) ** -0.5 for f in members]
    return fit_module(members, weights, FitOptions(n_components=k, **options))


def square(matrix):
    return float(np.square(matrix).sum())


class TestStack:
    def test_squares_of_updates(self, factors):
        expected = [square(dense(f)) if f is not None else 0.0 for f in factors]
        assert expected.count(0.0) == 3
        assert delta_squares(pad_factors(factors, N_IN, N_OUT)).tolist() == pytest.approx(expected, rel=1e-12)

    def test_updates_as_they_come_back(self, factors):
        bases = fitted(factors)
        coefficients = [projection.project(f, bases) if f is not None else None for f in factors]
        expected = [square(dense(projection.reconstruct(c, bases))) if c is not None else 0.0 for c in coefficients]
        found = delta_squares(coefficients_as_batch(coefficients, bases.down.k, bases.up.k))
        assert found.tolist() == pytest.approx(expected, rel=1e-12)


class TestStored:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_equals_dense_differences(self, factors, dtype):
        factors = [f for f in factors if f is None or f.down.abs().max() < 1e3]
        bases = spaces.round_bases(fitted(factors), dtype)
        coefficients = [projection.project(f, bases, dtype) if f is not None else None for f in factors]
        one = pad_factors(factors, N_IN, N_OUT)
        found = losses.stored(one, factors, coefficients, bases)
        for i, (f, c) in enumerate(zip(factors, coefficients, strict=True)):
            if f is None:
                assert [float(getattr(found, name)[i]) for name in ("delta", "down", "up", "down_total")] == [0.0] * 4
                continue
            back = projection.reconstruct(c, bases)
            # a power of two that was moved between the factors for the dtype's sake is no error of theirs
            shift = 2.0 ** float(projection.balance_exponents(stack_factors([f], [0.0]).to(torch.float64), dtype))
            a, b = (oracle.rows(f, side) for side in ("down", "up"))
            a_back, b_back = oracle.rows(back, "down") * shift, oracle.rows(back, "up") / shift
            assert float(found.delta[i]) == pytest.approx(square(dense(f) - dense(back)), rel=1e-9)
            assert float(found.down[i]) == pytest.approx(square(a - a_back), rel=1e-9)
            assert float(found.down_total[i]) == pytest.approx(square(a), rel=1e-12)
            if f.scaling:
                assert float(found.up[i]) == pytest.approx(square(b - b_back), rel=1e-9)
                assert float(found.up_total[i]) == pytest.approx(square(b), rel=1e-12)

    def test_an_error_far_below_the_update_is_not_lost_in_it(self):
        """‖D‖² − ‖D̂‖² would be rounding: the difference itself is taken."""
        basis = orthonormal(5, N_IN, 1), orthonormal(4, N_OUT, 2)
        inside = LoRAFactors(normal(3, 5, seed=3) @ basis[0], basis[1].mT @ normal(4, 3, seed=4), 1.5)
        off = LoRAFactors(inside.down + 1e-11 * normal(3, N_IN, seed=5), inside.up, 1.5)
        bases = fitted([inside], k=3)
        found = losses.stored(pad_factors([off], N_IN, N_OUT), [off], [projection.project(off, bases)], bases)
        back = projection.reconstruct(projection.project(off, bases), bases)
        expected = square(1.5 * (dense(LoRAFactors(off.down - back.down, off.up, 1.0))))
        assert 1e-23 < float(found.delta[0]) / square(dense(off)) < 1e-20
        assert float(found.delta[0]) == pytest.approx(expected, rel=1e-3)


class TestKept:
    def test_in_any_pair_of_bases(self, factors):
        right, left = orthonormal(5, N_IN, 8), orthonormal(6, N_OUT, 9)
        expected = [oracle.kept(dense(f), right.numpy(), left.numpy()) if f is not None else 0.0 for f in factors]
        assert losses.kept(pad_factors(factors, N_IN, N_OUT), right, left).tolist() == pytest.approx(
            expected, rel=1e-11
        )

    def test_by_k(self, factors):
        right, left = orthonormal(11, N_IN, 8), orthonormal(6, N_OUT, 9)
        grid = [1, 2, 5, 6, 9, 11, 20]
        found = losses.kept_by_k(pad_factors(factors, N_IN, N_OUT), right, left, grid)
        for column, k in enumerate(grid):
            expected = [
                oracle.kept(dense(f), right[:k].numpy(), left[:k].numpy()) if f is not None else 0.0 for f in factors
            ]
            assert found[:, column].tolist() == pytest.approx(expected, rel=1e-11)

    def test_nothing_in_bases_of_nothing(self, factors):
        none = torch.zeros(0, N_IN).double(), torch.zeros(0, N_OUT).double()
        one = pad_factors(factors, N_IN, N_OUT)
        assert losses.kept(one, *none).tolist() == [0.0] * len(factors)
        assert losses.kept_by_k(one, *none, [1, 3]).tolist() == [[0.0, 0.0]] * len(factors)


class TestRandomBases:
    def test_rows_are_orthonormal_and_of_the_generator(self):
        made = [losses.random_rows(7, N_IN, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
        torch.testing.assert_close(made[0] @ made[0].mT, torch.eye(7).double(), atol=1e-12, rtol=0)
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])

    def test_keep_what_chance_keeps(self):
        """k of d directions on either side keep k/d of an update, each; and so do the first few of them."""
        one = pad_factors([random_factors(1, N_OUT, N_IN, seed=1)], N_IN, N_OUT)
        generator = torch.Generator().manual_seed(3)
        shares = []
        for _ in range(400):
            rows = [losses.random_rows(12, d, generator) for d in (N_IN, N_OUT)]
            shares.append(losses.kept_by_k(one, *rows, [4, 12])[0] / delta_squares(one)[0])
        expected = [k * k / (N_IN * N_OUT) for k in (4, 12)]
        assert torch.stack(shares).mean(0).tolist() == pytest.approx(expected, rel=0.08)


class TestCutBySvd:
    def test_singular_values(self, factors):
        found = losses.singular_squares(pad_factors(factors, N_IN, N_OUT))
        for row, f in zip(found, factors, strict=True):
            expected = np.square(np.linalg.svd(dense(f), compute_uv=False)) if f is not None else np.zeros(N_IN)
            tiny = 1e-12 * max(float(expected[0]), 1e-300)
            assert row.tolist() == pytest.approx(expected[: len(row)].tolist(), rel=1e-9, abs=tiny)
            assert expected[len(row) :].sum() <= tiny

    def test_modules_of_one_size_keep_the_largest_values_of_all(self):
        made = [random_factors(3, N_OUT, N_IN, seed=seed, size=1 + seed) for seed in range(4)]
        values = [losses.singular_squares(pad_factors([f], N_IN, N_OUT))[0] for f in made]
        cost = 4 * (N_IN + N_OUT)
        every = sorted((v for f in made for v in np.square(np.linalg.svd(dense(f), compute_uv=False))), reverse=True)
        for budget in (0.0, cost - 1.0, float(cost), 5.5 * cost, 100.0 * cost):
            expected = sum(every[: int(budget // cost)])
            assert losses.truncated(values, [cost] * 4, budget) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("seed", range(6))
    def test_modules_of_several_sizes_are_near_the_best_choice(self, seed):
        costs = [35, 60, 110]
        values = [normal(3, seed=10 * seed + i).square().sort(descending=True)[0] * (1 + i) for i in range(3)]
        budget = 250.0
        best = 0.0
        # within a module, the larger values go first
        for counts in itertools.product(range(4), repeat=3):
            if sum(n * cost for n, cost in zip(counts, costs, strict=True)) <= budget:
                best = max(best, sum(float(row[:n].sum()) for n, row in zip(counts, values, strict=True)))
        found = losses.truncated(values, costs, budget)
        assert best - max(float(row[0]) for row in values) <= found <= best * (1 + 1e-12)
        assert found > 0.6 * best


class TestRounding:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("size", [1.0, 1e-9, 1e11])
    def test_equals_rounding_one_block_after_the_other(self, bits, size):
        n_out, n_in = 131, 187
        # scaling a power of two: it changes no step
        made = [random_factors(rank, n_out, n_in, seed=rank, scaling=-0.5, size=size) for rank in (3, 5)]
        found = losses.rounded_squares(pad_factors([*made, None], n_in, n_out), bits)
        for f, lost in zip(made, found[:2], strict=True):
            down, up = (oracle.rounded(oracle.rows(f, side), bits) for side in ("down", "up"))
            back = f.scaling * up.T @ down
            assert float(lost) == pytest.approx(square(dense(f) - back), rel=1e-9)
        assert float(found[2]) == 0.0

    def test_costs_what_such_rounding_costs(self):
        """About 0.6% of a Gaussian factor at 8 bits, 18 times as much at 4, and both factors are rounded."""
        made = [random_factors(6, 256, 192, seed=seed) for seed in range(5)]
        one = pad_factors(made, 192, 256)
        eight, four = ((losses.rounded_squares(one, bits) / delta_squares(one)).sqrt().mean() for bits in (8, 4))
        assert 0.005 < float(eight) < 0.012
        assert float(four / eight) == pytest.approx(128 / 8, rel=0.05)

    def test_whole_steps_lose_nothing(self):
        steps = torch.randint(-7, 8, (3, 100), generator=torch.Generator().manual_seed(1)).double()
        # the code without a counterpart, by either sign
        steps[:, [0, 70]] = torch.tensor([8.0, -8.0]).double()
        made = LoRAFactors(steps / 4, steps.mT[:90].clone() * 8, 2.0)
        one = pad_factors([made], 100, 90)
        assert losses.rounded_squares(one, 4).tolist() == [0.0]
        assert float(losses.rounded_squares(one, 3)[0]) > 0

    @pytest.mark.parametrize(("n_out", "n_in"), [(41, 29), (64, 128), (65, 129)])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_bytes_by_counting(self, n_out, n_in, bits):
        rank, found = 3, 0
        for _ in range(rank):
            numbers = n_in + n_out
            found += -(-numbers * bits // 8)
            found += 2 * len(range(0, n_in, 64)) + 2 * len(range(0, n_out, 64))
        assert losses.rounded_bytes(rank, n_out, n_in, bits) == found
