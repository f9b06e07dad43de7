"""Differences between adapters, compared with dense float64 matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenlorax import LoRAFactors, from_factors
from eigenlorax.core.update_changes import compare
from eigenlorax.errors import ShapeError

SIZES = {"layer.0.query": (17, 11), "layer.1.query": (13, 23), "layer.1.value": (29, 19)}


def update(out, width, rank, seed, scaling=1.5):
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((rank, width), (out, rank)))
    return LoRAFactors(down, up, scaling)


def adapter(name, seed, rank=3, sizes=SIZES, **fields):
    modules = {module: update(*shape, rank, seed + index) for index, (module, shape) in enumerate(sizes.items())}
    return from_factors(name, modules, **fields)


def dense(factors):
    return factors.scaling * factors.up.double() @ factors.down.double()


def expected(before, after):
    """Change, ratio of norms, and new parts per side, by the pseudoinverse of the whole matrix."""
    rows = torch.linalg.pinv(before, rtol=1e-7) @ before
    columns = before @ torch.linalg.pinv(before, rtol=1e-7)
    new_down, new_up = after - after @ rows, after - columns @ after
    return [
        float((after - before).norm() / before.norm()),
        float(after.norm() / before.norm()),
        float(new_down.norm() / after.norm()),
        float(new_up.norm() / after.norm()),
    ]


def figures(change):
    return [change.change, change.norm_ratio, change.down, change.up]


@pytest.mark.parametrize(("rank", "later_rank"), [(3, 3), (5, 2), (1, 12)])
def test_each_module_is_compared_as_its_whole_matrix_is(rank, later_rank):
    before, after = adapter("a", 0, rank), adapter("b", 100, later_rank)
    change = compare(before, after)
    assert (change.before, change.after, list(change.modules)) == ("a", "b", sorted(SIZES))
    for module in SIZES:
        matrices = dense(before.modules[module]), dense(after.modules[module])
        assert figures(change.modules[module]) == pytest.approx(expected(*matrices), rel=1e-9, abs=1e-12)
    blocks = [torch.block_diag(*(dense(each.modules[module]) for module in SIZES)) for each in (before, after)]
    assert figures(change.total) == pytest.approx(expected(*blocks), rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_the_factorisation_does_not_matter(seed, rank, scaling):
    before, after = adapter("a", seed, rank), adapter("b", seed + 50, rank)
    generator = torch.Generator().manual_seed(seed)
    gauge = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    factored = {
        module: LoRAFactors(
            gauge.mT @ factors.down.double() * 3, factors.up.double() @ gauge * factors.scaling / scaling / 3, scaling
        )
        for module, factors in after.modules.items()
    }
    assert figures(compare(before, from_factors("b", factored)).total) == pytest.approx(
        figures(compare(before, after).total), rel=1e-9
    )


def test_a_scaled_update_has_no_new_directions():
    before = adapter("a", 0)
    after = from_factors("b", {m: LoRAFactors(f.down, f.up, 1.25 * f.scaling) for m, f in before.modules.items()})
    total = compare(before, after).total
    assert (total.change, total.norm_ratio) == pytest.approx((0.25, 1.25))
    assert max(total.down, total.up) < 1e-12


def test_a_small_change_is_accurate():
    before = adapter("a", 0)
    after = from_factors(
        "b", {m: LoRAFactors(f.down.double(), f.up.double(), (1 + 1e-9) * f.scaling) for m, f in before.modules.items()}
    )
    assert compare(before, after).total.change == pytest.approx(1e-9, rel=1e-4)


def test_one_side_can_turn_alone():
    before = adapter("a", 0)
    turned = {m: LoRAFactors(update(*SIZES[m], 3, 77).down, f.up, f.scaling) for m, f in before.modules.items()}
    total = compare(before, from_factors("b", turned)).total
    assert total.down > 0.5
    assert total.up < 1e-12


def test_missing_modules_count_as_zero():
    few = adapter("a", 0, sizes={"layer.0.query": (17, 11)})
    more = adapter("b", 0, sizes={"layer.0.query": (17, 11), "layer.1.query": (13, 23)})
    norms = [float(dense(factors).norm()) for factors in more.modules.values()]
    grown, shrunk = compare(few, more), compare(more, few)
    assert grown.total.change == pytest.approx(norms[1] / norms[0])
    assert shrunk.total.change == pytest.approx(norms[1] / (norms[0] ** 2 + norms[1] ** 2) ** 0.5)
    assert figures(grown.modules["layer.1.query"]) == [None, None, 1.0, 1.0]
    assert figures(shrunk.modules["layer.1.query"]) == [1.0, 0.0, 0.0, 0.0]


def test_zero_updates():
    zero = from_factors("zero", {m: LoRAFactors(f.down, 0 * f.up, 1.0) for m, f in adapter("a", 0).modules.items()})
    assert figures(compare(zero, zero).total) == [0.0, 0.0, 0.0, 0.0]
    assert figures(compare(zero, adapter("a", 0)).total) == [None, None, 1.0, 1.0]
    assert figures(compare(adapter("a", 0), zero).total) == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert figures(compare(adapter("a", 0), adapter("b", 0)).total) == pytest.approx([0.0, 1.0, 0.0, 0.0], abs=1e-12)
    assert compare(adapter("a", 0), adapter("b", 0)).total.change == 0
    assert compare(from_factors("none", {}), from_factors("none", {})).modules == {}


def test_heads_and_other_tensors():
    head, table = torch.full((2, 3), 2.0), torch.arange(4)
    before = adapter("a", 0, heads={"score.weight": head, "bias": torch.zeros(2), "ids": table, "old": head})
    after = adapter("b", 0, heads={"score.weight": 1.5 * head, "bias": torch.ones(2), "ids": table, "new": head})
    assert compare(before, after).tensors == {"score.weight": pytest.approx(0.5), "bias": None}


def test_adapters_of_other_models():
    other = adapter("b", 0, sizes={**SIZES, "layer.1.query": (13, 31)})
    with pytest.raises(ShapeError, match=r"layer.1.query is \(13, 23\) \(out, in\) in 'a' and \(13, 31\) in 'b'"):
        compare(adapter("a", 0), other)
