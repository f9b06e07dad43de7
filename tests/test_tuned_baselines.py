"""Baselines tuned to an error: bytes and errors against dense matrices, and which wins in planted collections."""

import math
import sys
from pathlib import Path

import joint
import pytest
import torch

from eigenlorax.core.batch import delta_squares, pad_factors, scaled_batch
from eigenlorax.reports.analysis.losses import rounded_rows
from eigenlorax.reports.analysis.per_adapter import BOTH
from eigenlorax.reports.analysis.shared_basis import SHARED_BASIS
from made import of_one_subspace, random
from planted import MODULES, normal

# at the end: nothing there may hide a module of another name
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import tuned_baselines
from tuned_baselines import DIAGONAL, SharedFactors


def stacks(made, shapes=MODULES):
    return {m: pad_factors([one.get(m) for one in made], n_in, n_out) for m, (n_out, n_in) in shapes.items()}


def dense_loss(kind, one, rows, bits):
    """‖D − D'‖² of whole matrices, as defined by the baseline."""
    down, up = (rounded_rows(each[None], bits[0])[0] for each in rows)
    updates = one.up.mT @ one.down
    if kind == DIAGONAL:
        cores = joint.in_diagonal(one, (down, up)).cores
        back = torch.einsum("ko,nk,ki->noi", up, rounded_rows(cores[:, None], bits[1])[:, 0], down)
        return (updates - back).square().sum((1, 2))
    cores = torch.linalg.pinv(up.mT) @ updates @ torch.linalg.pinv(down)
    if kind == tuned_baselines.FULL:
        n, j, k = cores.shape
        cores = rounded_rows(cores.reshape(n, 1, j * k), bits[1]).reshape(n, j, k)
    else:
        left, sigma, right = torch.linalg.svd(cores)
        rank = one.down.shape[1]
        a = sigma[:, :rank, None].sqrt() * right[:, :rank]
        b = sigma[:, :rank, None].sqrt() * left[:, :, :rank].mT
        flat = [rounded_rows(rows.flatten(1)[:, None], bits[1]).reshape(rows.shape) for rows in (a, b)]
        cores = flat[1].mT @ flat[0]
    return (updates - up.mT @ cores @ down).square().sum((1, 2))


class TestSharedFactors:
    @pytest.mark.parametrize("kind", tuned_baselines.KINDS)
    def test_losses_are_those_of_dense_matrices(self, kind):
        one = stacks(of_one_subspace(7, noise=0.1, shapes=MODULES))["encoder.0.query"]
        weights = delta_squares(one).rsqrt()
        found = joint.diagonal(one, weights, 9) if kind == DIAGONAL else joint.full(one, weights, 9)
        rows = found.down, found.up
        for bits, lost in tuned_baselines._LOSSES[kind](one, rows, tuned_baselines.COMBINATIONS):
            expected = dense_loss(kind, one, rows, bits)
            # signs of singular vectors decide which number of a block is the largest
            rel = 0.1 if kind == SHARED_BASIS and bits[1] < 16 else 1e-6
            torch.testing.assert_close(lost, expected, rtol=rel, atol=1e-9)

    def test_bytes_by_counting(self):
        made = random(5, rank=3, shapes=MODULES)
        del made[2]["encoder.0.dense"]
        found = SharedFactors(stacks(made), [[0, 1, 2], [3, 4]])
        for kind, own in (
            (SHARED_BASIS, lambda k: 2 * 3 * k),
            (tuned_baselines.FULL, lambda k: k * k),
            (DIAGONAL, lambda k: k),
        ):
            counted = 0
            for module, (n_out, n_in) in MODULES.items():
                counted += 2 * 2 * 4 * (n_in + n_out)
                counted += sum(2 * own(4) for one in made if module in one)
            assert found.stored_bytes(kind, 4, (16, 16)) == counted
        eight = sum(2 * 4 * (n_in + n_out + 4) for n_out, n_in in MODULES.values())
        eight += sum(1 * 16 + 2 for one in made for _ in one)
        assert found.stored_bytes(tuned_baselines.FULL, 4, (8, 8)) == eight

    def test_the_floor_is_below_what_any_factors_lose(self):
        modules = stacks(of_one_subspace(9, noise=0.3, shapes=MODULES))
        found = SharedFactors(modules, [[0, 2, 4, 6, 8], [1, 3, 5, 7]])
        for k in (1, 3, 6, 12):
            points = [found.measure(kind, k)[16, 16] for kind in tuned_baselines.KINDS]
            assert all(found.lower_bound(k) <= point.worst for point in points)
        assert found.lower_bound(2) > 0.3
        assert found.lower_bound(1000) == 0.0

    def test_the_least_k_is_found(self):
        modules = stacks(of_one_subspace(9, noise=0.3, shapes=MODULES))
        found = SharedFactors(modules, [range(9)])
        point = found.least(SHARED_BASIS, (16, 16), 0.3, math.inf)
        every = [found.measure(SHARED_BASIS, k)[16, 16] for k in range(1, 28)]
        assert point == next(each for each in every if each.worst <= 0.3)
        assert found.least(SHARED_BASIS, (16, 16), 0.3, point.stored_bytes - 1) is None


class TestLeast:
    def test_what_is_shared_wins_where_much_is_shared(self):
        made = of_one_subspace(60, shapes=MODULES, noise=0.01)
        found = tuned_baselines.least(stacks(made), [0.3, 0.1], clusters=(1,))
        for place, error in enumerate((0.3, 0.1)):
            best = tuned_baselines.fewest(found, place)
            assert best.worst <= error
            assert best is found[SHARED_BASIS][place] or best is found[tuned_baselines.FULL][place]
            assert best.stored_bytes < found[BOTH][place].stored_bytes / 2

    def test_clusters_win_where_two_subspaces_are_there(self):
        made = [
            one
            for pair in zip(
                of_one_subspace(40, shapes=MODULES), of_one_subspace(40, shapes=MODULES, seed=9000), strict=True
            )
            for one in pair
        ]
        modules = stacks(made)
        groups = tuned_baselines.grouped(modules, 2)
        assert [set(group) for group in groups] == [set(range(0, 80, 2)), set(range(1, 80, 2))]
        found = tuned_baselines.least(modules, [0.1], clusters=(1, 2), kinds=[SHARED_BASIS])
        assert tuned_baselines.fewest(found, 0).settings["clusters"] == 2

    def test_nothing_is_shared_among_strangers(self):
        found = tuned_baselines.least(stacks(random(4, shapes=MODULES)), [0.5], clusters=(1, 2, 4), beyond=1.0)
        assert tuned_baselines.fewest(found, 0) is found[BOTH][0]
        # two of each at least
        assert not any("4 clusters" in name for name in found)


class TestDiagonalCoresOfMany:
    """Some of the adapters tell what all of them cannot hold."""

    @staticmethod
    def planted(n=24, k=5):
        """Every adapter: k common directions with weights of its own, and a little more."""
        n_out, n_in = MODULES["encoder.0.query"]
        down, up = normal(k, n_in, seed=1), normal(k, n_out, seed=2)
        cores = normal(n, k, seed=3)
        made = scaled_batch(
            down + 0.02 * normal(n, k, n_in, seed=4),
            cores[:, :, None] * up,
            torch.ones(n, dtype=torch.float64),
            (k,) * n,
        )
        return {"encoder.0.query": made}

    @pytest.mark.parametrize("error", [0.3])
    def test_the_same_is_found(self, monkeypatch, error):
        whole = SharedFactors(self.planted(), [range(24)]).least(DIAGONAL, (16, 16), error, math.inf)
        monkeypatch.setattr(tuned_baselines, "_SAMPLE", 12)
        some = SharedFactors(self.planted(), [range(24)])
        assert some.least(DIAGONAL, (16, 16), error, math.inf) == whole
        assert whole.worst <= error

    def test_what_they_lose_is_no_more_than_all_of_them_lose(self, monkeypatch):
        monkeypatch.setattr(tuned_baselines, "_SAMPLE", 8)
        found = SharedFactors(self.planted(), [range(24)])
        for k in (1, 3, 5, 8):
            assert found._sample_error(k) <= found.measure(DIAGONAL, k)[16, 16].worst
