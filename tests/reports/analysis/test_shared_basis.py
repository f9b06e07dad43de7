"""One shared basis as a baseline: bytes by counting, errors against dense matrices, and its lower bound."""

import math

import pytest
import torch

from eigenlorax.core.batch import delta_squares, pad_factors
from eigenlorax.reports.analysis.losses import rounded_rows
from eigenlorax.reports.analysis.shared_basis import SharedBasis
from made import awkward, of_one_subspace, random
from planted import MODULES

BITS = ((16, 16), (8, 8), (4, 8))


def stacks(adapters):
    return {
        module: pad_factors([one.get(module) for one in adapters], n_in, n_out)
        for module, (n_out, n_in) in MODULES.items()
    }


def test_bytes_by_counting():
    made = random(5, rank=3, shapes=MODULES)
    del made[2]["encoder.0.dense"]
    basis = SharedBasis(stacks(made), BITS, 1)
    factors = sum(2 * 4 * (n_in + n_out) for n_out, n_in in MODULES.values())
    coefficients = sum(2 * 2 * 3 * 4 for one in made for _ in one)
    assert basis.stored_bytes(4, (16, 16)) == factors + coefficients
    # a byte each, two bytes of scale for up to 64 numbers in a row; coefficients of a side are one row
    factors = sum(4 * (n_in + n_out + 2 * (-(-n_in // 64) + -(-n_out // 64))) for n_out, n_in in MODULES.values())
    coefficients = sum(2 * (3 * 4 + 2) for one in made for _ in one)
    assert basis.stored_bytes(4, (8, 8)) == factors + coefficients


def test_errors_are_those_of_dense_matrices():
    modules = stacks(of_one_subspace(7, noise=0.1, shapes=MODULES))
    basis = SharedBasis(modules, ((16, 16),), 1)
    lost = torch.zeros(7, dtype=torch.float64)
    for name, module in modules.items():
        down, up = (rounded_rows(rows[None], 16)[0] for rows in basis._bases(name, module, 9))
        updates = module.up.mT @ module.down
        cores = torch.linalg.pinv(up.mT) @ updates @ torch.linalg.pinv(down)
        lost += (updates - up.mT @ cores @ down).square().sum((1, 2))
    errors = (lost / sum(delta_squares(module) for module in modules.values())).sqrt()
    point = basis.measure(9)[16, 16]
    assert point.worst == pytest.approx(float(errors.max()), rel=1e-3)
    assert point.mean == pytest.approx(float(errors.mean()), rel=1e-3)
    assert point.settings == {"k": 9, "bits": [16, 16]}


@pytest.mark.parametrize("k", [1, 3, 6, 12])
def test_the_lower_bound_is_below_the_worst_error(k):
    basis = SharedBasis(stacks(of_one_subspace(9, noise=0.3, shapes=MODULES)), BITS, 1)
    assert all(basis.lower_bound(k) <= point.worst for point in basis.measure(k).values())
    assert basis.lower_bound(2) > 0.3
    assert basis.lower_bound(1000) == 0.0


def test_zeros_missing_modules_and_other_ranks_are_measured():
    basis = SharedBasis(stacks(awkward()), BITS, 1)
    points = basis.measure(basis.max_components)
    assert points[16, 16].worst < 0.01
    assert all(math.isfinite(point.mean) for point in points.values())
    zero = [{module: one[module] for module in one} for one in awkward()[7:8]]
    assert SharedBasis(stacks(zero), BITS, 1).measure(2)[8, 8].worst == 0.0
