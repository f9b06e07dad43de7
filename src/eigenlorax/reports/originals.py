"""From what a user points at to the adapters that a pack was made of, recognised by their content."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import checks, formats
from ..adapter import Adapter
from ..checks import Scan
from ..errors import FormatError, NonFiniteError, OptionError, ShapeError, SkippedAdapterWarning
from ..fitting import Progress
from ..formats import sources
from ..formats.sources import Found, Sources
from ..pack import Pack

EXACT = 1e-4
"""The delta error up to which what comes back from a pack is taken for what went in: of adapters trained in it, say."""


@dataclass(frozen=True, slots=True)
class Originals:
    """Trained adapters as they were, under their names in the pack, and the norms of their updates. untrained: the
    others that were found; missing: projected adapters that were not."""

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    untrained: Mapping[str, Adapter]
    missing: list[str]


def find(pack: Pack, given: Sources, progress: Progress, **options: Any) -> Originals:
    """The trained adapters of the pack among those given. Others are left out, and said.

    An adapter that comes back from the pack as it was needs no original. What cannot be read, or holds NaN, is passed
    over, and said: `fit` may have left it out. `OptionError` names one of the fit that is not there.
    """
    hashes: dict[str, list[str]] = {}
    for name, record in pack.records.items():
        hashes.setdefault(record.source_sha256, []).append(name)
    adapters: dict[str, Adapter] = {}
    untrained: dict[str, Adapter] = {}
    scans, strangers, unread = {}, [], {}
    found = sources.find(given, **options)
    for done, one in enumerate(found):
        progress("reading originals", done, len(found))
        try:
            adapter = _read(one, options)
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
            kept = untrained if pack.records[name].untrained else adapters
            kept[name], scans[name] = replace(adapter, name=name), scan
    progress("reading originals", len(found), len(found))
    for name, why in unread.items():
        warnings.warn(f"{name} was passed over: {why}", SkippedAdapterWarning, stacklevel=3)
    if strangers:
        warnings.warn(
            f"not in the pack, by their content, and left out: {', '.join(sorted(strangers))}.",
            SkippedAdapterWarning,
            stacklevel=3,
        )
    missing = []
    for name, record in pack.records.items():
        if record.untrained or name in adapters:
            continue
        if record.delta_error <= EXACT:
            adapters[name] = pack.adapter(name)
            scans[name] = checks.scan(adapters[name])
        elif record.in_fit:
            raise OptionError(
                f"the original of {name!r}, which is in the fit, is not among the adapters given ({len(found)} of "
                "them; they are recognised by their content). Give all that the pack was fitted on, or none, for a "
                "report of the pack alone." + f" Passed over: {', '.join(unread)}." * bool(unread)
            )
        else:
            missing.append(name)
    return Originals(dict(sorted(adapters.items())), scans, untrained, missing)


def _read(one: Found, options: Mapping[str, Any]) -> Adapter:
    if isinstance(one.source, Adapter):
        checks.check_made(one.source)
        return one.source
    return formats.read_adapter(one.source, name=one.name, **options)


def listed(given: Any) -> Sources | Originals:
    """What stands for adapters, as it is, or what may be gone through once as a list. `OptionError` for others."""
    if isinstance(given, str | Path | Adapter | Originals):
        return given
    several = given if isinstance(given, Mapping) else list(given) if isinstance(given, Iterable) else [given]
    for one in several.values() if isinstance(several, Mapping) else several:
        if not isinstance(one, str | Path | Adapter):
            raise OptionError(
                f"adapters must be folders, Hub ids or `Adapter`s, one or several, or a mapping from names to those; "
                f"got {one!r}. For example report(pack, 'adapters/')."
            )
    return several


def check_options(options: Iterable[str]) -> None:
    """`TypeError`, as of any function, unless all are options of a reader."""
    readers = [inspect.signature(one.read).parameters for one in formats.FORMATS.values()]
    known = {"format"}.union(*readers) - {"source", "name", "options"}
    for name in options:
        if name not in known:
            raise TypeError(
                f"report() got an unexpected keyword argument {name!r}; of reading, it takes {sorted(known)}"
            )
