"""Checkpoints of a training run: the folders `checkpoint-STEP` that the Trainer of transformers or TRL writes.

The metrics of a step are those of `trainer_state.json`, which the Trainer writes last into a checkpoint. A checkpoint
that is not complete yet is left out, with the reason, so that a run can be read while it goes on.
"""

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

TRAINER_STATE = "trainer_state.json"
SETTLED_SECONDS = 60
"""Age of the newest file of a checkpoint without `trainer_state.json` from which the file is not waited for."""
REFERENCE_ADAPTERS = ("ref", "reference")
"""Names that TRL's trainers and documentation give to the frozen copy of an adapter in training."""

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_EXPECTED = "Pass the output_dir of a Trainer, which has folders such as checkpoint-500."
# of a training record, beside the rewards of TRL, whose names start with "reward"
_TRAINING_METRICS = ("epoch", "loss", "learning_rate", "kl")
# times of an evaluation, which say nothing about the version
_TIMES = ("_runtime", "_per_second", "_time")

LogHistory = Sequence[Mapping[str, Any]]
"""Field `log_history` of `trainer_state.json`: the records of the run's training steps and evaluations."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
        step: Training step.
        folder: Folder of the adapter: the checkpoint's own, or a subfolder of it.
        metrics: Finite numbers by name: of the last training record up to the step (`epoch`, `loss`, `learning_rate`,
            `kl`, `reward…`), and of evaluations at the step (`eval_…`).
    """

    step: int
    folder: Path
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The checkpoints of a run.

    Attributes:
        path: Folder of the run.
        checkpoints: Checkpoints with an adapter, in the order of their steps.
        unfinished: Reason why a checkpoint is left out, by its folder.
    """

    path: Path
    checkpoints: tuple[Checkpoint, ...]
    unfinished: Mapping[Path, str]


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
    folders = {step: folder for step, folder in _checkpoint_folders(path).items() if step not in known_steps}
    logs = {step: _log_history(folder) for step, folder in folders.items()}
    checkpoints, unfinished = [], {}
    for step, folder in folders.items():
        # each log repeats the earlier ones, so that a later log replaces a missing one
        log = next((logs[later] for later in folders if later >= step and logs[later] is not None), None)
        try:
            checkpoints.append(Checkpoint(step, _complete_adapter(folder, adapter), metrics_at(step, log or ())))
        except _UnfinishedError as cause:
            unfinished[folder] = str(cause)
    return RunFolder(path, tuple(checkpoints), unfinished)


def metrics_at(step: int, log: LogHistory) -> dict[str, float]:
    """Return the metrics of a step, sorted by name; see `Checkpoint.metrics`.

    Args:
        step: Training step.
        log: `log_history` of the Trainer's state.
    """
    metrics: dict[str, float] = {}
    for record in log:
        logged_step = record.get("step")
        if not isinstance(logged_step, int) or logged_step > step:
            continue
        for name, number in record.items():
            is_metric = (
                logged_step == step and not name.endswith(_TIMES)
                if name.startswith("eval_")
                else name in _TRAINING_METRICS or name.startswith("reward")
            )
            if is_metric and type(number) in (int, float) and math.isfinite(number):
                metrics[name] = float(number)
    return dict(sorted(metrics.items()))


def _checkpoint_folders(path: Path) -> dict[int, Path]:
    """Return the folders of a run's checkpoints by step, in order."""
    if not path.is_dir():
        raise FormatError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}. {_EXPECTED}")
    matches = [(_CHECKPOINT.fullmatch(child.name), child) for child in path.iterdir() if child.is_dir()]
    folders = {int(match[1]): child for match, child in matches if match is not None}
    if not folders:
        whole = path.resolve()
        is_checkpoint = _CHECKPOINT.fullmatch(whole.name) is not None
        remedy = f"It is one checkpoint: pass its parent, {whole.parent}." if is_checkpoint else _EXPECTED
        raise FormatError(f"{path} has no folder checkpoint-STEP. {remedy}")
    return dict(sorted(folders.items()))


def _log_history(folder: Path) -> LogHistory | None:
    """Return the `log_history` of a checkpoint; None if its `trainer_state.json` is missing or has no such list."""
    try:
        data = limits.read_file(folder / TRAINER_STATE, limits.MAX_JSON_BYTES)
        log = limits.parse_json_object(data, TRAINER_STATE)[1].get("log_history")
    except (FileNotFoundError, FormatError):
        return None
    return [record for record in log if isinstance(record, dict)] if isinstance(log, list) else None


def _complete_adapter(folder: Path, adapter: str | None) -> Path:
    """Return the folder of a checkpoint's adapter.

    Raises:
        _UnfinishedError: A file of the checkpoint is missing or not complete.
    """
    is_saved = _check_state(folder)
    try:
        chosen = _adapter_folder(folder, adapter)
    except FormatError as error:
        if is_saved:
            raise
        raise _UnfinishedError(f"it has no {keys.ADAPTER_CONFIG} yet") from error
    try:
        limits.parse_json_object(
            limits.read_file(chosen / keys.ADAPTER_CONFIG, limits.MAX_JSON_BYTES), keys.ADAPTER_CONFIG
        )
        if (chosen / keys.ADAPTER_WEIGHTS).exists():
            ranges.open_tensors(ranges.local_file(chosen / keys.ADAPTER_WEIGHTS))
        elif not (chosen / keys.ADAPTER_PICKLE).exists():
            raise _UnfinishedError(f"it has no {keys.ADAPTER_WEIGHTS} yet")
    except FormatError as error:
        raise _UnfinishedError(f"its adapter is not complete: {error}") from error
    except FileNotFoundError as error:
        raise _UnfinishedError("it has been removed") from error
    return chosen


def _check_state(folder: Path) -> bool:
    """Return whether a checkpoint has a `trainer_state.json`; raise `_UnfinishedError` if it is still expected."""
    if (folder / TRAINER_STATE).exists():
        if _log_history(folder) is None:
            raise _UnfinishedError(f"its {TRAINER_STATE} is not complete")
        return True
    try:
        age = time.time() - max(file.stat().st_mtime for file in (folder, *folder.rglob("*")))
    except FileNotFoundError as error:
        raise _UnfinishedError("it has been removed") from error
    if age < SETTLED_SECONDS:
        raise _UnfinishedError(f"it has no {TRAINER_STATE} yet, and changed {max(age, 0):.0f} s ago")
    return False


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
