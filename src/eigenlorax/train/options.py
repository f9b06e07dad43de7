"""Options of a training, and their defaults.

Imports no torch, because the help of the command line imports this module.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.options import suggestion
from ..errors import OptionError

RANK = 8
"""Default rank of an update."""
TASKS = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
"""Task → PEFT's task type."""

MAX_LENGTH = {"text-classification": 128, "causal-lm": 512}
"""Task → default maximum number of tokens per row. The model's limit applies if it is lower."""

METRIC = "accuracy"
"""Metric of a classification that decides unless another one is passed."""

EVALUATION_BATCH = 64
"""Default number of rows per batch in an evaluation."""

DEFAULTS = {"num_train_epochs": 3.0, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "seed": 0}
"""Field of transformers' `TrainingArguments` → its default, for the fields of `OWN_OPTIONS`. Coefficients need a
learning rate about ten times as high as a LoRA."""

MIN_STEPS = 150
"""Minimum number of optimizer steps with the default number of epochs. Three epochs of 200 rows are 39 steps, after
which accuracies were 5 to 47 points below those after 150 steps; 300 steps were not better (experiments/LOG.md)."""

MIN_REFERENCE_STEPS = 40
"""The same for a training from a reference, which 75 and 150 steps did not improve (experiments/LOG.md)."""

MAX_POINTS = 12
"""Maximum number of checkpoints and of evaluations during a training with the default number of epochs."""

REFERENCE_DEFAULTS = {"learning_rate": 3e-3, "warmup_steps": 0.1}
"""The same for a training from a reference, whose LoRA is trained with AdamW: the best of three rates for users of two
populations (docs/results.md), and the fraction of steps in which the rate grows to it."""

HEAD_LEARNING_RATE, REFERENCE_HEAD_LEARNING_RATE = 2e-2, 5e-3
"""Default learning rates of other trained parameters, such as a classification head: of a new head, and of a trained
one with its reference. On eight tasks, new heads gained two points over a rate of 0.005 (docs/results.md)."""

GRADIENT_BATCHES = 8
"""Number of batches whose gradients give the components of `n_gradient`."""

OWN_OPTIONS = dict(zip(("epochs", "learning_rate", "batch_size", "seed"), DEFAULTS, strict=True))
"""Field of `Training` → the field of `TrainingArguments` that it sets. Its default is in `DEFAULTS`."""


def default_epochs(
    steps_per_epoch: int, min_steps: int = MIN_STEPS, epochs: float = DEFAULTS["num_train_epochs"]
) -> int:
    """Return the default number of epochs, at least `epochs`, and as many as give `min_steps` optimizer steps."""
    return math.ceil(max(epochs, min_steps / steps_per_epoch))


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a file of rows.

    Attributes:
        text: Column of the text. Language models use the columns `prompt` and `completion` if there is no such column.
        label: Column of the label.
        pair: Column of the second text, for tasks on pairs of texts.
    """

    text: str = "text"
    label: str = "label"
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """Options of one training, checked when built.

    Attributes:
        task: "text-classification" or "causal-lm".
        train: File of training rows.
        evaluation: File of evaluation rows. Default: no evaluation.
        model: Folder or Hub id of the base model. Default: the pack's.
        rank: Rank of the update.
        alpha: `lora_alpha`; the update is scaled by alpha / rank. Default: twice the rank.
        core: Train one k × k matrix per module instead of two factors.
        start: Initial update: "zero", "mean", the name of an adapter in the pack, or the path of a LoRA.
        reference: LoRA to train from, with its head, as PEFT goes on with a trained adapter: a folder, or the name of a
            version of the pack, such as "members@common". Rank, alpha and modules are its own. Default: none.
        labels: Names of the classes in the order of the reference's head. Needed if the labels of the rows are texts.
        n_extra: Number of random components that are added per side.
        extra_seed: Seed of these components.
        n_gradient: Number of components per side that the gradients of the first batches add. They are stored with the
            adapter.
        epochs: Number of epochs. Default: 3, or more for at least `MIN_STEPS` steps, `MIN_REFERENCE_STEPS` from a
            reference.
        learning_rate: Learning rate of the coefficients (optimizer: `tuner.SOAP`), 0.02 by default, or of the LoRA from
            a reference (AdamW), 0.003 by default. If trainer_options contain an `optim`, learning rate of all
            parameters.
        head_learning_rate: Learning rate of other parameters, such as a classification head. Default: 0.02, or 0.005
            from a reference, whose head is trained already.
        batch_size: Rows per batch. Default: 16.
        seed: Seed of the head's initial values and of the order of the rows. Default: 0.
        max_length: Maximum number of tokens per row. Default: `MAX_LENGTH` of the task.
        metric: Name of a classification's metric, as in `metrics.find`. It decides whether the adapter is better than
            its baseline, and which checkpoint is best (`load_best_model_at_end`). Default: accuracy, and the loss for
            checkpoints.
        columns: Names of the columns.
        trainer_options: Other fields of `TrainingArguments`. By default no checkpoint is kept after the training; with
            a `save_total_limit`, this number of checkpoints is kept.

    Raises:
        OptionError: A value is out of range, or two options contradict each other.
    """

    task: str
    train: Path
    evaluation: Path | None = None
    model: str | None = None
    rank: int = RANK
    alpha: float | None = None
    core: bool = False
    start: str = "zero"
    reference: str | None = None
    labels: Sequence[str] | None = None
    n_extra: int = 0
    extra_seed: int = 0
    n_gradient: int = 0
    epochs: float | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    batch_size: int | None = None
    seed: int | None = None
    max_length: int | None = None
    metric: str | None = None
    columns: Columns = Columns()
    trainer_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_task(self.task)
        for name in ("alpha", "epochs", "learning_rate", "head_learning_rate"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                raise OptionError(f"{name} must be a number above 0, got {number!r}.")
        for name, minimum in (("batch_size", 1), ("max_length", 2), ("seed", 0), ("n_extra", 0), ("n_gradient", 0)):
            number = getattr(self, name)
            if number is not None and number < minimum:
                raise OptionError(f"{name} must be at least {minimum}, got {number!r}.")
        for option, trainer_field in OWN_OPTIONS.items():
            if getattr(self, option) is not None and trainer_field in self.trainer_options:
                raise OptionError(
                    f"{trainer_field!r} is among the Trainer's options, and {option} was passed too. Pass one of them."
                )
        self._check_reference()
        if self.metric is not None and not self.has_classes:
            raise OptionError(
                f"metric={self.metric!r} (--metric) scores predicted classes, and {self.task} has none: it is measured "
                "by its perplexity. Remove it."
            )
        if self.head_learning_rate is not None and not self.has_default_optimizer:
            raise OptionError(
                "an optimizer is among the Trainer's options (optim). It has a single learning rate, and "
                "head_learning_rate belongs to the default optimizer. Pass one of them."
            )

    @property
    def keeps_checkpoints(self) -> bool:
        """True if checkpoints are kept after the training."""
        return "save_total_limit" in self.trainer_options

    @property
    def has_classes(self) -> bool:
        """True if a head is trained to classify texts."""
        return self.task == "text-classification"

    @property
    def has_default_optimizer(self) -> bool:
        """True if heads have a learning rate of their own, False for an optimizer of the Trainer."""
        return not {"optim", "optim_args", "optim_target_modules"} & set(self.trainer_options)

    def _check_reference(self) -> None:
        """Raise `OptionError` for an option that has no effect with, or without, a reference."""
        if self.reference is None:
            if self.labels is not None:
                raise OptionError(
                    "labels are the classes of a reference's head, and a new head has those of the training rows. "
                    "Remove labels, or pass reference (--reference)."
                )
            return
        defaults = {spec.name: spec.default for spec in fields(self)}
        for name in ("rank", "alpha", "core", "start", "n_extra", "extra_seed", "n_gradient"):
            if getattr(self, name) != defaults[name]:
                raise OptionError(
                    f"{name}= (--{name.replace('_', '-')}) has no effect with reference={self.reference!r}: rank, "
                    "alpha, modules and initial values are those of the reference. Remove it."
                )
        if self.labels is not None and not self.has_classes:
            raise OptionError(f"labels has no effect on the task {self.task}. Remove it.")


def check_task(task: str) -> None:
    """Raise `OptionError` unless the task is one of `TASKS`."""
    if task not in TASKS:
        raise OptionError(f"there is no task {task!r}.{suggestion(task, TASKS)} There are: {', '.join(TASKS)}.")
