"""The demo's new task: training of coefficients, of a LoRA, and of coefficients over a random basis."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.progress import Progress
from ..pack.pack import Pack
from ..pack.random_pack import random_pack
from . import comparison_run
from .comparison_run import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

EPOCHS, BATCH, MAX_LENGTH, SEED = 8, 16, 48, 0
RATES = {"LoRA": 4e-3, "coefficients": 2e-2}
"""Kind of method → learning rate: the best of three on a quarter of the training messages (experiments/LOG.md)."""
HEAD_RATE = 5e-3


@dataclass(frozen=True, slots=True)
class Attempt:
    """Result of one method on the task.

    Attributes:
        method: Name of the method.
        trained_numbers: Number of trained parameters without the head.
        accuracy: Accuracy on the test rows, 0 to 1.
        seconds: Duration of loading, training and testing in seconds.
    """

    method: str
    trained_numbers: int
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True)
class NewTask:
    """Messages to a shop, with the writer's intent as the label.

    Attributes:
        labels: Class names.
        train: Training rows (text, class number).
        test: Test rows (text, class number).
    """

    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def read() -> NewTask:
    """Read the task's rows from the package."""
    path = files("eigenlorax.train") / "demo_data" / "new_task.json"
    document = json.loads(path.read_text("utf-8"))
    rows = {split: [(row["text"], row["label"]) for row in document[split]] for split in ("train", "test")}
    return NewTask(document["labels"], rows["train"], rows["test"])


def run(pack: Pack, model_folder: Path, progress: Progress) -> list[Attempt]:
    """Train and test the task with each method, from the same seed.

    Args:
        pack: Pack with the subspace.
        model_folder: Folder of the base model.
        progress: Function that is called with ("training a new task", methods done, number of methods).

    Returns:
        One attempt per method.
    """
    from peft import LoraConfig

    from ..tuner import EigenLoraxConfig

    task = read()
    targets = sorted({name.rpartition(".")[2] for name in pack.info.modules})
    control = random_pack(pack, seed=SEED)
    configs: dict[str, tuple[str, Callable[[], Any]]] = {
        "coefficients": ("coefficients", lambda: EigenLoraxConfig(subspace=pack, r=8, task_type="SEQ_CLS")),
        "core": ("coefficients", lambda: EigenLoraxConfig(subspace=pack, r=8, core=True, task_type="SEQ_CLS")),
        "coefficients, random basis": (
            "coefficients",
            lambda: EigenLoraxConfig(subspace=control, r=8, task_type="SEQ_CLS"),
        ),
        "LoRA r=8": ("LoRA", lambda: LoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS")),
    }
    attempts = []
    for done, (method, (kind, config)) in enumerate(configs.items()):
        progress("training a new task", done, len(configs))
        recipe = Recipe(RATES[kind], "adamw" if kind == "LoRA" else "soap", HEAD_RATE)
        attempts.append(_attempt(method, config(), recipe, task, model_folder))
    progress("training a new task", len(configs), len(configs))
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
    """Train with a linear decay. The head has the same learning rate for all methods."""
    optimizer = comparison_run.make_optimizer(model, recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = random.Random(SEED)  # noqa: S311
    model.train()
    for _ in range(EPOCHS):
        # rows of similar length in one batch halve the padding
        sorted_rows = sorted(order.sample(rows, len(rows)), key=lambda row: len(row[0]) // 40)
        starts = list(range(0, len(rows), BATCH))
        for start in order.sample(starts, len(starts)):
            batch = sorted_rows[start : start + BATCH]
            labels = torch.tensor([label for _, label in batch])
            loss = model(**_encode(tokenizer, batch), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _accuracy(model: "PeftModel", tokenizer: Any, rows: list[tuple[str, int]]) -> float:
    with torch.inference_mode():
        predicted: list[int] = model(**_encode(tokenizer, rows)).logits.argmax(dim=-1).tolist()
    return sum(prediction == label for prediction, (_, label) in zip(predicted, rows, strict=True)) / len(rows)


def _encode(tokenizer: Any, rows: list[tuple[str, int]]) -> Any:
    texts = [text for text, _ in rows]
    return tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
