"""Matching of files with the adapters of a pack, by content hash."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.adapter import Adapter
from ..core.printable import first_names
from ..core.progress import Progress
from ..errors import FormatError, NonFiniteError, ShapeError, SkippedAdapterWarning
from ..formats import checks, sources
from ..formats.checks import Scan
from ..formats.sources import Sources


@dataclass(frozen=True, slots=True)
class MatchedAdapters:
    """Originals of a pack's adapters.

    Attributes:
        adapters: Originals, by name in the pack.
        scans: Content hash and norms of each original, by name in the pack.
        n_sources: Number of adapters that were passed.
        unread: Reason for each adapter that could not be read, by name.
    """

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    n_sources: int
    unread: Mapping[str, str]


def check_any_original(adapters: Mapping[str, Adapter]) -> None:
    """Raise `FormatError` if no source that was passed is an original of the pack."""
    if not adapters:
        raise FormatError(
            "none of the adapters that were passed is in the pack, compared by content. Pass the files that the pack "
            "was fitted from."
        )


def match_adapters(
    hashes: Mapping[str, str],
    adapter_sources: Sources,
    progress: Progress,
    options: Mapping[str, Any],
    stacklevel: int,
) -> MatchedAdapters:
    """Find the originals of a pack's adapters among some sources.

    Sources that are not in the pack, or cannot be read, are left out with a warning: a fit may have skipped them.

    Args:
        hashes: Hash of the source's content of each adapter or version, by name.
        adapter_sources: Adapters in any form that `fit` takes.
        progress: Callback with the arguments (stage, done, total).
        options: Options of `read_adapter`.
        stacklevel: Stack level of the warnings.
    """
    names_by_hash: dict[str, list[str]] = {}
    for name, content_hash in hashes.items():
        names_by_hash.setdefault(content_hash, []).append(name)
    adapters: dict[str, Adapter] = {}
    scans, unknown, unread = {}, [], {}
    originals = sources.find_adapters(adapter_sources, **options)
    for done, source in enumerate(originals):
        progress("reading originals", done, len(originals))
        try:
            adapter = checks.read_source(source, options)
            scan = checks.scan(adapter)
        except (FormatError, ShapeError) as error:
            unread[sources.default_name(source)] = str(error)
            continue
        except NonFiniteError:
            unread[sources.default_name(source)] = "it holds NaN or Inf, or numbers beyond float64."
            continue
        names = names_by_hash.get(scan.content_hash, [])
        if not names:
            unknown.append(source.name or adapter.name)
        for name in names:
            adapters[name], scans[name] = replace(adapter, name=name), scan
    progress("reading originals", len(originals), len(originals))
    for name, cause in unread.items():
        warnings.warn(f"{name} was passed over: {cause}", SkippedAdapterWarning, stacklevel=stacklevel)
    if unknown:
        warnings.warn(
            f"left out, because their content is not in the pack: {first_names(sorted(unknown))}.",
            SkippedAdapterWarning,
            stacklevel=stacklevel,
        )
    return MatchedAdapters(adapters, scans, len(originals), unread)
