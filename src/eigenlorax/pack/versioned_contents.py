"""Contents of a pack whose histories can be changed."""

from collections.abc import Mapping
from typing import Any

from ..core import keys
from ..formats import sources
from . import append
from .append import VersionOptions
from .history import VersionRecord
from .writable_contents import WritableContents


class VersionedContents(WritableContents):
    """Contents of a pack whose histories can be changed."""

    def append(
        self,
        source: sources.Source,
        version: str | None = None,
        *,
        name: str | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        max_error: float | None = None,
        head_error: float | None = None,
        lossless: bool = False,
        same_base: bool = False,
        **options: Any,
    ) -> VersionRecord:
        """Append a version to a history, and return its record with its errors.

        The version is predicted from the previous one where that saves bytes. Its error is measured against the source
        in float64, so that errors do not accumulate. Only this object changes; `save` writes one new file and the
        manifest.

        Args:
            source: Folder, file, URL, Hub id, `Adapter`, `PeftModel`, or state dict with its config.
            version: Label: letters, digits, `.`, `_` and `-`. Default: the step, else the next integer.
            name: Name of the history, which may be new. Default: for a folder `RUN/checkpoint-STEP`, the name of the
                run's folder; else the only history of the pack, or "adapter".
            step: Training step. Default: that of a folder `checkpoint-STEP`.
            metrics: Finite numbers by name.
            max_error: Bound of the relative error of the update, above 0 and below 1. Default: 0.05.
            head_error: Bound of the relative error of task heads. Other tensors beside the LoRA have a bound of at most
                0.002. Default: `max_error`, at least 0.1 and at most 0.3.
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
            >>> runs.append("adapters/a", name="run", step=10, metrics={"loss": 0.5}, lossless=True).version
            '10'
            >>> runs["run@latest"].ranks
            (3,)
        """
        run, checkpoint_step = append.run_and_step(source)
        step = append.check_step(step if step is not None else checkpoint_step)
        name = name or run or append.default_name(self.history_store.histories)
        bounds = append.error_bounds(max_error, head_error, lossless=lossless)
        version_options = VersionOptions(
            keys.check_label(str(version)) if version is not None else None,
            step,
            append.check_metrics(metrics),
            *bounds,
            same_base,
            options,
        )
        return append.append(sources.single(name, source), name, self, version_options)
