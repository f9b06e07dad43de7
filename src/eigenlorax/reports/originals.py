"""The original adapters of a pack, found by content among the sources that a user passes."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import formats
from ..core.adapter import Adapter
from ..core.progress import Progress
from ..errors import OptionError
from ..fitting.match_sources import match_adapters
from ..formats import checks
from ..formats.checks import Scan
from ..formats.sources import Sources
from ..pack.pack import Pack

EXACT = 1e-4
"""Maximum delta error of a reconstructed adapter that is used as its own original."""


@dataclass(frozen=True, slots=True)
class Originals:
    """Original trained adapters of a pack.

    Attributes:
        adapters: The originals, by name in the pack.
        scans: Norms of their updates, by name in the pack.
        missing: Names of projected adapters whose originals were not found.
    """

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    missing: list[str]


def find(pack: Pack, sources: Sources, progress: Progress, **options: Any) -> Originals:
    """Find the originals of the pack's trained adapters among the sources.

    An adapter that the pack reconstructs exactly needs no original. Sources that are not in the pack, that cannot be
    read or that contain NaN are left out with a warning, because `fit` may have left them out too.

    Args:
        pack: The pack.
        sources: Adapters in any form that `fit` takes.
        progress: Callback with the arguments (stage, done, total).
        **options: Options of `read_adapter`.

    Raises:
        OptionError: The original of an adapter of the fit is missing.
    """
    matches = match_adapters(pack.source_hashes, sources, progress, options, 4)
    adapters = {name: adapter for name, adapter in matches.adapters.items() if not pack.records[name].untrained}
    scans = dict(matches.scans)
    missing = []
    for name, record in pack.records.items():
        if record.untrained or name in adapters:
            continue
        if record.delta_error <= EXACT:
            adapters[name] = pack.adapter(name)
            scans[name] = checks.scan(adapters[name])
        elif record.in_fit:
            unread = f" Passed over: {', '.join(matches.unread)}." if matches.unread else ""
            raise OptionError(
                f"the original of {name!r}, which is in the fit, is not among the {matches.n_sources} adapters that "
                "were passed; they are recognised by their content. Pass all adapters that the pack was fitted to, or "
                f"none, for a report of the pack alone.{unread}"
            )
        else:
            missing.append(name)
    return Originals(dict(sorted(adapters.items())), scans, missing)


def listed(adapters: Any) -> Sources | Originals:
    """Return the argument `adapters` of `report`, with iterators as lists; `OptionError` if it has another type."""
    if isinstance(adapters, str | Path | Adapter | Originals):
        return adapters
    sources: Mapping[str, Any] | list[Any]
    if isinstance(adapters, Mapping):
        sources = adapters
    else:
        sources = list(adapters) if isinstance(adapters, Iterable) else [adapters]
    for source in sources.values() if isinstance(sources, Mapping) else sources:
        if not isinstance(source, str | Path | Adapter):
            raise OptionError(
                f"adapters must be folders, Hub ids or `Adapter`s, one or several, or a mapping from names to these; "
                f"got {source!r}. For example report(pack, 'adapters/')."
            )
    return sources


def check_options(options: Iterable[str]) -> None:
    """Raise `TypeError`, as Python does for unknown arguments, unless all are options of `read_adapter`."""
    readers = [inspect.signature(adapter_format.read).parameters for adapter_format in formats.FORMATS.values()]
    known = {"format"}.union(*readers) - {"source", "name", "options"}
    for name in options:
        if name not in known:
            raise TypeError(
                f"report() got an unexpected keyword argument {name!r}; options of reading are {sorted(known)}"
            )
