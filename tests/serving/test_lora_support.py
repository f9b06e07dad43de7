"""The table of models without LoRA beside vLLM's own classes."""

import pytest

from eigenlorax.serving.vllm.lora_support import WITH_TRANSFORMERS, WITHOUT_LORA, refusal_reason


def test_the_reason_names_the_architecture_and_what_serves_it_instead():
    reason = refusal_reason("BloomForCausalLM")
    assert reason.startswith("vLLM 0.32 has no LoRA for models of the architecture BloomForCausalLM")
    assert "AdapterBank" in reason


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "SomebodysLlama", *WITH_TRANSFORMERS, None])
def test_others_are_for_vllm_to_judge(architecture):
    assert refusal_reason(architecture) is None


@pytest.mark.slow
def test_it_is_what_vllm_says(vllm):
    from vllm.model_executor.models import registry, supports_lora

    checked, without = set(), set()
    for table in (
        registry._TEXT_GENERATION_MODELS,
        registry._EMBEDDING_MODELS,
        registry._TOKEN_CLASSIFICATION_MODELS,
        registry._SEQUENCE_CLASSIFICATION_MODELS,
        registry._MULTIMODAL_MODELS,
    ):
        for architecture in table:
            try:
                model_class = registry.ModelRegistry.models[architecture].load_model_cls()
            except ImportError:
                # of packages that this build lacks
                continue
            checked.add(architecture)
            if not supports_lora(model_class):
                without.add(architecture)
    assert without == WITHOUT_LORA
    assert len(checked) > 200
