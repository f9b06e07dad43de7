"""A base model of 8-bit weights: its own layers and weights stay as they are, with the bases beside them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, VOCABULARY, made_adapters
from offline import in_worker, with_engine

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7, 8 + i] for i in range(4)]


def quantised(base: Path, folder: Path) -> Path:
    """The model in compressed-tensors' format: weights of 8 bits with a scale a row."""
    shutil.copytree(base, folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def first_logprobs(llm, requests):
    """(prompts, vocabulary): of the first token after each prompt."""
    from vllm import SamplingParams

    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=1, logprobs=VOCABULARY),
        lora_request=requests,
        use_tqdm=False,
    )
    return torch.tensor([[a.outputs[0].logprobs[0][i].logprob for i in range(VOCABULARY)] for a in answers])


def test_weights_of_8_bits_stay_and_adapters_are_added_to_them(tmp_path):
    family = FAMILIES["qwen2"]
    base = family.made(tmp_path / "full")
    made_adapters(family, base, tmp_path / "adapters", n=len(PROMPTS))
    pack = eigenlorax.fit(tmp_path / "adapters", n_components=16)
    pack.save(tmp_path / "pack")
    eight = quantised(base, tmp_path / "base")

    from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key

    def answers(llm):
        layer = in_worker(llm).model.model.layers[0].mlp.down_proj
        weight = getattr(layer, "base_layer", layer).weight
        assert weight.dtype == torch.int8
        # some kernels have their input quantised by the layer before, which the bases could not multiply
        layer._input_quant_key = "any"
        assert get_input_quant_key(layer) is None
        del layer._input_quant_key
        adapters = eigenlorax.serving.vllm.Adapters(tmp_path / "pack")
        without = first_logprobs(llm, None)
        return without, first_logprobs(llm, [adapters[name] for name in adapters])

    # its kernels want 16-bit activations; what is rounded differently moves a logarithm by some hundredths
    options = {"dtype": "bfloat16", "max_logprobs": VOCABULARY}
    without, expanded = with_engine(answers, eight, tmp_path / "pack", shared=False, **options)
    same, shared = with_engine(answers, eight, tmp_path / "pack", shared=True, **options)
    assert torch.equal(without, same)
    assert (shared - expanded).abs().mean() < 0.1
    assert (expanded - without).abs().mean() > 0.8
