"""The record of a training in its folder: the settings that the training depends on, and its result."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

from ..core import atomic_files, json_dataclasses, keys
from ..errors import FormatError, OptionError
from ..version import __version__
from .baselines import Baseline
from .data import Labels
from .figures import ClassificationFigures, Figures, LanguageModelFigures

RECORD = "training.json"
"""File in the folder of a training with its settings and its result."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of a training; the field names are those of the record and of `--json`.

    Attributes:
        name: Name of the adapter in the pack; empty before it is added.
        task: "text-classification" or "causal-lm".
        model: Base model that was loaded.
        labels: Class names in the order of the head; None for a language model.
        rows: Number of training rows.
        modules: Number of modules with coefficients.
        numbers: Number of trained coefficients.
        head_numbers: Number of other trained parameters.
        steps: Number of optimizer steps.
        epochs: Number of epochs.
        figures: Figures of the trained model on the evaluation rows; None without evaluation rows.
        baseline: Comparison with a baseline that needs no training.
        history: Losses and accuracies during the training, with their epoch and step.
        folder: Folder of the adapter.
        added: Whether the adapter was added to the pack.
        delta_error: Relative error of the adapter in the pack; None if it was not added.
        rounding_error: Part of that error that rounding causes; None if the adapter was not added.
        seconds: Duration of the call in seconds.
    """

    name: str
    task: str
    model: str
    labels: list[str] | None
    rows: int
    modules: int
    numbers: int
    head_numbers: int
    steps: int
    epochs: float
    figures: Figures | None
    baseline: Baseline
    history: list[dict[str, float]]
    folder: Path
    added: bool
    delta_error: float | None
    rounding_error: float | None
    seconds: float


def write(output: Path, settings: Mapping[str, Any], labels: Labels | None, result: TrainingResult | None) -> None:
    """Write the record of a training.

    Args:
        output: Folder of the training.
        settings: Everything that the training depends on, as JSON. A resumed training must have the same settings.
        labels: Classes of the head; None for a language model.
        result: Result of the training; None if it is not finished.
    """
    record = {
        "eigenlorax": __version__,
        "asked": dict(settings),
        "labels": list(labels.names) if labels else None,
        # the folder is not stored, because it may be moved
        "result": {**asdict(result), "folder": None} if result else None,
    }
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    atomic_files.write_file(output / RECORD, text.encode("utf-8", errors="surrogatepass"))


def read(output: Path) -> dict[str, Any]:
    """Read the record of a training.

    Args:
        output: Folder of the training.

    Returns:
        The JSON document. Its key `labels` has the class names in the order of the head, or None.

    Raises:
        FormatError: The folder was not written by `eigenlorax train`.
    """
    path = output / RECORD
    if not path.is_file():
        raise FormatError(f"{output} has no {RECORD}: it was not written by `eigenlorax train`.")
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("labels"), list | None):
        raise FormatError(f"{path} is not a record of `eigenlorax train`.")
    return record


def finished_result(output: Path, settings: Mapping[str, Any]) -> TrainingResult | None:
    """Return the result of the training in a folder, or None if the training is not finished.

    Args:
        output: Folder of the training.
        settings: Settings of the training that resumes it.

    Raises:
        OptionError: The training in the folder has other settings.
        FormatError: The folder was not written by `eigenlorax train`, or its record is damaged.
    """
    record = read(output)
    stored = record.get("asked", {})
    differing = sorted(option for option in settings if stored.get(option) != settings[option])
    if differing:
        first = differing[0]
        raise OptionError(
            f"{output} was started with {first}={stored.get(first)!r}, and now it is {settings[first]!r}. "
            "resume=True (--resume) continues the same training. Choose another folder for another training."
        )
    if record.get("result") is not None and (output / keys.ADAPTER_WEIGHTS).is_file():
        return _parse_result(output, record["result"])
    return None


def _parse_result(output: Path, document: Any) -> TrainingResult:
    """Return the result in a record. Raises `FormatError` if a field is missing or has another type."""
    is_classification = isinstance(document, dict) and document.get("labels") is not None
    figures = ClassificationFigures if is_classification else LanguageModelFigures
    types = {**get_type_hints(TrainingResult), "figures": figures | None, "folder": NoneType}
    try:
        fields = json_dataclasses.from_json(dict, document, "result")
        parsed = {
            name: json_dataclasses.from_json(type_, fields.get(name, ...), f"result.{name}")
            for name, type_ in types.items()
        }
    except json_dataclasses.JsonTypeError as error:
        raise FormatError(f"{output / RECORD} is not a record of `eigenlorax train`: {error}") from error
    return TrainingResult(**{**parsed, "folder": output})
