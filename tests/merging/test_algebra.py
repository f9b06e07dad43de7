"""Sums and projections of adapters, compared with dense float64 matrices."""

import math

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import OptionError, ShapeError
from planted import MODULES, normal, random_factors

QUERY, DENSE = MODULES


def dense(adapter, module):
    if module not in adapter.specs:
        return torch.zeros(MODULES[module], dtype=torch.float64)
    factors = adapter.modules[module]
    return factors.scaling * factors.up.double() @ factors.down.double()


@pytest.fixture
def pair():
    """Two adapters of other ranks; the second has one module, and each has a head."""
    a = {name: random_factors(2 + n, *shape, seed=n, scaling=0.5) for n, (name, shape) in enumerate(MODULES.items())}
    b = {QUERY: random_factors(4, *MODULES[QUERY], seed=9, scaling=3.0)}
    return [
        from_factors(
            name, modules, base_model="org/base", heads={"base_model.model.classifier.weight": normal(3, 5, seed=n)}
        )
        for n, (name, modules) in enumerate((("a", a), ("b", b)))
    ]


def assert_update(adapter, wanted, tolerance=1e-6):
    for module in MODULES:
        error = (dense(adapter, module) - wanted(module)).norm()
        assert error <= tolerance * max(1.0, float(wanted(module).norm())), module


def test_scale(pair):
    a, _ = pair
    assert_update(ex.scale(a, -0.25), lambda module: -0.25 * dense(a, module), 1e-12)
    assert ex.scale(a, 2).heads == a.heads
    assert (ex.scale(a, 2).name, ex.scale(a, 2, name="twice").name) == ("a", "twice")


def test_sums_and_differences(pair):
    a, b = pair
    assert_update(ex.combine(pair, [2.0, -3.0]), lambda module: 2 * dense(a, module) - 3 * dense(b, module))
    assert_update(ex.subtract(a, b), lambda module: dense(a, module) - dense(b, module))
    assert ex.subtract(a, b).heads.keys() == a.heads.keys()
    assert ex.subtract(a, b).specs[QUERY].rank == 6
    assert not dense(ex.subtract(a, a), QUERY).norm() > 1e-6


def test_a_sum_is_cut_to_a_rank(pair):
    a, b = pair
    left, values, right = torch.linalg.svd(dense(a, QUERY) + dense(b, QUERY), full_matrices=False)
    best = left[:, :3] @ torch.diag(values[:3]) @ right[:3]
    found = ex.combine(pair, [1.0, 1.0], rank=3)
    torch.testing.assert_close(dense(found, QUERY), best, rtol=1e-5, atol=1e-5)
    assert found.ranks == (3,)


@pytest.mark.parametrize(("position", "nearer"), [(0.0, "a"), (0.3, "a"), (0.7, "b"), (1.0, "b"), (1.5, "b")])
def test_interpolation(pair, position, nearer):
    a, b = pair
    found = ex.interpolate(a, b, position)
    assert_update(found, lambda module: (1 - position) * dense(a, module) + position * dense(b, module))
    assert found.name == nearer
    (head,), (wanted,) = found.heads.values(), pair["ab".index(nearer)].heads.values()
    assert torch.equal(head, wanted)


def test_orthogonal_updates(pair):
    a, b = pair
    found = ex.orthogonalize(a, b)
    square = dense(b, QUERY).square().sum()
    share = (dense(a, QUERY) * dense(b, QUERY)).sum() / square
    assert_update(found, lambda module: dense(a, module) - share * dense(b, module))
    assert abs(sum(float((dense(found, module) * dense(b, module)).sum()) for module in MODULES)) < 1e-5 * float(square)


def test_projected_out_of_another(pair):
    a, b = pair
    found = ex.project_out(a, b)
    left, values, right = torch.linalg.svd(dense(b, QUERY), full_matrices=False)
    rank = int((values > 1e-9).sum())
    outputs, inputs = left[:, :rank] @ left[:, :rank].mT, right[:rank].mT @ right[:rank]
    assert rank == 4

    def wanted(module):
        if module == DENSE:
            return dense(a, module)
        update = dense(a, module)
        return update - outputs @ update - update @ inputs + outputs @ update @ inputs

    assert_update(found, wanted)
    assert found.ranks == a.ranks


def test_an_untrained_adapter_takes_nothing_away(pair):
    a, b = pair
    zero = from_factors(
        "zero",
        {QUERY: LoRAFactors(b.modules[QUERY].down, torch.zeros_like(b.modules[QUERY].up), 1.0)},
        base_model="org/base",
    )
    assert_update(ex.project_out(a, zero), lambda module: dense(a, module))
    with pytest.raises(OptionError, match="the update of 'zero' is zero: nothing can be orthogonal to it"):
        ex.orthogonalize(a, zero)


def test_results_are_written_and_read(pair, tmp_path):
    found = ex.subtract(*pair, rank=3)
    again = ex.read_adapter(ex.write_adapter(found, tmp_path / "difference"))
    assert_update(again, lambda module: dense(found, module), 1e-6)
    assert again.base_model == "org/base"


def test_bad_input(pair):
    a, b = pair
    with pytest.raises(OptionError, match="factor must be a number, got 'two'"):
        ex.scale(a, "two")
    with pytest.raises(OptionError, match="factor must be finite, got inf"):
        ex.scale(a, math.inf)
    with pytest.raises(OptionError, match="weights has 1 numbers for 2 adapters"):
        ex.combine(pair, [1.0])
    with pytest.raises(OptionError, match="weights must be finite"):
        ex.combine(pair, [1.0, math.nan])
    with pytest.raises(OptionError, match="rank must be from 1 to 37"):
        ex.combine(pair, [1.0, 1.0], rank=0)
    wide = from_factors("wide", {QUERY: random_factors(2, 5, 7, seed=1)}, base_model="org/base")
    for function in (ex.subtract, ex.orthogonalize, ex.project_out):
        with pytest.raises(ShapeError, match=f"module {QUERY}"):
            function(a, wide)
    with pytest.raises(ShapeError, match=f"module {QUERY}"):
        ex.interpolate(b, wide, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: ex.scale("adapters/a", 2.0), "adapters must be Adapters, .* got str"),
        (lambda a: ex.combine(a, [1.0]), "adapters must be a list of Adapters, got Adapter"),
        (lambda a: ex.combine([], []), "combine needs at least one adapter"),
        (lambda a: ex.combine([a, a], 1.0), "weights must be a list of numbers"),
        (lambda a: ex.subtract(a, None), "adapters must be Adapters, .* got NoneType"),
        (lambda a: ex.interpolate(a, "b", 0.5), "adapters must be Adapters, .* got str"),
        (lambda a: ex.orthogonalize(a, 3), "adapters must be Adapters, .* got int"),
        (lambda a: ex.project_out(None, a), "adapters must be Adapters, .* got NoneType"),
        (lambda a: ex.scale(a, 2.0, name=3), "name must be a text, got 3"),
    ],
)
def test_arguments_of_other_types(call, message):
    adapter = from_factors("a", {"layer": random_factors(2, 7, 11, seed=1)})
    with pytest.raises(OptionError, match=message):
        call(adapter)
