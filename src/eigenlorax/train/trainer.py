"""transformers' Trainer for coefficients: its options out of a YAML file, its progress, and where it goes on from."""

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
from ..errors import FormatError, MissingExtraError, NonFiniteError, OptionError, reason
from ..fitting.fit import Progress
from .options import DEFAULTS, EVALUATION_BATCH, HEAD_LEARNING_RATE, MAX_POINTS, MIN_STEPS, OWN_OPTIONS, Training

_OURS = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "do_train", "do_eval", "do_predict")
"""Fields that the command itself needs."""
RECORD = "training.json"
"""What a training notes of itself, in its folder."""
_HISTORY = ("loss", "eval_loss", "eval_accuracy")


def read_options(path: Path) -> dict[str, Any]:
    """Fields of `TrainingArguments` out of a YAML file. What they are is checked where they are used."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError(
            "reading trainer_options (--trainer-options) needs PyYAML: pip install 'eigenlorax[train]'."
        ) from error
    if not path.is_file():
        raise FormatError(f"{path} does not exist. A YAML file with fields of TrainingArguments was expected.")
    try:
        found = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or reason(error)
        raise FormatError(f"{path}{line} is not YAML: {problem}.") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise FormatError(f"{path} is not a mapping; lines such as `weight_decay: 0.01` were expected.")
    return found


def arguments(training: Training, checkpoints: Path, rows: int) -> Any:
    """`TrainingArguments`: our defaults, the training's options, and the further ones it names. `OptionError` for
    fields that there are not, and values that they cannot have.

    rows: how many there are to train on, by which epochs are chosen where the training says nothing of them.
    """
    import torch
    from transformers import TrainingArguments

    epochs = "epoch" if training.evaluation else "no"
    defaults = {
        **DEFAULTS,
        "per_device_eval_batch_size": EVALUATION_BATCH,
        "eval_strategy": epochs,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_strategy": "epoch",
        # a loss that is no number is to be seen, not averaged away
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    given = {field: getattr(training, option) for option, field in OWN_OPTIONS.items()}
    found = {
        **defaults,
        **{field: value for field, value in given.items() if value is not None},
        **_checked(training.trainer_options, TrainingArguments),
    }
    if found["eval_strategy"] != "no" and training.evaluation is None:
        raise OptionError(
            "the Trainer's eval_strategy asks for evaluations, and there are no rows for them: evaluation= (--eval)."
        )
    try:
        made = TrainingArguments(output_dir=str(checkpoints), disable_tqdm=True, **found)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise OptionError(f"the Trainer does not take its options: {reason(error)}") from error
    if training.epochs is not None or {"num_train_epochs", "max_steps"} & set(training.trainer_options):
        return made
    longer = _enough(steps_per_epoch(made, rows), found)
    return TrainingArguments(output_dir=str(checkpoints), disable_tqdm=True, **{**found, **longer})


def steps_per_epoch(training_arguments: Any, rows: int) -> int:
    """Steps of the optimizer in a pass over the rows, as the Trainer counts them."""
    batch: int = training_arguments.train_batch_size * training_arguments.world_size
    batches = rows // batch if training_arguments.dataloader_drop_last else math.ceil(rows / batch)
    return max(1, math.ceil(batches / int(training_arguments.gradient_accumulation_steps)))


def _enough(per_epoch: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with which the default training has `MIN_STEPS` steps and more, and few points on the way."""
    epochs = math.ceil(max(fields["num_train_epochs"], MIN_STEPS / per_epoch))
    every = math.ceil(epochs / MAX_POINTS)
    kinds = ("eval", "save", "logging")
    if every == 1 or any(fields[f"{kind}_strategy"] not in ("epoch", "no") for kind in kinds):
        return {"num_train_epochs": float(epochs)}
    points = {f"{kind}_strategy": "steps" for kind in kinds if fields[f"{kind}_strategy"] == "epoch"}
    points |= {f"{kind}_steps": every * per_epoch for kind in kinds}
    # the last point is the end
    return {"num_train_epochs": float(every * math.ceil(epochs / every)), **points}


def _checked(options: Mapping[str, Any], of: type) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(of) if field.init}
    kinds = typing.get_type_hints(of)
    for name in options:
        if name in _OURS:
            raise OptionError(f"{name} is not for the Trainer's options: the command sets it.")
        if name not in fields:
            near = suggestion(name, fields - set(_OURS))
            raise OptionError(f"{name!r} is no field of transformers' TrainingArguments.{near}")
    return {name: _converted(name, value, kinds[name]) for name, value in options.items()}


def _converted(name: str, value: Any, kind: Any) -> Any:
    """A value of YAML, where 1 may stand for 1.0 and 1e-3 is a text."""
    kinds = set(typing.get_args(kind)) or {kind}
    if type(value) in kinds:
        return value
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if kinds <= {bool, int, float, str, NoneType}:
        names = " or ".join(sorted(one.__name__ for one in kinds - {NoneType}))
        raise OptionError(f"the Trainer's {name} must be {names}, got {value!r}.")
    return value


def make(
    model: Any,
    training: Training,
    training_arguments: Any,
    rows: Any,
    evaluation: Any,
    collate: Any,
    progress: Progress,
) -> Any:
    """The Trainer; it prints nothing, reports its steps to `progress`, and stops where the loss is no number. Its
    checkpoints may be read by whom the record beside them may be."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            progress("training", state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            progress("training", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            checkpoints = Path(args.output_dir)
            atomic_files.copy_permissions(checkpoints, checkpoints.parent / RECORD)

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            loss = (rest.get("logs") or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the training has diverged: by step {state.global_step} the loss was {loss}. A lower "
                    "learning_rate= (--learning-rate) may help; nothing was added to the pack."
                )

    def count(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(axis=-1) == predicted.label_ids).mean())}

    classification = model.peft_config["default"].task_type == "SEQ_CLS"
    try:
        trainer = Trainer(
            model,
            training_arguments,
            train_dataset=rows,
            eval_dataset=evaluation,
            data_collator=collate,
            compute_metrics=count if classification else None,
            optimizers=(_optimizer(model, training, training_arguments) if training.own_optimizer else None, None),
            callbacks=[Report()],
        )
    except (ValueError, ImportError) as error:
        raise OptionError(f"the Trainer does not take its options: {reason(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer(model: Any, training: Training, training_arguments: Any) -> Any:
    """SOAP on coefficients, with what the Trainer's options say of Adam."""
    from ..tuner import SOAP, coefficient_groups
    from ..tuner.optim import BETAS, EPSILON

    names = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    given = {name: getattr(training_arguments, name) for name in names if name in training.trainer_options}
    groups = coefficient_groups(
        model, lr=training_arguments.learning_rate, head_lr=training.head_learning_rate or HEAD_LEARNING_RATE
    )
    return SOAP(
        groups,
        betas=(given.get("adam_beta1", BETAS[0]), given.get("adam_beta2", BETAS[1])),
        eps=given.get("adam_epsilon", EPSILON),
        weight_decay=given.get("weight_decay", 0.0),
    )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint to go on from. One whose writer was killed lacks the Trainer's state, which is written last."""
    whole = [path for path in checkpoints.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
        return checkpoint.name.rpartition("-")[2].isdigit()
    except (OSError, ValueError):
        return False


def history(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What the Trainer has noted: losses and accuracies, with their epoch and step."""
    return [
        {"epoch": entry["epoch"], "step": entry["step"], **{name: entry[name] for name in _HISTORY if name in entry}}
        for entry in log
        if any(name in entry for name in _HISTORY)
    ]
