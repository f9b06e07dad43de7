"""Evaluation of an adapter of a pack on a file of rows: accuracy, macro-F1 and other metrics, or perplexity."""

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core import keys
from ..core.adapter import Adapter
from ..core.progress import Progress
from ..errors import AdapterNameError, FormatError, NonFiniteError, OptionError, reason
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import data, examples, figures, metrics, models
from .data import Labels
from .examples import IGNORED, Collate, Example
from .figures import Figures, LanguageModelFigures
from .metrics import NamedMetric
from .options import EVALUATION_BATCH, TASKS, Columns, check_task


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Result of an evaluation; the field names are those of `--json`.

    Attributes:
        name: Name of the adapter in the pack.
        task: "text-classification" or "causal-lm".
        model: Base model that was loaded.
        data: File of rows.
        figures: Figures of the adapter on the rows.
        seconds: Duration in seconds, including loading the model.
    """

    name: str
    task: str
    model: str
    data: Path
    figures: Figures
    seconds: float


def evaluate(
    pack: Path,
    name: str,
    rows: Path,
    *,
    model: str | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    columns: Columns | None = None,
    batch_size: int = EVALUATION_BATCH,
    max_length: int | None = None,
    metric: str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Load an adapter of a pack with PEFT, and evaluate it on a file of rows.

    Args:
        pack: Folder of the pack.
        name: Name of the adapter in the pack.
        rows: File of rows: JSON lines, CSV, or a folder saved by `datasets`.
        model: Base model. Default: the pack's.
        task: "text-classification" or "causal-lm". Default: the adapter's task type.
        labels: Class names in the order of the head. Needed if the file's labels are texts.
        columns: Names of the columns. Default: `Columns()`.
        batch_size: Rows per batch, at least 1.
        max_length: Maximum number of tokens per row, at least 2. Default: 128 for classification, 512 for language
            models.
        metric: Name of a classification's metric, as in `metrics.find`. Default: accuracy.
        progress: Function that is called with ("evaluating", rows done, number of rows).

    Raises:
        OptionError: An option is out of range, or does not fit the adapter or the rows.
        FormatError: The rows or the base model cannot be read, or the adapter belongs to a different base model.
        AdapterNameError: The pack has no such adapter, or the adapter has no head for a classification.
        MissingExtraError: The metric needs a package that is not installed.
        NonFiniteError: The loss is NaN or Inf.
    """
    started, columns = time.perf_counter(), columns or Columns()
    check_sizes(batch_size, max_length)
    if labels is not None:
        check_label_names(labels)
    opened = Pack.open(pack)
    adapter, folder = opened.packed(name), opened.adapter_folder(name)
    task = resolve_task(adapter, task)
    if metric is not None and task != "text-classification":
        raise OptionError(
            f"metric={metric!r} (--metric) scores predicted classes, and {task} has none: it is measured by its "
            "perplexity. Remove it."
        )
    table = data.read(rows, columns.label)
    models.check_installed()
    with models.quiet():
        base, revision = models.resolve_base_model(opened, model)
        config = models.load_config(base, revision)
        tokenizer = models.load_tokenizer(base, revision)
        token_limit = examples.max_tokens(task, max_length, tokenizer, config)
        classes, chosen = None, metrics.ACCURACY
        if task == "text-classification":
            classes = label_names(count_head_classes(adapter, config), labels, table, columns)
            encoded = examples.encode_classification(table, classes, columns, tokenizer, token_limit)
            if metric is not None:
                chosen = metrics.find(metric, len(classes.names), [row["labels"] for row in encoded])
        else:
            check_language_model(adapter, config)
            encoded = examples.encode_language_model(table, columns, tokenizer, token_limit)
        from peft import PeftModel

        peft_model = PeftModel.from_pretrained(models.load_model(base, revision, classes, tokenizer), folder)
        peft_model.to(device())
        collate = examples.collator(task, tokenizer)
        measured = measure(peft_model, encoded, collate, classes, batch_size, progress, metric=chosen)
    return EvaluationResult(name, task, base, rows, measured, time.perf_counter() - started)


def check_sizes(batch_size: int, max_length: int | None) -> None:
    """Raise `OptionError` unless a batch has at least one row, and a row at least two tokens."""
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}.")
    if max_length is not None and max_length < 2:
        raise OptionError(f"max_length must be at least 2, got {max_length}.")


def check_label_names(names: Sequence[str]) -> None:
    """Raise `OptionError` unless all class names are different and not empty."""
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates or not all(names):
        problem = f"{duplicates[0]!r} appears twice" if duplicates else "one of them is empty"
        raise OptionError(f"the labels {', '.join(names)} are not names of classes: {problem}. Name each class once.")


def resolve_task(adapter: PackedAdapter | Adapter, task: str | None) -> str:
    """Return the task of an adapter.

    Args:
        adapter: The adapter.
        task: "text-classification" or "causal-lm". Default: the task type in the adapter's config.

    Raises:
        OptionError: The config has the task type of another task, or `task` is None and the config has no supported
            task type.
    """
    task_type = json.loads(adapter.source_config or "{}").get("task_type")
    if task is not None:
        check_task(task)
        if task_type in TASKS.values() and task_type != TASKS[task]:
            raise OptionError(f"adapter {adapter.name!r} has the task type {task_type!r}: it is not for {task}.")
        return task
    for name, peft_type in TASKS.items():
        if peft_type == task_type:
            return name
    raise OptionError(
        f"adapter {adapter.name!r} has the task type {task_type!r}. Pass one of {', '.join(TASKS)} as task= (--task)."
    )


def count_head_classes(adapter: PackedAdapter | Adapter, config: Any) -> int:
    """Return the number of classes of an adapter's head.

    Builds the model on the meta device with each number of classes that is a length of a head tensor, until the shapes
    are equal.

    Args:
        adapter: Adapter with a head.
        config: Config of the base model.

    Raises:
        AdapterNameError: The adapter has no head.
        FormatError: The head does not fit the model.
    """
    from transformers import AutoModelForSequenceClassification

    shapes = {
        name: tuple(tensor.shape) for key, tensor in adapter.heads.items() if (name := _name_in_model(key)) is not None
    }
    if not shapes:
        raise AdapterNameError(f"adapter {adapter.name!r} has no head, so it cannot classify.")
    config = copy.deepcopy(config)

    def fits(n: int) -> bool:
        config.num_labels = n
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        model_shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        return all(model_shapes.get(key) == shape for key, shape in shapes.items())

    for n in sorted({shape[0] for shape in shapes.values()}):
        # if only trained biases were compared, any number of classes would fit, so n + 1 must not fit
        if fits(n) and not fits(n + 1):
            return n
    first = min(shapes)
    raise FormatError(
        f"the head of adapter {adapter.name!r}, such as {first} of shape {shapes[first]}, does not fit a "
        f"{config.model_type} model for classification. It belongs to a different base model."
    )


def check_language_model(adapter: PackedAdapter | Adapter, config: Any) -> None:
    """Raise `OptionError` if the adapter has a head that the base model, as a language model, does not have.

    Args:
        adapter: Adapter of a pack.
        config: Config of the base model.
    """
    if not adapter.heads:
        return
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model_keys = AutoModelForCausalLM.from_config(config).state_dict().keys()
    except ValueError as error:
        raise OptionError(f"there is no {config.model_type} model for causal-lm: {reason(error)}") from error
    for key in sorted(adapter.heads):
        name = _name_in_model(key)
        if name is not None and name not in model_keys:
            raise OptionError(
                f"adapter {adapter.name!r} has a head, {name}, that a {config.model_type} model for causal-lm does not "
                "have: it is for another task, such as text-classification."
            )


def _name_in_model(key: str) -> str | None:
    """Return the base model's name of a tensor in an adapter's file, or None for a duplicate.

    With trained biases, PEFT writes parameters under the names of its wrapper modules, and the head's biases twice.
    """
    if {"modules_to_save", "original_module"} & set(key.split(".")):
        return None
    return key.removeprefix(keys.MODEL_PREFIX).replace(".base_layer.", ".")


def label_names(n: int, names: Sequence[str] | None, table: data.Table, columns: Columns) -> Labels:
    """Return the classes of a head.

    Args:
        n: Number of classes of the head.
        names: Class names in the order of the head. Default: the names of the file's `ClassLabel`, otherwise numbers.
        table: Rows.
        columns: Names of the columns.

    Raises:
        OptionError: The number of names is not n, or the labels are texts and there are no names.
    """
    names = names or table.classes
    if names is None:
        name = data.first_name(table, columns)
        if name is not None:
            raise OptionError(
                f"{table.path} has labels such as {name!r}, and an adapter does not store class names. Pass its {n} "
                "names in the order of its head as labels= (--labels), or the folder of `eigenlorax train`."
            )
        return data.numbered_labels(n)
    if len(names) != n:
        raise OptionError(f"{len(names)} labels are named, and the adapter's head has {n}: {', '.join(names)}.")
    return Labels(tuple(names))


def device() -> torch.device:
    """Return the CUDA or MPS device if there is one, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def measure(
    model: Any,
    rows: Sequence[Example],
    collate: Collate,
    labels: Labels | None,
    batch_size: int,
    progress: Progress | None = None,
    *,
    metric: NamedMetric = metrics.ACCURACY,
) -> Figures:
    """Evaluate a loaded model on its device.

    Args:
        model: Classifier or language model.
        rows: Encoded rows, at least one.
        collate: Function that makes a padded batch of rows.
        labels: Classes of the head; None for a language model.
        batch_size: Rows per batch.
        progress: Function that is called with ("evaluating", rows done, number of rows).
        metric: Metric of a classification that is computed beside accuracy and macro-F1.

    Raises:
        NonFiniteError: The loss is NaN or Inf.
    """
    model.eval()
    loss, tokens, predictions, done = 0.0, 0, [], 0
    for inputs, targets in batches(model, rows, collate, batch_size):
        if progress is not None:
            progress("evaluating", done, len(rows))
        done += len(targets)
        with torch.inference_mode():
            logits = model(**inputs).logits
        if labels is None:
            logits, targets = next_token_logits(logits, targets)
            tokens += len(targets)
        logits = to_float64(logits)
        if labels is not None:
            predictions.append(logits.cpu().numpy())
        loss += float(cross_entropy(logits, targets.to(logits.device), reduction="sum"))
    if progress is not None:
        progress("evaluating", len(rows), len(rows))
    if not math.isfinite(loss):
        raise NonFiniteError(
            "the model's loss on these rows is NaN or Inf: its weights are damaged, or its training diverged."
        )
    if labels is None:
        return LanguageModelFigures(len(rows), tokens, loss / tokens, figures.perplexity(loss / tokens))
    classes = np.array([row["labels"] for row in rows])
    return figures.classification_figures(classes, np.concatenate(predictions), loss / len(rows), labels, metric)


def batches(
    model: Any, rows: Sequence[Example], collate: Collate, batch_size: int
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield batches of rows: the model's inputs, and the labels.

    Args:
        model: Model whose device gets the tensors.
        rows: Encoded rows.
        collate: Function that makes a padded batch of rows.
        batch_size: Rows per batch.
    """
    model_device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        inputs = dict(collate([dict(row) for row in rows[start : start + batch_size]]).to(model_device))
        yield inputs, inputs.pop("labels")


def next_token_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and targets of all predicted tokens. Logits at one position predict the token at the next.

    Args:
        logits: Logits, (rows, length, vocabulary).
        labels: Token ids, (rows, length); `IGNORED` for tokens that are not predicted.

    Returns:
        Logits, (tokens, vocabulary), and targets, (tokens,).
    """
    is_target = labels[:, 1:] != IGNORED
    return logits[:, :-1][is_target], labels[:, 1:][is_target]


def to_float64(logits: Tensor) -> Tensor:
    """Convert logits to float64, on the CPU if they are on MPS, which has no float64."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()
