"""Every adapter with every other, against dense matrices: products of updates and of factors, and shared directions."""

import numpy as np
import oracle
import pytest
import torch

from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis import pairs as module
from eigenlorax.reports.analysis.pairs import Pairs, cosines, overlap
from made import awkward, gauged, pairs_of
from planted import MODULES, normal, orthonormal, random_factors
from reference import dense

# by what inner products are in: share of the norms that they may be off
PRECISION = {"float64": 1e-12, "float32": 1e-6}


@pytest.fixture(params=PRECISION)
def precision(request, monkeypatch):
    """How far off products may be, in each of the two precisions."""
    monkeypatch.setattr(module, "FLOAT64_ROWS", 10**9 if request.param == "float64" else 0)
    return PRECISION[request.param]


def assert_products(found, expected, tolerance):
    """Equal up to a share of the norms on the diagonal."""
    norms = np.sqrt(np.diagonal(expected))
    np.testing.assert_array_less(np.abs(found.numpy() - expected), tolerance * norms[:, None] * norms + 1e-300)


class TestProducts:
    def test_of_updates(self, precision):
        expected = oracle.table(oracle.updates(awkward()), oracle.inner)
        assert_products(pairs_of(awkward()).delta, expected, precision)
        assert np.count_nonzero(np.diagonal(expected)) == 9

    @pytest.mark.parametrize("side", ["down", "up"])
    def test_of_factors(self, precision, side):
        made = awkward()
        expected = oracle.table(made, lambda one, other: oracle.rows_alike(one, other, side))
        found = getattr(pairs_of(made), side)
        # with a scaling of zero there is no update, and B does not count
        counts = [i for i in range(len(made)) if i != 7]
        assert_products(found[counts][:, counts], expected[counts][:, counts], precision)

    def test_of_directions(self, precision):
        found, updates = pairs_of(awkward()), oracle.updates(awkward())
        assert_products(found.down_shared, oracle.table(updates, oracle.shared_down), precision)
        assert_products(found.up_shared, oracle.table(updates, oracle.shared_up), precision)

    def test_of_rows_that_do_not_belong_together(self):
        """By so many as belong together: what these would have by chance; or in random directions, where that is more,
        and of rank 1, where there are none."""
        made = awkward()
        made[8] = {m: LoRAFactors(f.down[:1], f.up[:, :1], 1.0) for m, f in made[8].items()}

        def crossed(one, other):
            total = 0.0
            for m in one.keys() & other.keys():
                a, b = oracle.rows(one[m], "down"), oracle.rows(other[m], "down")
                pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i != j]
                mean = sum((a[i] @ b[j]) ** 2 for i, j in pairs) / len(pairs) if pairs else 0.0
                both = min(len(a), len(b))
                turned = ((a @ a.T)[:both, :both] * (b @ b.T)[:both, :both]).sum() / a.shape[1]
                total += max(both * mean, turned)
            return total

        np.testing.assert_allclose(pairs_of(made).down_cross.numpy(), oracle.table(made, crossed), rtol=1e-9)

    def test_ranks(self):
        made = awkward()
        sizes = [[one[m].down.shape[0] if m in one else 0 for m in MODULES] for one in made]
        assert pairs_of(made).same_ranks.tolist() == [[one == other for other in sizes] for one in sizes]

    def test_blocks_of_adapters_make_no_difference(self, monkeypatch):
        whole = pairs_of(awkward())
        monkeypatch.setattr(module, "_CHUNK_NUMBERS", 4 * 10 * 3)
        parts = pairs_of(awkward())
        for name in ("delta", "down", "up", "down_cross", "down_shared", "up_shared"):
            one, other = getattr(whole, name), getattr(parts, name)
            assert bool(other.any())
            assert torch.equal(other, other.mT)
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)

    def test_of_some_adapters(self):
        made, chosen = awkward(), [8, 2, 5]
        some, alone = pairs_of(made).subset(chosen), pairs_of([made[i] for i in chosen])
        for name in ("delta", "down", "up", "down_cross", "down_shared", "up_shared"):
            torch.testing.assert_close(getattr(some, name), getattr(alone, name), rtol=1e-9, atol=0)
        assert torch.equal(some.same_ranks, alone.same_ranks)

    def test_many_rows_are_float32(self):
        """Sizes are taken out before, so that no size is too large or small for it."""
        n_out, n_in = 23, 19
        n = module.FLOAT64_ROWS // 3 + 5
        made = [
            {"m": random_factors(3, n_out, n_in, seed=2 * i, scaling=1.0, size=10.0 ** (i % 41 - 20))} for i in range(n)
        ]
        found = pairs_of(made, {"m": (n_out, n_in)})
        some = list(range(0, n, 17))
        expected = oracle.table([{"m": dense(made[i]["m"])} for i in some], oracle.inner)
        assert_products(found.delta[some][:, some], expected, PRECISION["float32"])
        exact = pairs_of([made[i] for i in some], {"m": (n_out, n_in)}).delta
        assert not torch.allclose(found.delta[some][:, some], exact, rtol=1e-10, atol=0)

    def test_nothing_added(self):
        found = Pairs.of(3)
        found.add(pad_factors([None, None, None], 5, 7))
        assert not found.delta.any()
        assert found.same_ranks.all()
        assert found.sides == []


class TestCosines:
    def test_equal_those_of_long_vectors(self, precision):
        updates = oracle.updates(awkward())
        expected = oracle.table(updates, oracle.cosine)
        np.fill_diagonal(expected, 1.0)
        np.testing.assert_allclose(cosines(pairs_of(awkward()).delta).numpy(), expected, atol=2 * precision)

    def test_of_the_same_update_in_another_gauge(self, precision):
        found = cosines(pairs_of(awkward()).delta)
        assert float(found[0, 9]) == pytest.approx(1.0, abs=30 * precision)
        assert bool((found.diagonal() == 1).all())

    def test_of_a_zero_update(self):
        found = cosines(pairs_of(awkward()).delta)
        assert found[7].tolist() == [0.0] * 7 + [1.0] + [0.0] * 2


class TestOverlap:
    def test_equals_that_of_dense_matrices(self, precision):
        updates = oracle.updates(awkward())
        expected = oracle.table(updates, oracle.overlap)
        np.fill_diagonal(expected, 1.0)
        np.testing.assert_allclose(overlap(pairs_of(awkward())).numpy(), expected, atol=4 * precision)

    def test_is_blind_to_gauge_sign_and_size(self):
        made = awkward()
        turned = [gauged(one, 7 * i, 30.0) for i, one in enumerate(made)]
        for one in turned[::2]:
            for m, f in one.items():
                one[m] = LoRAFactors(f.down, f.up, -3.0 * f.scaling)
        torch.testing.assert_close(overlap(pairs_of(made)), overlap(pairs_of(turned)), rtol=1e-7, atol=1e-12)

    def test_orthogonal_directions(self):
        n_out, n_in = 41, 29
        right, left = orthonormal(6, n_in, 1), orthonormal(6, n_out, 2)
        parts = [slice(0, 2), slice(2, 4), slice(2, 4)]
        made = [{"m": of_directions(right[part], left[part])} for part in parts]
        # the third has the second's directions on one side alone
        made[2] = {"m": of_directions(right[parts[2]], left[slice(4, 6)])}
        found = overlap(pairs_of(made, {"m": (n_out, n_in)}))
        assert found[0, 1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
        assert float(found[1, 2]) == pytest.approx(0.5)

    @pytest.mark.parametrize("rank", [1, 4])
    def test_of_chance(self, rank):
        """r / dimension, where singular values are equal."""
        n_out, n_in = 41, 29
        made = [
            {"m": of_directions(orthonormal(rank, n_in, 10 * i), orthonormal(rank, n_out, 10 * i + 1))}
            for i in range(60)
        ]
        found = overlap(pairs_of(made, {"m": (n_out, n_in)}))
        mean = float((found.sum() - 60) / (60 * 59))
        assert mean == pytest.approx((rank / n_in + rank / n_out) / 2, rel=0.05)


def of_directions(right, left):
    """Factors of an update with these directions, all singular values 1."""
    mixing = torch.linalg.qr(normal(len(right), len(right), seed=17))[0]
    return LoRAFactors(mixing @ right, left.mT @ mixing.mT, 1.0)
