"""Reading and writing against PEFT itself: real models built from configs, real adapters saved by PEFT."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the peft extra is not installed")

import eigenlorax as ex  # noqa: E402

TOKENS = torch.arange(12).reshape(2, 6)


def bert(seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


class Convolutional(torch.nn.Module):
    """A convolution, then a linear layer: what PEFT wraps outside transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 7, 3)
        self.dense = torch.nn.Linear(7, 5)

    def forward(self, tokens):
        images = tokens.float().reshape(2, 1, 6, 1).expand(2, 3, 6, 6) / 12
        return self.dense(self.conv(images).mean((2, 3)))


def outputs(model, tokens=TOKENS):
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits


def trained(model, config, seed):
    """A PEFT model with every trained tensor moved off its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
    return wrapped.eval()


def save(wrapped, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder, **options)
    return folder


def load(model, folder):
    """The base model with the adapter in `folder`; no key may be left over or missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    assert expected <= set(load_file(folder / "adapter_model.safetensors"))
    return wrapped.eval()


def lora(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": ["query", "value"], **options})


CASES = {
    "plain": (bert, lora()),
    "rslora": (bert, lora(use_rslora=True)),
    "patterns": (
        bert,
        lora(
            rank_pattern={"layer.0.attention.self.query": 2, r"^bert\.encoder\.layer\.1.*value": 4},
            alpha_pattern={"value": 5, "query": 7},
        ),
    ),
    "sequence classification": (bert, lora(task_type="SEQ_CLS")),
    "modules to save": (bert, lora(modules_to_save=["classifier", "pooler"])),
    "trained biases, all": (bert, lora(bias="all")),
    "trained biases, all, and a head": (bert, lora(bias="all", task_type="SEQ_CLS")),
    "trained biases, lora only": (bert, lora(bias="lora_only")),
    "bias of lora_B": (bert, lora(lora_bias=True)),
    "DoRA": (bert, lora(use_dora=True)),
    "embedding": (bert, lora(target_modules=["query", "word_embeddings"])),
    "trainable tokens": (bert, lora(trainable_token_indices={"word_embeddings": [1, 5]})),
    "Conv1D": (gpt2, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")),
    "Conv2d": (Convolutional, lora(target_modules=["conv", "dense"])),
    "every linear layer": (bert, lora(target_modules="all-linear")),
    "some layers": (bert, lora(layers_to_transform=[1], layers_pattern="layer")),
}


@pytest.fixture(params=CASES, ids=str)
def case(request, tmp_path):
    """A way to make a model, and three adapters of it that PEFT saved, with the outputs of each."""
    make, config = CASES[request.param]
    wanted = {}
    for seed in range(3):
        wrapped = trained(make(), config, seed)
        wanted[f"a{seed}"] = outputs(wrapped)
        save(wrapped, tmp_path / "in" / f"a{seed}")
    return make, tmp_path / "in", wanted


def test_deltas_are_those_of_peft(case):
    make, folder, wanted = case
    for name in wanted:
        adapter, wrapped = ex.read_adapter(folder / name), load(make(), folder / name)
        layers = dict(wrapped.base_model.model.named_modules())
        assert adapter.specs
        for module, factors in adapter.modules.items():
            delta = layers[module].get_delta_weight("default")
            if getattr(layers[module], "fan_in_fan_out", False):
                delta = delta.T
            # that of a convolution is (out, channels, height, width)
            torch.testing.assert_close(factors.scaling * factors.up @ factors.down, delta.flatten(1))


def test_exported_at_full_rank_the_outputs_are_the_originals(case, tmp_path):
    make, folder, wanted = case
    pack = ex.fit([folder], energy=1.0)
    pack.save(tmp_path / "pack")
    written = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out")
    for name, logits in wanted.items():
        assert pack.records[name].delta_error < 1e-5
        torch.testing.assert_close(outputs(load(make(), written[name])), logits, atol=1e-5, rtol=1e-5)


def test_what_the_subspace_does_not_hold_comes_back_to_the_bit(case, tmp_path):
    _, folder, wanted = case
    written = ex.fit([folder], n_components=1).export(tmp_path / "out")
    for name in wanted:
        before, after = (load_file(f / "adapter_model.safetensors") for f in (folder / name, written[name]))
        assert before.keys() == after.keys()
        held = {
            key
            for module in ex.read_adapter(folder / name).specs
            for key in (f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight")
        }
        for key in before.keys() - held:
            assert torch.equal(before[key], after[key])
            assert before[key].dtype == after[key].dtype
        config = (folder / name / "adapter_config.json").read_bytes()
        assert (written[name] / "adapter_config.json").read_bytes() == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_files_are_read_and_kept(dtype, tmp_path):
    folder = save(trained(bert(), lora(task_type="SEQ_CLS"), 1), tmp_path / "a")
    state = {key: value.to(dtype) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    pack = ex.fit([folder], energy=1.0)
    assert pack.dtype == pack.coefficient_dtype == dtype
    back = pack.adapter("a")
    assert {spec.dtype for spec in back.specs.values()} == {torch.float32}
    assert {head.dtype for head in back.heads.values()} == {dtype}
    assert pack.adapter("a", dtype).modules[next(iter(back.specs))].down.dtype == dtype


def test_the_widest_dtype_of_the_sources_is_stored(tmp_path):
    folders = []
    for name, dtype in (("a", torch.float16), ("b", torch.bfloat16)):
        folder = save(trained(bert(), lora(), len(folders)), tmp_path / name)
        state = {key: value.to(dtype) for key, value in load_file(folder / "adapter_model.safetensors").items()}
        save_file(state, folder / "adapter_model.safetensors")
        folders.append(folder)
    assert ex.fit(folders[:1], n_components=4).dtype == torch.float16
    assert ex.fit(folders, n_components=4).dtype == torch.float32


@pytest.mark.parametrize("spelling", ["default", "named", "without prefix", "default without prefix"])
def test_every_spelling_of_the_keys_is_one_adapter(spelling, tmp_path):
    folder = save(trained(bert(), lora(task_type="SEQ_CLS", use_dora=True), 1), tmp_path / "a")
    want = ex.read_adapter(folder)

    def respell(key):
        if spelling in ("default", "named", "default without prefix"):
            adapter = "sst2" if spelling == "named" else "default"
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                key = key.replace(f".{part}", f".{part}.{adapter}")
            key = key.replace(".classifier.", f".classifier.modules_to_save.{adapter}.")
        return key.removeprefix("base_model.model.") if "without prefix" in spelling else key

    other = tmp_path / "b"
    other.mkdir()
    state = load_file(folder / "adapter_model.safetensors")
    save_file({respell(key): value for key, value in state.items()}, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    found = ex.read_adapter(other)
    assert found.specs == want.specs
    for module in want.specs:
        assert torch.equal(found.modules[module].down, want.modules[module].down)
        assert torch.equal(found.modules[module].up, want.modules[module].up)
    assert dict(found.heads).keys() == dict(want.heads).keys()
    assert dict(found.carried).keys() == dict(want.carried).keys()
    # and it can be loaded again once it was through our hands
    torch.testing.assert_close(
        outputs(load(bert(), ex.write_adapter(found, tmp_path / "c"))), outputs(load(bert(), folder))
    )


def test_a_bin_file_is_read_on_request_only(tmp_path):
    folder = save(trained(bert(), lora(task_type="SEQ_CLS"), 1), tmp_path / "a", safe_serialization=False)
    with pytest.raises(ValueError, match=r"adapter_model.bin only, a pickle.*--allow-pickle"):
        ex.read_adapter(folder)
    adapter = ex.read_adapter(folder, allow_pickle=True)
    written = ex.write_adapter(adapter, tmp_path / "b")
    torch.testing.assert_close(outputs(load(bert(), written)), outputs(trained(bert(), lora(task_type="SEQ_CLS"), 1)))


def test_resized_and_saved_embeddings_are_kept(tmp_path):
    config = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    folder = save(trained(gpt2(), config, 1), tmp_path / "a", save_embedding_layers=True)
    adapter = ex.read_adapter(folder)
    assert {"base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"} & set(adapter.heads)
    pack = ex.fit([folder], n_components=2)
    back = pack.adapter("a")
    for key, head in adapter.heads.items():
        assert torch.equal(head, back.heads[key])


def test_experts_with_stacked_factors_are_carried(tmp_path):
    folder = save(trained(bert(), lora(), 1), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.mlp.experts.base_layer"
    state |= {f"{stem}.lora_A.weight": torch.randn(6, 11), f"{stem}.lora_B.weight": torch.randn(13, 6)}
    save_file(state, folder / "adapter_model.safetensors")
    adapter = ex.read_adapter(folder)
    assert set(adapter.carried) == {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}
    back = ex.fit([adapter], energy=1.0).adapter("a")
    assert torch.equal(back.carried[f"{stem}.lora_A.weight"], state[f"{stem}.lora_A.weight"])


def test_an_adapter_made_in_memory_loads_in_peft(tmp_path):
    wrapped = trained(bert(), CASES["patterns"][1], 1)
    read = ex.read_adapter(save(wrapped, tmp_path / "a"))
    made = ex.from_factors("made", dict(read.modules), base_model="org/base")
    written = ex.write_adapter(made, tmp_path / "made")
    torch.testing.assert_close(outputs(load(bert(), written)), outputs(wrapped))


def test_a_rank_written_for_one_module_is_not_that_of_another(tmp_path):
    modules = {
        name: ex.LoRAFactors(torch.randn(rank, 7), torch.randn(11, rank), 2.0 / rank)
        for name, rank in {"first.q": 2, "0.q": 3, "decoder.0.q": 4}.items()
    }
    written = ex.write_adapter(ex.from_factors("made", modules), tmp_path / "made")
    found = ex.read_adapter(written)
    assert {name: spec.rank for name, spec in found.specs.items()} == {"first.q": 2, "0.q": 3, "decoder.0.q": 4}
    assert {name: spec.scaling for name, spec in found.specs.items()} == {n: f.scaling for n, f in modules.items()}


def test_a_config_that_disagrees_with_the_factors_is_not_written(tmp_path):
    read = ex.read_adapter(save(trained(bert(), lora(), 1), tmp_path / "a"))
    modules = {m: ex.LoRAFactors(f.down, f.up, 2 * f.scaling) for m, f in read.modules.items()}
    wrong = ex.from_factors("a", modules, source_config=read.source_config)
    with pytest.raises(ValueError, match=r"scaling 8 differ from its config, 3 and 4"):
        ex.write_adapter(wrong, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_architecture_prefixes_are_one_module(tmp_path):
    """An adapter saved from `BertModel` has names without `bert.`; exported, it loads into BertModel again."""

    def encoder():
        return bert().bert.eval()

    def states(model):
        with torch.no_grad():
            return model(TOKENS).last_hidden_state

    long = save(trained(bert(), lora(), 1), tmp_path / "long")
    short_model = trained(encoder(), lora(), 2)
    short = save(short_model, tmp_path / "short")
    pack = ex.fit([long, short], energy=1.0)
    assert sorted(pack.info.modules) == sorted(ex.read_adapter(long).specs)
    written = pack.export(tmp_path / "out")
    torch.testing.assert_close(states(load(encoder(), written["short"])), states(short_model), atol=1e-5, rtol=1e-5)
    # and a third one is added by its short names
    third_model = trained(encoder(), lora(), 1)
    pack.add(save(third_model, tmp_path / "third"))
    assert pack.records["third"].delta_error < 1e-5
