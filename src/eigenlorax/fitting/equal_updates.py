"""Adapters of a collection whose updates are equal, number by number: only one of them needs to be fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..pack.scanned_adapter import ScannedAdapter
from .collection import Collection


def find_equal_updates(collection: Collection) -> dict[str, str]:
    """Return, for each trained adapter that has the factors and scalings of another one, the first such by name."""
    by_norms: dict[tuple[tuple[str, float], ...], list[ScannedAdapter]] = {}
    for scanned in sorted(collection.scanned, key=lambda scanned: scanned.name):
        if scanned.name in collection.weights:
            squares = scanned.scan.delta_squares
            norms = sorted((name, squares[module]) for module, name in scanned.subspace_names.items())
            by_norms.setdefault(tuple(norms), []).append(scanned)
    copies = {}
    for candidates in by_norms.values():
        originals: list[ScannedAdapter] = []
        for scanned in candidates:
            original = next((each for each in originals if _has_equal_factors(scanned, each)), None)
            if original is None:
                originals.append(scanned)
            else:
                copies[scanned.name] = original.name
    return copies


def _has_equal_factors(scanned: ScannedAdapter, original: ScannedAdapter) -> bool:
    """Return whether two adapters, in the same modules of the subspace, have equal factors and scalings in all."""
    modules = {name: module for module, name in original.subspace_names.items()}
    # one module after the other: most adapters with equal norms differ nowhere, and the others in the first one
    return all(
        scanned.adapter.specs[module] == original.adapter.specs[modules[name]]
        and all(map(torch.equal, _weights(scanned, module), _weights(original, modules[name])))
        for module, name in scanned.subspace_names.items()
    )


def _weights(scanned: ScannedAdapter, module: str) -> Sequence[torch.Tensor]:
    return scanned.adapter.modules[module].weights


def without(collection: Collection, names: Mapping[str, str]) -> Collection:
    """Return the collection without some of its adapters."""
    return replace(
        collection,
        scanned=[scanned for scanned in collection.scanned if scanned.name not in names],
        modules={
            module: [member for member in members if member.name not in names]
            for module, members in collection.modules.items()
        },
        weights={name: weight for name, weight in collection.weights.items() if name not in names},
    )
