"""`fit(reference=…)`: a population, the adapters of many users that were trained from one common adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import keys
from ..core.progress import Progress
from ..errors import AdapterNameError, OptionError
from ..formats import checks, sources
from ..formats.sources import AdapterSource, Source, Sources
from ..pack.bundles import bundle
from ..pack.history import History, VersionRecord
from ..pack.pack import Pack
from .collection import NONE_LEFT
from .options import ReadOptions

DEFAULT_NAME = "members"
"""Name of the history with the common adapter and its members."""
COMMON_ERROR = 0.002
"""Error bound of the common adapter and of its head.

Closer, it is larger and the members are not smaller: the common adapter of the writers in docs/results.md has 35,348
bytes in 16 bits, 25,164 at 0.0005 and 20,200 at 0.002, and the first eight users 4,626 and 4,623 bytes on average at an
error of 0.2 of their change. If it is stored exactly, there are no whole numbers that predict those of a member."""


LITTLE_EXPLAINED = 0.5
"""Share of a member's squared norm below which a note says that the common adapter explains little of it."""
MAX_LISTED = 5
"""Maximum number of members that a note names."""


@dataclass(frozen=True, slots=True)
class MemberOptions:
    """Size of the members of a population.

    Attributes:
        name: Name of the history.
        max_error: Error bound of each update, relative to its change from the common adapter; None for the default.
        head_error: Error bound of each head, relative to its change; None for the default.
        max_bytes: Maximum size of a member in bytes; None for none.
    """

    name: str
    max_error: float | None
    head_error: float | None
    max_bytes: int | None


def refuse_options(needed: str, options: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise `OptionError` for the first option that differs from its default.

    Args:
        needed: Why the option has no effect, for the message.
        options: Value and default of each option, by name.
    """
    for name, (passed, default) in options.items():
        if passed != default:
            raise OptionError(f"{name} has no effect {needed}. Remove it.")


def fit_population(
    adapters: Sources, common: Source, members: MemberOptions, options: ReadOptions, progress: Progress
) -> Pack:
    """Return a pack with one history: the common adapter, and each adapter as its change from that.

    Args:
        adapters: Adapters in any form that `fit` takes. Their order does not matter.
        common: The adapter from which they were trained.
        members: Size of the adapters.
        options: Adapters to leave out, and options of reading.
        progress: Callback with the arguments (stage, done, total).

    Raises:
        AdapterNameError: Names are equal, or cannot be labels of versions.
        OptionError: No adapter is left, or one does not fit into its bytes.
        BaseModelError, ShapeError: An adapter has other modules or another base model than the common one.
    """
    if members.max_bytes is not None and members.max_error is not None:
        raise OptionError(
            "max_bytes_per_adapter chooses the errors of adapters, and max_error was passed too. Pass one of them."
        )
    chosen = _choose(sources.find_adapters(adapters, **options.reading), options)
    pack = Pack.empty()
    reading = {"name": members.name, "same_base": options.same_base, **options.reading}
    pack.append(common, keys.COMMON, max_error=COMMON_ERROR, head_error=COMMON_ERROR, **reading)
    sizes: dict[str, Any] = {
        "max_error": members.max_error,
        "head_error": members.head_error,
        "max_bytes": members.max_bytes,
    }
    for done, (name, source) in enumerate(sorted(chosen.items())):
        progress("encoding adapters", done, len(chosen))
        pack.append(source.source, name, reference=keys.COMMON, **sizes, **reading)
    progress("encoding adapters", len(chosen), len(chosen))
    pack.notes.extend(_notes(pack.histories[members.name]))
    store = pack.history_store
    store.histories[members.name] = bundle(store, store.histories[members.name], chosen)
    return pack


def _notes(history: History) -> list[str]:
    """Return a note that names the members of which the common adapter explains little."""
    shares = {record.version: _explained(record) for record in history.versions[1:]}
    apart = {name: share for name, share in shares.items() if share < LITTLE_EXPLAINED}
    if not apart:
        return []
    listed = [f"{name} ({share:.2f})" for name, share in sorted(apart.items(), key=lambda pair: pair[1])]
    more = ", …" if len(listed) > MAX_LISTED else ""
    return [
        f"The common adapter explains less than half of the squared norm of {len(apart)} of {len(shares)} adapters: "
        f"{', '.join(listed[:MAX_LISTED])}{more}. If they were not trained from it, fit them in a pack of "
        "their own, and leave them out here (exclude_adapters, --exclude-adapter)."
    ]


def _explained(record: VersionRecord) -> float:
    """Return 1 − ‖D − C‖² / ‖D‖² of a member D and the common adapter C, at least 0."""
    if record.change_error is None:
        # a member that does not refer to the common adapter: relative to ‖C‖ instead
        return max(1 - (record.change or 0.0) ** 2, 0.0)
    if not record.change_error:
        return 1.0
    # both are errors of the same update, ‖D − D̂‖ relative to ‖D‖ and to ‖D − C‖
    return max(1 - (record.delta_error / record.change_error) ** 2, 0.0)


def _choose(found: list[AdapterSource], options: ReadOptions) -> dict[str, AdapterSource]:
    """Return the adapters of a population by name, which is to be the label of a version."""
    names = [sources.default_name(source) for source in found]
    for name in options.exclude_adapters:
        keys.check_known(name, names, "the sources (exclude_adapters, --exclude-adapter)")
    chosen = {name: source for name, source in zip(names, found, strict=True) if name not in options.exclude_adapters}
    checks.check_names(name for name in names if name not in options.exclude_adapters)
    if not chosen:
        raise OptionError(NONE_LEFT)
    for name in chosen:
        keys.check_label(name)
        if name.lower() == keys.COMMON:
            raise AdapterNameError(
                f"an adapter is named {name!r}, which is the name of the common adapter (reference, --reference). Set "
                "another name for it: pass NAME=PATH, or in Python a mapping, {'name': source}."
            )
    return chosen
