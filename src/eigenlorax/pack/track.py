"""Tracking of a training run: append each new checkpoint to a history, while the run goes on or afterwards."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..core import keys
from ..core.options import to_float
from ..core.progress import Progress
from ..errors import (
    AdapterNameError,
    FormatError,
    NonFiniteError,
    OptionError,
    PackBusyError,
    PackDamagedError,
    PackExistsError,
)
from ..formats import checks, run_folders
from ..formats.run_folders import LogHistory
from ..formats.sources import AdapterSource
from . import append
from .history import History, VersionRecord
from .pack import Pack


@dataclass(frozen=True, slots=True)
class Tracked:
    """Checkpoints that one call of `track` has seen.

    Attributes:
        name: Name of the history.
        appended: Records of the new versions, in order.
        known_steps: Steps of all complete checkpoints, which a later call can leave out.
        earlier_steps: Steps before the latest version that are not in the history, because their versions were pruned
            or removed. They are not appended again.
        unfinished: Reason why a checkpoint was left out, by its folder. It is taken by a later call.
        not_finite: Error of a checkpoint with NaN or Inf, which was left out, by its folder.
        is_finished: True if the last step of the run has been saved and is in the history.
    """

    name: str
    appended: tuple[VersionRecord, ...]
    known_steps: frozenset[int]
    earlier_steps: tuple[int, ...]
    unfinished: Mapping[Path, str]
    not_finite: Mapping[Path, str]
    is_finished: bool

    def __str__(self) -> str:
        """Return one line: the history, and the numbers of versions and of checkpoints that were left out."""
        counts = {
            "appended": self.appended,
            "earlier": self.earlier_steps,
            "unfinished": self.unfinished,
            "not finite": self.not_finite,
        }
        listed = ", ".join(
            f"{len(members)} {label}" for label, members in counts.items() if members or label == "appended"
        )
        return f"history {self.name!r}: {listed}; the run is {'finished' if self.is_finished else 'not finished'}"


def track(
    run: str | PathLike[str],
    history: str | PathLike[str],
    *,
    name: str | None = None,
    adapter: str | None = None,
    max_error: float | None = None,
    head_error: float | None = None,
    lossless: bool = False,
    same_base: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
    known_steps: Collection[int] = (),
    progress: Progress | None = None,
) -> Tracked:
    """Append the checkpoints of a run to a history, in the order of their steps, with their metrics.

    A checkpoint whose files are still being written is left out, and taken by the next call. One that is in the history
    already is compared with it, and skipped. So is one with NaN or Inf, and one before the latest version that is not
    in the history, because it was pruned or removed; unless versions have other metrics than the run has logged, which
    is a run that was repeated. The pack is saved after each version, so that an interrupted call
    loses none.

    Args:
        run: `output_dir` of the Trainer of transformers or TRL, with folders `checkpoint-STEP`.
        history: Folder of the pack with the history, which is created if it does not exist.
        name: Name of the history. Default: the name of the run's folder.
        adapter: Name of the adapter, for a run that saves several in subfolders of its checkpoints.
        max_error: Bound of the relative error of each update, above 0 and below 1. Default: 0.05.
        head_error: Bound of the relative error of task heads. Default: `max_error`, at least 0.1 and at most 0.3.
        lossless: Store every tensor bit for bit, for `Pack.restore`.
        same_base: Accept checkpoints that name another base model than the history.
        allow_pickle: Read `adapter_model.bin` if there is no safetensors file.
        overwrite: Replace versions of steps that were trained again, and all versions after them.
        known_steps: Steps to leave out, such as those of an earlier call.
        progress: Function that is called with a stage, and the done and total number of checkpoints.

    Raises:
        FormatError: The folder is no run with adapters.
        AdapterNameError: The history has another version of a checkpoint's step, and `overwrite` is not set; or the
            name is invalid.
        BaseModelError, ShapeError: A checkpoint does not belong to the history.
        OptionError: An option is invalid.
        PackBusyError: Another process is writing to the pack.
        PackDamagedError: The file of a version is missing or was changed.

    Example:
        >>> tracked = eigenlorax.track("run/", "history/")
        >>> [record.version for record in tracked.appended]
        ['10', '20', '30']
        >>> eigenlorax.Pack.open("history/")["run@latest"].ranks
        (3,)
    """
    append.check_error_bounds(max_error, head_error, lossless=lossless)
    found = run_folders.read_run(Path(run), adapter, known_steps=known_steps)
    history_name = keys.check_name(name, kind="history") if name is not None else run_name(Path(run))
    options: dict[str, Any] = {"max_error": max_error, "head_error": head_error, "lossless": lossless}
    options |= {"same_base": same_base, "allow_pickle": allow_pickle}
    appended, earlier, unfinished = [], [], dict(found.unfinished)
    not_finite: dict[Path, str] = {}
    with opened_for_appending(Path(history)) as pack:
        for done, checkpoint in enumerate(found.checkpoints):
            if progress is not None:
                progress("appending checkpoints", done, len(found.checkpoints))
            history_now = pack.histories.get(history_name)
            if _is_earlier(checkpoint.step, history_now) and not _is_repeated(history_now, found.log):
                earlier.append(checkpoint.step)
                continue
            # a lossless version can resume the training, which needs the settings of the run
            options["metrics"] = {**checkpoint.metrics, **(checkpoint.settings if lossless else {})}
            source = AdapterSource(history_name, checkpoint.folder)
            try:
                record = append_new(pack, source, checkpoint.step, options, overwrite=overwrite)
            except NonFiniteError as error:
                # a training may recover, or be repeated from an earlier checkpoint
                not_finite[checkpoint.folder] = str(error)
                continue
            except (FormatError, OSError):
                # the Trainer removes old checkpoints (save_total_limit)
                if checkpoint.folder.exists():
                    raise
                unfinished[checkpoint.folder] = run_folders.REMOVED
                continue
            if record is not None:
                appended.append(record)
                save_appended(pack, Path(history))
    seen = {checkpoint.step for checkpoint in found.checkpoints}
    return Tracked(
        name=history_name,
        appended=tuple(appended),
        known_steps=frozenset({*known_steps, *seen}),
        earlier_steps=tuple(earlier),
        unfinished=unfinished,
        not_finite=not_finite,
        is_finished=found.is_finished,
    )


def _is_earlier(step: int, history: History | None) -> bool:
    """Return whether a step is not in a history that has later ones, because its version was pruned or removed."""
    if history is None or str(step) in history.labels:
        return False
    return any(record.step is not None and record.step > step for record in history)


def _is_repeated(history: History | None, log: LogHistory) -> bool:
    """Return whether a version has other metrics than a run has logged, so that it is of an earlier training.

    Args:
        history: History of the versions.
        log: Log of the run.
    """
    last_step = max((record["step"] for record in log if type(record.get("step")) is int), default=-1)
    for version in history or ():
        if version.step is None or version.step > last_step:
            continue
        logged = run_folders.metrics_at(version.step, log)
        if any(logged.get(name, number) != number for name, number in version.metrics.items()):
            return True
    return False


@contextmanager
def opened_for_appending(path: Path) -> Iterator[Pack]:
    """Open a pack for changes and hold its lock, or return a new empty pack that the caller saves."""
    if (path / keys.MANIFEST).is_file():
        with Pack.edit(path) as pack:
            yield pack
    else:
        yield Pack.empty()


def save_appended(pack: Pack, path: Path) -> None:
    """Save a pack of `opened_for_appending`.

    Raises:
        PackBusyError: The pack is new, and another process has created one in its folder in the meantime.
    """
    try:
        pack.save(None if pack.path is not None else path)
    except PackExistsError as error:
        if not (path / keys.MANIFEST).is_file():
            raise
        raise PackBusyError(f"{path} was created by another process in the meantime. Repeat the call.") from error


def append_new(
    pack: Pack, source: AdapterSource, step: int, options: Mapping[str, Any], *, overwrite: bool = False
) -> VersionRecord | None:
    """Append an adapter as the version of a step, unless the history has the same version already.

    Args:
        pack: The pack.
        source: The adapter, with the name of the history.
        step: Training step, whose number is the label of the version.
        options: Options of `Pack.append`.
        overwrite: Remove the versions of this step and of later ones first, which an earlier training has made.

    Returns:
        The record; None if the history had the version.

    Raises:
        AdapterNameError: The history has another version of this step, or later ones, or has it within an error bound
            and was to have it lossless; and `overwrite` is not set.
        PackDamagedError: The file of the version is missing or was changed, and `overwrite` is not set.
    """
    assert source.name is not None
    history, label = pack.histories.get(source.name), str(step)
    if history is not None and label in history.labels:
        adapter = checks.read_source(source, {"allow_pickle": options.get("allow_pickle", False)})
        is_lossless = bool(options.get("lossless"))
        if history[label].source_sha256 == checks.scan(adapter).content_hash:
            if history[label].lossless or not is_lossless:
                if _is_readable(pack, history[label], overwrite=overwrite):
                    return None
            elif not overwrite:
                raise AdapterNameError(
                    f"The history {source.name!r} has step {step} within an error bound, and it was to be stored "
                    "lossless. Pass another name (--name), or overwrite=True (--overwrite) to replace this version and "
                    "later ones."
                )
    repeated = [
        f"{source.name}{keys.VERSION_MARK}{record.version}"
        for record in history or ()
        if record.version == label or (record.step is not None and record.step >= step)
    ]
    if repeated and not overwrite:
        others = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        raise AdapterNameError(
            f"Step {step} was trained twice: the history has {repeated[0]}{others} of another training. Pass another "
            "name (--name) to keep both, or overwrite=True (--overwrite) to replace what the other one has from this "
            "step on."
        )
    pack.remove(*repeated)
    return pack.append(source.source, label, name=source.name, step=step, **options)


def _is_readable(pack: Pack, record: VersionRecord, *, overwrite: bool) -> bool:
    """Return whether the file of a version is in the pack, unchanged.

    Raises:
        PackDamagedError: It is missing or was changed, and `overwrite` is not set.
    """
    try:
        pack.history_store.read(record)
    except PackDamagedError as error:
        if not overwrite:
            raise PackDamagedError(
                f"{error} Or pass overwrite=True (--overwrite): the run still has the checkpoint, which then replaces "
                "this version and later ones."
            ) from error
        return False
    return True


def run_name(run: Path) -> str:
    """Return the default name of a run's history: that of its folder, or "adapter" if that is no valid name."""
    folder = run.absolute().name if run.name not in ("", ".", "..") else run.resolve().name
    return folder if keys.is_valid_name(folder) else append.DEFAULT_NAME


def watch(
    run: str | PathLike[str],
    history: str | PathLike[str],
    *,
    interval: float = 30.0,
    on_busy: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Tracked]:
    """Track a run until its last step has been saved; yield the result of each look at it.

    A run whose folder has no checkpoint yet is waited for, and so is another process that is writing to the pack.

    Args:
        run: `output_dir` of the Trainer.
        history: Folder of the pack with the history.
        interval: Seconds between two looks, above 0.
        on_busy: Function that is called when a wait for another process begins.
        options: Other options of `track`.

    Raises:
        OptionError: `interval` is not above 0.
        EigenloraxError: Errors of `track`.
    """
    if not to_float("interval", interval) > 0:
        raise OptionError(f"interval={interval:g}: a number of seconds above 0 was expected.")
    known_steps: Collection[int] = ()
    was_busy = False
    while True:
        tracked = None
        try:
            if run_folders.has_checkpoints(Path(run)):
                tracked = track(run, history, known_steps=known_steps, **options)
            was_busy = False
        except PackBusyError:
            if on_busy is not None and not was_busy:
                on_busy()
            was_busy = True
        if tracked is not None:
            known_steps = tracked.known_steps
            yield tracked
            if tracked.is_finished:
                return
        time.sleep(interval)
