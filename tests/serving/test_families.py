"""Every family of models in vLLM's own engine: eight adapters mixed in one batch, in both ways of serving, have the
greedy tokens that transformers and PEFT have with the exported LoRA."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import eigenlorax
from eigenlorax.errors import ServingError
from families import FAMILIES, made_adapters
from offline import greedy, peft_greedy, slots, with_engine

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8 + i] for i in range(8)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_eight_adapters_mixed_say_what_peft_says(kind, tmp_path):
    family = FAMILIES[kind]
    base = family.made(tmp_path / "base")
    made_adapters(family, base, tmp_path / "adapters")
    # far from all that they are: what is served has to be what is exported, and not what was trained
    pack = eigenlorax.fit(tmp_path / "adapters", n_components=20)
    pack.save(tmp_path / "pack")
    exported = pack.export(tmp_path / "exported")
    wanted = peft_greedy(base, PROMPTS, [exported[name] for name in pack.names])
    without = peft_greedy(base, PROMPTS, [None] * len(PROMPTS))
    assert sum(one != other for one, other in zip(wanted, without, strict=True)) >= 6

    def check(llm):
        adapters = eigenlorax.serving.vllm.Adapters(tmp_path / "pack")
        assert greedy(llm, PROMPTS, [adapters[name] for name in pack.names]) == wanted
        return {name.rpartition(".")[2].startswith("eigen_core_") for name in slots(llm)}

    for shared in (False, True):
        assert with_engine(check, base, tmp_path / "pack", shared=shared, **family.engine) == {shared}


def test_rows_without_an_adapter_say_what_the_base_model_says(tmp_path):
    """Beside others, in each slot: vLLM's own products on CPUs give such rows what is in the last one."""
    base = FAMILIES["llama"].made(tmp_path / "base")
    made_adapters(FAMILIES["llama"], base, tmp_path / "adapters", n=3)
    pack = eigenlorax.fit(tmp_path / "adapters", n_components=20)
    pack.save(tmp_path / "pack")
    exported = pack.export(tmp_path / "exported")
    names = ["a0", None, "a1", None, "a2", None]
    prompts = [[5, 6, 7, 8 + i] for i in range(len(names))]
    wanted = peft_greedy(base, prompts, [exported.get(name) for name in names])
    without = peft_greedy(base, prompts, [None] * len(names))

    def check(llm):
        adapters = eigenlorax.serving.vllm.Adapters(tmp_path / "pack")
        requests = [adapters[name] if name is not None else None for name in names]
        assert greedy(llm, prompts, requests) == wanted
        assert greedy(llm, prompts, [None] * len(names)) == without

    for shared in (False, True):
        with_engine(check, base, tmp_path / "pack", shared=shared, max_loras=3)


@pytest.mark.parametrize("kind", ["lm_head", "embed_tokens"])
def test_so_do_rows_beside_adapters_of_the_vocabulary(kind, tmp_path):
    """vLLM has products of its own for these."""
    base = FAMILIES["llama"].made(tmp_path / "base")
    for seed, name in enumerate(("a0", "a1")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            lora = LoraConfig(r=4, target_modules=["q_proj", kind], init_lora_weights=False, task_type="CAUSAL_LM")
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        model.save_pretrained(tmp_path / "adapters" / name, save_embedding_layers=False)
    pack = eigenlorax.fit(tmp_path / "adapters", n_components=8)
    pack.save(tmp_path / "pack")
    exported = pack.export(tmp_path / "exported")
    names = ["a0", None, "a1"]
    wanted = peft_greedy(base, PROMPTS[:3], [exported.get(name) for name in names])
    without = peft_greedy(base, PROMPTS[:3], [None] * 3)

    def check(llm):
        adapters = eigenlorax.serving.vllm.Adapters(tmp_path / "pack")
        requests = [adapters[name] if name is not None else None for name in names]
        assert greedy(llm, PROMPTS[:3], requests) == wanted
        assert greedy(llm, PROMPTS[:3], [None] * 3) == without

    with_engine(check, base, tmp_path / "pack", max_loras=1)
    assert wanted[0] != without[0]


@pytest.mark.parametrize("shared", [False, True], ids=["on demand", "shared basis"])
def test_an_adapter_of_which_a_part_would_be_left_out_is_refused(shared, tmp_path):
    """vLLM says nothing, and answers as the base model does."""
    base = FAMILIES["llama"].made(tmp_path / "base")
    made_adapters(FAMILIES["llama"], base, tmp_path / "adapters", n=2)
    pack = eigenlorax.fit(tmp_path / "adapters", n_components=8)
    pack.save(tmp_path / "pack")

    def check(llm):
        ordinary = eigenlorax.serving.vllm.Adapters(tmp_path / "pack", shared_basis=False)
        with pytest.raises(ServingError, match="14 modules of an adapter would be ignored by this server"):
            llm.llm_engine.add_lora(ordinary["a0"])

    targets = {} if shared else {"lora_target_modules": ["embed_tokens"]}
    with_engine(check, base, tmp_path / "pack", shared=shared, **targets)
