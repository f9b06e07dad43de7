"""Adapters as tensors for engines: PEFT gives the logits of the exported folder, and one scaling holds for all."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

import eigenlorax as ex
from adapters import HEAD, MODULES, make_adapter, make_adapters
from eigenlorax.core.adapter import from_factors
from eigenlorax.errors import AdapterNameError, ServingError
from families import FAMILIES
from planted import random_factors

RANKS = (2, 5, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return FAMILIES["llama"].made(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pack(base, tmp_path_factory):
    """Adapters whose modules have several ranks and scalings."""
    shapes = FAMILIES["llama"].shapes(AutoModelForCausalLM.from_pretrained(base))
    adapters = [
        from_factors(
            f"a{i}",
            {
                name: random_factors(
                    RANKS[j % 3], *shape, seed=50 * i + j, scaling=0.05 * (1 + j % 4), dtype=torch.float32
                )
                for j, (name, shape) in enumerate(shapes.items())
            },
            base_model=str(base),
        )
        for i in range(3)
    ]
    folder = tmp_path_factory.mktemp("pack") / "pack"
    ex.fit(adapters, n_components=12).save(folder)
    return ex.Pack.open(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8, 9]])).logits


def test_peft_gives_the_logits_of_the_exported_folder(pack, base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base)
    without = logits(plain)
    exported = pack.export(tmp_path / "out", ["a1"])["a1"]
    wanted = logits(PeftModel.from_pretrained(plain, str(exported)))
    tensors, config = ex.lora_tensors(pack, "a1")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    loaded = set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    torch.testing.assert_close(logits(model), wanted)
    assert (wanted - without).abs().max() > 0.1


@pytest.mark.parametrize("rank", [None, 8])
def test_one_rank_and_one_scaling_hold_for_all_modules(pack, rank):
    """As in engines that read no patterns: the scaling is lora_alpha / r."""
    tensors, config = ex.lora_tensors(pack, "a2", rank=rank)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (rank or max(RANKS), {}, {})
    adapter = pack.adapter("a2")
    assert len(tensors) == 2 * len(adapter.modules)
    for module, factors in adapter.modules.items():
        down, up = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        assert len(down) == config["r"]
        wanted = factors.scaling * factors.up.double() @ factors.down.double()
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * up @ down, wanted, rtol=1e-5, atol=1e-6)


def test_a_dtype_and_versions(tmp_path):
    pack = ex.Pack.empty()
    for step, folder in enumerate(make_adapters(tmp_path, "first second"), start=1):
        pack.append(folder, name="run", step=step, lossless=True)
    tensors, config = ex.lora_tensors(pack, "run@latest", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert config["r"] == max(pack.adapter("run@latest").ranks)


def test_what_no_engine_loads_from_tensors_is_an_error(tmp_path):
    make_adapters(tmp_path / "in", "plain")
    make_adapter(tmp_path / "in" / "head", seed=4, head=HEAD)
    make_adapter(tmp_path / "in" / "pissa", seed=5, config={"init_lora_weights": "pissa"})
    pack = ex.fit(tmp_path / "in", n_components=4)
    with pytest.raises(ServingError, match=r"'head' cannot be loaded from tensors: it has .*weight' beside"):
        ex.lora_tensors(pack, "head")
    with pytest.raises(ServingError, match=r"'pissa' cannot be loaded from tensors: .*changes weights of the base"):
        ex.lora_tensors(pack, "pissa")
    with pytest.raises(ServingError, match=r"'plain' has rank 3, which is above rank=2\. Pass 3 or more"):
        ex.lora_tensors(pack, "plain", rank=2)
    with pytest.raises(AdapterNameError, match="nobody"):
        ex.lora_tensors(pack, "nobody")
    assert len(ex.lora_tensors(pack, "plain")[0]) == 2 * len(MODULES)
