"""The report that `fit` stores in a pack's folder: write it, and read it if it still describes the pack."""

import warnings
from pathlib import Path
from typing import Any

from ..core import keys
from ..core.progress import Progress
from ..errors import EigenloraxWarning, FormatError, StaleReportWarning
from ..formats import sources
from ..formats.sources import Sources
from ..pack.pack import Pack
from . import build, files, measure, module_sample
from .files import Report
from .module_sample import ModuleSample, ModuleSize

DRAWING = 5.0
"""Seconds of every report: for baselines, the codec's curve, and figures."""
DECODING = 0.7e-6
"""Seconds of decoding one LoRA number of an entropy-coded pack."""


def write(pack: Pack, adapters: Sources, folder: Path, progress: Progress, **options: Any) -> Report:
    """Write the report of a pack that was just saved into its folder, as HTML and as JSON.

    Args:
        pack: The pack.
        adapters: Adapters as they were passed to `fit`, which has already warned about some of them.
        folder: Folder of the pack.
        progress: Callback with the arguments (stage, done, total).
        **options: Options of `read_adapter` as they were passed to `fit`.
    """
    for name in keys.REPORTS:
        files.check(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EigenloraxWarning)
        by_name = {sources.default_name(source): source.source for source in sources.find_adapters(adapters, **options)}
        members = {name: source for name, source in by_name.items() if name in pack.records}
        report = build.report(pack, members, progress=progress, **options)
    for done, name in enumerate(keys.REPORTS):
        progress("writing the report", done, len(keys.REPORTS))
        files.write(report, folder / name)
    progress("writing the report", len(keys.REPORTS), len(keys.REPORTS))
    return report


def seconds(pack: Pack, full: bool) -> float:
    """Estimate the seconds that the report of this pack takes, of all modules or of a sample."""
    decoding = DECODING * sum(record.lora_numbers for record in pack.records.values()) if pack.is_coded else 0.0
    rows = sum(max(record.ranks, default=0) for record in pack.records.values() if not record.untrained)
    # as if every adapter had all modules: only reading all adapters would tell
    sizes = {name: ModuleSize(rows, bases.shape) for name, bases in pack.subspace.modules.items()}
    k = measure.largest_k(pack)
    sample = ModuleSample.whole(sizes, k, len(pack)) if full else module_sample.choose(sizes, k, None, 0)
    return DRAWING + decoding + module_sample.fit_seconds(sizes) / 4 + sample.seconds


def load(pack: Pack) -> Report | None:
    """Return the report in a pack's folder.

    Return None if there is no report. Warn with `StaleReportWarning` and return None if the report cannot be read, or
    describes an earlier state of the pack.
    """
    path = pack.path / keys.REPORT_FIGURES if pack.path is not None else None
    if path is None or not path.is_file():
        return None
    try:
        report = files.read(path)
    except FormatError as error:
        warnings.warn(f"the report in the pack is not used: {error}", StaleReportWarning, stacklevel=2)
        return None
    reported: dict[str, object] = {
        adapter.name: (adapter.delta_error, adapter.in_fit, adapter.coefficient_bytes) for adapter in report.adapters
    }
    current: dict[str, object] = {
        name: (record.delta_error, record.in_fit, record.coefficient_bytes) for name, record in pack.records.items()
    }
    for figures in report.histories:
        reported |= {f"{figures.name}{keys.VERSION_MARK}{each.version}": each.sha256 for each in figures.versions}
    for history in pack.histories.values():
        current |= {history.full_name(record): record.sha256 for record in history}
    if report.collection.fingerprint == pack.info.fingerprint and reported == current:
        return report
    changed = sorted(name for name in reported | current if reported.get(name) != current.get(name))
    listing = ", ".join(changed[:3]) + (" …" if len(changed) > 3 else "")
    difference = f"added, removed or replaced: {listing}" if changed else "the subspace has changed"
    warnings.warn(
        f"{path} is not used, because the pack has changed since it was made ({difference}). Pass the original "
        "adapters with adapters= (--adapters) for a new report.",
        StaleReportWarning,
        stacklevel=2,
    )
    return None
