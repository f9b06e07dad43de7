"""Adapters with equal updates: which ones they are, and one file for the codes that they have in common."""

import warnings
from collections.abc import Mapping

from ..codec.storage.coded import codes_digest
from ..core import keys, printable
from ..errors import DuplicateAdapterWarning
from .contents import PackContents
from .packed_adapter import PackedAdapter
from .record import Record

NAMED = 5
"""Maximum number of copies of one adapter that a warning names."""


def share_codes(adapters: Mapping[str, PackedAdapter]) -> dict[str, PackedAdapter]:
    """Let one adapter hold the codes of all that have equal ones: their parent, which has no parent itself.

    It is the first by name among those that had codes of their own. Adapters without codes do not change.
    """
    by_codes: dict[str, list[str]] = {}
    for name, packed in sorted(adapters.items()):
        if packed.payload is not None and keys.CODED in packed.payload:
            by_codes.setdefault(codes_digest(packed.payload[keys.CODED]), []).append(name)
    shared = dict(adapters)
    for names in by_codes.values():
        parent = next((name for name in names if adapters[name].parent is None), names[0])
        for name in names:
            shared[name] = adapters[name].with_parent(parent if name != parent else None)
    return shared


def names_by_content(pack: PackContents) -> dict[str, str]:
    """Return an adapter's name for each `Record.source_sha256` in a pack.

    In an entropy-coded pack, its codes are as good as those of a new adapter would be: adapters whose error may be
    larger than the pack's aim are left out.
    """
    return {
        record.source_sha256: name
        for name, record in sorted(pack.records.items(), reverse=True)
        if not pack.is_coded or (record.delta_error <= pack.aim and not record.bound)
    }


def warn_of_copies(copies: Mapping[str, str], records: Mapping[str, Record], *, as_references: bool) -> None:
    """Issue one `DuplicateAdapterWarning` if there are copies.

    It is attributed to the line that called `fit` or `Pack.add`.

    Args:
        copies: For each adapter whose update is that of another one, the name of that.
        records: Records of all adapters, by name.
        as_references: True if they are stored as references.
    """
    by_original: dict[str, list[str]] = {}
    for name, original in sorted(copies.items()):
        by_original.setdefault(original, []).append(name)
    sentences = [_sentence(names, original, as_references) for original, names in sorted(by_original.items())]
    if len(sentences) > NAMED:
        sentences[NAMED:] = [f"There are copies of {len(sentences) - NAMED} more adapters."]
    different = sorted(name for name, original in copies.items() if not _is_equal(records[name], records[original]))
    if different:
        sentences.append(
            f"Only the updates are equal: heads or other tensors differ in {printable.first_names(different, NAMED)}."
        )
    if sentences:
        warnings.warn(" ".join(sentences), DuplicateAdapterWarning, stacklevel=4)


def _is_equal(record: Record, original: Record) -> bool:
    """Return whether two adapters have equal contents, heads and carried tensors included."""
    return record.source_sha256 == original.source_sha256 or not (
        record.head_bytes or record.carried_bytes or original.head_bytes or original.carried_bytes
    )


def _sentence(names: list[str], original: str, as_references: bool) -> str:
    listed = printable.first_names(names, NAMED)
    if len(names) == 1:
        return f"{listed} has the same update as {original}{'; it is stored as a reference' * as_references}."
    return f"{listed} have the same update as {original}{'; they are stored as references' * as_references}."
