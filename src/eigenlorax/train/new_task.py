"""The second half of the demo: a task that no shipped adapter knows, trained on coefficients, beside a LoRA and
coefficients over a random basis of equal size."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..fitting.fit import Progress
from ..pack.pack import Pack
from . import methods, training_run
from .training_run import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

EPOCHS, BATCH, MAX_LENGTH, SEED = 8, 16, 48, 0
# chosen on a quarter of the training messages: the best of three each (experiments/LOG.md)
RATES = {"LoRA": 4e-3, "coefficients": 2e-2}
HEAD_RATE = 5e-3


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to train the task: numbers trained besides the head, and the share of test sentences it has right."""

    method: str
    trained_numbers: int
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class NewTask:
    """Messages to a shop and what their writers want, written for the demo; rows are (text, label)."""

    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def read() -> NewTask:
    """The task, out of the package."""
    path = files("eigenlorax.train") / "demo_data" / "new_task.json"
    found = json.loads(path.read_text("utf-8"))
    rows = {split: [(one["text"], one["label"]) for one in found[split]] for split in ("train", "test")}
    return NewTask(found["labels"], rows["train"], rows["test"])


def run(pack: Pack, model_folder: Path, progress: Progress) -> list[Attempt]:
    """Train the task in each way, from one seed, and test it."""
    from peft import LoraConfig

    from ..tuner import EigenLoraxConfig

    task = read()
    targets = sorted({name.rpartition(".")[2] for name in pack.info.modules})
    at_random = methods.random_basis(pack, seed=SEED)
    ways: dict[str, tuple[str, Callable[[], Any]]] = {
        "coefficients": ("coefficients", lambda: EigenLoraxConfig(subspace=pack, r=8, task_type="SEQ_CLS")),
        "core": ("coefficients", lambda: EigenLoraxConfig(subspace=pack, r=8, core=True, task_type="SEQ_CLS")),
        "coefficients, random basis": (
            "coefficients",
            lambda: EigenLoraxConfig(subspace=at_random, r=8, task_type="SEQ_CLS"),
        ),
        "LoRA r=8": ("LoRA", lambda: LoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS")),
    }
    attempts = []
    for done, (method, (kind, config)) in enumerate(ways.items()):
        progress("training a new task", done, len(ways))
        recipe = Recipe(RATES[kind], "adamw" if kind == "LoRA" else "soap", HEAD_RATE)
        attempts.append(_attempt(method, config(), recipe, task, model_folder))
    progress("training a new task", len(ways), len(ways))
    return attempts


def _attempt(method: str, config: Any, recipe: Recipe, task: NewTask, model_folder: Path) -> Attempt:
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(task.labels))
        model = get_peft_model(base, config)
        _train(model, recipe, tokenizer, task.train)
    accuracy = _accuracy(model.eval(), tokenizer, task.test)
    numbers = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    return Attempt(method, numbers, accuracy, time.perf_counter() - started)


def _train(model: "PeftModel", recipe: Recipe, tokenizer: Any, rows: list[tuple[str, int]]) -> None:
    """A linear decay; the head learns at a rate of its own, whatever the method."""
    optimizer = training_run.make_optimizer(model, recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = random.Random(SEED)  # noqa: S311
    model.train()
    for _ in range(EPOCHS):
        # rows of like length meet in a batch, which halves the padding
        sorted_rows = sorted(order.sample(rows, len(rows)), key=lambda row: len(row[0]) // 40)
        starts = list(range(0, len(rows), BATCH))
        for start in order.sample(starts, len(starts)):
            chosen = sorted_rows[start : start + BATCH]
            labels = torch.tensor([label for _, label in chosen])
            loss = model(**_encoded(tokenizer, chosen), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _accuracy(model: "PeftModel", tokenizer: Any, rows: list[tuple[str, int]]) -> float:
    with torch.inference_mode():
        predicted: list[int] = model(**_encoded(tokenizer, rows)).logits.argmax(dim=-1).tolist()
    return sum(one == label for one, (_, label) in zip(predicted, rows, strict=True)) / len(rows)


def _encoded(tokenizer: Any, rows: list[tuple[str, int]]) -> Any:
    texts = [text for text, _ in rows]
    return tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
