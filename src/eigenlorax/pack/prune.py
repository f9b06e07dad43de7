"""Removal of versions from a history. What depends on a removed version is encoded again."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..codec.versions import lossy
from ..codec.versions.version import DecodedVersion, EncodedVersion
from ..core import atomic_files, keys, metrics
from ..core.options import to_int
from ..errors import OptionError, PackError
from . import history_json, lossless_versions
from .bundles import bundle_again
from .history import History, VersionRecord
from .history_store import HistoryStore, offered_reference
from .lossless_versions import LosslessVersion


@dataclass(frozen=True, slots=True)
class Pruned:
    """Outcome of a pruning.

    Attributes:
        removed: Labels of the versions that were removed, in order.
        encoded_again: Labels of the versions that referred to them and were encoded again, in order.
        freed_bytes: Bytes of the history in its files and in the manifest before, minus those after.
    """

    removed: tuple[str, ...]
    encoded_again: tuple[str, ...]
    freed_bytes: int


def pruned_labels(history: History, keep_last: Any, keep_every: Any) -> list[str]:
    """Return the labels of the versions that a pruning removes.

    Args:
        history: The history.
        keep_last: Number of versions at the end that stay, at least 1; None for 1.
        keep_every: Divisor of the steps that stay, at least 1; None to keep the last versions only. Where a version has
            no step, its label counts, or its position from 1 if the label is no integer.

    Raises:
        OptionError: Both are None, or one is below 1.
    """
    if history.is_population and len(history) > 1:
        raise OptionError(
            f"the versions of {history.name!r} are no steps of one adapter, but adapters that all refer to "
            f"{keys.COMMON!r}: there is nothing to prune. Remove them by name (`remove`)."
        )
    if keep_last is None and keep_every is None:
        raise OptionError("nothing says which versions stay: pass keep_last, keep_every or both.")
    last, every = (
        None if number is None else _at_least_one(name, number)
        for name, number in (("keep_last", keep_last), ("keep_every", keep_every))
    )
    kept = {record.version for record in history.versions[-(last or 1) :]}
    if every is not None:
        kept |= {
            record.version
            for position, record in enumerate(history.versions, start=1)
            if _number(record, position) % every == 0
        }
    return [label for label in history.labels if label not in kept]


def _at_least_one(name: str, value: Any) -> int:
    number: int = to_int(name, value)
    if number < 1:
        raise OptionError(f"{name}={number}: it is a number of at least 1.")
    return number


def _number(record: VersionRecord, position: int) -> int:
    if record.step is not None:
        return record.step
    return int(record.version) if re.fullmatch(r"[0-9]{1,18}", record.version) else position


def remove_named(store: HistoryStore, names: Iterable[str]) -> None:
    """Remove histories and versions by name, such as "run" and "run@1000". All names are known."""
    labels: dict[str, set[str]] = {}
    for name in names:
        if name in store.histories:
            labels.setdefault(name, set()).update(store.histories[name].labels)
        else:
            history, record = store.find(name)
            labels.setdefault(history.name, set()).add(record.version)
    for name, removed in labels.items():
        remove_versions(store, store.histories[name], removed)


def remove_versions(store: HistoryStore, history: History, labels: Collection[str]) -> Pruned:
    """Remove versions of a history. All others decode to the same numbers as before.

    Args:
        store: The histories of the pack.
        history: One of them.
        labels: Labels of the versions. Without any other version, the history is removed.
    """
    others = set(history.labels) - set(labels)
    if history.is_population and keys.COMMON in labels and others:
        raise OptionError(
            f"All other versions of {history.name!r} refer to {keys.COMMON!r}. Remove them first, or the whole history "
            f"by its name, {history.name!r}."
        )
    heights = _heights([record for record in history.versions if record.version not in labels])
    remaining = replace(history, versions=())
    again: list[str] = []
    # of each kind, the last version that was encoded again, as its new bytes say
    newest: dict[bool, tuple[str, DecodedVersion]] = {}
    for position, record in enumerate(history.versions):
        if record.version in labels:
            continue
        # a change from the previous version, of which there may be another one now
        follows_removed = position > 0 and history.versions[position - 1].version in labels
        is_compared_again = follows_removed and record.change_error is None and not history.is_population
        # the bytes of a version within an error bound also depend on how its reference was encoded
        if record.reference in labels or (record.reference in again and not record.lossless):
            offered = offered_reference(remaining, lossless=record.lossless, height=heights[record.version])
            reference = _reference(store, history, offered, newest.get(record.lossless))
            encoded = _encode_again(store.decode(history, record), reference)
            # it may refer to another version now, from which it has another change
            is_compared_again |= record.change_error is not None
            record = _with_file(record, encoded, offered)
            store.add_file(record, encoded.data)
            again.append(record.version)
            newest[record.lossless] = record.version, encoded.decoded
        if is_compared_again:
            record = replace(record, change=_change(store, history, remaining, record.version))
        remaining = replace(remaining, versions=(*remaining.versions, record))
    _check_numbers(store, history, remaining, again)
    remaining = bundle_again(store, history, remaining)
    store.replace(remaining)
    freed = _stored_bytes(history) - _stored_bytes(remaining)
    return Pruned(tuple(label for label in history.labels if label in labels), tuple(again), freed)


def _heights(kept: Sequence[VersionRecord]) -> dict[str, int]:
    """Return, for each version, the number of versions in the longest chain that begins with it."""
    heights = {record.version: 1 for record in kept}
    for record in reversed(kept):
        if record.reference in heights:
            heights[record.reference] = max(heights[record.reference], heights[record.version] + 1)
    return heights


def _reference(
    store: HistoryStore, history: History, offered: VersionRecord | None, newest: tuple[str, DecodedVersion] | None
) -> DecodedVersion | None:
    """Return a version that another one may refer to, as its bytes will be after the removal; None for none.

    Args:
        store: The histories of the pack.
        history: The history before the removal.
        offered: The version.
        newest: Label of the last version that was encoded again, and the version.
    """
    if offered is None:
        return None
    return newest[1] if newest is not None and newest[0] == offered.version else store.decode(history, offered)


def _encode_again(decoded: DecodedVersion, reference: DecodedVersion | None) -> EncodedVersion:
    """Encode a version so that it decodes to the same numbers, with another reference or as a key version.

    Args:
        decoded: The version.
        reference: Version that it may refer to; None for none.
    """
    if isinstance(decoded, LosslessVersion):
        return lossless_versions.encode(decoded, reference)
    return lossy.encode_again(decoded, reference)


def _with_file(record: VersionRecord, encoded: EncodedVersion, offered: VersionRecord | None) -> VersionRecord:
    """Return the record of a version with other bytes, which may refer to `offered`."""
    return replace(
        record,
        sha256=atomic_files.digest(encoded.data),
        reference=offered.version if offered is not None and encoded.has_reference else None,
        change_error=None,
        bundle=None,
        offset=None,
        lora_bytes=encoded.lora_bytes,
        tensor_bytes=encoded.tensor_bytes,
    )


def _check_numbers(store: HistoryStore, history: History, remaining: History, again: Collection[str]) -> None:
    """Raise `PackError` if a chain with versions that were encoded again would end in other numbers than before.

    Args:
        store: The histories of the pack.
        history: The history before the removal.
        remaining: The history after it.
        again: Labels of the versions that were encoded again.
    """
    if not again:
        return
    # numbers of a chain add up, so that its end shows an error anywhere
    references = {record.reference for record in remaining.versions}
    for record in remaining.versions:
        if record.version not in references and any(each.version in again for each in remaining.chain(record)):
            after = HistoryStore({history.name: remaining}, store.read).decode(remaining, record)
            if not _is_equal(store.decode(history, history[record.version]), after):
                raise PackError(
                    f"Version {history.full_name(record)!r} would not decode to the same numbers after the removal. "
                    "Nothing was changed. Please report it with the output of `eigenlorax env`."
                )


def _is_equal(decoded: DecodedVersion, again: DecodedVersion) -> bool:
    """Return whether two versions have the same numbers."""
    pairs = [
        *((factors.down, again.modules[module].down) for module, factors in decoded.modules.items()),
        *((factors.up, again.modules[module].up) for module, factors in decoded.modules.items()),
        *((tensor, again.tensors[key]) for key, tensor in decoded.tensors.items()),
    ]
    return all(torch.equal(before, after) for before, after in pairs)


def _change(store: HistoryStore, history: History, remaining: History, label: str) -> float | None:
    """Return the distance of a version to the last remaining one before it; None if there is none."""
    if not remaining.versions:
        return None
    previous = store.decode(history, history[remaining.latest.version])
    return metrics.relative_distance(previous.modules, store.decode(history, history[label]).modules)


def _stored_bytes(history: History) -> int:
    """Return the bytes of a history in its files and in the manifest; 0 for one without versions."""
    if not history.versions:
        return 0
    files = {(record.file, record.offset): record.file_bytes for record in history.versions}
    return sum(files.values()) + history_json.manifest_bytes(history)
