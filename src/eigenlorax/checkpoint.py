"""A folder of modules that are fitted already, so that a fit that was interrupted goes on where it was.

It belongs to one fit of one collection, told by a key; to any other, it is empty.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from . import keys, store
from .basis import Basis
from .chunks import CoefficientChunk
from .errors import OptionError
from .jobs import Fitted
from .metrics import ModuleError
from .subspace import ModuleBases

_KEY = "fit.json"
_LOCK = ".lock"
_SUFFIX = ".safetensors"
_FIELDS = ("energy", "shortfall", "tail")


class Checkpoint:
    """The modules of one fit, by their place in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, place: int) -> Fitted | None:
        """A module that is there; None where it is not, or was written by another release."""
        path = self._path(place)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
            return _fitted(from_safetensors(path.read_bytes()), about)
        except (SafetensorError, KeyError, ValueError, TypeError):
            return None

    def keep(self, place: int, fitted: Fitted) -> None:
        """Write a module, whole or not at all."""
        tensors, about = _described(fitted)
        store.write_file(self._path(place), to_safetensors(tensors, metadata={"about": json.dumps(about)}))

    def _path(self, place: int) -> Path:
        return self._folder / f"{place:05d}{_SUFFIX}"


@contextmanager
def opened(folder: Path, key: dict[str, Any]) -> Iterator[Checkpoint]:
    """The checkpoint in `folder` for the fit with this key.

    What another fit left there is deleted, and so is the folder if nothing was kept in it.

    `PackBusyError` where another process uses it.
    """
    mine = (json.dumps(key, sort_keys=True, indent=1) + "\n").encode()
    _check_is_one(folder)
    empty = False
    with store.made(folder.parent):
        folder.mkdir(exist_ok=True)
        try:
            with store.lock(folder / _LOCK, timeout=0.0):
                place = folder / _KEY
                if not place.exists() or place.read_bytes() != mine:
                    for path in _contents(folder):
                        path.unlink()
                    store.write_file(place, mine)
                store.sweep_staging(folder)
                try:
                    yield Checkpoint(folder)
                finally:
                    empty = not count(folder)
        finally:
            if empty:
                discard(folder)


def count(folder: Path) -> int:
    """How many modules are kept in a folder; none where there is no such folder."""
    return len(list(folder.glob(f"*{_SUFFIX}")))


def discard(folder: Path) -> None:
    """Delete a checkpoint, if there is one."""
    if folder.exists():
        _check_is_one(folder)
        store.remove(folder)


def _contents(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == _SUFFIX or path.name == _KEY]


def _check_is_one(folder: Path) -> None:
    """`OptionError` where a folder holds anything else, which would be lost."""
    store.check_is_folder(folder)
    if not folder.exists():
        return
    others = {path.name for path in folder.iterdir()} - {path.name for path in _contents(folder)} - {_LOCK}
    others = {name for name in others if not name.startswith(store.STAGING)}
    if others:
        raise OptionError(
            f"{folder} is no checkpoint of a fit: it holds {min(others)!r}. Choose a folder that is empty or new."
        )


def _described(fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {}
    for side in keys.SIDES:
        basis = fitted.bases.side(side)
        tensors[f"{side}.components"], tensors[f"{side}.singular_values"] = basis.components, basis.singular_values
        tensors |= _under(f"{side}.payload", basis.payload)
    for index, chunk in enumerate(fitted.coefficients):
        tensors |= {f"{index}.down": chunk.down, f"{index}.up": chunk.up, f"{index}.scaling": chunk.scaling}
        tensors |= _under(f"{index}.payload", chunk.payload)
    tensors["errors"] = torch.tensor(
        [[error.total, error.lost, error.rounding] for error in fitted.errors], dtype=torch.float64
    )
    about = {
        "members": fitted.members,
        "by_iteration": fitted.by_iteration,
        "bases": {side: {name: getattr(fitted.bases.side(side), name) for name in _FIELDS} for side in keys.SIDES},
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def _under(name: str, payload: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in (payload or {}).items()}


def _payload(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """The inverse of `_under`."""
    start = f"{name}."
    return {key.removeprefix(start): tensors[key] for key in tensors if key.startswith(start)} or None


def _fitted(tensors: dict[str, Tensor], about: dict[str, Any]) -> Fitted:
    down, up = (
        Basis(
            tensors[f"{side}.components"],
            tensors[f"{side}.singular_values"],
            **about["bases"][side],
            payload=_payload(tensors, f"{side}.payload"),
        )
        for side in keys.SIDES
    )
    members = tuple(tuple(indices) for indices in about["members"])
    return Fitted(
        bases=ModuleBases(down, up),
        members=members,
        coefficients=tuple(
            CoefficientChunk(
                tensors[f"{index}.down"],
                tensors[f"{index}.up"],
                tensors[f"{index}.scaling"],
                _payload(tensors, f"{index}.payload"),
            )
            for index in range(len(members))
        ),
        errors=tuple(ModuleError(*values) for values in tensors["errors"].tolist()),
        by_iteration=about["by_iteration"],
        seconds={},
    )
