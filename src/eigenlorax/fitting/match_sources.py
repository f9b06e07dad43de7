"""Matching files of a user with the adapters of a pack, by the hash of their content."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.adapter import Adapter
from ..core.progress import Progress
from ..errors import FormatError, NonFiniteError, ShapeError, SkippedAdapterWarning
from ..formats import checks, sources
from ..formats.checks import Scan
from ..formats.sources import Sources
from ..pack.pack import Pack


@dataclass(frozen=True, slots=True)
class MatchedAdapters:
    """Originals of a pack's adapters, and their scans, by their names in the pack.

    n_sources: number of adapters that were passed. unread: those that could not be read, with the reason.
    """

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    n_sources: int
    unread: Mapping[str, str]


def match_adapters(
    pack: Pack, adapter_sources: Sources, progress: Progress, options: Mapping[str, Any], stacklevel: int
) -> MatchedAdapters:
    """Find the originals of the pack's adapters among some sources.

    Sources that are not in the pack, or cannot be read, are left out with a warning: a fit may have skipped them.
    options: those of `read_adapter`. stacklevel: of the warnings.
    """
    names_by_hash: dict[str, list[str]] = {}
    for name, record in pack.records.items():
        names_by_hash.setdefault(record.source_sha256, []).append(name)
    adapters: dict[str, Adapter] = {}
    scans, strangers, unread = {}, [], {}
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
            strangers.append(source.name or adapter.name)
        for name in names:
            adapters[name], scans[name] = replace(adapter, name=name), scan
    progress("reading originals", len(originals), len(originals))
    for name, why in unread.items():
        warnings.warn(f"{name} was passed over: {why}", SkippedAdapterWarning, stacklevel=stacklevel)
    if strangers:
        warnings.warn(
            f"not in the pack, by their content, and left out: {', '.join(sorted(strangers))}.",
            SkippedAdapterWarning,
            stacklevel=stacklevel,
        )
    return MatchedAdapters(adapters, scans, len(originals), unread)
