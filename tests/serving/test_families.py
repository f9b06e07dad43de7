"""Every family of models in vLLM's own engine: eight adapters mixed in one batch, in both ways of serving, have the
greedy tokens that transformers and PEFT have with the exported LoRA."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, made_adapters
from offline import engine, greedy, peft_greedy, slots

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
    for shared in (False, True):
        with engine(base, tmp_path / "pack", shared=shared) as llm:
            adapters = eigenlorax.vllm.Adapters(tmp_path / "pack")
            assert greedy(llm, PROMPTS, [adapters[name] for name in pack.names]) == wanted
            cores = {name.rpartition(".")[2].startswith("eigen_core_") for name in slots(llm)}
            assert cores == {shared}
