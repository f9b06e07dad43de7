"""Adapters and packs under the names that transformers 4 had, on a model of the transformers that is installed."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import eigenlorax as ex
from eigenlorax.core import registry
from eigenlorax.errors import ModuleNameError
from eigenlorax.tuner import from_lora, swap, to_lora
from eigenlorax.tuner.layer import EigenLoraxLayer
from renamed_vit import NAMES, SHAPES, dense, lora, make_vit, pictures
from tiny import shake

pytestmark = pytest.mark.slow

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=["old", "new"])
def naming(request):
    return request.param


@pytest.fixture(scope="module")
def other(naming):
    return {"old": "new", "new": "old"}[naming]


@pytest.fixture(scope="module")
def pack_path(naming, tmp_path_factory):
    pack = ex.fit([lora(f"a{i}", naming, 100 * i) for i in range(3)], energy=1.0)
    return pack.save(tmp_path_factory.mktemp("packs") / naming)


def adapted(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, EigenLoraxLayer)
    }


def every_module(naming):
    return {name.format(layer) for name in NAMES[naming].values() for layer in range(2)}


def of_this_transformers():
    return next(naming for naming in NAMES if every_module(naming) <= {name for name, _ in make_vit().named_modules()})


@torch.no_grad()
def test_adapters_of_a_pack(pack_path, naming, tmp_path):
    pack = ex.Pack.open(pack_path)
    for index, name in enumerate(pack.names):
        model = PeftModel.from_pretrained(make_vit(), pack_path / "adapters" / name).eval()
        wanted = dense(lora(name, naming, 100 * index))(pictures()).logits
        torch.testing.assert_close(model(pictures()).logits, wanted, **CLOSE)
    # and PEFT's own LoRA of the same updates, under the names of this transformers
    here = lora("a0", of_this_transformers(), 0)
    peft = PeftModel.from_pretrained(make_vit(), ex.write_adapter(here, tmp_path / "lora")).eval()
    torch.testing.assert_close(peft(pictures()).logits, dense(here)(pictures()).logits, **CLOSE)
    assert set(pack.adapter("a0").specs) == every_module(naming)


def test_training_and_back_into_the_pack(pack_path, naming, tmp_path):
    model = get_peft_model(make_vit(), ex.EigenLoraxConfig(subspace=pack_path, r=3))
    shake(model).eval()
    assert adapted(model) == every_module(of_this_transformers())
    model.save_pretrained(tmp_path / "mine")
    with torch.no_grad():
        wanted = model(pictures()).logits
        again = PeftModel.from_pretrained(make_vit(), tmp_path / "mine").eval()
        torch.testing.assert_close(again(pictures()).logits, wanted, **CLOSE)
    pack = ex.Pack.open(pack_path)
    assert pack.add(tmp_path / "mine", name="mine").delta_error < 1e-5
    pack.save(tmp_path / "pack")
    with torch.no_grad():
        again = PeftModel.from_pretrained(make_vit(), tmp_path / "pack" / "adapters" / "mine").eval()
        torch.testing.assert_close(again(pictures()).logits, wanted, **CLOSE)


@pytest.mark.parametrize("targets", ["short", "whole", "regex"])
def test_targets_ranks_and_alphas_of_an_adapter_that_was_trained_under_other_names(
    pack_path, naming, tmp_path, targets
):
    """What transformers 4 or 5 would have saved, with names and patterns of its own."""
    query, up = NAMES[naming]["query"], NAMES[naming]["up"]
    chosen = {
        "short": [query.rpartition(".")[2], up.removeprefix("vit.").partition("{}.")[2]],
        "whole": [name.format(layer) for name in (query, up) for layer in range(2)],
        "regex": rf".*\.({query.rpartition('.')[2]}|{up.rpartition('{}.')[2]})",
    }[targets]
    pattern = {query.rpartition(".")[2]: 2}
    here = NAMES[of_this_transformers()]
    model = get_peft_model(
        make_vit(),
        ex.EigenLoraxConfig(
            subspace=pack_path,
            r=3,
            lora_alpha=5,
            target_modules=[
                here["query"].format(0),
                here["query"].format(1),
                here["up"].format(0),
                here["up"].format(1),
            ],
            rank_pattern={here["query"].rpartition(".")[2]: 2},
            alpha_pattern={f"{here['up'].format(1)}": 7},
        ),
    )
    shake(model).eval()
    with torch.no_grad():
        wanted = model(pictures()).logits
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    rewrite(folder, naming, target_modules=chosen, rank_pattern=pattern, alpha_pattern={up.format(1): 7})
    again = PeftModel.from_pretrained(make_vit(), folder).eval()
    assert adapted(again) == adapted(model)
    with torch.no_grad():
        torch.testing.assert_close(again(pictures()).logits, wanted, **CLOSE)
    again.save_pretrained(tmp_path / "again")
    read, before = ex.read_adapter(tmp_path / "again"), to_lora(model)
    for name, factors in read.modules.items():
        one = before.modules[name]
        torch.testing.assert_close(factors.scaling * factors.up @ factors.down, one.scaling * one.up @ one.down)


def rewrite(folder, naming, **fields):
    """An adapter's folder as a transformers of this naming has it."""
    here = NAMES[of_this_transformers()]
    names = {here[kind].format(layer): NAMES[naming][kind].format(layer) for kind in SHAPES for layer in range(2)}
    path = folder / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(path).items():
        module, _, part = key.removeprefix("base_model.model.").rpartition(".")
        tensors[f"base_model.model.{names.get(module, module)}.{part}"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    embedded = {names[module]: sizes for module, sizes in config["embedded_shapes"].items()}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "embedded_shapes": embedded, **fields}))


@pytest.mark.parametrize("core", [False, True])
def test_an_embedded_subspace(pack_path, naming, tmp_path, monkeypatch, core):
    model = get_peft_model(make_vit(), ex.EigenLoraxConfig(subspace=pack_path, r=3, embed_subspace=True, core=core))
    shake(model).eval()
    model.save_pretrained(tmp_path / "mine")
    rewrite(tmp_path / "mine", naming, target_modules=sorted(every_module(naming)))
    monkeypatch.setattr(registry, "_pack_openers", {})
    monkeypatch.setattr(registry, "_alive", type(registry._alive)())
    again = PeftModel.from_pretrained(make_vit(), tmp_path / "mine").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pictures()).logits, model(pictures()).logits, **CLOSE)
    again.save_pretrained(tmp_path / "again")
    assert set(ex.read_adapter(tmp_path / "again").specs) == every_module(of_this_transformers())


@torch.no_grad()
def test_transformers_own_loaders(pack_path, naming, tmp_path):
    make_vit().save_pretrained(tmp_path / "vit")
    adapter = pack_path / "adapters" / "a1"
    ex.Pack.open(pack_path)
    wanted = dense(lora("a1", naming, 100))(pictures()).logits
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    model.load_adapter(str(adapter))
    torch.testing.assert_close(model(pictures()).logits, wanted, **CLOSE)


@torch.no_grad()
def test_a_lora_in_and_another_one_in_its_place(pack_path, naming, other):
    for adapter in (lora("one", naming, 100), lora("two", other, 200)):
        model = from_lora(make_vit(), adapter, subspace=pack_path).eval()
        torch.testing.assert_close(model(pictures()).logits, dense(adapter)(pictures()).logits, **CLOSE)
        again = lora("again", other, 0)
        assert swap(model, again) < 1e-5
        torch.testing.assert_close(model(pictures()).logits, dense(again)(pictures()).logits, **CLOSE)


@torch.no_grad()
def test_starts(pack_path, other, tmp_path):
    adapter = lora("start", other, 100)
    path = ex.write_adapter(adapter, tmp_path / "start")
    for start in (str(path), "a1"):
        config = ex.EigenLoraxConfig(subspace=pack_path, r=3, lora_alpha=3, start=start)
        model = get_peft_model(make_vit(), config).eval()
        torch.testing.assert_close(model(pictures()).logits, dense(adapter)(pictures()).logits, **CLOSE)


def test_adapters_of_both_namings_are_one_module_each(tmp_path):
    adapters = [lora(f"a{i}", ("old", "new")[i % 2], 100 * i) for i in range(4)]
    pack = ex.fit(adapters, energy=1.0)
    assert set(pack.subspace.modules) == every_module("new")
    for index, adapter in enumerate(adapters):
        assert pack.records[adapter.name].delta_error < 1e-5
        assert set(pack.adapter(adapter.name).specs) == every_module(("old", "new")[index % 2])
    path = pack.save(tmp_path / "pack")
    for name in pack.names:
        model = PeftModel.from_pretrained(make_vit(), path / "adapters" / name).eval()
        with torch.no_grad():
            wanted = dense(pack.adapter(name))(pictures()).logits
            torch.testing.assert_close(model(pictures()).logits, wanted, **CLOSE)


def test_adding_to_a_pack(pack_path, other):
    pack = ex.Pack.open(pack_path)
    assert pack.add(lora("more", other, 100), name="more").delta_error < 1e-5
    assert set(pack.adapter("more").specs) == every_module(other)


@torch.inference_mode()
def test_the_bank(pack_path, naming, other):
    bank = ex.AdapterBank(make_vit(), pack_path)
    bank.add("more", lora("more", other, 200))
    names = ["a0", "more", "__base__", "a1"]
    got = bank(pictures(4), adapter_names=names).logits
    wanted = [dense(lora("a0", naming, 0)), dense(lora("more", other, 200)), make_vit(), dense(lora("a1", naming, 100))]
    for row, model in enumerate(wanted):
        torch.testing.assert_close(got[row : row + 1], model(pictures(4)[row : row + 1]).logits, **CLOSE)


def test_coefficients_for_which_there_is_no_layer_are_not_dropped(pack_path, naming, tmp_path):
    model = shake(get_peft_model(make_vit(), ex.EigenLoraxConfig(subspace=pack_path, r=3)))
    model.save_pretrained(tmp_path / "mine")
    lacking = NAMES[naming]["up"].format(1)
    rewrite(tmp_path / "mine", naming, target_modules=sorted(every_module(naming) - {lacking}))
    with pytest.raises(ModuleNameError, match=f"coefficients of '{lacking}', which is not among its 9 modules"):
        PeftModel.from_pretrained(make_vit(), tmp_path / "mine")


def test_names_that_no_transformers_has(pack_path):
    adapter = lora("odd", "old", 0)
    odd = ex.from_factors("odd", {name.replace("encoder.layer", "block"): f for name, f in adapter.modules.items()})
    with pytest.raises(ModuleNameError, match="has 10 of 10 modules that the subspace lacks"):
        ex.Pack.open(pack_path).add(odd)
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        get_peft_model(make_vit(), ex.EigenLoraxConfig(subspace=pack_path, r=3, target_modules=["vit.block.0.query"]))
