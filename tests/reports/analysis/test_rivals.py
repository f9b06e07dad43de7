"""What else could store a collection: bytes and errors against dense matrices, the fewest bytes against all choices."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eigenlorax.codec import joint
from eigenlorax.core.stack import Stack, squares, stack
from eigenlorax.reports.analysis import rivals
from eigenlorax.reports.analysis.losses import pair_bytes, rounded_rows
from made import of_one_subspace, random
from planted import MODULES, normal, random_factors
from reference import dense


def stacks(made, shapes=MODULES):
    return {m: stack([one.get(m) for one in made], n_in, n_out) for m, (n_out, n_in) in shapes.items()}


def small():
    """Ranks that differ, one module missing, one untrained adapter."""
    made = random(5, rank=3, shapes=MODULES)
    query, other = MODULES
    made[1][query] = random_factors(2, *MODULES[query], seed=77)
    del made[2][other]
    made[3] = {m: random_factors(2, *shape, seed=5, scaling=0.0) for m, shape in MODULES.items()}
    return made


def lost_by(made, ranks, bits):
    """Dense: the leading directions of each module, in that many bits."""
    lost = 0.0
    for factors, rank in zip(made.values(), ranks, strict=True):
        update = dense(factors)
        left, sigma, right = np.linalg.svd(update)
        root = np.sqrt(sigma[:rank])
        up, down = (
            torch.tensor(side.copy())[None] for side in ((left[:, :rank] * root).T, right[:rank] * root[:, None])
        )
        back = torch.zeros(update.shape) if rank == 0 else rounded_rows(up, bits)[0].mT @ rounded_rows(down, bits)[0]
        lost += float(np.square(update - back.numpy()).sum())
    return lost


class TestWithin:
    """The least error in so many bytes, and the LoRAs of it."""

    @pytest.mark.parametrize("share", [0.15, 0.8])
    def test_no_smaller_error_fits(self, share):
        tables = rivals.tables(stacks(small()))
        whole = rivals.alone(tables, 1e-3)[rivals.BOTH].stored_bytes
        found = rivals.within(tables, share * whole).point
        assert found.stored_bytes <= share * whole
        # all that is cheaper loses more, and all that loses less is dearer
        for error in np.linspace(0.01, 1, 200):
            other = rivals.alone(tables, float(error))[rivals.BOTH]
            assert other.stored_bytes > share * whole or other.worst >= 0.98 * found.worst

    def test_loras_are_what_was_counted(self):
        made = small()
        tables = rivals.tables(stacks(made))
        found = rivals.within(tables, 0.2 * rivals.alone(tables, 1e-3)[rivals.BOTH].stored_bytes)
        errors, spent = [], 0
        for i, one in enumerate(made):
            lost = total = 0.0
            for place, module in enumerate(MODULES):
                rank, bits = int(found.ranks[place, i]), int(found.bits[i])
                if module not in one or one[module].scaling == 0:
                    assert rank == 0
                    continue
                back = rivals.cut(one[module], rank, bits)
                assert back.spec == replace(one[module].spec, dtype=torch.float32)
                assert np.linalg.matrix_rank(dense(back)) == rank
                lost += float(np.square(dense(one[module]) - dense(back)).sum())
                total += float(np.square(dense(one[module])).sum())
                spent += rank * pair_bytes(*MODULES[module], bits)
            errors += [math.sqrt(lost / total)] if total else []
        assert found.point.stored_bytes == spent
        assert found.point.worst == pytest.approx(max(errors), rel=1e-4)
        assert found.point.mean == pytest.approx(sum(errors) / len(errors), rel=1e-4)

    def test_any_number_of_bytes_is_enough(self):
        tables = rivals.tables(stacks(small()))
        none = rivals.within(tables, 0)
        assert (none.point.stored_bytes, none.point.worst) == (0, pytest.approx(1))
        assert int(none.ranks.sum()) == 0
        assert rivals.within(tables, 10**9).point.worst < 1e-3

    def test_an_update_of_no_scale_stays_as_it_is(self):
        one = random_factors(2, *MODULES[next(iter(MODULES))], seed=5, scaling=0.0)
        assert rivals.cut(one, 1, 4) is one


class TestAlone:
    @pytest.mark.parametrize("bits", [16, 4])
    def test_tables_are_those_of_dense_svds(self, bits):
        made = small()
        found = rivals.tables(stacks(made), (bits,))
        for i, one in enumerate(made):
            present = [m for m in MODULES if m in one]
            for ranks in itertools.product(range(4), repeat=len(present)):
                ranks_of = dict(zip(present, ranks, strict=True))
                table = sum(float(found.lost[bits][place][i, ranks_of.get(m, 0)]) for place, m in enumerate(MODULES))
                expected = lost_by(one, [min(r, one[m].down.shape[0]) for m, r in ranks_of.items()], bits)
                total = sum(float(np.square(dense(f)).sum()) for f in one.values())
                assert table == pytest.approx(expected, rel=1e-5, abs=1e-7 * total + 1e-12)

    @pytest.mark.parametrize("error", [0.05, 0.5])
    def test_ranks_by_energy_are_near_the_cheapest_of_all_choices(self, error):
        made = random(6, rank=3, shapes=MODULES)
        found = rivals.tables(stacks(made), (16,))
        costs = [pair_bytes(*shape, 16) for shape in MODULES.values()]
        expected = 0
        for one in made:
            total = sum(float(np.square(dense(f)).sum()) for f in one.values())
            choices = itertools.product(range(4), repeat=2)
            fits = [r for r in choices if lost_by(one, r, 16) <= error**2 * total]
            expected += min(sum(r * c for r, c in zip(ranks, costs, strict=True)) for ranks in fits)
        point = rivals.alone(found, error)[rivals.CUT_BY_ENERGY]
        assert expected <= point.stored_bytes <= 1.1 * expected
        assert point.worst <= error

    def test_each_way_holds_the_error_and_more_freedom_costs_no_more(self):
        found = rivals.tables(stacks(small()))
        for error in (0.02, 0.1, 0.3, 0.6):
            ways = rivals.alone(found, error)
            assert all(point.worst <= error * (1 + 1e-9) and point.mean <= point.worst for point in ways.values())
            size = {name: point.stored_bytes for name, point in ways.items()}
            assert size[rivals.BOTH] <= min(size.values())
            assert size[rivals.CUT_BY_ENERGY] <= size[rivals.CUT] * 1.05

    def test_what_cannot_be_reached_is_not(self):
        found = rivals.tables(stacks(random(2, shapes=MODULES)), (4,))
        assert rivals.alone(rivals.tables(stacks(random(2, shapes=MODULES))), 1e-6)[rivals.BOTH] is None
        assert math.isinf(rivals._fixed(found, 4, 0.01)[0].max())

    def test_an_untrained_collection_costs_nothing(self):
        made = [{m: random_factors(2, *shape, seed=i, scaling=0.0) for m, shape in MODULES.items()} for i in range(3)]
        point = rivals.alone(rivals.tables(stacks(made)), 0.1)[rivals.BOTH]
        assert (point.stored_bytes, point.worst) == (0, 0.0)


def dense_loss(kind, one, rows, bits):
    """‖D − D'‖² of whole matrices, by the words of `rivals`."""
    down, up = (rounded_rows(each[None], bits[0])[0] for each in rows)
    updates = one.up.mT @ one.down
    if kind == rivals.DIAGONAL:
        cores = joint.in_diagonal(one, (down, up)).cores
        back = torch.einsum("ko,nk,ki->noi", up, rounded_rows(cores[:, None], bits[1])[:, 0], down)
        return (updates - back).square().sum((1, 2))
    cores = torch.linalg.pinv(up.mT) @ updates @ torch.linalg.pinv(down)
    if kind == rivals.FULL:
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


class TestTogether:
    @pytest.mark.parametrize("kind", rivals.KINDS)
    def test_losses_are_those_of_dense_matrices(self, kind):
        one = stacks(of_one_subspace(7, noise=0.1, shapes=MODULES))["encoder.0.query"]
        weights = squares(one).rsqrt()
        found = joint.diagonal(one, weights, 9) if kind == rivals.DIAGONAL else joint.full(one, weights, 9)
        rows = found.down, found.up
        for bits, lost in rivals._LOSSES[kind](one, rows, rivals.TOGETHER):
            expected = dense_loss(kind, one, rows, bits)
            # signs of singular vectors decide which number of a block is the largest
            rel = 0.1 if kind == rivals.COEFFICIENTS and bits[1] < 16 else 1e-6
            torch.testing.assert_close(lost, expected, rtol=rel, atol=1e-9)

    def test_bytes_by_counting(self):
        made = random(5, rank=3, shapes=MODULES)
        del made[2]["encoder.0.dense"]
        found = rivals.Together(stacks(made), [[0, 1, 2], [3, 4]])
        for kind, own in (
            (rivals.COEFFICIENTS, lambda k: 2 * 3 * k),
            (rivals.FULL, lambda k: k * k),
            (rivals.DIAGONAL, lambda k: k),
        ):
            counted = 0
            for module, (n_out, n_in) in MODULES.items():
                counted += 2 * 2 * 4 * (n_in + n_out)
                counted += sum(2 * own(4) for one in made if module in one)
            assert found.stored_bytes(kind, 4, (16, 16)) == counted
        eight = sum(2 * 4 * (n_in + n_out + 4) for n_out, n_in in MODULES.values())
        eight += sum(1 * 16 + 2 for one in made for _ in one)
        assert found.stored_bytes(rivals.FULL, 4, (8, 8)) == eight

    def test_the_floor_is_below_what_any_factors_lose(self):
        modules = stacks(of_one_subspace(9, noise=0.3, shapes=MODULES))
        found = rivals.Together(modules, [[0, 2, 4, 6, 8], [1, 3, 5, 7]])
        for k in (1, 3, 6, 12):
            points = [found.tried(kind, k)[16, 16] for kind in rivals.KINDS]
            assert all(found.floor(k) <= point.worst for point in points)
        assert found.floor(2) > 0.3
        assert found.floor(1000) == 0.0

    def test_the_least_k_is_found(self):
        modules = stacks(of_one_subspace(9, noise=0.3, shapes=MODULES))
        found = rivals.Together(modules, [range(9)])
        point = found.least(rivals.COEFFICIENTS, (16, 16), 0.3, math.inf)
        every = [found.tried(rivals.COEFFICIENTS, k)[16, 16] for k in range(1, 28)]
        assert point == next(each for each in every if each.worst <= 0.3)
        assert found.least(rivals.COEFFICIENTS, (16, 16), 0.3, point.stored_bytes - 1) is None


class TestLeast:
    def test_what_is_shared_wins_where_much_is_shared(self):
        made = of_one_subspace(60, shapes=MODULES, noise=0.01)
        found = rivals.least(stacks(made), [0.3, 0.1], clusters=(1,))
        for place, error in enumerate((0.3, 0.1)):
            best = rivals.fewest(found, place)
            assert best.worst <= error
            assert best is found[rivals.COEFFICIENTS][place] or best is found[rivals.FULL][place]
            assert best.stored_bytes < found[rivals.BOTH][place].stored_bytes / 2

    def test_clusters_win_where_two_subspaces_are_there(self):
        made = [
            one
            for pair in zip(
                of_one_subspace(40, shapes=MODULES), of_one_subspace(40, shapes=MODULES, seed=9000), strict=True
            )
            for one in pair
        ]
        modules = stacks(made)
        groups = rivals.grouped(modules, 2)
        assert [set(group) for group in groups] == [set(range(0, 80, 2)), set(range(1, 80, 2))]
        found = rivals.least(modules, [0.1], clusters=(1, 2), kinds=[rivals.COEFFICIENTS])
        assert rivals.fewest(found, 0).settings["clusters"] == 2

    def test_nothing_is_shared_among_strangers(self):
        found = rivals.least(stacks(random(4, shapes=MODULES)), [0.5], clusters=(1, 2, 4), beyond=1.0)
        assert rivals.fewest(found, 0) is found[rivals.BOTH][0]
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
        made = Stack(
            down + 0.02 * normal(n, k, n_in, seed=4),
            cores[:, :, None] * up,
            torch.ones(n, dtype=torch.float64),
            (k,) * n,
        )
        return {"encoder.0.query": made}

    @pytest.mark.parametrize("error", [0.3])
    def test_the_same_is_found(self, monkeypatch, error):
        whole = rivals.Together(self.planted(), [range(24)]).least(rivals.DIAGONAL, (16, 16), error, math.inf)
        monkeypatch.setattr(rivals, "_MANY", 12)
        some = rivals.Together(self.planted(), [range(24)])
        assert some.least(rivals.DIAGONAL, (16, 16), error, math.inf) == whole
        assert whole.worst <= error

    def test_what_they_lose_is_no_more_than_all_of_them_lose(self, monkeypatch):
        monkeypatch.setattr(rivals, "_MANY", 8)
        found = rivals.Together(self.planted(), [range(24)])
        for k in (1, 3, 5, 8):
            assert found._lost_by_some(k) <= found.tried(rivals.DIAGONAL, k)[16, 16].worst
