"""Every family of models in vLLM's own engine: eight adapters mixed in one batch, in both ways of serving, have the
greedy tokens that transformers and PEFT have with the exported LoRA."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, made_adapters
from offline import greedy, peft_greedy, slots, with_engine

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
        adapters = eigenlorax.vllm.Adapters(tmp_path / "pack")
        assert greedy(llm, PROMPTS, [adapters[name] for name in pack.names]) == wanted
        return {name.rpartition(".")[2].startswith("eigen_core_") for name in slots(llm)}

    assert with_engine(check, base, tmp_path / "pack", shared=False) == {False}
    assert with_engine(check, base, tmp_path / "pack", shared=True) == {True}


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
        adapters = eigenlorax.vllm.Adapters(tmp_path / "pack")
        requests = [adapters[name] if name is not None else None for name in names]
        assert greedy(llm, prompts, requests) == wanted
        assert greedy(llm, prompts, [None] * len(names)) == without

    for shared in (False, True):
        with_engine(check, base, tmp_path / "pack", shared=shared, max_loras=3)
