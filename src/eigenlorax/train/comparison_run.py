"""One run of a method comparison: trains a model with transformers' Trainer, and scores it on test rows.

`eigenlorax compare` and the experiments train with this module. `eigenlorax train` uses the module `trainer`.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from . import methods
from .metrics import Metric, accuracy
from .options import HEAD_LEARNING_RATE


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters that all compared methods share.

    The learning rate rises linearly during the warm-up, and then decays to zero.

    Attributes:
        learning_rate: Learning rate of the method's parameters; of the head if the method has no other parameters.
        optimizer: Optimizer of the method's parameters, "adamw" or "soap" (`tuner.SOAP`). AdamW trains the head.
        head_learning_rate: Learning rate of the head's parameters, the same for every method.
        epochs: Number of epochs.
        batch_size: Rows per batch.
        warmup: Fraction of the steps in the warm-up.
        schedule: Name of transformers' learning-rate schedule.
        evaluations: Number of scores during training, at equal distances. The last one is after the last step.
        bf16: Compute in bfloat16 by autocast. Trained parameters stay float32.
        by_length: Put rows of similar length into one batch, which halves the padding. Rows must have "input_ids".
    """

    learning_rate: float
    optimizer: str = "adamw"
    head_learning_rate: float = HEAD_LEARNING_RATE
    epochs: float = 4.0
    batch_size: int = 32
    warmup: float = 0.1
    schedule: str = "linear"
    evaluations: int = 8
    bf16: bool = False
    by_length: bool = True


@dataclass(frozen=True, slots=True)
class RunData:
    """Encoded rows of one run, and the functions that score them.

    Attributes:
        train: Training rows.
        validation: Rows that are scored during training.
        test: Rows that are scored after training.
        collate: Function that makes a padded batch of rows.
        metric: Function (predictions, labels) that returns a score.
        reduce_logits: Function (logits, labels) that returns the predictions of a batch, for models whose logits of all
            tokens would fill the memory. Default: the predictions are the logits.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    collate: Callable[..., Any]
    metric: Metric = accuracy
    reduce_logits: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Score of a run during training.

    Attributes:
        step: Number of optimizer steps so far.
        epoch: Number of epochs so far.
        seconds: Seconds of training so far, without evaluation.
        loss: Mean training loss since the last checkpoint.
        score: Score on the validation rows.
    """

    step: int
    epoch: float
    seconds: float
    loss: float
    score: float


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Result of one run.

    Attributes:
        parameters: Number of trained parameters of the method.
        head_parameters: Number of trained parameters of the head.
        checkpoints: Scores during training.
        score: Score on the test rows.
        seconds: Seconds of training, without evaluation.
        cpu_seconds: CPU seconds of training, with evaluation on the validation rows.
        predictions: Logits of the test rows, or the results of `RunData.reduce_logits`.
    """

    parameters: int
    head_parameters: int
    checkpoints: list[Checkpoint]
    score: float
    seconds: float
    cpu_seconds: float
    predictions: np.ndarray = field(repr=False)


def run(model: Any, rows: RunData, recipe: Recipe, *, seed: int) -> TrainingRun:
    """Train the parameters of a model that require gradients, and score the model on the test rows.

    Sets the global seeds of random, NumPy and torch, as the Trainer does.

    Args:
        model: Model with trainable parameters.
        rows: Encoded rows.
        recipe: Hyperparameters.
        seed: Seed of the order of the rows, and of dropout.

    Raises:
        NonFiniteError: The training diverges.
    """
    parameters, head_parameters = methods.count_parameters(model)
    cpu_started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer, clock = _make_trainer(model, rows, recipe, seed, Path(scratch))
        trainer.train()
        cpu_seconds = time.process_time() - cpu_started
        checkpoints = _checkpoints(trainer.state.log_history, clock.seconds_at)
        predictions, score = _predict(trainer, rows, recipe)
    if not math.isfinite(checkpoints[-1].loss) or not np.isfinite(predictions).all():
        raise NonFiniteError("the training diverged: losses or predictions are NaN or Inf. Try a lower learning rate.")
    return TrainingRun(
        parameters=parameters,
        head_parameters=head_parameters,
        checkpoints=checkpoints,
        score=score,
        seconds=checkpoints[-1].seconds,
        cpu_seconds=cpu_seconds,
        predictions=predictions,
    )


def _make_trainer(model: Any, rows: RunData, recipe: Recipe, seed: int, scratch: Path) -> tuple[Any, Any]:
    """Return the Trainer of a run, and its callback from `_make_clock`.

    Args:
        model: Model with trainable parameters.
        rows: Encoded rows.
        recipe: Hyperparameters.
        seed: Seed of the order of the rows, and of dropout.
        scratch: Folder for files of the Trainer.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    steps = math.ceil(recipe.epochs * math.ceil(len(rows.train) / recipe.batch_size))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.warmup * steps),
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length" if recipe.by_length else "random",
        eval_strategy="no",
        logging_strategy="no",
        save_strategy="no",
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    clock = _make_clock({math.ceil(steps * n / recipe.evaluations) for n in range(1, recipe.evaluations + 1)})

    class SequentialEvalTrainer(Trainer):  # type: ignore[misc]
        # group_by_length would also reorder the evaluated rows, and with them the predictions
        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            return torch.utils.data.SequentialSampler(eval_dataset)

    trainer = SequentialEvalTrainer(
        model,
        arguments,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        data_collator=rows.collate,
        compute_metrics=lambda evaluated: {"score": rows.metric(evaluated.predictions, evaluated.label_ids)},
        preprocess_logits_for_metrics=rows.reduce_logits,
        optimizers=(make_optimizer(model, recipe), None),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def _predict(trainer: Any, rows: RunData, recipe: Recipe) -> tuple[np.ndarray, float]:
    """Return the predictions in the order of the test rows, and their score."""
    order = list(range(len(rows.test)))
    if recipe.by_length:
        order.sort(key=lambda index: len(rows.test[index]["input_ids"]))
    output = trainer.predict([rows.test[index] for index in order])
    return output.predictions[np.argsort(order)], rows.metric(output.predictions, output.label_ids)


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, with one parameter group for the method and one for the head.

    Args:
        model: Model with trainable parameters.
        recipe: Hyperparameters.
    """
    method_parameters: list[Any] = []
    head_parameters: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head_parameters if methods.is_head(name) else method_parameters).append(parameter)
    head_learning_rate = recipe.head_learning_rate if method_parameters else recipe.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": method_parameters, "lr": recipe.learning_rate},
        # max_side=0 makes SOAP update the head as AdamW does; AdamW ignores the key
        {"params": head_parameters, "lr": head_learning_rate, "max_side": 0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    from ..tuner import SOAP

    return SOAP(groups)


def _make_clock(evaluated_steps: set[int]) -> Any:
    """Return a callback of the Trainer that evaluates after these steps.

    Its attribute `seconds_at` maps each step to the seconds of training up to it, without evaluations.
    """
    from transformers import TrainerCallback

    class TrainingClock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds_at: dict[int, float] = {}
            self._started = self._stopped = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._started = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step in evaluated_steps:
                self._stopped = time.perf_counter()
                self.seconds_at[state.global_step] = self._stopped - self._started
                control.should_log = control.should_evaluate = True

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            # add the duration of the evaluation to the start, so that later times do not include it
            self._started += time.perf_counter() - self._stopped

    return TrainingClock()


def _checkpoints(log_history: list[dict[str, Any]], seconds_at: dict[int, float]) -> list[Checkpoint]:
    """Return the checkpoints in the Trainer's log. seconds_at: step → seconds of training up to it."""
    losses = {entry["step"]: entry["loss"] for entry in log_history if "loss" in entry}
    return [
        Checkpoint(
            step=entry["step"],
            epoch=entry["epoch"],
            seconds=seconds_at[entry["step"]],
            loss=losses.get(entry["step"], math.nan),
            score=entry["eval_score"],
        )
        for entry in log_history
        if "eval_score" in entry
    ]
