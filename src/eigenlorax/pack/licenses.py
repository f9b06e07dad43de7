"""Licences of a pack's adapters: in the manifest, where they are an optional field, and together.

The field has each licence once, with the adapters that have it. docs/pack-format.md describes it.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..core.json_dataclasses import JsonTypeError, from_json
from ..core.license import HUB_IDS, License

_FIELD = "licenses"
_MAX_DESCRIBED = 4
"""Largest number of licences in one line."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A licence, and the adapters that have it.

    Attributes:
        id, name, link: Fields of the licence; `id` is None if none is stated.
        adapters: Names of the adapters; None for all adapters that no other group lists.
    """

    id: str | None
    name: str | None
    link: str | None
    adapters: list[str] | None


def to_json(licenses: Mapping[str, License | None]) -> dict[str, Any]:
    """Return the field of the manifest; empty if no adapter states a licence."""
    groups = by_license(licenses)
    if not groups.keys() - {None}:
        return {}
    # the largest group lists no names
    return {_FIELD: [_to_json(licence, names if i else None) for i, (licence, names) in enumerate(groups.items())]}


def _to_json(licence: License | None, names: list[str] | None) -> dict[str, Any]:
    fields = dict.fromkeys(License.__dataclass_fields__) if licence is None else asdict(licence)
    return {**fields, "adapters": names}


def by_license(licenses: Mapping[str, License | None]) -> dict[License | None, list[str]]:
    """Return the names of the adapters of each licence, those of most adapters first, and None for no licence."""
    groups: dict[License | None, list[str]] = {}
    for name, licence in sorted(licenses.items()):
        groups.setdefault(licence, []).append(name)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[1])))


def read(value: Any, adapters: Collection[str]) -> dict[str, License]:
    """Return the licences of the adapters that state one, by name.

    Args:
        value: The field of the manifest.
        adapters: Names of all adapters of the pack.

    Raises:
        JsonTypeError: The field has another form, or names an adapter twice or one that the pack lacks.
    """
    groups: list[_Group] = from_json(list[_Group], value, _FIELD)
    names = [name for group in groups for name in group.adapters or ()]
    listed = set(names)
    if len(listed) < len(names) or not listed <= set(adapters):
        raise JsonTypeError(f"{_FIELD} names an adapter twice, or one that the pack lacks.")
    if sum(group.adapters is None for group in groups) > 1:
        raise JsonTypeError(f"{_FIELD} has two objects without adapters.")
    found: dict[str, License] = {}
    for group in groups:
        if group.id is None:
            continue
        try:
            stated = License(group.id, group.name, group.link)
        except ValueError as error:
            raise JsonTypeError(f"{_FIELD}: {error}.") from error
        members = [name for name in adapters if name not in listed] if group.adapters is None else group.adapters
        found |= dict.fromkeys(members, stated)
    return found


def common(licenses: Mapping[str, License | None], histories: Collection[str] = ()) -> str | None:
    """Return the identifier of the Hub that all adapters of a pack state; None if they differ or one states none.

    Args:
        licenses: Licence of each adapter, by name.
        histories: Histories of the pack. The licences of their versions are unknown.
    """
    stated = set(licenses.values())
    if len(stated) != 1 or histories:
        return None
    (licence,) = stated
    return licence.id if licence is not None and licence.id in HUB_IDS else None


def describe(licenses: Mapping[str, License | None]) -> str | None:
    """Return the licences of the adapters with their numbers, such as "mit (3), not stated (1)"; None without any."""
    groups = by_license(licenses)
    if not groups.keys() - {None}:
        return None
    shown = [
        f"{'not stated' if licence is None else licence.title} ({len(names):,})" for licence, names in groups.items()
    ]
    return ", ".join(shown[:_MAX_DESCRIBED]) + ", …" * (len(shown) > _MAX_DESCRIBED)
