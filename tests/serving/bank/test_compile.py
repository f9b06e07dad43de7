"""A compiled model serves whatever the bank has: nothing is compiled twice."""

import pytest
import torch

import eigenlorax as ex
from eigenlorax.errors import OptionError, ShapeError
from planted import normal
from served import BASE, write_adapter
from tiny import IN

pytestmark = pytest.mark.slow


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(("kind", "backend"), [("bert", "eager"), ("llama", "aot_eager")])
def test_nothing_is_compiled_twice(served, kind, backend):
    one = served(kind)
    bank, inputs = one.bank(), one.inputs(4)
    compiled = torch.compile(bank.model, backend=backend, fullgraph=True)
    logits(compiled, inputs)

    def check(names):
        wanted = one.wanted(names, inputs)
        if len(set(names)) == 1:
            bank.set_adapter(names[0])
            torch.testing.assert_close(logits(compiled, inputs), wanted, atol=1e-5, rtol=0)
            bank.set_adapter(None)
        with bank.using(names):
            torch.testing.assert_close(logits(compiled, inputs), wanted, atol=1e-5, rtol=0)

    with torch.compiler.set_stance("fail_on_recompile"):
        for name in one.names:
            check([name] * 4)
        check(["wide", BASE, "plain-a", "partial"])
        check(["wide", "wide", "plain-a", "plain-a"])
        bank.remove("plain-a")
        for number in range(100):
            bank.add(f"n{number}", "plain-b")
        bank.replace("wide", "narrow")
        with bank.using(["n7", "wide", "n99", BASE]):
            wanted = one.wanted(["plain-b", "narrow", "plain-b", BASE], inputs)
            torch.testing.assert_close(logits(compiled, inputs), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_was_compiled_before_is_compiled_again(served, in_place):
    one = served("bert")
    model, inputs = one.kind.model(), one.inputs(3)
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    logits(compiled, inputs)
    bank = ex.AdapterBank(model, one.pack, adapters=["narrow"])
    with bank.using("narrow"):
        torch.testing.assert_close(logits(compiled, inputs), one.wanted(["narrow"] * 3, inputs), atol=1e-5, rtol=0)
    # the first one with a head of its own
    bank.add("wide")
    names = ["wide", "narrow", BASE]
    with bank.using(names):
        torch.testing.assert_close(logits(compiled, inputs), one.wanted(names, inputs), atol=1e-5, rtol=0)


def test_the_first_head_is_seen_by_a_model_that_is_compiled(served):
    one = served("bert")
    bank, inputs = one.bank(adapters=["narrow"]), one.inputs(3)
    compiled = torch.compile(bank.model, backend="eager", fullgraph=True)
    with bank.using("narrow"):
        logits(compiled, inputs)
    bank.add("wide")
    with bank.using("wide"):
        torch.testing.assert_close(logits(compiled, inputs), one.wanted(["wide"] * 3, inputs), atol=1e-5, rtol=0)


def test_a_part_that_was_compiled_before_is_refused(served):
    one = served("bert")
    model = one.kind.model()
    model.bert.encoder.layer[1].compile(backend="eager")
    with pytest.raises(OptionError, match=r"module bert.encoder.layer.1 is already compiled.*layer.1.attention"):
        ex.AdapterBank(model, one.pack)
    bank = one.bank(adapters=["narrow"])
    bank.model.classifier.compile(backend="eager")
    with pytest.raises(OptionError, match="module classifier is already compiled"):
        bank.add("wide")
    assert bank.names == ["narrow"]


def test_parts_that_are_compiled_afterwards(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(3)
    for layer in bank.model.model.layers:
        layer.compile(backend="eager")
    names = ["wide", "plain-a", BASE]
    with torch.no_grad():
        got = bank(**inputs, adapter_names=names).logits
    torch.testing.assert_close(got, one.wanted(names, inputs), atol=1e-5, rtol=0)


def test_compiled_in_place_a_call_of_the_bank_is_one_request(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(3)
    bank.model.compile(backend="aot_eager", fullgraph=True)
    names = ["wide", "plain-a", BASE]
    with torch.no_grad():
        got = bank(**inputs, adapter_names=names).logits
    torch.testing.assert_close(got, one.wanted(names, inputs), atol=1e-5, rtol=0)


def test_by_inductor(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(3)
    compiled = torch.compile(bank.model)
    names = ["wide", "plain-a", BASE]
    with bank.using(names):
        try:
            got = logits(compiled, inputs)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"inductor cannot compile here: {error}")
    torch.testing.assert_close(got, one.wanted(names, inputs), atol=1e-5, rtol=0)


def test_with_gradients_it_serves_and_refuses_to_go_back(served):
    one = served("llama")
    bank, inputs = one.bank(), one.inputs(2)
    compiled = torch.compile(bank.model, backend="aot_eager", fullgraph=True)
    with bank.using("wide"):
        got = compiled(**inputs).logits
    torch.testing.assert_close(got.detach(), one.wanted(["wide"] * 2, inputs), atol=1e-5, rtol=0)
    with pytest.raises(OptionError, match="compiled model that serves a bank has no gradients"):
        got.sum().backward()


def test_an_unloaded_bank_leaves_the_base_model(served):
    one = served("bert")
    bank, inputs = one.bank(), one.inputs(2)
    compiled = torch.compile(bank.model, backend="eager", fullgraph=True)
    bank.set_adapter("wide")
    base = one.wanted([BASE] * 2, inputs)
    assert not torch.allclose(logits(compiled, inputs), base)
    bank.unload()
    torch.testing.assert_close(logits(compiled, inputs), base, atol=1e-6, rtol=0)


def test_heads_for_another_number_of_labels_are_refused(served, tmp_path):
    one = served("bert")
    bank, inputs = one.bank(), one.inputs(2)
    own = {"classifier.weight": normal(5, IN, seed=1).float(), "classifier.bias": normal(5, seed=2).float()}
    bank.add(
        "five",
        write_adapter(tmp_path / "five", one.kind, "plain-a", 3, own, modules_to_save=["classifier"]),
        warn_above=1.0,
    )
    compiled = torch.compile(bank.model, backend="eager", fullgraph=True)
    with (
        bank.using("five"),
        pytest.raises(ShapeError, match=r"has shape \(2, 5\), but the model was compiled for \(2, 3\)"),
    ):
        logits(compiled, inputs)
