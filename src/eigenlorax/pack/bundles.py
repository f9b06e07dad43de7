"""Bundles: several versions of a history in one file, so that thousands of members of a population take one file."""

from collections.abc import Collection
from dataclasses import replace

from ..core import atomic_files
from .history import History
from .history_store import HistoryStore


def bundle(store: HistoryStore, history: History, labels: Collection[str]) -> History:
    """Return a history some of whose versions are in one file, in their order. The file is written with the pack.

    Args:
        store: The histories of the pack, which read the versions as they are stored now.
        history: The history.
        labels: Labels of the versions.
    """
    parts = {record.version: store.read(record) for record in history.versions if record.version in labels}
    digest, offset = atomic_files.digest(b"".join(parts.values())), 0
    versions = []
    for record in history.versions:
        data = parts.get(record.version)
        if data is not None:
            store.add_file(record, data)
            record = replace(record, bundle=digest, offset=offset)
            offset += len(data)
        versions.append(record)
    return replace(history, versions=tuple(versions))


def bundle_again(store: HistoryStore, history: History, remaining: History) -> History:
    """Return a history after a change, with new bundles in place of those that have lost versions.

    Args:
        store: The histories of the pack.
        history: The history before the change.
        remaining: The history after it.
    """
    before, after = ({(record.bundle, record.offset) for record in each.versions} for each in (history, remaining))
    for digest in sorted({digest for digest, _ in before - after if digest is not None}):
        remaining = bundle(store, remaining, {record.version for record in remaining if record.bundle == digest})
    return remaining
