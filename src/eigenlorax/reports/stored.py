"""The report that `fit` leaves in a pack, and whether it is still about what the pack holds."""

import warnings
from pathlib import Path
from typing import Any

from ..core import keys
from ..errors import EigenloraxWarning, FormatError, StaleReportWarning
from ..fitting.fit import Progress
from ..formats import sources
from ..formats.sources import Sources
from ..pack.pack import Pack
from . import build, files, measure
from .files import Report

PATIENCE = 300.0
"""Seconds that a report may take which nobody has asked for."""


def leave(pack: Pack, adapters: Sources, folder: Path, progress: Progress, **options: Any) -> Report:
    """Make the report on a pack that was just written to `folder`, and leave its page and its figures there.

    adapters, options: as they were given to `fit`, which has said already what is wrong with some of them.
    """
    for name in keys.REPORTS:
        files.check(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EigenloraxWarning)
        found = {sources.default_name(one): one.source for one in sources.find_adapters(adapters, **options)}
        kept = {name: source for name, source in found.items() if name in pack.records}
        report = build.report(pack, kept, progress=progress, **options)
    for name in keys.REPORTS:
        files.write(report, folder / name)
    return report


def seconds(pack: Pack) -> float:
    """How long that will take, roughly."""
    return measure.seconds(pack, {name: pack.packed(name) for name in pack.names})


def of(pack: Pack) -> Report | None:
    """The report in a pack's folder; None where there is none, or, with a warning, none of the pack as it is now."""
    path = pack.path / keys.REPORT_FIGURES if pack.path is not None else None
    if path is None or not path.is_file():
        return None
    try:
        found = files.read(path)
    except FormatError as error:
        warnings.warn(f"the report in the pack is not used: {error}", StaleReportWarning, stacklevel=2)
        return None
    said = {row.name: (row.delta_error, row.in_fit, row.coefficient_bytes) for row in found.adapters}
    held = {name: (one.delta_error, one.in_fit, one.coefficient_bytes) for name, one in pack.records.items()}
    if found.collection.fingerprint == pack.info.fingerprint and said == held:
        return found
    changed = sorted(name for name in said.keys() | held.keys() if said.get(name) != held.get(name))
    what = (
        f"{len(changed)} adapters of it were added, removed or replaced" if changed else "its subspace is another one"
    )
    warnings.warn(
        f"{path} is not used: it was made when the pack held something else ({what}). Name the original adapters with "
        "adapters= (--adapters) for a new one.",
        StaleReportWarning,
        stacklevel=2,
    )
    return None
