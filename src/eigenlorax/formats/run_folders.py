"""Checkpoints of a training run: the folders `checkpoint-STEP` that the Trainer of transformers or TRL writes.

The metrics of a step are those of `trainer_state.json`, which the Trainer writes last into a checkpoint. A checkpoint
that is not complete yet is left out, with the reason, so that a run can be read while it goes on. The checkpoints of
mlx-lm are files of one folder, `0000100_adapters.safetensors`, and `adapters.safetensors` is the state after the last.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import keys, limits
from ..core.options import suggestion
from ..errors import AdapterNameError, FormatError, OptionError
from . import ranges
from .folders import LocalFolder
from .mlx import config as mlx_config

TRAINER_STATE = "trainer_state.json"
SETTLED_SECONDS = 60
"""Age of the newest file of a checkpoint without `trainer_state.json` from which the file is not waited for."""
COPIED_SECONDS = 2
"""The same for a checkpoint of a run in which nothing is from a Trainer, as after a download of the adapters alone."""
TRAINING_ARGUMENTS = "training_args.bin"
"""File that the Trainer writes beside the adapter."""
REMOVED = "it has been removed"
"""Reason why a checkpoint is left out that was there when the run was listed."""
REFERENCE_ADAPTERS = ("ref", "reference")
"""Names that TRL's trainers and documentation give to the frozen copy of an adapter in training."""

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_EXPECTED = "Pass the output_dir of a Trainer, which has folders such as checkpoint-500."
_OTHER_FOLDERS = (
    f"{_EXPECTED} Versions in other folders are added by `Pack.append` in Python; adapters that were trained from one "
    "adapter by `eigenlorax fit ADAPTERS --reference ADAPTER`."
)
# of a training record
_TRAINING_METRICS = (
    *("epoch", "loss", "learning_rate"),
    # of TRL: GRPO and KTO, PPO and RLOO, SFT, and reward models
    *("kl", "lr", "mean_token_accuracy", "accuracy", "margin", "mean_reward"),
)
# of TRL's GRPO and DPO (reward, rewards/chosen), and of PPO and RLOO (objective/kl, objective/scores)
_TRAINING_PREFIXES = ("reward", "objective/")
SETTING = "trainer_state."
"""Prefix of the run's settings among the metrics of a version."""
# with other values than the checkpoint's, a resumed Trainer would log, evaluate and save at other steps
_SETTINGS = ("eval_steps", "logging_steps", "max_steps", "num_train_epochs", "save_steps", "train_batch_size")
# times of an evaluation, which say nothing about the version
_TIMES = ("_runtime", "_per_second", "_time")

LogHistory = Sequence[Mapping[str, Any]]
"""Field `log_history` of `trainer_state.json`: the records of the run's training steps and evaluations."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
        step: Training step.
        folder: Folder of the adapter: the checkpoint's own, or a subfolder of it; its file in a run of mlx-lm.
        metrics: Finite numbers by name: of the last training record up to the step (`epoch`, `loss`, `learning_rate`,
            and those of TRL, such as `kl`, `reward…` and `objective/…`), and of evaluations at the step (`eval_…`).
        settings: Settings of the run, by name; see `settings`.
    """

    step: int
    folder: Path
    metrics: Mapping[str, float]
    settings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The checkpoints of a run.

    Attributes:
        path: Folder of the run.
        checkpoints: Checkpoints with an adapter, in the order of their steps.
        unfinished: Reason why a checkpoint is left out, by its folder.
        is_finished: True if the last step of the run (`max_steps`) has been saved.
        log: Log of the last checkpoint that has one.
    """

    path: Path
    checkpoints: tuple[Checkpoint, ...]
    unfinished: Mapping[Path, str]
    is_finished: bool
    log: LogHistory


@dataclass(frozen=True, slots=True)
class _State:
    """State of the Trainer: its log, and its fields, of which `max_steps` is the step at which the run ends."""

    log: LogHistory
    fields: Mapping[str, Any]


class _UnfinishedError(Exception):
    """A checkpoint is not complete. The text says what is missing."""


def read_run(path: str | Path, adapter: str | None = None, *, known_steps: Collection[int] = ()) -> RunFolder:
    """List the checkpoints of a run in the order of their steps. No tensor is read.

    Args:
        path: `output_dir` of the Trainer.
        adapter: Name of the adapter, for a run that saves several in subfolders. Default: the adapter in the
            checkpoint's own folder, otherwise the only one that is not a frozen reference of TRL.
        known_steps: Steps to leave out.

    Raises:
        FormatError: The folder has no checkpoints, or they have no adapter.
        OptionError: There are several adapters, and `adapter` is None.
        AdapterNameError: A checkpoint has no adapter of that name.
    """
    path = Path(path)
    if mlx_files := _mlx_files(path):
        return _read_mlx_run(path, mlx_files, known_steps)
    folders = {step: folder for step, folder in _checkpoint_folders(path).items() if step not in known_steps}
    states = {step: _read_state(folder) for step, folder in folders.items()}
    is_trainers = any(state is not None for state in states.values()) or any(
        (folder / TRAINING_ARGUMENTS).exists() for folder in folders.values()
    )
    checkpoints, unfinished = [], {}
    for step, folder in folders.items():
        # each log repeats the earlier ones, so that a later state replaces a missing one
        later = (state for number, state in states.items() if number >= step and state is not None)
        state = next(later, _State((), {}))
        try:
            _check_state(folder, states[step], SETTLED_SECONDS if is_trainers else COPIED_SECONDS)
            complete = _complete_adapter(folder, adapter, is_saved=states[step] is not None)
            checkpoints.append(Checkpoint(step, complete, metrics_at(step, state.log), settings(state.fields)))
        except _UnfinishedError as cause:
            unfinished[folder] = str(cause)
    steps = [checkpoint.step for checkpoint in checkpoints]
    last = states[steps[-1]] if steps else None
    max_steps = last.fields.get("max_steps") if last is not None else None
    is_finished = isinstance(max_steps, int) and steps[-1] >= max_steps
    log = next((state.log for state in reversed(states.values()) if state is not None), ())
    return RunFolder(path, tuple(checkpoints), unfinished, is_finished, log)


def checkpoint_step(folder: Path) -> int | None:
    """Return the training step of a checkpoint, from the name of its folder or file; None if it has another name."""
    match = _CHECKPOINT.fullmatch(folder.name) or keys.MLX_CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match is not None else None


def has_checkpoints(path: Path) -> bool:
    """Return whether a run has saved a checkpoint yet; raise `FormatError` if it has no folder."""
    return any(checkpoint_step(child) is not None for child in _run_folder(path).iterdir())


def _mlx_files(path: Path) -> dict[int, Path]:
    """Return the checkpoints of a run of mlx-lm by step, in order; empty if the folder is none."""
    files = {
        int(match[1]): child
        for child in _run_folder(path).iterdir()
        if (match := keys.MLX_CHECKPOINT.fullmatch(child.name)) is not None and child.is_file()
    }
    return dict(sorted(files.items())) if (path / keys.ADAPTER_CONFIG).is_file() else {}


def _read_mlx_run(path: Path, files: dict[int, Path], known_steps: Collection[int]) -> RunFolder:
    """List the checkpoints of a run of mlx-lm, which records no metrics.

    Args:
        path: Folder of the run.
        files: Its checkpoints by step, in order.
        known_steps: Steps to leave out.
    """
    unfinished = {}
    where = str(path / keys.ADAPTER_CONFIG)
    last_step = mlx_config.settings(mlx_config.read(LocalFolder(path))[1], where).iterations
    final = path / keys.MLX_WEIGHTS
    if last_step is not None and last_step > max(files) and _is_final(final, files[max(files)]):
        files = {**files, last_step: final}
    checkpoints = []
    for step, file in files.items():
        try:
            ranges.open_tensors(ranges.local_file(file))
        except FormatError as error:
            unfinished[file] = f"it is not complete: {str(error).rstrip('.')}"
            continue
        if step not in known_steps:
            checkpoints.append(Checkpoint(step, file, {}, {}))
    is_finished = last_step in files and files[last_step] not in unfinished
    return RunFolder(path, tuple(checkpoints), unfinished, is_finished, ())


def _is_final(final: Path, last: Path) -> bool:
    """Return whether `adapters.safetensors` is later than the last checkpoint.

    mlx-lm writes it before each checkpoint, with the same content, so that it has to be a little older than now.
    """
    if not final.is_file() or time.time() - final.stat().st_mtime < COPIED_SECONDS:
        return False
    return _sha256(final) != _sha256(last)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def metrics_at(step: int, log: LogHistory) -> dict[str, float]:
    """Return the metrics of a step, sorted by name; see `Checkpoint.metrics`.

    Args:
        step: Training step.
        log: `log_history` of the Trainer's state.
    """
    metrics: dict[str, float] = {}
    for record in log:
        logged_step = record.get("step")
        if type(logged_step) is not int or logged_step > step:
            continue
        for name, number in record.items():
            is_metric = (
                logged_step == step and not name.endswith(_TIMES)
                if name.startswith("eval_")
                else name in _TRAINING_METRICS or name.startswith(_TRAINING_PREFIXES)
            )
            if is_metric and _is_finite(number):
                metrics[name] = float(number)
    return dict(sorted(metrics.items()))


def settings(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the settings of a run that the Trainer takes from a checkpoint: the numbers in `_SETTINGS`, prefixed.

    Args:
        state: Fields of the Trainer's state.
    """
    return {SETTING + field: float(state[field]) for field in _SETTINGS if _is_finite(state.get(field))}


def _is_finite(number: Any) -> bool:
    """Return whether a value is a number that a float can represent."""
    try:
        return type(number) in (int, float) and math.isfinite(number)
    except OverflowError:
        return False


def trainer_state(step: int, versions: Sequence[tuple[int, Mapping[str, float]]]) -> bytes | None:
    """Return a `trainer_state.json` with which a Trainer resumes a training; None if the settings are unknown.

    It has the step and the settings of the run, and the metrics of the versions as log. The state of the optimizer and
    of callbacks such as `EarlyStoppingCallback` is not in it.

    Args:
        step: Training step of the checkpoint.
        versions: Step and metrics of each version up to that step, in order, the metrics with the run's settings.
    """
    metrics = dict(versions[-1][1])
    fields = {field: metrics.get(SETTING + field) for field in _SETTINGS}
    if fields["train_batch_size"] is None:
        return None
    whole = {field: int(number) for field, number in fields.items() if number is not None}
    log = [
        {"step": logged_step, **{name: number for name, number in each.items() if not name.startswith(SETTING)}}
        for logged_step, each in versions
    ]
    state = {
        **whole,
        "epoch": metrics.get("epoch", 0.0),
        "global_step": step,
        "log_history": log,
        "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}},
    }
    return (json.dumps(state, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _checkpoint_folders(path: Path) -> dict[int, Path]:
    """Return the folders of a run's checkpoints by step, in order."""
    children = [child for child in _run_folder(path).iterdir() if child.is_dir()]
    steps = [(checkpoint_step(child), child) for child in children]
    folders = {step: child for step, child in steps if step is not None}
    if not folders:
        whole = path.resolve()
        is_checkpoint = checkpoint_step(whole) is not None
        remedy = f"It is one checkpoint: pass its parent, {whole.parent}." if is_checkpoint else _OTHER_FOLDERS
        raise FormatError(f"{path} has no folder checkpoint-STEP. {remedy}")
    return dict(sorted(folders.items()))


def _run_folder(path: Path) -> Path:
    if not path.is_dir():
        raise FormatError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}. {_EXPECTED}")
    return path


def _read_state(folder: Path) -> _State | None:
    """Return the Trainer's state in a checkpoint; None if `trainer_state.json` is missing or not complete."""
    try:
        data = limits.read_file(folder / TRAINER_STATE, limits.MAX_JSON_BYTES)
        state = limits.parse_json_object(data, TRAINER_STATE)[1]
    except (FileNotFoundError, FormatError):
        return None
    log = state.get("log_history")
    return _State([record for record in log if isinstance(record, dict)], state) if isinstance(log, list) else None


def _complete_adapter(folder: Path, adapter: str | None, *, is_saved: bool) -> Path:
    """Return the folder of a checkpoint's adapter.

    Args:
        folder: Folder of the checkpoint.
        adapter: Name of the adapter; None to choose it.
        is_saved: True if the Trainer has written its state, so that nothing is missing any more.

    Raises:
        _UnfinishedError: A file of the checkpoint is missing or not complete.
    """
    try:
        chosen = _adapter_folder(folder, adapter)
    except FormatError as error:
        if is_saved:
            raise
        raise _UnfinishedError(f"it has no {keys.ADAPTER_CONFIG}") from error
    try:
        limits.parse_json_object(
            limits.read_file(chosen / keys.ADAPTER_CONFIG, limits.MAX_JSON_BYTES), keys.ADAPTER_CONFIG
        )
        if (chosen / keys.ADAPTER_WEIGHTS).exists():
            ranges.open_tensors(ranges.local_file(chosen / keys.ADAPTER_WEIGHTS))
        elif not (chosen / keys.ADAPTER_PICKLE).exists():
            raise _UnfinishedError(f"it has no {keys.ADAPTER_WEIGHTS}")
    except FormatError as error:
        raise _UnfinishedError(f"its adapter is not complete: {str(error).rstrip('.')}") from error
    except FileNotFoundError as error:
        raise _UnfinishedError(REMOVED) from error
    return chosen


def _check_state(folder: Path, state: _State | None, settled_seconds: float) -> None:
    """Raise `_UnfinishedError` if a checkpoint has no whole `trainer_state.json` and may still get one.

    Args:
        folder: Folder of the checkpoint.
        state: Its state; None if it has none.
        settled_seconds: Age from which the file is not waited for.
    """
    if state is not None:
        return
    if (folder / TRAINER_STATE).exists():
        raise _UnfinishedError(f"its {TRAINER_STATE} is not complete")
    try:
        age = time.time() - max(file.stat().st_mtime for file in (folder, *folder.rglob("*")))
    except FileNotFoundError as error:
        raise _UnfinishedError(REMOVED) from error
    if age < settled_seconds:
        raise _UnfinishedError(f"it has no {TRAINER_STATE} yet, and changed {max(age, 0):.0f} s ago")


def _adapter_folder(folder: Path, adapter: str | None) -> Path:
    """Return the folder of the adapter in a checkpoint.

    Raises:
        FormatError: The checkpoint has no adapter.
        OptionError: It has several, and `adapter` is None.
        AdapterNameError: It has no adapter of that name.
    """
    adapters = {child.parent.name: child.parent for child in sorted(folder.glob(f"*/{keys.ADAPTER_CONFIG}"))}
    if adapter is not None and adapter != "default":
        if adapter not in adapters:
            raise _unknown_adapter(folder, adapter, adapters)
        return adapters[adapter]
    if (folder / keys.ADAPTER_CONFIG).is_file():
        return folder
    trained = [name for name in adapters if name not in REFERENCE_ADAPTERS] or list(adapters)
    if not trained:
        raise FormatError(
            f"{folder} has no adapter ({keys.ADAPTER_CONFIG}). Pass the folder of a run that trains an adapter of PEFT."
        )
    if len(trained) > 1:
        raise OptionError(
            f"{folder} has several adapters: {', '.join(trained)}. Choose one with adapter={trained[0]!r} "
            f"(--adapter {trained[0]})."
        )
    return adapters[trained[0]]


def _unknown_adapter(folder: Path, adapter: str, adapters: Iterable[str]) -> AdapterNameError:
    known = sorted(adapters)
    return AdapterNameError(
        f"{folder} has no adapter {adapter!r} in a subfolder.{suggestion(adapter, known)} It has: "
        f"{', '.join(known) or 'none'}. Remove adapter= (--adapter) to take the one that the checkpoint has."
    )
