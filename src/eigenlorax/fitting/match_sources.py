"""Which adapters of a pack somebody's files are, by the hash of their content."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.adapter import Adapter
from ..errors import FormatError, NonFiniteError, ShapeError, SkippedAdapterWarning
from ..formats import checks, sources
from ..formats.checks import Scan
from ..formats.sources import Sources
from ..pack.pack import Pack


@dataclass(frozen=True, slots=True)
class Recognised:
    """Adapters as they were, under the names they have in a pack, and what was read of them.

    given: how many there were to look at; unread: those that could not be read, with the reason.
    """

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    given: int
    unread: Mapping[str, str]


def recognise(
    pack: Pack, given: Sources, progress: Callable[[str, int, int], None], options: Mapping[str, Any], stacklevel: int
) -> Recognised:
    """The adapters of the pack among those given. Others are left out, and said; so is what cannot be read, or holds
    NaN: a fit may have left it out. options: those of `read_adapter`."""
    hashes: dict[str, list[str]] = {}
    for name, record in pack.records.items():
        hashes.setdefault(record.source_sha256, []).append(name)
    adapters: dict[str, Adapter] = {}
    scans, strangers, unread = {}, [], {}
    found = sources.find_adapters(given, **options)
    for done, one in enumerate(found):
        progress("reading originals", done, len(found))
        try:
            adapter = checks.read_source(one, options)
            scan = checks.scan(adapter)
        except (FormatError, ShapeError) as error:
            unread[sources.default_name(one)] = str(error)
            continue
        except NonFiniteError:
            unread[sources.default_name(one)] = "it holds NaN or Inf, or numbers beyond float64."
            continue
        names = hashes.get(scan.content_hash, [])
        if not names:
            strangers.append(one.name or adapter.name)
        for name in names:
            adapters[name], scans[name] = replace(adapter, name=name), scan
    progress("reading originals", len(found), len(found))
    for name, why in unread.items():
        warnings.warn(f"{name} was passed over: {why}", SkippedAdapterWarning, stacklevel=stacklevel)
    if strangers:
        warnings.warn(
            f"not in the pack, by their content, and left out: {', '.join(sorted(strangers))}.",
            SkippedAdapterWarning,
            stacklevel=stacklevel,
        )
    return Recognised(adapters, scans, len(found), unread)
