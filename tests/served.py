"""What the tests of the bank serve: tiny models, packs of adapters of several recipes, and PEFT's answers for each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import eigenlorax as ex
from adapters import lora_config
from planted import normal
from tiny import IN, make_bert

HIDDEN, VOCABULARY = 24, 53
BASE = "__base__"
MIXED_ROWS = [
    ["plain-a", "plain-b", "plain-c"],
    ["plain-b", "scaled", "plain-b"],
    ["wide", BASE, "narrow", "partial", "patterned", "plain-a", "scaled"],
    ["narrow"] * 5 + ["wide"] * 4 + [BASE] * 4,
    ["plain-c"] * 6 + ["plain-a"],
]
"""The adapter of each row of batches that mix ranks, scalings and rows without an adapter."""


def make_llama():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=44,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()


def make_t5():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=44,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
            dropout_rate=0.0,
        )
        return T5ForConditionalGeneration(config).eval()


def shapes(model: nn.Module, suffixes: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if name.endswith(suffixes)}


@dataclass(frozen=True)
class Kind:
    model: Callable[[], nn.Module]
    suffixes: tuple[str, ...]
    task: str
    heads: bool = False


KINDS = {
    "bert": Kind(make_bert, ("self.query", "self.value"), "SEQ_CLS", heads=True),
    "llama": Kind(make_llama, ("q_proj", "k_proj", "v_proj", "o_proj"), "CAUSAL_LM"),
    "t5": Kind(make_t5, (".q", ".v", ".wo"), "SEQ_2_SEQ_LM"),
}
RECIPES = {
    # name: rank, alpha, rsLoRA, every how many modules
    "plain-a": (3, 6, False, 1),
    "plain-b": (3, 6, False, 1),
    "plain-c": (3, 6, False, 1),
    "scaled": (3, 11, False, 1),
    "wide": (7, 5, True, 1),
    "narrow": (1, 2, False, 1),
    "partial": (3, 6, False, 2),
    "patterned": (2, 4, False, 1),
}


def write_adapter(
    folder: Path, kind: Kind, name: str, seed: int, own: dict[str, torch.Tensor] | None = None, **changed: object
) -> Path:
    """A LoRA folder as PEFT saves it; `patterned` has another rank and alpha on one module.

    own: tensors of its own, by the model's name, in the place of its head; changed: fields of its config.
    """
    rank, alpha, rslora, every = RECIPES[name]
    modules = dict(sorted(shapes(kind.model(), kind.suffixes).items())[::every])
    odd = min(modules)
    fields = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "task_type": kind.task}
    if name == "patterned":
        fields |= {"rank_pattern": {odd: 5}, "alpha_pattern": {odd: 3}}
    tensors = {}
    for place, (module, (n_out, n_in)) in enumerate(modules.items()):
        r = 5 if name == "patterned" and module == odd else rank
        down, up = normal(r, n_in, seed=seed + 2 * place), normal(n_out, r, seed=seed + 2 * place + 1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.2 * down.float()
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.2 * up.float()
    if own is not None:
        tensors |= {f"base_model.model.{key}": value for key, value in own.items()}
    elif kind.heads and name == "narrow":
        # of a classifier, PEFT always wants a head
        fields["task_type"] = None
    elif kind.heads:
        fields["modules_to_save"] = ["classifier"]
        tensors["base_model.model.classifier.weight"] = normal(3, IN, seed=seed + 90).float()
        tensors["base_model.model.classifier.bias"] = normal(3, seed=seed + 91).float()
    folder.mkdir(parents=True)
    config = lora_config(
        modules, **{**fields, "base_model_name_or_path": None, "target_modules": sorted(modules), **changed}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True, eq=False)
class Served:
    kind: Kind
    pack: Path
    loras: dict[str, Path]

    @classmethod
    def make(cls, kind: Kind, folder: Path) -> "Served":
        sources = [
            write_adapter(folder / "sources" / name, kind, name, seed=1000 * number)
            for number, name in enumerate(RECIPES, start=1)
        ]
        pack = ex.fit(sources, n_components=10)
        path = pack.save(folder / "pack")
        return cls(kind, path, pack.export(folder / "loras"))

    @property
    def names(self) -> list[str]:
        return [*RECIPES, BASE]

    def bank(self, **options: object) -> ex.AdapterBank:
        return ex.AdapterBank(self.kind.model(), self.pack, **options)

    @cache  # noqa: B019 (there are three, made once a session)
    def alone(self, name: str) -> nn.Module:
        """The model with one adapter, by PEFT."""
        model = self.kind.model()
        if name == BASE:
            return model
        return PeftModel.from_pretrained(model, self.loras[name]).eval()

    def inputs(self, rows: int, tokens: int = 9) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))
        if self.kind.task == "SEQ_2_SEQ_LM":
            return {"input_ids": ids, "decoder_input_ids": ids[:, : max(1, tokens - 2)]}
        return {"input_ids": ids}

    def wanted(self, names: list[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits of each row with its adapter alone."""
        rows = []
        with torch.no_grad():
            for row, name in enumerate(names):
                one = {key: value[row : row + 1] for key, value in inputs.items()}
                rows.append(self.alone(name)(**one).logits)
        return torch.cat(rows)
