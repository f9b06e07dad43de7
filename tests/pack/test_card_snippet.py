"""The code of the model card runs, and the card states the task of the adapters."""

import json
import re

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import eigenlorax as ex
import tiny
from adapters import change_config, make_adapters
from eigenlorax.pack import card, tasks
from eigenlorax.pack.folder import open_pack

TOKENS = torch.tensor([[5, 6, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def save(model, place, task_type, names):
    """Save a base model, and trained LoRAs of it."""
    model.save_pretrained(place / "base")
    for seed, name in enumerate(names, start=1):
        torch.manual_seed(seed)
        targets = ["query", "c_attn"]
        config = peft.LoraConfig(r=3, target_modules=targets, task_type=task_type, init_lora_weights=False)
        config.base_model_name_or_path = str(place / "base")
        trained = peft.get_peft_model(type(model).from_pretrained(place / "base"), config)
        trained.save_pretrained(place / "in" / name)
    return place


@pytest.mark.parametrize(
    ("made", "task_type", "tag"),
    [
        (lambda: tiny.make_bert(n_labels=5), "SEQ_CLS", "text-classification"),
        (tiny.make_gpt2, "CAUSAL_LM", "text-generation"),
    ],
    ids=["classification", "language model"],
)
def test_the_code_gives_the_model_with_the_adapter(made, task_type, tag, tmp_path, monkeypatch):
    save(made(), tmp_path, task_type, ("alpha", "beta"))
    pack = ex.fit(tmp_path / "in", n_components=8, dtype="float32").save(tmp_path / "pack")
    opened = open_pack(pack)
    text = card.render(opened.manifest, str(pack), task=tasks.common(opened))
    assert ModelCard(text).data.pipeline_tag == tag
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(code, variables)
    wanted = peft.PeftModel.from_pretrained(
        getattr(transformers, tasks.TASKS[task_type].model_class).from_pretrained(
            tmp_path / "base", **({"num_labels": 5} if task_type == "SEQ_CLS" else {})
        ),
        tmp_path / "in/alpha",
    )
    torch.testing.assert_close(logits(variables["model"]), logits(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "types", [("SEQ_CLS", "CAUSAL_LM"), (None, None), ("SEQ_CLS", None), ("MINE", "MINE"), ([], [])]
)
def test_different_and_unknown_tasks_are_none(types, tmp_path):
    for folder, task_type in zip(make_adapters(tmp_path / "in", "alpha beta"), types, strict=True):
        change_config(folder, task_type=task_type)
    opened = open_pack(ex.fit(tmp_path / "in", n_components=3).save(tmp_path / "pack"))
    assert tasks.common(opened) is None
    text = card.render(opened.manifest, task=None)
    assert ModelCard(text).data.pipeline_tag is None
    assert json.dumps(opened.manifest.base_model) in text
