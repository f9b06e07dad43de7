"""The report that `fit` leaves in a pack, and whether it is still about what the pack holds."""

import warnings
from pathlib import Path

from .. import keys
from ..errors import FormatError, StaleReportWarning
from ..pack import Pack
from . import files
from .data import Report


def save(report: Report, folder: Path) -> None:
    """Leave a report in the pack in `folder`: its page, and its figures."""
    for name in keys.REPORTS:
        files.write(report, folder / name)


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
        "--adapters for a new one.",
        StaleReportWarning,
        stacklevel=2,
    )
    return None
