"""Reports in the folder of a pack: recognise them, and remove them when the pack changes."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core import atomic_files, keys
from ..core.limits import MAX_REPORT_BYTES
from .manifest import Manifest

REPORT_MARK = re.compile(rb"Made by eigenlorax \S+ from the subspace of fingerprint ")
"""Sentence that every HTML and Markdown report contains."""


def is_report(path: Path) -> bool:
    """Return whether a file is a report that `eigenlorax report` wrote: HTML, Markdown or JSON."""
    data = atomic_files.read_regular_file(path, MAX_REPORT_BYTES)
    if data is None:
        return False
    if path.suffix.lower() != ".json":
        return REPORT_MARK.search(data) is not None
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("schema") == keys.REPORT_SCHEMA


@contextmanager
def outdated_reports_removed(folder: Path, previous: Manifest | None, new: Manifest) -> Iterator[None]:
    """Remove the reports of a pack whose content changes in the block. An error in the block restores them.

    They are moved before the block, so that a process that is killed in it leaves no report about another pack.

    Args:
        folder: Folder of the pack.
        previous: Manifest before the block; None if there is none that can be read.
        new: Manifest after the block.
    """
    is_same = previous is not None and _content(previous) == _content(new)
    reports = [path for path in (folder / name for name in keys.REPORTS) if not is_same and is_report(path)]
    moved = {path: folder / f"{atomic_files.STAGING_PREFIX}{path.name}" for path in reports}
    try:
        for path, staged in moved.items():
            path.replace(staged)
        yield
    except BaseException:
        for path, staged in moved.items():
            if staged.exists():
                staged.replace(path)
        raise
    # the next writer removes files that cannot be removed now
    with suppress(OSError):
        for staged in moved.values():
            staged.unlink()


def _content(manifest: Manifest) -> tuple[object, ...]:
    """Return the fields of a manifest that a report depends on."""
    return manifest.adapters, manifest.subspace, manifest.subspace_files
