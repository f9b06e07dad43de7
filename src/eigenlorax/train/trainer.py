"""The Trainer of transformers for coefficients: its options, progress and checkpoints."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from ..core import atomic_files
from ..core.options import suggestion
from ..core.progress import Progress
from ..errors import FormatError, MissingExtraError, NonFiniteError, OptionError, reason
from . import metrics
from .metrics import NamedMetric
from .options import (
    DEFAULTS,
    EVALUATION_BATCH,
    HEAD_LEARNING_RATE,
    MAX_POINTS,
    MIN_REFERENCE_STEPS,
    MIN_STEPS,
    OWN_OPTIONS,
    REFERENCE_DEFAULTS,
    REFERENCE_HEAD_LEARNING_RATE,
    Training,
    default_epochs,
)
from .training_record import RECORD

_RESERVED = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "do_train", "do_eval", "do_predict")
"""Fields of `TrainingArguments` that users must not set."""
_LOSSES = ("loss", "eval_loss")


def read_options(path: Path) -> dict[str, Any]:
    """Read fields of `TrainingArguments` from a YAML file.

    Args:
        path: YAML file with a mapping.

    Returns:
        Field → value. `arguments` checks names and values.

    Raises:
        FormatError: The file does not exist, is not YAML, or is not a mapping.
        MissingExtraError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError(
            "reading trainer_options (--trainer-options) needs PyYAML: pip install 'eigenlorax[train]'."
        ) from error
    if not path.is_file():
        raise FormatError(f"{path} does not exist. A YAML file with fields of TrainingArguments was expected.")
    try:
        options = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or reason(error)
        raise FormatError(f"{path}{line} is not YAML: {problem}.") from error
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise FormatError(f"{path} is not a mapping; lines such as `weight_decay: 0.01` were expected.")
    return options


def arguments(training: Training, checkpoints: Path, rows: int) -> Any:
    """Return `TrainingArguments` from our defaults, the training's options, and its `trainer_options`.

    Args:
        training: Options of the training.
        checkpoints: Folder of the checkpoints.
        rows: Number of training rows, which determines the default number of epochs.

    Returns:
        `TrainingArguments` of transformers.

    Raises:
        OptionError: A field is unknown or reserved, or has an invalid value.
    """
    import torch
    from transformers import TrainingArguments

    evaluation_strategy = "epoch" if training.evaluation else "no"
    defaults = {
        **DEFAULTS,
        **(REFERENCE_DEFAULTS if training.reference is not None else {}),
        **_best_checkpoint(training),
        "per_device_eval_batch_size": EVALUATION_BATCH,
        "eval_strategy": evaluation_strategy,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_strategy": "epoch",
        # the Trainer would leave NaN out of the mean loss, and hide a divergence
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    own_options = {field: getattr(training, option) for option, field in OWN_OPTIONS.items()}
    fields = {
        **defaults,
        **{field: setting for field, setting in own_options.items() if setting is not None},
        **_check_fields(training.trainer_options, TrainingArguments),
    }
    if fields["eval_strategy"] != "no" and training.evaluation is None:
        raise OptionError(
            "the Trainer's eval_strategy needs evaluation rows, and there are none. Pass evaluation= (--eval)."
        )
    try:
        training_arguments = TrainingArguments(output_dir=str(checkpoints), disable_tqdm=True, **fields)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise OptionError(f"the Trainer rejects its options: {reason(error)}") from error
    if training.epochs is not None or {"num_train_epochs", "max_steps"} & set(training.trainer_options):
        return training_arguments
    min_steps = MIN_STEPS if training.reference is None else MIN_REFERENCE_STEPS
    schedule = _default_schedule(steps_per_epoch(training_arguments, rows), min_steps, fields)
    return TrainingArguments(output_dir=str(checkpoints), disable_tqdm=True, **{**fields, **schedule})


def _best_checkpoint(training: Training) -> dict[str, Any]:
    """Return the fields that make the chosen metric decide which checkpoint is best, unless the user has set them."""
    if training.metric is None or "metric_for_best_model" in training.trainer_options:
        return {}
    # explicitly greater: of metrics whose names end with "loss", such as neg_log_loss, the Trainer assumes lower
    return {"metric_for_best_model": training.metric, "greater_is_better": True}


def steps_per_epoch(training_arguments: Any, rows: int) -> int:
    """Return the number of optimizer steps per epoch, as the Trainer counts them.

    Args:
        training_arguments: `TrainingArguments` of transformers.
        rows: Number of training rows.
    """
    batch: int = training_arguments.train_batch_size * training_arguments.world_size
    batches = rows // batch if training_arguments.dataloader_drop_last else math.ceil(rows / batch)
    return max(1, math.ceil(batches / int(training_arguments.gradient_accumulation_steps)))


def _default_schedule(per_epoch: int, min_steps: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with at most `MAX_POINTS` evaluations and checkpoints.

    Args:
        per_epoch: Optimizer steps per epoch.
        min_steps: Minimum number of optimizer steps.
        fields: Fields of `TrainingArguments` so far.
    """
    epochs = default_epochs(per_epoch, min_steps, fields["num_train_epochs"])
    interval = math.ceil(epochs / MAX_POINTS)
    kinds = ("eval", "save", "logging")
    if interval == 1 or any(fields[f"{kind}_strategy"] not in ("epoch", "no") for kind in kinds):
        return {"num_train_epochs": float(epochs)}
    points: dict[str, Any] = {f"{kind}_strategy": "steps" for kind in kinds if fields[f"{kind}_strategy"] == "epoch"}
    points |= {f"{kind}_steps": interval * per_epoch for kind in kinds}
    # round epochs up, so that the last evaluation is after the last step
    return {"num_train_epochs": float(interval * math.ceil(epochs / interval)), **points}


def _check_fields(options: Mapping[str, Any], arguments_class: type) -> dict[str, Any]:
    """Return the options, converted to the types of their fields.

    Raises:
        OptionError: An option is unknown or reserved, or cannot be converted.
    """
    fields = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    types = typing.get_type_hints(arguments_class)
    for name in options:
        if name in _RESERVED:
            raise OptionError(f"{name} is set by eigenlorax. Remove it from the Trainer's options.")
        if name not in fields:
            hint = suggestion(name, fields - set(_RESERVED))
            raise OptionError(f"{name!r} is not a field of transformers' TrainingArguments.{hint}")
    return {name: _convert(name, yaml_value, types[name]) for name, yaml_value in options.items()}


def _convert(name: str, yaml_value: Any, field_type: Any) -> Any:
    """Convert a value from YAML to the type of its field. YAML reads 1 as an integer, and 1e-3 as a text."""
    types = set(typing.get_args(field_type)) or {field_type}
    if type(yaml_value) in types:
        return yaml_value
    if float in types and not isinstance(yaml_value, bool):
        try:
            return float(yaml_value)
        except (TypeError, ValueError):
            pass
    if types <= {bool, int, float, str, NoneType}:
        names = " or ".join(sorted(type_.__name__ for type_ in types - {NoneType}))
        raise OptionError(f"the Trainer's {name} must be {names}, got {yaml_value!r}.")
    return yaml_value


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows of a training.

    Attributes:
        train: Training rows.
        evaluation: Evaluation rows; None without evaluation rows.
        collate: Function that makes a padded batch of rows.
        metric: Metric of classifications, computed during the training beside accuracy and macro-F1.
    """

    train: Any
    evaluation: Any
    collate: Any
    metric: NamedMetric


def make(model: Any, training: Training, training_arguments: Any, rows: Rows, progress: Progress) -> Any:
    """Return a Trainer that prints nothing and reports its steps.

    It raises `NonFiniteError` if the loss is NaN or Inf. Its checkpoints get the permissions of the record beside them.

    Args:
        model: PEFT model with trainable parameters.
        training: Options of the training.
        training_arguments: Result of `arguments`.
        rows: Encoded rows.
        progress: Function that is called with ("training", step, number of steps).

    Raises:
        OptionError: The Trainer rejects its options.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class ProgressCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            progress("training", state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            progress("training", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            checkpoints = Path(args.output_dir)
            atomic_files.copy_permissions(checkpoints, checkpoints.parent / RECORD)

        def on_log(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            loss = (keywords.get("logs") or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the training diverged: at step {state.global_step} the loss is {loss}. Nothing was added to the "
                    "pack. Try a lower learning_rate= (--learning-rate)."
                )

    def scores(evaluated: Any) -> dict[str, float]:
        return metrics.all_scores(evaluated.predictions, evaluated.label_ids, rows.metric)

    try:
        optimizer = _optimizer(model, training, training_arguments) if training.has_default_optimizer else None
        trainer = Trainer(
            model,
            training_arguments,
            train_dataset=rows.train,
            eval_dataset=rows.evaluation,
            data_collator=rows.collate,
            compute_metrics=scores if training.has_classes else None,
            optimizers=(optimizer, None),
            callbacks=[ProgressCallback()],
        )
    except (ValueError, ImportError) as error:
        raise OptionError(f"the Trainer rejects its options: {reason(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer(model: Any, training: Training, training_arguments: Any) -> Any:
    """Return SOAP for coefficients or AdamW for a LoRA, with the Adam options that the user passed to the Trainer."""
    default_head_rate = HEAD_LEARNING_RATE if training.reference is None else REFERENCE_HEAD_LEARNING_RATE
    rate, head_rate = training_arguments.learning_rate, training.head_learning_rate or default_head_rate
    if training.reference is not None:
        return _adamw(model, rate, head_rate, training_arguments)
    from ..tuner import SOAP, coefficient_groups
    from ..tuner.optim import BETAS, EPSILON

    names = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    adam_options = {name: getattr(training_arguments, name) for name in names if name in training.trainer_options}
    return SOAP(
        coefficient_groups(model, lr=rate, head_lr=head_rate),
        betas=(adam_options.get("adam_beta1", BETAS[0]), adam_options.get("adam_beta2", BETAS[1])),
        eps=adam_options.get("adam_epsilon", EPSILON),
        weight_decay=adam_options.get("weight_decay", 0.0),
    )


def _adamw(model: Any, rate: float, head_rate: float, training_arguments: Any) -> Any:
    """Return AdamW for a LoRA and its head, with learning rates of their own."""
    import torch

    from ..tuner import lora_groups

    return torch.optim.AdamW(
        lora_groups(model, lr=rate, head_lr=head_rate),
        betas=(training_arguments.adam_beta1, training_arguments.adam_beta2),
        eps=training_arguments.adam_epsilon,
        weight_decay=training_arguments.weight_decay,
    )


def is_update(parameter: str) -> bool:
    """Return whether a trained parameter is part of the update, as coefficients or in a LoRA, and not of a head."""
    return "eigenlorax_" in parameter or "lora_" in parameter


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the last complete checkpoint in a folder, or None.

    An incomplete checkpoint lacks the Trainer's state, which is written last.
    """
    complete = [path for path in checkpoints.glob("checkpoint-*") if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
        return checkpoint.name.rpartition("-")[2].isdigit()
    except (OSError, ValueError):
        return False


def history(log: list[dict[str, Any]], metric: NamedMetric) -> list[dict[str, float]]:
    """Return the losses and scores in the Trainer's log, with their epoch and step.

    Args:
        log: `TrainerState.log_history`.
        metric: Metric that was computed beside accuracy and macro-F1.
    """
    names = (*_LOSSES, *(f"eval_{name}" for name in dict.fromkeys((*metrics.METRICS, metric.name))))
    return [
        {"epoch": entry["epoch"], "step": entry["step"], **{name: entry[name] for name in names if name in entry}}
        for entry in log
        if any(name in entry for name in names)
    ]
