"""Prototypes are the leading right singular vectors of dense updates, and PEFT's Arrow has the same."""

import pytest
import torch

from eigenlorax.core.coefficients import Coefficients
from eigenlorax.core.prototypes import leading_combination, module_prototypes
from planted import normal, of_spectrum, orthonormal

K_DOWN, K_UP, IN, OUT, RANK = 7, 6, 29, 41, 3


def dense(adapter, down_basis, up_basis):
    down = adapter.down @ down_basis + (0 if adapter.down_residual is None else adapter.down_residual)
    up = up_basis.mT @ adapter.up + (0 if adapter.up_residual is None else adapter.up_residual)
    return adapter.scaling * up @ down


def made(seed, *, rank=RANK, down_residual=False, up_residual=False):
    return Coefficients(
        normal(rank, K_DOWN, seed=seed),
        normal(K_UP, rank, seed=seed + 1),
        0.5,
        (),
        normal(rank, IN, seed=seed + 2) if down_residual else None,
        normal(OUT, rank, seed=seed + 3) if up_residual else None,
    )


def assert_same_direction(found, wanted):
    torch.testing.assert_close(found * torch.sign(found @ wanted), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("stored", ["orthonormal", "rounded"])
def test_they_are_the_leading_right_singular_vectors(stored):
    down_basis, up_basis = orthonormal(K_DOWN, IN, 1), orthonormal(K_UP, OUT, 2)
    if stored == "rounded":
        # far from orthonormal, as bases of few bits are
        down_basis, up_basis = (down_basis * 8).round() / 8, (up_basis * 8).round() / 8
    adapters = [
        made(10),
        None,
        made(20, rank=5),
        made(30, down_residual=True),
        made(40, up_residual=True),
        made(50, down_residual=True, up_residual=True),
    ]
    found = module_prototypes(adapters, down_basis, up_basis)
    vectors = found.coordinates @ down_basis + found.outside
    for adapter, vector in zip(adapters, vectors, strict=True):
        if adapter is None:
            assert not vector.any()
        else:
            assert_same_direction(vector, torch.linalg.svd(dense(adapter, down_basis, up_basis)).Vh[0])


def test_adapters_in_the_span_have_coordinates_only():
    found = module_prototypes([made(1), made(2)], orthonormal(K_DOWN, IN, 1), orthonormal(K_UP, OUT, 2))
    assert found.outside is None
    torch.testing.assert_close(found.coordinates.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_they_do_not_depend_on_how_the_update_is_factored():
    down_basis, up_basis, adapter = orthonormal(K_DOWN, IN, 1), orthonormal(K_UP, OUT, 2), made(3)
    mixing = normal(RANK, RANK, seed=9)
    other = Coefficients(mixing @ adapter.down, adapter.up @ torch.linalg.inv(mixing), 7.0)
    first, second = module_prototypes([adapter, other], down_basis, up_basis).coordinates
    assert_same_direction(first, second)


def test_an_update_of_zero_has_none():
    down_basis, up_basis = orthonormal(K_DOWN, IN, 1), orthonormal(K_UP, OUT, 2)
    untrained = Coefficients(normal(RANK, K_DOWN, seed=1), torch.zeros(K_UP, RANK, dtype=torch.float64), 1.0)
    assert not module_prototypes([untrained], down_basis, up_basis).coordinates.any()


def test_pefts_arrow_has_the_same():
    arrow = pytest.importorskip("peft.tuners.lora.arrow", reason="PEFT is not installed: pip install '.[peft]'")
    config = pytest.importorskip("peft.tuners.lora.config").ArrowConfig(rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = [], []
    layer = arrow.ArrowLoraLinearLayer(IN, config)
    # PEFT iterates fifteen times, which suffices where the singular values differ
    factors = of_spectrum([5.0, 1.0, 0.3], OUT, IN, seed=4)
    peft_vector = layer.top_right_singular_vec_from_BA(factors.down, factors.up).double()
    vector = leading_combination(factors.down @ factors.down.mT, factors.up.mT @ factors.up) @ factors.down
    torch.testing.assert_close(vector * torch.sign(vector @ peft_vector), peft_vector, atol=1e-6, rtol=0)
