"""Adapters in mlx-lm itself, with the logits of PEFT. `scripts/mlx-suite` installs what it needs."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eigenlorax as ex

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: run scripts/mlx-suite")
mx = pytest.importorskip("mlx.core", reason="mlx is not installed: run scripts/mlx-suite")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import lora  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402
from mlx_lm.utils import load_model, quantize_model  # noqa: E402

pytestmark = pytest.mark.slow
LAYERS, HIDDEN, INNER, VOCABULARY = 3, 64, 96, 101
TOKENS = [[1, 5, 9, 33, 2, 77, 50]]
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base model as transformers saves it, with an output layer of its own."""
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def models(folder, *, is_quantised=False):
    """The base model in mlx-lm and in transformers, with the same weights, which may be those of four bits."""
    ours = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs, config = load_model(folder)
    if is_quantised:
        theirs, _ = quantize_model(theirs, config, group_size=32, bits=4)
        modules = {name: module for name, module in theirs.named_modules() if "scales" in module}
        assert len(modules) == LAYERS * len(ATTENTION + MLP) + 2
        for name, module in modules.items():
            weight = mx.dequantize(
                module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits
            )
            ours.get_submodule(name).weight.data = torch.from_numpy(np.array(weight))
    return theirs, ours


def said_by_mlx(model):
    return torch.from_numpy(np.array(model(mx.array(TOKENS))))


def said_by_peft(model, folder=None):
    with torch.no_grad():
        adapted = model if folder is None else peft.PeftModel.from_pretrained(model, folder).eval()
        return adapted(torch.tensor(TOKENS)).logits


def shaken(parameters, seed):
    """Set the parameters of an adapter to large random numbers, and magnitudes of DoRA to other positive ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters:
        if "lora_magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


ADAPTERS = {
    "all": {"target_modules": ATTENTION + MLP},
    "last-layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
    "first-layer": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "other-modules-by-layer": {"target_modules": r".*(layers\.0\.self_attn\.q_proj|layers\.2\.mlp\.up_proj)"},
    "ranks-and-alphas": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"q_proj": 3},
    },
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "output-and-embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "dora-last-layer": {"target_modules": ["v_proj", "down_proj"], "use_dora": True, "layers_to_transform": [2]},
}


@pytest.mark.parametrize("is_quantised", [False, True], ids=["plain", "quantised"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_mlx_lm_loads_what_peft_saved(folders, tmp_path, kind, is_quantised):
    theirs, ours = models(folders, is_quantised=is_quantised)
    adapted = peft.get_peft_model(ours, peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=8, **ADAPTERS[kind]))
    shaken(adapted.named_parameters(), seed=7)
    # embeddings as they are in the base model are no part of the adapter
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    written = ex.write_adapter(ex.read_adapter(tmp_path / "peft"), tmp_path / "mlx", format="mlx")

    expected, plain = said_by_peft(adapted.eval()), said_by_mlx(theirs)
    torch.testing.assert_close(said_by_mlx(load_adapters(theirs, str(written))), expected, atol=2e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-2


class Tokens:
    """Rows of tokens, as the datasets of mlx-lm."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return [(index * 7 + place * 13) % VOCABULARY for place in range(12)]

    def process(self, row):
        return row, 0


@pytest.mark.parametrize("is_quantised", [False, True], ids=["plain", "quantised"])
@pytest.mark.parametrize(
    ("kind", "num_layers", "keys"),
    [("lora", 2, None), ("lora", -1, ["self_attn.q_proj", "mlp.up_proj"]), ("dora", 2, ["self_attn.v_proj"])],
)
def test_peft_loads_what_mlx_lm_trained(folders, tmp_path, kind, num_layers, keys, is_quantised):
    theirs, ours = models(folders, is_quantised=is_quantised)
    options = {
        **lora.CONFIG_DEFAULTS,
        "model": str(folders),
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": {"rank": 5, "dropout": 0.0, "scale": 3.0, **({"keys": keys} if keys else {})},
        "iters": 6,
        "save_every": 3,
        "batch_size": 2,
        "val_batches": 1,
        "learning_rate": 1e-2,
        "adapter_path": str(tmp_path / "run"),
    }
    lora.train_model(SimpleNamespace(**options), theirs, Tokens(), Tokens())
    theirs.eval()
    assert sorted(file.name for file in (tmp_path / "run").glob("*.safetensors")) == [
        "0000003_adapters.safetensors",
        "0000006_adapters.safetensors",
        "adapters.safetensors",
    ]
    adapter = ex.read_adapter(tmp_path / "run")
    plain = said_by_peft(ours)
    logits = said_by_peft(ours, ex.write_adapter(adapter, tmp_path / "peft", format="peft"))
    torch.testing.assert_close(logits, said_by_mlx(theirs), atol=2e-5, rtol=1e-5)
    assert (logits - plain).abs().max() > 1e-2

    # and once more, by way of PEFT
    again = ex.write_adapter(ex.read_adapter(tmp_path / "peft"), tmp_path / "again", format="mlx")
    fresh, _ = models(folders, is_quantised=is_quantised)
    torch.testing.assert_close(said_by_mlx(load_adapters(fresh, str(again))), logits, atol=2e-5, rtol=1e-5)


def test_a_packed_run_comes_back_into_mlx_lm(folders, tmp_path):
    theirs, _ = models(folders)
    parameters = {"rank": 4, "dropout": 0.0, "scale": 2.0}
    run = tmp_path / "run"
    run.mkdir()
    lora.linear_to_lora_layers(theirs, 2, parameters)
    (run / "adapter_config.json").write_text(json.dumps({"num_layers": 2, "lora_parameters": parameters}))
    expected = {}
    mx.random.seed(3)
    for step in (100, 200):
        tensors = {
            name: mx.random.normal(tensor.shape) * 0.2
            for name, tensor in tree_flatten(theirs.parameters())
            if name.endswith(("lora_a", "lora_b"))
        }
        mx.save_safetensors(str(run / f"{step:07d}_adapters.safetensors"), tensors)
        theirs.load_weights(list(tensors.items()), strict=False)
        expected[step] = said_by_mlx(theirs)
    shutil.copy(run / "0000200_adapters.safetensors", run / "adapters.safetensors")
    ex.track(run, tmp_path / "history", lossless=True)
    history = ex.Pack.open(tmp_path / "history")
    for step, logits in expected.items():
        fresh, _ = models(folders)
        load_adapters(fresh, str(history.restore(f"run@{step}", tmp_path / str(step))))
        assert torch.equal(said_by_mlx(fresh), logits)
