"""What a training is asked for, and its defaults. Nothing here imports torch: the command's help reads it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.options import suggestion
from ..errors import OptionError

TASKS = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
"""The tasks, and PEFT's names of them."""

MAX_LENGTH = {"text-classification": 128, "causal-lm": 512}
"""Tokens of a row, where nothing else is said and the model has room for them."""

EVALUATION_BATCH = 64

DEFAULTS = {"num_train_epochs": 3.0, "learning_rate": 2e-2, "per_device_train_batch_size": 16, "seed": 0}
"""What is ours of transformers' `TrainingArguments` and has an option of its own. Coefficients want a learning rate
that is an order of magnitude above that of a LoRA."""

MIN_STEPS = 150
"""Steps of the optimizer that the default number of epochs comes to, at least. Three epochs of 200 rows are 39 steps,
after which accuracies were 5 to 47 points below what 150 steps reach; 300 brought no more (experiments/LOG.md)."""

MAX_POINTS = 12
"""Checkpoints and evaluations on the way, at most, where the default number of epochs is a larger one."""

HEAD_LEARNING_RATE = 5e-3
"""Of what is trained beside coefficients."""

OWN_OPTIONS = dict(zip(("epochs", "learning_rate", "batch_size", "seed"), DEFAULTS, strict=True))
"""Those options, by field of `Training`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of columns. `pair` is the second text of tasks on two texts. Language modelling takes `prompt` and
    `completion` where there is no column `text`."""

    text: str = "text"
    label: str = "label"
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class Training:
    """One training. None stands for a default: `DEFAULTS`, `MAX_LENGTH`, `HEAD_LEARNING_RATE`; the pack's base model;
    an alpha of twice the rank, which scales the update by 2.

    epochs: 3 by default, or as many as come to `MIN_STEPS` steps. learning_rate: of coefficients, which are trained
    with `tuner.SOAP`, unless trainer_options name an `optim`; that one then trains all at this rate. trainer_options:
    any other fields of `TrainingArguments`; with a `save_total_limit`, so many checkpoints stay in the end.
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
        for name, least in (("batch_size", 1), ("max_length", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} must be at least {least}, got {value!r}.")
        for option, field_ in OWN_OPTIONS.items():
            if getattr(self, option) is not None and field_ in self.trainer_options:
                raise OptionError(
                    f"{field_} stands among the Trainer's options, and {option} was given too. Give one of them."
                )
        if self.head_learning_rate is not None and not self.own_optimizer:
            raise OptionError(
                "an optimizer stands among the Trainer's options (optim): it has one rate, and head_learning_rate is "
                "for the default one. Give one of them."
            )

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether checkpoints stay when the training has ended: where a number of them is asked for."""
        return "save_total_limit" in self.trainer_options

    @property
    def own_optimizer(self) -> bool:
        """Whether coefficients get `tuner.SOAP`, rather than an optimizer of the Trainer's."""
        return not {"optim", "optim_args", "optim_target_modules"} & set(self.trainer_options)


def check_task(task: str) -> None:
    """`OptionError` unless it is one of `TASKS`."""
    if task not in TASKS:
        raise OptionError(f"there is no task {task!r}.{suggestion(task, TASKS)} There are: {', '.join(TASKS)}.")
