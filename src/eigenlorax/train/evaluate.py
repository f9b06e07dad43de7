"""An adapter of a pack on a file of rows: accuracy or perplexity, each row counted once."""

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core import keys
from ..errors import AdapterNameError, FormatError, NonFiniteError, OptionError, reason
from ..fitting.fit import Progress
from ..pack.pack import Pack
from ..pack.packed_adapter import PackedAdapter
from . import data, examples, models
from .data import Labels
from .examples import IGNORED, Collate, Example
from .options import EVALUATION_BATCH, TASKS, Columns, check_task

CONFUSION_CLASSES = 20
"""The most classes that a table of confusions is made for."""


@dataclass(frozen=True, slots=True)
class Classified:
    """Figures of a classification. loss is the mean cross-entropy of a row, in nats; majority the share of the most
    frequent class among these rows. p_value: the probability of so high an accuracy where the true one is that share.
    confusion[i][j]: rows of class i that were taken for j, where classes are few.
    """

    rows: int
    loss: float
    accuracy: float
    majority: float
    p_value: float
    labels: list[str]
    confusion: list[list[int]] | None


@dataclass(frozen=True, slots=True)
class Modelled:
    """Figures of a language model. loss is the mean cross-entropy of a predicted token, in nats, over all tokens of all
    rows; perplexity is its exponential (None where that is no longer a number)."""

    rows: int
    tokens: int
    loss: float
    perplexity: float | None


Figures = Classified | Modelled


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An adapter's figures on a file; seconds with the loading of the model."""

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
    progress: Progress | None = None,
) -> Evaluated:
    """Load an adapter with PEFT on the base model, and count.

    task: the adapter's own where it is not given. labels: the names of the head's classes in their order, for files
    whose labels are texts.
    """
    started, columns = time.perf_counter(), columns or Columns()
    check_sizes(batch_size, max_length)
    if labels is not None:
        check_labels(labels)
    opened = Pack.open(pack)
    adapter, folder = opened.packed(name), opened.adapter_folder(name)
    task = task_of(adapter, task)
    table = data.read(rows, columns.label)
    models.check_installed()
    with models.quiet():
        base, revision = models.of_pack(opened, model)
        config = models.config_of(base, revision)
        tokenizer = models.tokenizer_of(base, revision)
        most = examples.length(task, max_length, tokenizer, config)
        classes = None
        if task == "text-classification":
            classes = classes_of(classes_of_head(adapter, config), labels, table, columns)
            found = examples.classification(table, classes, columns, tokenizer, most)
        else:
            check_modelled(adapter, config)
            found = examples.modelling(table, columns, tokenizer, most)
        from peft import PeftModel

        network = PeftModel.from_pretrained(models.load(base, revision, classes, tokenizer), folder)
        network.to(device())
        figures = measure(network, found, examples.collator(task, tokenizer), classes, batch_size, progress)
    return Evaluated(name, task, base, rows, figures, time.perf_counter() - started)


def check_sizes(batch_size: int, max_length: int | None) -> None:
    """`OptionError` unless there is room for a row, and in it for a token and what it is predicted from."""
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}.")
    if max_length is not None and max_length < 2:
        raise OptionError(f"max_length must be at least 2, got {max_length}.")


def check_labels(names: Sequence[str]) -> None:
    """`OptionError` unless every class has a name of its own."""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice or not all(names):
        wrong = f"{twice[0]!r} is there twice" if twice else "one of them is empty"
        raise OptionError(f"the labels {', '.join(names)} are not the names of classes: {wrong}. Name each class once.")


def task_of(adapter: PackedAdapter, asked: str | None) -> str:
    """The task that was asked for, unless the adapter says that it is for another one, or what it says."""
    kind = json.loads(adapter.source_config).get("task_type")
    if asked is not None:
        check_task(asked)
        if kind in TASKS.values() and kind != TASKS[asked]:
            raise OptionError(f"adapter {adapter.name!r} has the task type {kind!r}: it is not for {asked}.")
        return asked
    found = [task for task, theirs in TASKS.items() if theirs == kind]
    if not found:
        raise OptionError(
            f"adapter {adapter.name!r} has the task type {kind!r}; name one of {', '.join(TASKS)} with task= (--task)."
        )
    return found[0]


def classes_of_head(adapter: PackedAdapter, config: Any) -> int:
    """How many classes an adapter's head tells apart: the number with which the model's head has its shapes."""
    from transformers import AutoModelForSequenceClassification

    shapes = {
        name: tuple(tensor.shape) for key, tensor in adapter.heads.items() if (name := _name_in_model(key)) is not None
    }
    if not shapes:
        raise AdapterNameError(f"adapter {adapter.name!r} has no head: there is nothing that tells classes apart.")
    config = copy.deepcopy(config)

    def fits(n: int) -> bool:
        config.num_labels = n
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        theirs = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        return all(theirs.get(key) == shape for key, shape in shapes.items())

    for n in sorted({shape[0] for shape in shapes.values()}):
        # trained biases fit whatever the number of classes is
        if fits(n) and not fits(n + 1):
            return n
    first = min(shapes)
    raise FormatError(
        f"the head of adapter {adapter.name!r}, such as {first} of shape {shapes[first]}, is not one of a "
        f"{config.model_type} model for classification. It belongs to a different base model."
    )


def check_modelled(adapter: PackedAdapter, config: Any) -> None:
    """`OptionError` where an adapter has a head that the language model does not."""
    if not adapter.heads:
        return
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(config).state_dict().keys()
    except ValueError as error:
        raise OptionError(f"there is no {config.model_type} model for causal-lm: {reason(error)}") from error
    for key in sorted(adapter.heads):
        name = _name_in_model(key)
        if name is not None and name not in theirs:
            raise OptionError(
                f"adapter {adapter.name!r} has a head, {name}, that a {config.model_type} model for causal-lm does not "
                "have: it is for another task, such as text-classification."
            )


def _name_in_model(key: str) -> str | None:
    """What a parameter of an adapter's is called in the model. With trained biases, PEFT writes some under the names of
    what it wraps modules in, those of a head twice: None for the second."""
    if {"modules_to_save", "original_module"} & set(key.split(".")):
        return None
    return key.removeprefix(keys.MODEL_PREFIX).replace(".base_layer.", ".")


def classes_of(n: int, names: Sequence[str] | None, table: data.Table, columns: Columns) -> Labels:
    """The n classes of a head: those named, else those that the file itself names, else numbers."""
    names = names or table.classes
    if names is None:
        name = data.named_label(table, columns)
        if name is not None:
            raise OptionError(
                f"{table.where} has labels such as {name!r}, and a pack keeps no names of classes: give the adapter's "
                f"{n} in the order of its head with labels= (--labels), or the folder that `eigenlorax train` has "
                "written."
            )
        return data.numbered(n)
    if len(names) != n:
        raise OptionError(f"{len(names)} labels are named, and the adapter's head has {n}: {', '.join(names)}.")
    return Labels(tuple(names))


def device() -> torch.device:
    """Where models are run: on the accelerator, if there is one."""
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
) -> Figures:
    """The figures of a model that is loaded, wherever it is: of a classification if there are labels."""
    model.eval()
    loss, tokens, answers, done = 0.0, 0, [], 0
    for inputs, wanted in batches(model, rows, collate, batch_size):
        if progress is not None:
            progress("evaluating", done, len(rows))
        done += len(wanted)
        with torch.inference_mode():
            logits = model(**inputs).logits
        if labels is None:
            logits, wanted = predicted(logits, wanted)
            tokens += len(wanted)
        else:
            answers += logits.argmax(dim=-1).tolist()
        logits = exact(logits)
        loss += float(cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
    if progress is not None:
        progress("evaluating", len(rows), len(rows))
    if not math.isfinite(loss):
        raise NonFiniteError("the model's loss on these rows is not a number: its weights are damaged, or diverged.")
    if labels is None:
        return Modelled(len(rows), tokens, loss / tokens, perplexity(loss / tokens))
    return _classified([row["labels"] for row in rows], answers, loss / len(rows), labels)


def batches(
    model: Any, rows: Sequence[Example], collate: Collate, batch_size: int
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What a model is given, where it is, and what it should say: its labels."""
    where = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        inputs = dict(collate([dict(row) for row in rows[start : start + batch_size]]).to(where))
        yield inputs, inputs.pop("labels")


def predicted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that count, a row each, and these tokens: each is predicted from what is before it."""
    counts = labels[:, 1:] != IGNORED
    return logits[:, :-1][counts], labels[:, 1:][counts]


def exact(logits: Tensor) -> Tensor:
    """In float64; on the CPU where the accelerator has no such numbers."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def perplexity(loss: float) -> float | None:
    """The exponential of a mean loss, None where that is no longer a number."""
    return math.exp(loss) if loss < 700 else None


def binomial_test(right: int, rows: int, rate: float) -> float:
    """The probability that at least so many of the rows are right, where each is with the probability `rate`.

    Of the rate of the most frequent class it is the test of an accuracy against the no-information rate.
    """
    if right == 0 or rate == 1:
        return 1.0
    log, other = math.log(rate), math.log1p(-rate)
    whole = math.lgamma(rows + 1)
    ways = (whole - math.lgamma(one + 1) - math.lgamma(rows - one + 1) for one in range(right, rows + 1))
    return min(1.0, math.fsum(math.exp(way + one * log + (rows - one) * other) for one, way in enumerate(ways, right)))


def _classified(wanted: list[int], answers: list[int], loss: float, labels: Labels) -> Classified:
    pairs = Counter(zip(wanted, answers, strict=True))
    n, classes = len(wanted), range(len(labels.names))
    majority = max(Counter(wanted).values()) / n
    right = sum(pairs[one, one] for one in classes)
    return Classified(
        rows=n,
        loss=loss,
        accuracy=right / n,
        majority=majority,
        p_value=binomial_test(right, n, majority),
        labels=list(labels.names),
        confusion=[[pairs[i, j] for j in classes] for i in classes] if len(classes) <= CONFUSION_CLASSES else None,
    )
