"""Adapters stored by themselves: sizes and errors against dense matrices, the fewest bytes against all choices."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eigenlorax.core.batch import pad_factors
from eigenlorax.reports.analysis import per_adapter
from eigenlorax.reports.analysis.losses import pair_bytes, rounded_rows
from made import random
from planted import MODULES, random_factors
from reference import dense


def stacks(made, shapes=MODULES):
    return {m: pad_factors([one.get(m) for one in made], n_in, n_out) for m, (n_out, n_in) in shapes.items()}


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
        tables = per_adapter.tables(stacks(small()))
        whole = per_adapter.at_error(tables, 1e-3)[per_adapter.BOTH].stored_bytes
        found = per_adapter.at_size(tables, share * whole).point
        assert found.stored_bytes <= share * whole
        # all that is cheaper loses more, and all that loses less is dearer
        for error in np.linspace(0.01, 1, 200):
            other = per_adapter.at_error(tables, float(error))[per_adapter.BOTH]
            assert other.stored_bytes > share * whole or other.worst >= 0.98 * found.worst

    def test_loras_are_what_was_counted(self):
        made = small()
        tables = per_adapter.tables(stacks(made))
        found = per_adapter.at_size(tables, 0.2 * per_adapter.at_error(tables, 1e-3)[per_adapter.BOTH].stored_bytes)
        errors, spent = [], 0
        for i, one in enumerate(made):
            lost = total = 0.0
            for place, module in enumerate(MODULES):
                rank, bits = int(found.ranks[place, i]), int(found.bits[i])
                if module not in one or one[module].scaling == 0:
                    assert rank == 0
                    continue
                back = per_adapter.cut(one[module], rank, bits)
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
        tables = per_adapter.tables(stacks(small()))
        none = per_adapter.at_size(tables, 0)
        assert (none.point.stored_bytes, none.point.worst) == (0, pytest.approx(1))
        assert int(none.ranks.sum()) == 0
        assert per_adapter.at_size(tables, 10**9).point.worst < 1e-3

    def test_an_update_of_no_scale_stays_as_it_is(self):
        one = random_factors(2, *MODULES[next(iter(MODULES))], seed=5, scaling=0.0)
        assert per_adapter.cut(one, 1, 4) is one


class TestAlone:
    @pytest.mark.parametrize("bits", [16, 4])
    def test_tables_are_those_of_dense_svds(self, bits):
        made = small()
        found = per_adapter.tables(stacks(made), (bits,))
        for i, one in enumerate(made):
            present = [m for m in MODULES if m in one]
            for ranks in itertools.product(range(4), repeat=len(present)):
                ranks_of = dict(zip(present, ranks, strict=True))
                table = sum(
                    float(found.squared_errors[bits][place][i, ranks_of.get(m, 0)]) for place, m in enumerate(MODULES)
                )
                expected = lost_by(one, [min(r, one[m].down.shape[0]) for m, r in ranks_of.items()], bits)
                total = sum(float(np.square(dense(f)).sum()) for f in one.values())
                assert table == pytest.approx(expected, rel=1e-5, abs=1e-7 * total + 1e-12)

    @pytest.mark.parametrize("error", [0.05, 0.5])
    def test_ranks_by_energy_are_near_the_cheapest_of_all_choices(self, error):
        made = random(6, rank=3, shapes=MODULES)
        found = per_adapter.tables(stacks(made), (16,))
        costs = [pair_bytes(*shape, 16) for shape in MODULES.values()]
        expected = 0
        for one in made:
            total = sum(float(np.square(dense(f)).sum()) for f in one.values())
            choices = itertools.product(range(4), repeat=2)
            fits = [r for r in choices if lost_by(one, r, 16) <= error**2 * total]
            expected += min(sum(r * c for r, c in zip(ranks, costs, strict=True)) for ranks in fits)
        point = per_adapter.at_error(found, error)[per_adapter.CUT_BY_ENERGY]
        assert expected <= point.stored_bytes <= 1.1 * expected
        assert point.worst <= error

    def test_each_way_holds_the_error_and_more_freedom_costs_no_more(self):
        found = per_adapter.tables(stacks(small()))
        for error in (0.02, 0.1, 0.3, 0.6):
            ways = per_adapter.at_error(found, error)
            assert all(point.worst <= error * (1 + 1e-9) and point.mean <= point.worst for point in ways.values())
            size = {name: point.stored_bytes for name, point in ways.items()}
            assert size[per_adapter.BOTH] <= min(size.values())
            assert size[per_adapter.CUT_BY_ENERGY] <= size[per_adapter.CUT] * 1.05

    def test_what_cannot_be_reached_is_not(self):
        modules = stacks(random(2, shapes=MODULES))
        assert per_adapter.at_error(per_adapter.tables(modules), 1e-6)[per_adapter.BOTH] is None
        found = per_adapter.tables(modules, (4,))
        assert math.isinf(per_adapter._full_rank(found, 4, 0.01)[0].max())

    def test_an_untrained_collection_costs_nothing(self):
        made = [{m: random_factors(2, *shape, seed=i, scaling=0.0) for m, shape in MODULES.items()} for i in range(3)]
        point = per_adapter.at_error(per_adapter.tables(stacks(made)), 0.1)[per_adapter.BOTH]
        assert (point.stored_bytes, point.worst) == (0, 0.0)
