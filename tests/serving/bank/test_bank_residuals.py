"""Adapters with a residual in the bank: every row as PEFT computes it, as an ordinary LoRA."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import eigenlorax as ex
from convnets import CONVOLUTIONS, conv_pack, images, make_convnet, with_updates
from eigenlorax.core.layer_update import is_folding_cheaper
from eigenlorax.errors import OptionError
from rests import with_adapters, with_rests
from served import BASE, MIXED_ROWS, Served

SIDES = {
    "plain-a": ["both"],
    "plain-b": ["both"],
    "scaled": ["down", "none", "up"],
    "wide": ["up"],
    "partial": ["none", "both"],
    "patterned": ["down"],
}


@pytest.fixture(scope="module")
def with_residuals(served, tmp_path_factory):
    made = {}

    def with_residuals_of(kind):
        if kind not in made:
            plain = served(kind)
            pack = with_rests(ex.Pack.open(plain.pack), SIDES)
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = Served(plain.kind, pack.save(folder / "pack"), pack.export(folder / "loras"))
        return made[kind]

    return with_residuals_of


@pytest.fixture(params=["bert", "llama", "t5"])
def case(request, with_residuals):
    return with_residuals(request.param)


def assert_rows(got, wanted):
    # of one layer after the other, updates are larger than those of coefficients alone
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 9, 30])
def test_alone_before_and_after_folding(case, tokens):
    bank, inputs = case.bank(), case.inputs(3, tokens)
    for name in case.names:
        wanted = case.wanted([name] * 3, inputs)
        with bank.using(name):
            for _ in range(2):
                assert_rows(bank.model(**inputs).logits, wanted)
        bank.set_adapter(name)
        assert_rows(bank.model(**inputs).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 9, 30])
@pytest.mark.parametrize(
    "names",
    [*MIXED_ROWS, ["plain-a"] * 3],
    ids=lambda names: "-".join(sorted(set(names))) if isinstance(names, list) else None,
)
def test_each_row_has_its_own(case, names, tokens):
    bank, inputs = case.bank(), case.inputs(len(names), tokens)
    assert_rows(bank(**inputs, adapter_names=names).logits, case.wanted(names, inputs))


def with_components(tensor, components, axis):
    """The residual of some components of an adapter alone."""
    keep = torch.zeros(tensor.shape[axis], dtype=torch.bool)
    keep[components] = True
    return tensor * (keep[:, None] if axis == 0 else keep)


@pytest.fixture(scope="module")
def with_few_components(served, tmp_path_factory):
    """Residuals of component 2 on the down side, and of components 0 and 2 on the up side."""
    plain = served("llama")
    pack = with_rests(ex.Pack.open(plain.pack), {"plain-a": ["both"], "plain-b": ["both"]})
    adapters = {name: pack.packed(name) for name in pack.names}
    for name in ("plain-a", "plain-b"):
        few = {
            module: replace(
                c,
                down_residual=with_components(c.down_residual, [2], 0),
                up_residual=with_components(c.up_residual, [0, 2], 1),
            )
            for module, c in adapters[name].coefficients.items()
        }
        adapters[name] = replace(adapters[name], coefficients=few)
    made = with_adapters(pack, adapters)
    folder = tmp_path_factory.mktemp("few")
    return Served(plain.kind, made.save(folder / "pack"), made.export(folder / "loras"))


def multiplications(model, inputs):
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **options: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(**inputs)
    return counter.get_total_flops() // 2


@torch.no_grad()
@pytest.mark.parametrize("names", [["plain-a", "plain-b"], ["plain-b", "plain-a", "plain-b"], ["plain-a"] * 3])
def test_a_residual_costs_the_components_that_it_has(served, with_few_components, names):
    bank, plain = with_few_components.bank(), served("llama").bank()
    pack = ex.Pack.open(with_few_components.pack)
    shapes = [
        c.residual("up").shape[:1] + c.residual("down").shape[1:] for c in pack.packed("plain-a").coefficients.values()
    ]
    a_row = sum(2 * n_out + n_in for n_out, n_in in shapes)
    assert bank.nbytes - plain.nbytes == 2 * a_row * 4
    inputs = with_few_components.inputs(len(names), 1)
    with bank.using(names), plain.using(names):
        assert multiplications(bank.model, inputs) - multiplications(plain.model, inputs) == len(names) * a_row
    assert_rows(bank(**inputs, adapter_names=names).logits, with_few_components.wanted(names, inputs))
    longer = with_few_components.inputs(len(names), 30)
    assert_rows(bank(**longer, adapter_names=names).logits, with_few_components.wanted(names, longer))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation_with_beams(with_residuals, kind):
    case = with_residuals(kind)
    bank, names = case.bank(), ["plain-a", BASE, "wide", "scaled", "plain-a"]
    ids = case.inputs(len(names), 7)["input_ids"]
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    got = bank.generate(input_ids=ids, adapter_names=names, attention_mask=torch.ones_like(ids), **options)
    for row, name in enumerate(names):
        alone = ids[row : row + 1]
        wanted = case.alone(name).generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(got[row : row + 1], wanted)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_as_one_graph(with_residuals):
    case = with_residuals("bert")
    bank, inputs = case.bank(), case.inputs(3)
    compiled = torch.compile(bank.model, backend="aot_eager", fullgraph=True)
    for names in (["plain-c"] * 3, ["plain-a", "wide", BASE], ["plain-b"] * 3):
        with bank.using(names):
            assert_rows(compiled(**inputs).logits, case.wanted(names, inputs))


@torch.no_grad()
def test_replaced_added_and_removed(with_residuals):
    case = with_residuals("bert")
    bank, inputs = case.bank(), case.inputs(2)
    bank.set_adapter("plain-c")
    bank.replace("plain-c", "plain-a")
    assert_rows(bank.model(**inputs).logits, case.wanted(["plain-a"] * 2, inputs))
    bank.replace("plain-c", "plain-c")
    assert_rows(bank.model(**inputs).logits, case.wanted(["plain-c"] * 2, inputs))
    # as a LoRA it is projected, and what does not lie in the bases is lost: the record says so
    record = bank.add("projected", case.loras["plain-a"], warn_above=1.0)
    assert record.delta_error > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_of_the_model(with_residuals, dtype):
    case = with_residuals("llama")
    bank, inputs, names = case.bank(), case.inputs(3), ["plain-a", "wide", BASE]
    wanted = bank(**inputs, adapter_names=names).logits
    bank.model.to(dtype)
    got = bank(**inputs, adapter_names=names).logits
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), wanted, atol=tolerance * wanted.abs().max().item(), rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("repeats", [1, 3])
def test_convolutions(repeats):
    plain, _ = conv_pack((*CONVOLUTIONS, "head"), n_components=7, energy=None)
    pack = with_rests(plain, {"a0": ["both"], "a1": ["down", "up", "none"]})
    bank = ex.AdapterBank(make_convnet(), pack)
    names = ["a0", "__base__", "a1", "a1", "a2", "a0"] * repeats
    x = images(len(names))
    got = bank(x, adapter_names=names)
    for row, name in enumerate(names):
        dense = make_convnet() if name == "__base__" else with_updates(pack.adapter(name))
        torch.testing.assert_close(got[row : row + 1], dense(x[row : row + 1]), atol=1e-5, rtol=1e-5)
        with bank.using(name):
            for _ in range(2):
                torch.testing.assert_close(bank.model(x), dense(x), atol=1e-5, rtol=1e-5)


def test_bytes_count_them(with_residuals):
    pack = ex.Pack.open(with_residuals("bert").pack)
    none = ex.AdapterBank(with_residuals("bert").kind.model(), pack, adapters=[]).nbytes
    for name in ("plain-a", "scaled", "plain-c"):
        bank = ex.AdapterBank(with_residuals("bert").kind.model(), pack, adapters=[name], heads=False)
        assert bank.nbytes - none == pack.records[name].coefficient_bytes


def test_one_that_would_be_rounded_is_refused(with_residuals):
    pack = ex.Pack.open(with_residuals("bert").pack)
    bank = ex.AdapterBank(with_residuals("bert").kind.model(), pack, adapters=[])
    packed = pack.packed("plain-a")
    fine = {m: replace(c, down_residual=c.down_residual.double() + 1e-12) for m, c in packed.coefficients.items()}
    with pytest.raises(OptionError, match=r"'x' is torch.float64, which the bank's torch.float32 would round"):
        bank.add("x", replace(packed, coefficients=fine))


def test_with_a_residual_of_the_whole_rank_folding_pays_after_as_many_tokens_as_the_rank():
    assert not is_folding_cheaper(8, 8, 64, 1.0, residual_rank=8)
    assert is_folding_cheaper(9, 8, 64, 1.0, residual_rank=8)
    assert not is_folding_cheaper(9, 8, 64, 1.0)
