"""AdaLoRA checkpoints of a real training, compared with PEFT's own updates."""

import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the peft extra is not installed")

import eigenlorax as ex  # noqa: E402
from eigenlorax.errors import FormatError, NonFiniteError, ShapeError  # noqa: E402
from eigenlorax.formats import checks  # noqa: E402

STEPS, FINAL = 12, 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def quietly(call, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def train(folder, base=bert, dtype=None, **options):
    """Train an AdaLoRA, save it at each step, and return the live updates at each step."""
    fields = {"init_r": 5, "target_r": 1, "tinit": 2, "tfinal": FINAL, "total_step": STEPS, "lora_alpha": 7}
    targets = {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
    model = quietly(peft.get_peft_model, base(), peft.AdaLoraConfig(**fields | targets | options))
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.03)
    tokens = torch.randint(60, (8, 6), generator=torch.Generator().manual_seed(1))
    states = []
    for step in range(STEPS):
        model(input_ids=tokens, labels=tokens[:, 0] % 3).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        states.append(updates(model))
        quietly(model.save_pretrained, folder / str(step))
    return states


def updates(model):
    """The update of each module as PEFT computes it, by name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def loaded_updates(folder, base=bert):
    return updates(quietly(peft.PeftModel.from_pretrained, base(), folder))


def dense(adapter):
    return {
        module: factors.scaling * (factors.up.double() @ factors.down.double())
        for module, factors in adapter.modules.items()
    }


def assert_equal_updates(actual, expected):
    assert actual.keys() == expected.keys()
    for module, update in expected.items():
        torch.testing.assert_close(actual[module].double(), update.double(), rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder)


def test_every_state_of_a_training_has_peft_s_updates(run, tmp_path):
    folder, _ = run
    ranks = []
    for step in range(STEPS):
        adapter = ex.read_adapter(folder / str(step))
        ranks.append(sum(spec.rank for spec in adapter.specs.values()))
        assert_equal_updates(dense(adapter), loaded_updates(folder / str(step)))
        assert adapter.config["peft_type"] == "LORA"
        ex.write_adapter(adapter, tmp_path / str(step))
        assert_equal_updates(loaded_updates(tmp_path / str(step)), loaded_updates(folder / str(step)))
        assert sorted(adapter.heads) == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    modules = len(adapter.specs)
    assert ranks[0] == 5 * modules
    assert ranks[-1] < ranks[4] < ranks[0]
    # a LoRA has no module of rank 0, which the allocation has chosen here
    stored = load_file(folder / str(STEPS - 1) / WEIGHTS)
    assert any(0 in tensor.shape for tensor in stored.values())
    assert any(not update.any() for update in dense(adapter).values())


def test_the_final_state_is_that_of_the_model_in_training(run):
    folder, states = run
    last = STEPS - 1
    assert_equal_updates(dense(ex.read_adapter(folder / str(last))), states[last])


def test_masked_triplets_are_dropped_without_a_rank_pattern(run, tmp_path):
    """A checkpoint of an earlier release, or one whose ranks are not final, stores them with E = 0."""
    folder, _ = run
    tensors = load_file(folder / "0" / WEIGHTS)
    values = sorted(name for name in tensors if name.endswith("lora_E"))
    tensors[values[0]][[0, 3]] = 0
    tensors[values[1]][:] = 0
    config = json.loads((folder / "0" / CONFIG).read_text())
    assert config["rank_pattern"] is None
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    adapter = ex.read_adapter(tmp_path)
    assert_equal_updates(dense(adapter), loaded_updates(tmp_path))
    ranks = {f"base_model.model.{module}.lora_E": spec.rank for module, spec in adapter.specs.items()}
    assert [ranks.pop(name) for name in values[:2]] == [3, 1]
    assert set(ranks.values()) == {5}


def test_an_untrained_checkpoint_has_rank_one_and_no_update(tmp_path):
    model = quietly(peft.get_peft_model, bert(), peft.AdaLoraConfig(total_step=5, target_modules=["query"]))
    quietly(model.save_pretrained, tmp_path)
    adapter = ex.read_adapter(tmp_path)
    assert adapter.ranks == (1,)
    assert not any(update.any() for update in dense(adapter).values())


@pytest.mark.parametrize("lora_alpha", [-1, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_scaling(run, tmp_path, dtype, lora_alpha):
    folder, _ = run
    tensors = load_file(folder / str(STEPS - 1) / WEIGHTS)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    config = json.loads((folder / str(STEPS - 1) / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "lora_alpha": lora_alpha}))
    adapter = ex.read_adapter(tmp_path)
    assert {spec.dtype for spec in adapter.specs.values()} == {torch.promote_types(dtype, torch.float32)}
    assert_equal_updates(dense(adapter), loaded_updates(tmp_path))
    checks.check_in_memory(pickle.loads(pickle.dumps(adapter)))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=24, n_layer=2, n_head=2, num_labels=3)
    config.pad_token_id = 0
    return transformers.GPT2ForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (bert, {"bias": "all"}),
        (bert, {"modules_to_save": ["pooler"], "use_rslora": True}),
        (bert, {"trainable_token_indices": {"word_embeddings": [1, 5]}}),
    ],
)
def test_the_lora_computes_what_the_checkpoint_computes(tmp_path, base, options):
    train(tmp_path, base, **options)
    source = tmp_path / str(STEPS - 1)
    ex.write_adapter(ex.read_adapter(source), tmp_path / "lora")
    tokens = torch.arange(12).reshape(2, 6)
    outputs = [
        quietly(peft.PeftModel.from_pretrained, base(), folder).eval()(input_ids=tokens).logits
        for folder in (source, tmp_path / "lora")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    assert (outputs[0] - base()(input_ids=tokens).logits).abs().max() > 1e-3


def test_a_model_in_memory_keeps_the_error_bound(run, tmp_path):
    folder, _ = run
    model = quietly(peft.PeftModel.from_pretrained, bert(), folder / str(STEPS - 1))
    pack = quietly(ex.fit, {"last": model, "first": folder / "0"}, max_error=0.01)
    pack.save(tmp_path / "pack")
    ex.Pack.open(tmp_path / "pack").export(tmp_path / "loras")
    expected, actual = updates(model), loaded_updates(tmp_path / "loras" / "last")
    norm = sum(float(update.square().sum()) for update in expected.values()) ** 0.5
    deviation = sum(float((actual[module] - update).square().sum()) for module, update in expected.items()) ** 0.5
    assert 0 < deviation <= 0.01 * norm


def test_a_state_dict_is_read_with_its_config(run):
    folder, _ = run
    model = quietly(peft.PeftModel.from_pretrained, bert(), folder / "4")
    state_dict = quietly(peft.get_peft_model_state_dict, model)
    pack = quietly(ex.fit, {"memory": (state_dict, model.peft_config["default"]), "file": folder / "4"}, max_error=0.1)
    assert pack.records["memory"].source_sha256 == pack.records["file"].source_sha256


def change(run, tmp_path, tensors=None, **fields):
    folder, _ = run
    source = folder / str(STEPS - 1)
    stored = load_file(source / WEIGHTS)
    if tensors is not None:
        tensors(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({**json.loads((source / CONFIG).read_text()), **fields}))
    return tmp_path


def first(tensors, part):
    return min(name for name in tensors if name.endswith(part) and 0 not in tensors[name].shape)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (lambda tensors: tensors.pop(first(tensors, "lora_E")), FormatError, r"module bert\S+ has no lora_E"),
        (
            lambda tensors: tensors.update({first(tensors, "lora_E"): torch.ones(2)}),
            ShapeError,
            r"lora_E \(2,\): \(rank, in\), \(out, rank\) and \(rank, 1\) must share one rank",
        ),
        (
            lambda tensors: tensors.update({first(tensors, "lora_A") + ".weight": torch.ones(2, 3)}),
            FormatError,
            r"lora_A\.weight' belongs to a LoRA, but adapter_config\.json says AdaLoRA",
        ),
        (
            lambda tensors: tensors.update({first(tensors, "lora_A") + ".other": torch.ones(2, 3)}),
            FormatError,
            r"are both lora_A of bert\S+\. Remove one of them",
        ),
        (
            lambda tensors: tensors.update({first(tensors, "lora_B"): tensors[first(tensors, "lora_B")].int()}),
            FormatError,
            r"lora_B' is not float64, float32, float16 or bfloat16",
        ),
        (lambda tensors: tensors.clear(), FormatError, "has no LoRA tensor at all"),
    ],
)
def test_tensors_that_do_not_fit(run, tmp_path, tensors, error, message):
    with pytest.raises(error, match=message):
        ex.read_adapter(change(run, tmp_path, tensors))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"init_r": 0}, FormatError, r"init_r=0 and lora_alpha=7 .* are not usable numbers"),
        ({"lora_alpha": "7"}, FormatError, r"lora_alpha='7' .* are not usable numbers"),
        ({"rank_pattern": {"query": 3}}, FormatError, "rank_pattern .* must be lists of true and false"),
        ({"rank_pattern": None}, ShapeError, r"has \d triplets, but adapter_config\.json says 5 .* correct the config"),
        ({"lora_alpha": 1e300}, FormatError, "are not usable numbers"),
        ({"lora_alpha": 10**400}, FormatError, "are not usable numbers"),
        ({"init_r": 10**400}, FormatError, "are not usable numbers"),
    ],
)
def test_configs_that_do_not_fit(run, tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        ex.read_adapter(change(run, tmp_path, **fields))


def test_a_value_that_is_not_a_number_is_not_a_masked_triplet(run, tmp_path):
    folder = change(run, tmp_path, lambda tensors: tensors[first(tensors, "lora_E")].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match="are NaN or Inf"):
        checks.scan(ex.read_adapter(folder))


def test_names_with_the_adapter_and_without_the_prefix(run, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            suffix = ".default" * ("lora_" in name)
            tensors[name.removeprefix("base_model.model.") + suffix] = tensors.pop(name)

    folder, _ = run
    pattern = json.loads((folder / str(STEPS - 1) / CONFIG).read_text())["rank_pattern"]
    renamed = change(run, tmp_path, rename, rank_pattern={f"{name}.default": mask for name, mask in pattern.items()})
    assert_equal_updates(dense(ex.read_adapter(renamed)), dense(ex.read_adapter(folder / str(STEPS - 1))))
