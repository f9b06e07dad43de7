"""One fitted module of a fit as bytes, for a checkpoint, and back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..core import keys
from ..core.basis import Basis
from ..core.coefficients import CoefficientBatch
from ..core.metrics import ModuleError
from ..core.subspace import ModuleBases
from . import jobs
from .jobs import Fitted, Job

_ABOUT, _ERRORS = "about", "errors"
_FIELDS = ("energy", "shortfall", "tail")


def to_bytes(fitted: Fitted) -> bytes:
    """Return a module as the bytes of a safetensors file; `from_bytes` makes the same module of them."""
    tensors = {}
    for side in keys.SIDES:
        basis = fitted.bases.side(side)
        tensors[f"{side}.components"], tensors[f"{side}.singular_values"] = basis.components, basis.singular_values
        tensors |= _under(f"{side}.payload", basis.payload)
    for index, chunk in enumerate(fitted.coefficients):
        tensors |= {f"{index}.down": chunk.down, f"{index}.up": chunk.up, f"{index}.scaling": chunk.scaling}
        tensors |= _under(f"{index}.payload", chunk.payload)
    tensors[_ERRORS] = torch.tensor(
        [[error.square, error.squared_error, error.squared_rounding] for error in fitted.errors], dtype=torch.float64
    )
    about = {
        "members": fitted.members,
        "by_iteration": fitted.by_iteration,
        "bases": {side: {name: getattr(fitted.bases.side(side), name) for name in _FIELDS} for side in keys.SIDES},
    }
    tensors[_ABOUT] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return to_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})


def most_bytes(job: Job) -> int:
    """Return more bytes than `to_bytes` gives for any result of this job."""
    asked, spec = job.setting.options.n_components, job.places[0].spec
    sides = (spec.in_features, spec.out_features)
    down, up = (dimension if asked is None else min(asked, dimension) for dimension in sides)
    # each number at most once in float64, and once more as what is stored in its place
    bases = 16 * (down * sides[0] + up * sides[1]) + 8 * sum(sides)
    each = [16 * place.spec.rank * (down + up) for place in job.places]
    return bases + sum(each) + 4096 * len(job.places) + 2**20


def from_bytes(data: bytes, job: Job) -> Fitted | None:
    """Return the result of `job` that `to_bytes` has written; None for bytes that are no result of that job.

    Bytes with a right digest may be of another build of the same version.
    """
    try:
        tensors = from_safetensors(data)
        about = json.loads(tensors[_ABOUT].numpy().tobytes())
        members = tuple(tuple(indices) for indices in about["members"])
        return _fitted(tensors, about, members) if _is_of(tensors, members, job) else None
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None


def _is_of(tensors: Mapping[str, Tensor], members: tuple[tuple[int, ...], ...], job: Job) -> bool:
    """Return whether tensors have the shapes, and numbers the dtype, that a result of the job has."""
    spec, dtype = job.places[0].spec, job.setting.storage.dtype
    down, up = tensors["down.components"], tensors["up.components"]
    if members != jobs.unread(job).members or (down.dtype, up.dtype) != (dtype, dtype):
        return False
    shapes: dict[str, Sequence[int]] = {
        "down.components": (len(down), spec.in_features),
        "up.components": (len(up), spec.out_features),
        "down.singular_values": (tensors["down.singular_values"].numel(),),
        "up.singular_values": (tensors["up.singular_values"].numel(),),
        _ERRORS: (len(job.places), 3),
    }
    for index, chunk in enumerate(members):
        rank = tensors[f"{index}.down"].shape[1:2]
        shapes |= {
            f"{index}.down": (len(chunk), *rank, len(down)),
            f"{index}.up": (len(chunk), len(up), *rank),
            f"{index}.scaling": (len(chunk),),
        }
    return all(tuple(tensors[name].shape) == tuple(shape) for name, shape in shapes.items())


def _under(name: str, payload: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in (payload or {}).items()}


def _payload(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """Return the inverse of `_under`."""
    start = f"{name}."
    return {key.removeprefix(start): tensors[key] for key in tensors if key.startswith(start)} or None


def _fitted(tensors: Mapping[str, Tensor], about: Mapping[str, Any], members: tuple[tuple[int, ...], ...]) -> Fitted:
    down, up = (
        Basis(
            tensors[f"{side}.components"],
            tensors[f"{side}.singular_values"],
            **about["bases"][side],
            payload=_payload(tensors, f"{side}.payload"),
        )
        for side in keys.SIDES
    )
    return Fitted(
        bases=ModuleBases(down, up),
        members=members,
        coefficients=tuple(
            CoefficientBatch(
                tensors[f"{index}.down"],
                tensors[f"{index}.up"],
                tensors[f"{index}.scaling"],
                _payload(tensors, f"{index}.payload"),
            )
            for index in range(len(members))
        ),
        errors=tuple(ModuleError(*values) for values in tensors[_ERRORS].tolist()),
        by_iteration=about["by_iteration"],
        seconds={},
    )
