"""One trial: a model trained on rows by transformers' Trainer, and its score on others on the way and in the end."""

import math
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import NonFiniteError
from . import methods
from .examples import IGNORED
from .options import HEAD_LEARNING_RATE

Metric = Callable[[np.ndarray, np.ndarray], float]
"""Predictions, a row each, and what they should be → a score, of which more is better."""


def accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """The share of rows whose highest logit is the right one's."""
    return float((predicted.argmax(axis=-1) == wanted).mean())


def pearson(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's correlation; 0 where all predictions are the same."""
    predicted = predicted.reshape(-1)
    if predicted.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, wanted)[0, 1])


def likelihood(losses: np.ndarray, _: np.ndarray) -> float:
    """The mean log-likelihood of a row's tokens, in nats."""
    return -float(losses.mean())


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each row's tokens, which are predicted from what is before them."""
    wanted = labels[:, 1:]
    each = cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(wanted.shape).sum(-1) / (wanted != IGNORED).sum(-1)


METRICS: dict[str, Metric] = {"accuracy": accuracy, "pearson": pearson, "likelihood": likelihood}

REDUCED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"likelihood": row_losses}
"""Metric → what is kept of a batch's logits, where all of them would fill the memory."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How all methods of a comparison are trained: a linear warm-up and a linear decay to zero.

    learning_rate: of the method's numbers; heads have their own, whatever the method. optimizer: of the method's
    numbers, "adamw" or "soap" (`tuner.SOAP`); heads get AdamW. evaluations: scores taken on the
    way, in equal steps, the end included. bf16: autocast, of what is not trained. by_length: rows of like length meet
    in a batch, which halves the padding; for rows that have a length.
    """

    learning_rate: float
    optimizer: str = "adamw"
    head_learning_rate: float = HEAD_LEARNING_RATE
    epochs: float = 4.0
    batch_size: int = 32
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    evaluations: int = 8
    bf16: bool = False
    by_length: bool = True


@dataclass(frozen=True, slots=True)
class Point:
    """Where a training stood: steps and epochs done, seconds of training alone, the mean loss since the last point, and
    the score on the rows for the way."""

    step: int
    epoch: float
    seconds: float
    loss: float
    score: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What a training came to.

    numbers: trained numbers of the method; head_numbers: of heads. score: on all rows for testing. seconds and
    cpu_seconds: of training, evaluation on the way left out of the first alone. peak_bytes: the most memory of this
    process so far, or of the accelerator in this training. predicted: logits, a row each, or what `REDUCED` keeps of
    them.
    """

    numbers: int
    head_numbers: int
    total_numbers: int
    points: list[Point]
    score: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    predicted: np.ndarray = field(repr=False)


def run(
    model: Any,
    rows: Sequence[Any],
    on_the_way: Sequence[Any],
    test: Sequence[Any],
    collate: Callable[..., Any],
    recipe: Recipe,
    *,
    seed: int,
    metric: str = "accuracy",
) -> Trial:
    """Train a model, whose trained numbers are those that have gradients, and score it. Sets torch's seeds."""
    numbers, head_numbers = methods.counted(model)
    started, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer, clock = _trainer(model, rows, on_the_way, collate, recipe, seed, metric, Path(scratch))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        cpu, whole = time.process_time() - cpu, time.perf_counter() - started
        points = _points(trainer.state.log_history, clock)
        predicted, score = _predicted(trainer, test, recipe, METRICS[metric])
    if not math.isfinite(points[-1].loss) or not np.isfinite(predicted).all():
        raise NonFiniteError("the training has diverged: losses or predictions are no numbers. A lower rate may help.")
    return Trial(
        numbers=numbers,
        head_numbers=head_numbers,
        total_numbers=sum(parameter.numel() for parameter in model.parameters()),
        points=points,
        score=score,
        seconds=points[-1].seconds if points else whole,
        cpu_seconds=cpu,
        peak_bytes=_peak_bytes(),
        predicted=predicted,
    )


def _trainer(
    model: Any,
    rows: Sequence[Any],
    on_the_way: Sequence[Any],
    collate: Callable[..., Any],
    recipe: Recipe,
    seed: int,
    metric: str,
    scratch: Path,
) -> tuple[Any, "_Clock"]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    steps = math.ceil(recipe.epochs * math.ceil(len(rows) / recipe.batch_size))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=2 * recipe.batch_size,
        max_grad_norm=recipe.max_grad_norm,
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
    chosen = optimizer(model, recipe)
    parts = recipe.evaluations
    clock = _Clock({math.ceil(steps * part / parts) for part in range(1, parts + 1)})

    class InOrder(Trainer):  # type: ignore[misc]
        # grouped by length, rows to be scored would be shuffled too, and predictions would not be those of the rows
        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            return torch.utils.data.SequentialSampler(eval_dataset)

    trainer = InOrder(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=on_the_way,
        data_collator=collate,
        compute_metrics=lambda found: {"score": METRICS[metric](found.predictions, found.label_ids)},
        preprocess_logits_for_metrics=REDUCED.get(metric),
        optimizers=(chosen, _schedule(chosen, steps, recipe.warmup)),
        callbacks=[clock.callback()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def _predicted(trainer: Any, rows: Sequence[Any], recipe: Recipe, metric: Metric) -> tuple[np.ndarray, float]:
    """What is predicted, in the order of the rows, and the score."""
    order = list(range(len(rows)))
    if recipe.by_length:
        order.sort(key=lambda place: len(rows[place]["input_ids"]))
    # the Trainer evaluates in the order that it samples in: grouped by length, that is another one each time
    trainer.args.train_sampling_strategy = "random"
    found = trainer.predict([rows[place] for place in order])
    return found.predictions[np.argsort(order)], metric(found.predictions, found.label_ids)


def optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Of the method's numbers as the recipe has it; of heads, AdamW."""
    own: list[Any] = []
    head: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if methods.is_head(name) else own).append(parameter)
    # of AdamW, the key is one that it does not look at
    groups = [
        {"params": own, "lr": recipe.learning_rate},
        {"params": head, "lr": recipe.head_learning_rate, "max_side": 0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0)
    from ..tuner import SOAP

    return SOAP(groups)


def _schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: float) -> Any:
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)


class _Clock:
    """When scores are taken, and the seconds of training by then, without those of evaluation."""

    def __init__(self, stops: set[int]) -> None:
        self._stops = stops
        self.at: dict[int, float] = {}
        self._paused = 0.0
        self._started = self._stopped = 0.0

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock._started = time.perf_counter()

            def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
                if state.global_step in clock._stops:
                    clock._stopped = time.perf_counter()
                    clock.at[state.global_step] = clock._stopped - clock._started - clock._paused
                    control.should_log = control.should_evaluate = True

            def on_evaluate(self, *_: Any, **__: Any) -> None:
                clock._paused += time.perf_counter() - clock._stopped

        return Watch()


def _points(log: list[dict[str, Any]], clock: _Clock) -> list[Point]:
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    return [
        Point(
            step=entry["step"],
            epoch=entry["epoch"],
            seconds=clock.at[entry["step"]],
            loss=losses.get(entry["step"], math.nan),
            score=entry["eval_score"],
        )
        for entry in log
        if "eval_score" in entry
    ]


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
