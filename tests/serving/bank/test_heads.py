"""Heads and trained biases: each row has those of its adapter."""

import json

import pytest
import torch
from peft import PeftModel

import eigenlorax as ex
from eigenlorax.errors import ModuleNameError, ShapeError
from planted import normal
from served import BASE, write_adapter
from tiny import BERT, IN, make_bert


@pytest.fixture
def one(served):
    return served("bert")


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def head(labels, seed=3):
    return {
        "classifier.weight": normal(labels, IN, seed=seed).float(),
        "classifier.bias": normal(labels, seed=seed + 1).float(),
    }


def test_are_those_of_each_row(one):
    bank, without, inputs = one.bank(), one.bank(heads=False), one.inputs(3)
    names = ["wide", "narrow", BASE]
    got, plain = logits(bank, inputs, adapter_names=names), logits(without, inputs, adapter_names=names)
    torch.testing.assert_close(got, one.wanted(names, inputs), atol=1e-5, rtol=0)
    assert (got[0] - plain[0]).abs().max() > 0.1
    # these two have none, and take the model's
    torch.testing.assert_close(got[1:], plain[1:], atol=1e-5, rtol=0)


def test_for_other_numbers_of_labels(one, tmp_path):
    """The widest of a batch says how wide it is; labels that a row's adapter does not know get −∞."""
    bank, inputs = one.bank(), one.inputs(4)
    bank.add("two", write_adapter(tmp_path / "two", one.kind, "plain-a", 50, head(2), modules_to_save=["classifier"]))
    bank.add("five", write_adapter(tmp_path / "five", one.kind, "plain-b", 60, head(5), modules_to_save=["classifier"]))
    alone = {name: logits(bank, inputs, adapter_names=name) for name in ("two", "five", "wide", BASE)}
    assert [alone[name].shape[1] for name in alone] == [2, 5, 3, 3]
    names = ["two", "five", "wide", BASE]
    got = logits(bank, inputs, adapter_names=names)
    assert got.shape == (4, 5)
    for row, name in enumerate(names):
        labels = alone[name].shape[1]
        torch.testing.assert_close(got[row, :labels], alone[name][row], atol=1e-5, rtol=0)
        assert (got[row, labels:] == -torch.inf).all()
    # a batch that knows fewer is as wide as those
    assert logits(bank, inputs, adapter_names=["two"] * 4).shape == (4, 2)


def test_trained_biases_of_adapted_and_other_modules(one, tmp_path):
    biases = {
        f"{BERT[0]}.base_layer.bias": normal(IN, seed=20).float(),
        "bert.encoder.layer.1.output.dense.bias": normal(IN, seed=21).float(),
        "bert.encoder.layer.1.output.LayerNorm.bias": normal(IN, seed=22).float(),
    }
    fields = {"bias": "all", "task_type": None}
    folder = write_adapter(tmp_path / "biased", one.kind, "plain-a", 70, biases, **fields)
    bank, inputs = one.bank(), one.inputs(3)
    # it is not of the pack, and loses much in its subspace
    bank.add("biased", folder, warn_above=1.0)
    with_it = ex.Pack.open(one.pack)
    with_it.add(folder, warn_above=1.0)
    exported = with_it.export(tmp_path / "loras", ["biased"])["biased"]
    assert json.loads((exported / "adapter_config.json").read_text())["bias"] == "all"
    alone = PeftModel.from_pretrained(make_bert(), exported).eval()
    assert torch.equal(alone.get_submodule(f"base_model.model.{BERT[0]}").bias, biases[f"{BERT[0]}.base_layer.bias"])
    for names in (["biased"] * 3, ["wide", "biased", BASE]):
        got = logits(bank, inputs, adapter_names=names)
        torch.testing.assert_close(got[1:2], logits(alone, {"input_ids": inputs["input_ids"][1:2]}), atol=1e-5, rtol=0)
        row = one.wanted(["wide", BASE], {"input_ids": inputs["input_ids"][::2]})
        if names[0] == "wide":
            torch.testing.assert_close(got[::2], row, atol=1e-5, rtol=0)


def test_of_a_language_model_with_beams(served, tmp_path):
    """A whole `lm_head` and an embedding of its own."""
    one = served("llama")
    own = {
        "lm_head.weight": normal(53, 24, seed=30).float(),
        "model.embed_tokens.weight": 0.2 * normal(53, 24, seed=31).float(),
    }
    fields = {"modules_to_save": ["lm_head", "embed_tokens"]}
    folder = write_adapter(tmp_path / "headed", one.kind, "plain-a", 80, own, **fields)
    bank = one.bank()
    bank.add("headed", folder, warn_above=1.0)
    ids = one.inputs(3, 6)["input_ids"]
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    names = ["wide", "headed", "headed"]
    got = bank.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for row, name in enumerate(names):
        lone = ids[row : row + 1]
        alone = bank.generate(input_ids=lone, attention_mask=torch.ones_like(lone), adapter_names=name, **options)
        assert torch.equal(got[row : row + 1], alone)
    with_it = ex.Pack.open(one.pack)
    with_it.add(folder, warn_above=1.0)
    model = PeftModel.from_pretrained(one.kind.model(), with_it.export(tmp_path / "l", ["headed"])["headed"]).eval()
    inputs = {"input_ids": ids}
    torch.testing.assert_close(
        logits(bank, inputs, adapter_names="headed"), logits(model, inputs), atol=1e-4, rtol=1e-5
    )


def test_that_the_model_has_no_place_for(one):
    pack = ex.Pack.open(one.pack)
    with pytest.raises(ModuleNameError, match=r"'partial' has a head of its own, '.*classifier.*heads=False"):
        ex.AdapterBank(make_bert().bert, pack)
    bank = ex.AdapterBank(make_bert().bert, pack, heads=False)
    assert len(bank) == len(pack)


def test_of_another_shape(one, tmp_path):
    bank = one.bank(adapters=[])
    wrong = {**head(3), "classifier.weight": normal(3, IN + 1, seed=1).float()}
    folder = write_adapter(tmp_path / "wrong", one.kind, "plain-a", 90, wrong, modules_to_save=["classifier"])
    with pytest.raises(ShapeError, match=r"'wrong': `weight` of its head has shape \(3, 25\), in the model \(3, 24\)"):
        bank.add("wrong", folder, warn_above=1.0)
    lone = {"classifier.weight": normal(4, IN, seed=1).float()}
    folder = write_adapter(tmp_path / "lone", one.kind, "plain-a", 90, lone, modules_to_save=["classifier"])
    with pytest.raises(ShapeError, match=r"'lone': `bias` of its head has shape \(3,\), in the model \(4,\)"):
        bank.add("lone", folder, warn_above=1.0)
    assert len(bank) == 0
