"""The table of models without LoRA beside vLLM's own classes."""

import json

import pytest

from children import python
from eigenlorax.serving.vllm.lora_support import WITH_TRANSFORMERS, WITHOUT_LORA, refusal_reason

# prints whether each architecture has LoRA
ARCHITECTURES = """
import json
from vllm.model_executor.models import registry, supports_lora

found = {}
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
        found[architecture] = supports_lora(model_class)
print(json.dumps(found))
"""


def test_the_reason_names_the_architecture_and_what_serves_it_instead():
    reason = refusal_reason("BloomForCausalLM")
    assert reason.startswith("vLLM 0.32 has no LoRA for models of the architecture BloomForCausalLM")
    assert "AdapterBank" in reason


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "SomebodysLlama", *WITH_TRANSFORMERS, None])
def test_others_are_for_vllm_to_judge(architecture):
    assert refusal_reason(architecture) is None


@pytest.mark.slow
def test_it_is_what_vllm_says(vllm):
    # some classes import Numba, and vLLM 0.32 starts no engine for CPUs in a process that has done so
    done = python("-c", ARCHITECTURES)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {architecture for architecture, has_lora in found.items() if not has_lora} == WITHOUT_LORA
    assert len(found) > 200
