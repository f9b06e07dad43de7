"""Options of a training and their defaults. Imports no torch, because the help of the command line reads it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.options import suggestion
from ..errors import OptionError

TASKS = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
"""Task → PEFT's task type."""

MAX_LENGTH = {"text-classification": 128, "causal-lm": 512}
"""Default maximum number of tokens per row, if the model has so many positions."""

EVALUATION_BATCH = 64

DEFAULTS = {"num_train_epochs": 3.0, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "seed": 0}
"""Defaults of fields of transformers' `TrainingArguments` that have an option of their own. Coefficients need a
learning rate about ten times that of a LoRA."""

MIN_STEPS = 150
"""Minimum number of optimizer steps with the default number of epochs. Three epochs of 200 rows are 39 steps, after
which accuracies were 5 to 47 points below those after 150 steps; 300 steps were not better (experiments/LOG.md)."""

MAX_POINTS = 12
"""Maximum number of checkpoints and evaluations during a training whose default number of epochs is larger."""

HEAD_LEARNING_RATE = 5e-3
"""Default learning rate of parameters that are not coefficients."""

OWN_OPTIONS = dict(zip(("epochs", "learning_rate", "batch_size", "seed"), DEFAULTS, strict=True))
"""Field of `Training` → field of `TrainingArguments` with a default in `DEFAULTS`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns. pair: column of the second text, for tasks on pairs of texts.

    Language modelling uses the columns `prompt` and `completion` if there is no text column.
    """

    text: str = "text"
    label: str = "label"
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """Options of one training, checked when built. None stands for the default.

    Args:
        task: "text-classification" or "causal-lm".
        train: File of training rows.
        evaluation: File of evaluation rows.
        model: Base model. Default: the pack's.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank. Default: twice the rank.
        core: Train one k × k matrix per module instead of two factors.
        start: Initial update: "zero", "mean", the name of an adapter in the pack, or the path of a LoRA.
        n_extra, extra_seed: Number and seed of additional random components per side.
        epochs: Default: 3, or as many as give `MIN_STEPS` steps.
        learning_rate: Of the coefficients, which are trained with `tuner.SOAP`. If trainer_options contain an `optim`,
            that optimizer trains everything at this rate.
        head_learning_rate: Of other parameters, such as a classification head.
        max_length: Maximum number of tokens per row. Default: `MAX_LENGTH`.
        trainer_options: Other fields of `TrainingArguments`. With a `save_total_limit`, so many checkpoints stay after
            the training; without it, none.

    Raises `OptionError` for values out of range and options that contradict each other.
    """

    task: str
    train: Path
    evaluation: Path | None = None
    model: str | None = None
    rank: int = 8
    alpha: float | None = None
    core: bool = False
    start: str = "zero"
    n_extra: int = 0
    extra_seed: int = 0
    epochs: float | None = None
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    batch_size: int | None = None
    seed: int | None = None
    max_length: int | None = None
    columns: Columns = Columns()
    trainer_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_task(self.task)
        for name in ("alpha", "epochs", "learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name} must be a number above 0, got {value!r}.")
        for name, minimum in (("batch_size", 1), ("max_length", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise OptionError(f"{name} must be at least {minimum}, got {value!r}.")
        for option, trainer_field in OWN_OPTIONS.items():
            if getattr(self, option) is not None and trainer_field in self.trainer_options:
                raise OptionError(
                    f"{trainer_field} is among the Trainer's options, and {option} was passed too. Pass one of them."
                )
        if self.head_learning_rate is not None and not self.uses_soap:
            raise OptionError(
                "an optimizer is among the Trainer's options (optim). It has a single learning rate, and "
                "head_learning_rate belongs to the default optimizer. Pass one of them."
            )

    @property
    def keeps_checkpoints(self) -> bool:
        """True if checkpoints are kept after the training."""
        return "save_total_limit" in self.trainer_options

    @property
    def uses_soap(self) -> bool:
        """True if coefficients are trained with `tuner.SOAP`, and not with an optimizer of the Trainer."""
        return not {"optim", "optim_args", "optim_target_modules"} & set(self.trainer_options)


def check_task(task: str) -> None:
    """Raise `OptionError` unless the task is one of `TASKS`."""
    if task not in TASKS:
        raise OptionError(f"there is no task {task!r}.{suggestion(task, TASKS)} There are: {', '.join(TASKS)}.")
