"""The demo's history: real checkpoints of one training run, stored as versions, beside baselines."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core import metrics
from ..core.adapter import Adapter
from ..core.batch import ModuleBatch, pad_factors
from ..core.progress import Progress
from ..formats import read_adapter
from ..formats.run_folders import read_run
from ..pack.pack import Pack
from ..reports.analysis import per_adapter
from ..reports.analysis.shared_basis import SharedBasis
from .demo_subspaces import fit_without

NAME = "roberta-portuguese"
"""Name of the run and of its history."""
MAX_ERROR = 0.05
READ_STEP = 3000
"""Step of the version that is read back and compared with its original."""
_SHARED_SIZES = (6, 8, 10, 12, 14, 16, 20, 24)
"""Numbers of components per side of the shared basis that is compared; its components and coefficients have 8 bits."""


@dataclass(frozen=True, slots=True)
class DemoVersion:
    """One checkpoint of the run, as a version of the history.

    Attributes:
        step: Training step.
        eval_loss: Loss of the evaluation at this step, by the run's own log.
        stored_bytes: Bytes of the version in the history.
        delta_error: Relative error of the update against the original checkpoint.
        to_latest: Relative distance to the latest version.
        left_out_error: Relative error in a basis that was fitted to all other checkpoints.
    """

    step: int
    eval_loss: float
    stored_bytes: int
    delta_error: float
    to_latest: float
    left_out_error: float


@dataclass(frozen=True, slots=True)
class DemoHistory:
    """The checkpoints as a history.

    Attributes:
        versions: One version per checkpoint, in the order of their steps.
        n_components: Maximum number of components per module and side of the bases for `left_out_error`.
        source_bytes: Bytes of the checkpoints' weights files, LoRAs in float16.
        stored_bytes: Bytes of all versions.
        baseline: Best of rounding, truncation, both, and a shared basis, in words.
        baseline_bytes: Bytes of all checkpoints with this baseline, at the same error bound.
        read_back_step: Step of the version that is read from the saved history and compared with its original.
        read_back_error: Relative error of that version.
    """

    versions: list[DemoVersion]
    n_components: int
    source_bytes: int
    stored_bytes: int
    baseline: str
    baseline_bytes: int
    read_back_step: int
    read_back_error: float


def run(checkpoints: Path, directory: Path, n_components: int, *, overwrite: bool, progress: Progress) -> DemoHistory:
    """Store the checkpoints of a run as a history, read one version back, and leave each checkpoint out of a fit.

    Args:
        checkpoints: Folder of the run.
        directory: Folder for the history.
        n_components: Maximum number of components per module and side of the bases.
        overwrite: Whether to replace a history in `directory`.
        progress: Function that is called with (stage, done, total).
    """
    saved = read_run(checkpoints).checkpoints
    history = Pack.empty()
    for done, checkpoint in enumerate(saved):
        progress("appending versions", done, len(saved))
        history.append(
            checkpoint.folder, name=NAME, step=checkpoint.step, metrics=checkpoint.metrics, max_error=MAX_ERROR
        )
    progress("appending versions", len(saved), len(saved))
    opened = Pack.open(history.save(directory, overwrite=overwrite))
    originals = {str(checkpoint.step): read_adapter(checkpoint.folder) for checkpoint in saved}
    read_back = opened[f"{NAME}@{READ_STEP}"]
    baseline, baseline_bytes = _best_baseline(originals, progress)
    versions = []
    for done, entry in enumerate(opened.log(NAME)):
        progress("leaving checkpoints out", done, len(saved))
        record = entry.record
        _, check = fit_without(originals, [record.version], n_components)
        versions.append(
            DemoVersion(
                step=record.step or 0,
                eval_loss=record.metrics["eval_loss"],
                stored_bytes=record.file_bytes,
                delta_error=record.delta_error,
                to_latest=entry.to_latest or 0.0,
                left_out_error=check.left_out[record.version],
            )
        )
    progress("leaving checkpoints out", len(saved), len(saved))
    return DemoHistory(
        versions=versions,
        n_components=n_components,
        source_bytes=sum(record.source_file_bytes for record in opened.histories[NAME]),
        stored_bytes=sum(version.stored_bytes for version in versions),
        baseline=baseline,
        baseline_bytes=baseline_bytes,
        read_back_step=READ_STEP,
        read_back_error=metrics.relative_distance(originals[str(READ_STEP)].modules, read_back.modules) or 0.0,
    )


def _best_baseline(adapters: Mapping[str, Adapter], progress: Progress) -> tuple[str, int]:
    """Return the smallest baseline of which every adapter is within the error bound, in words, and its bytes."""
    modules = {module: _stack(adapters, module) for module in next(iter(adapters.values())).specs}
    points = per_adapter.at_error(per_adapter.tables(modules), MAX_ERROR)
    sizes = {f"each LoRA {method}": point.stored_bytes for method, point in points.items() if point is not None}
    shared = SharedBasis(modules, ((8, 8),), 1)
    for done, k in enumerate(_SHARED_SIZES):
        progress("measuring baselines", done, len(_SHARED_SIZES))
        (point,) = shared.measure(k).values()
        if point.worst <= MAX_ERROR:
            sizes[f"one shared basis of {k} components, 8 bits"] = math.ceil(point.stored_bytes)
    progress("measuring baselines", len(_SHARED_SIZES), len(_SHARED_SIZES))
    best = min(sizes, key=sizes.__getitem__)
    return best, sizes[best]


def _stack(adapters: Mapping[str, Adapter], module: str) -> ModuleBatch:
    factors = [adapter.modules[module] for adapter in adapters.values()]
    return pad_factors(factors, factors[0].down.shape[1], factors[0].up.shape[0])
