"""The original adapters of a pack, recognised by their content among what a user names."""

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
"""Delta error up to which a reconstructed adapter serves as its own original, as of one trained on coefficients."""


@dataclass(frozen=True, slots=True)
class Originals:
    """The original trained adapters of a pack by their names in it, with the norms of their updates.

    missing: adapters that were projected into the pack and whose originals were not found.
    """

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    missing: list[str]


def find(pack: Pack, sources: Sources, progress: Progress, **options: Any) -> Originals:
    """Find the originals of the pack's trained adapters among the sources; others are passed over with a warning.

    An adapter that the pack reconstructs exactly needs no original. A source that cannot be read or contains NaN is
    passed over with a warning, because `fit` may have left it out. `OptionError` if the original of an adapter of the
    fit is missing.
    """
    matches = match_adapters(pack, sources, progress, options, 4)
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
                f"the original of {name!r}, which is in the fit, is not among the adapters given "
                f"({matches.n_sources} of them; they are recognised by their content). Give all that the pack was "
                f"fitted on, or none, for a report of the pack alone.{unread}"
            )
        else:
            missing.append(name)
    return Originals(dict(sorted(adapters.items())), scans, missing)


def listed(adapters: Any) -> Sources | Originals:
    """Return the argument `adapters` of `report` with iterators as lists. `OptionError` for other types."""
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
                f"adapters must be folders, Hub ids or `Adapter`s, one or several, or a mapping from names to those; "
                f"got {source!r}. For example report(pack, 'adapters/')."
            )
    return sources


def check_options(options: Iterable[str]) -> None:
    """Raise `TypeError`, as for any function, unless all are options of a reader of adapters."""
    readers = [inspect.signature(adapter_format.read).parameters for adapter_format in formats.FORMATS.values()]
    known = {"format"}.union(*readers) - {"source", "name", "options"}
    for name in options:
        if name not in known:
            raise TypeError(
                f"report() got an unexpected keyword argument {name!r}; of reading, it takes {sorted(known)}"
            )
