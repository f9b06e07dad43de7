"""The field `subspace` of a manifest: JSON without repeated fields of sides, read in every format version."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..core import keys
from ..core.augmentation import Augmentation
from ..core.json_dataclasses import JsonTypeError, from_json
from .manifest import SideInfo, SubspaceInfo
from .shared_fields import most_common

SIDES_SHARED_SINCE = 8
"""Format version that introduced fields which several sides share."""
_SHARED_FIELDS = {"dimension", "k", "energy", "shortfall", "grown"}
"""Fields of a side that are often the same for most sides; each module has a `square` of its own."""
_MAX_SHARED_STEPS = 1 << 16
"""Largest number of shared steps of growth times modules, because each side has a list of its own in memory."""


def to_json(info: SubspaceInfo) -> dict[str, Any]:
    """Return the field `subspace`, without the name and the hash of the file."""
    sides = {name: {side: _fields(pair[side]) for side in keys.SIDES} for name, pair in info.modules.items()}
    shared = most_common([fields for pair in sides.values() for fields in pair.values()], _SHARED_FIELDS)
    if len(shared.get("grown", ())) * len(sides) > _MAX_SHARED_STEPS:
        del shared["grown"]
    fields = {name: getattr(info, name) for name in SubspaceInfo.__dataclass_fields__}
    return {
        **fields,
        "growth": [asdict(step) for step in info.growth],
        "shared_fields": shared,
        "modules": {name: _module_fields(pair["down"], pair["up"], shared) for name, pair in sides.items()},
    }


def _fields(side: SideInfo) -> dict[str, Any]:
    fields = {name: getattr(side, name) for name in SideInfo.__dataclass_fields__}
    return {**fields, "grown": list(side.grown)}


def _module_fields(down: Mapping[str, Any], up: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's fields: those that both sides have alike, and by side those that differ."""
    own = {
        side: {name: value for name, value in fields.items() if name not in shared or shared[name] != value}
        for side, fields in zip(keys.SIDES, (down, up), strict=True)
    }
    alike = {name: value for name, value in own["down"].items() if own["up"].get(name) == value}
    different = {
        side: {name: value for name, value in fields.items() if name not in alike} for side, fields in own.items()
    }
    return {**alike, **{side: fields for side, fields in different.items() if fields}}


def complete(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `subspace` of a manifest with all fields of the newest format, stated in each side."""
    version, fields = body["format_version"], dict(from_json(dict, body.get("subspace"), "subspace"))
    if version < 7:
        if "reference_bytes" in fields:
            raise JsonTypeError(f"subspace has the field reference_bytes, which version {version} lacks.")
        fields["reference_bytes"] = 0
    if version < 3:
        return _with_growth(fields, version)
    return _with_shared_fields(fields) if version >= SIDES_SHARED_SINCE else fields


def _with_shared_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the field with all fields of sides in each side; `JsonTypeError` if others are shared than may be."""
    shared = from_json(dict, fields.pop("shared_fields", ...), "subspace.shared_fields")
    if not shared.keys() <= _SHARED_FIELDS:
        raise JsonTypeError(
            f"subspace.shared_fields has the fields {sorted(shared)}, and may have {sorted(_SHARED_FIELDS)}."
        )
    grown = from_json(list, shared.get("grown", []), "subspace.shared_fields.grown")
    stored = from_json(dict, fields.get("modules"), "subspace.modules")
    if len(grown) * len(stored) > _MAX_SHARED_STEPS:
        raise JsonTypeError(
            f"subspace.shared_fields.grown has {len(grown):,} steps for {len(stored):,} modules, of which the product "
            f"may be {_MAX_SHARED_STEPS:,} at most."
        )
    modules = {}
    for name, module in stored.items():
        where = f"subspace.modules.{name}"
        alike = dict(from_json(dict, module, where))
        different = [from_json(dict, alike.pop(side, {}), f"{where}.{side}") for side in keys.SIDES]
        both = {**shared, **alike}
        # one object for both sides, because hostile manifests may have millions of modules without fields of their own
        modules[name] = {
            side: {**both, **own} if own else both for side, own in zip(keys.SIDES, different, strict=True)
        }
    return {**fields, "modules": modules}


def _with_growth(fields: dict[str, Any], version: int) -> dict[str, Any]:
    """Return the field of formats 1 and 2, whose subspaces grew by augmentations only, with the fields of growth."""
    steps = from_json(tuple[Augmentation, ...], fields.pop("augmentations", ...), "subspace.augmentations")
    modules = from_json(dict[str, dict[str, _EarlySide]], fields.get("modules"), "subspace.modules")
    if "growth" in fields:
        raise JsonTypeError(f"subspace has the field growth, which version {version} lacks.")
    grown = [step.n_extra for step in steps]
    return {
        **fields,
        "growth": [{"fingerprint": None, "seed": step.seed} for step in steps],
        "modules": {
            name: {side: {**asdict(info), "shortfall": 0.0, "grown": grown} for side, info in pair.items()}
            for name, pair in modules.items()
        },
    }


@dataclass(frozen=True, slots=True)
class _EarlySide:
    """One side of one module in formats 1 and 2."""

    dimension: int
    k: int
    energy: float
    square: float
