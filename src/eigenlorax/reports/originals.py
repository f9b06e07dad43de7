"""From what a user points at to the adapters that a pack was made of, recognised by their content."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import formats
from ..core.adapter import Adapter
from ..errors import OptionError
from ..fitting.fit import Progress
from ..fitting.match_sources import recognise
from ..formats import checks
from ..formats.checks import Scan
from ..formats.sources import Sources
from ..pack.pack import Pack

EXACT = 1e-4
"""The delta error up to which what comes back from a pack is taken for what went in: of adapters trained in it, say."""


@dataclass(frozen=True, slots=True)
class Originals:
    """Trained adapters as they were, under their names in the pack, and the norms of their updates. missing: projected
    adapters that were not found."""

    adapters: Mapping[str, Adapter]
    scans: Mapping[str, Scan]
    missing: list[str]


def find(pack: Pack, given: Sources, progress: Progress, **options: Any) -> Originals:
    """The trained adapters of the pack among those given. Others are left out, and said.

    An adapter that comes back from the pack as it was needs no original. What cannot be read, or holds NaN, is passed
    over, and said: `fit` may have left it out. `OptionError` names one of the fit that is not there.
    """
    found = recognise(pack, given, progress, options, 4)
    adapters = {name: one for name, one in found.adapters.items() if not pack.records[name].untrained}
    scans = dict(found.scans)
    missing = []
    for name, record in pack.records.items():
        if record.untrained or name in adapters:
            continue
        if record.delta_error <= EXACT:
            adapters[name] = pack.adapter(name)
            scans[name] = checks.scan(adapters[name])
        elif record.in_fit:
            raise OptionError(
                f"the original of {name!r}, which is in the fit, is not among the adapters given ({found.given} of "
                "them; they are recognised by their content). Give all that the pack was fitted on, or none, for a "
                "report of the pack alone." + f" Passed over: {', '.join(found.unread)}." * bool(found.unread)
            )
        else:
            missing.append(name)
    return Originals(dict(sorted(adapters.items())), scans, missing)


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
