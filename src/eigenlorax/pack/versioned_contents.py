"""Contents of a pack whose histories can be changed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import formats
from ..core import atomic_files, keys, update_changes
from ..core.update_changes import AdapterChange
from ..errors import OptionError
from ..formats import peft, run_folders, sources
from ..formats.mlx import writer as mlx_writer
from . import append, prune, writer
from .append import VersionOptions
from .history import VersionRecord
from .prune import Pruned
from .version_log import LogEntry, read_log
from .writable_contents import WritableContents


class VersionedContents(WritableContents):
    """Contents of a pack whose histories can be changed."""

    def log(self, name: str) -> list[LogEntry]:
        """Return the versions of a history with their distances to the latest one. Every version is decoded.

        Args:
            name: Name of the history.

        Raises:
            AdapterNameError: The pack has no history of this name.

        Example:
            >>> [(entry.record.version, entry.to_latest) for entry in runs.log("run")][-1]
            ('30', 0.0)
        """
        return read_log(self.history_store, self.history_store.history(name))

    def diff(self, before: str, after: str) -> AdapterChange:
        """Compare two versions or adapters: relative changes of all modules, of each module and side, and of heads.

        Args:
            before: Name of a version, such as "run@500" or "run@latest", or of an adapter. Changes are relative to it.
            after: Name of the version or adapter that is compared with it.

        Raises:
            AdapterNameError: A name is unknown.
            ShapeError: A module has other sizes in the second one.

        Example:
            >>> change = runs.diff("run@10", "run@latest")
            >>> change.total.change > 0, sorted(change.modules) == sorted(runs["run@10"].modules)
            (True, True)
        """
        return update_changes.compare(self.adapter(before), self.adapter(after))

    def append(
        self,
        source: sources.Source,
        version: str | None = None,
        *,
        name: str | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        reference: str | None = None,
        max_error: float | None = None,
        head_error: float | None = None,
        max_bytes: int | None = None,
        lossless: bool = False,
        same_base: bool = False,
        **options: Any,
    ) -> VersionRecord:
        """Append a version to a history, and return its record with its errors.

        The version is predicted from the previous one where that saves bytes. Its error is measured against the source
        in float64, so that errors do not accumulate. Only this object changes; `save` writes one new file and the
        manifest.

        Args:
            source: Folder, file, URL, Hub id, `Adapter`, state dict with its config, or `PeftModel`. Of a model with
                several adapters, the one with the name of the history is taken.
            version: Label: letters, digits, `.`, `_` and `-`. Default: the step, else the next integer.
            name: Name of the history, which may be new. Default: for a folder `RUN/checkpoint-STEP`, the name of the
                run's folder; else the only history of the pack, or "adapter".
            step: Training step. Default: that of a folder `checkpoint-STEP`.
            metrics: Finite numbers by name.
            reference: Label of the earlier version that this one refers to. Error bounds are then relative to the
                change from that version. Default: "common" in a population, a history whose first version has that
                label (docs/histories.md); else the history chooses, and error bounds are relative to the version.
            max_error: Bound of the relative error of the update, above 0 and below 1. Default: 0.05, or 0.2 of the
                change from a reference.
            head_error: Bound of the relative error of task heads. Other tensors beside the LoRA have a bound of at most
                0.002. Default: `max_error`, at least 0.1 and at most 0.3.
            max_bytes: With a reference, maximum size of the version's file, in place of `max_error`: the error is about
                as small as that allows.
            lossless: Store every tensor bit for bit, for `restore`.
            same_base: Accept an adapter that names another base model.
            options: Options of `read_adapter`.

        Raises:
            AdapterNameError: The label is used already, or is invalid, or the name is that of an adapter.
            BaseModelError, ShapeError: The adapter does not belong to the history.
            NonFiniteError: A tensor has NaN or Inf.
            OptionError: An option is invalid.

        Example:
            >>> runs = eigenlorax.Pack.empty()
            >>> runs.append("adapters/a", name="run", step=10, metrics={"loss": 0.5}).version
            '10'
            >>> runs["run@latest"].ranks
            (3,)
        """
        run, checkpoint_step = append.run_and_step(source)
        step = append.check_step(step if step is not None else checkpoint_step)
        name = name or run or append.default_name(self.history_store.histories)
        if lossless:
            append.refuse_for_lossless(max_bytes=max_bytes)
        bounds = append.check_error_bounds(max_error, head_error, lossless=lossless)
        if reference is None and name in self.histories and self.histories[name].is_population:
            reference = keys.COMMON
        version_options = VersionOptions(
            label=keys.check_label(str(version)) if version is not None else None,
            step=step,
            metrics=append.check_metrics(metrics),
            reference=str(reference) if reference is not None else None,
            max_bytes=append.check_max_bytes(max_bytes, max_error, reference),
            max_error=bounds[0],
            head_error=bounds[1],
            lossless=lossless,
            same_base=same_base,
            reading=options,
        )
        return append.append(append.version_source(source, name), name, self, version_options)

    def prune(self, name: str, *, keep_last: int | None = None, keep_every: int | None = None) -> Pruned:
        """Remove versions of a history, and return what was removed and how many bytes that frees.

        A version that refers to a removed one is encoded again, to exactly the numbers that it decodes to now. Only
        this object changes; `save` writes the pack.

        Args:
            name: Name of the history.
            keep_last: Number of versions at the end that stay, at least 1. Default: 1, since the latest always stays.
            keep_every: Versions stay whose step is a multiple of this. Without a step, the label counts if it is an
                integer, and else the position, from 1. Default: none.

        Raises:
            AdapterNameError: The pack has no history of this name.
            OptionError: Neither keep_last nor keep_every is passed, or one is below 1.

        Example:
            >>> runs = eigenlorax.Pack.empty()
            >>> records = [runs.append("adapters/a", step=step) for step in (10, 20, 30, 40)]
            >>> runs.prune("adapter", keep_last=1, keep_every=20).removed
            ('10', '30')
        """
        history = self.history_store.history(name)
        return prune.remove_versions(self.history_store, history, prune.pruned_labels(history, keep_last, keep_every))

    def restore(self, name: str, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a lossless version as the PEFT folder that it was, to resume training from, and return the folder.

        `adapter_config.json` has the same bytes as the source's, and `adapter_model.safetensors` the same tensors and
        metadata, bit for bit. A version of `track` or `VersionCallback` also gets a `trainer_state.json`, so that
        `Trainer.train(resume_from_checkpoint=…)` goes on at its step. The state of the optimizer is not part of a pack.

        Args:
            name: Name of the version, such as "run@1000" or "run@latest".
            directory: The folder to write.
            overwrite: Replace an existing folder of these files.

        Raises:
            AdapterNameError: The pack has no such version.
            OptionError: The version is not lossless, or was no PEFT folder. `export` writes it.
            PackExistsError: The folder exists, and `overwrite` is not set.

        Example:
            >>> runs = eigenlorax.Pack.empty()
            >>> record = runs.append("adapters/a", name="run", lossless=True)
            >>> folder = runs.restore("run@latest", "restored")
            >>> sorted(path.name for path in folder.iterdir())
            ['adapter_config.json', 'adapter_model.safetensors']
        """
        history, record = self.history_store.find(name)
        remedy = "`export` writes it as an ordinary LoRA."
        if not record.lossless:
            raise OptionError(
                f"Version {history.full_name(record)!r} is stored within an error bound of {record.max_error:g}, and "
                f"cannot be restored bit for bit: only versions appended with lossless=True (--lossless) can. {remedy}"
            )
        source_format = formats.format_of(record.origin)
        if formats.writable(source_format).suffix:
            raise OptionError(f"Version {history.full_name(record)!r} was a single file, and no folder. {remedy}")
        path = Path(directory)
        writer.check_outside(path)
        earlier = history.versions[: history.labels.index(record.version) + 1]
        logged = [(each.step, each.metrics) for each in earlier if each.step is not None]
        state = run_folders.trainer_state(record.step, logged) if record.step is not None else None
        files = (mlx_writer if source_format == formats.MLX else peft).to_files(self.adapter(name))
        if state is not None:
            files[run_folders.TRAINER_STATE] = state
        atomic_files.write_folder(path, files, overwrite=overwrite)
        return path
