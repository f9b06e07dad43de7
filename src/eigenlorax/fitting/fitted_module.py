"""Serialisation of fitted modules for a checkpoint."""

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
from .jobs import FitJob, FittedModule

_ABOUT, _ERRORS = "about", "errors"
_FIELDS = ("energy", "shortfall", "tail")


def to_bytes(fitted: FittedModule) -> bytes:
    """Return a fitted module as a safetensors file, which `from_bytes` reads."""
    tensors = {}
    for side in keys.SIDES:
        basis = fitted.bases.side(side)
        tensors[f"{side}.components"], tensors[f"{side}.singular_values"] = basis.components, basis.singular_values
        tensors |= _prefixed(f"{side}.payload", basis.payload)
    for index, batch in enumerate(fitted.coefficients):
        tensors |= {f"{index}.down": batch.down, f"{index}.up": batch.up, f"{index}.scaling": batch.scaling}
        tensors |= _prefixed(f"{index}.payload", batch.payload)
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


def max_bytes(job: FitJob) -> int:
    """Return an upper bound of the size of `to_bytes`, in bytes, for any result of this job."""
    n_components, spec = job.fitter.options.n_components, job.updates[0].spec
    sides = (spec.in_features, spec.out_features)
    down, up = (dimension if n_components is None else min(n_components, dimension) for dimension in sides)
    # each number appears at most twice: in float64, and in the payload of its storage
    bases = 16 * (down * sides[0] + up * sides[1]) + 8 * sum(sides)
    coefficients = sum(16 * update.spec.rank * (down + up) for update in job.updates)
    return bases + coefficients + 4096 * len(job.updates) + 2**20


def from_bytes(data: bytes, job: FitJob) -> FittedModule | None:
    """Parse a result of `job` from `to_bytes`; return None if the bytes are anything else.

    The checkpoint has checked their digest, but another build of the same version may have written them.
    """
    try:
        tensors = from_safetensors(data)
        about = json.loads(tensors[_ABOUT].numpy().tobytes())
        members = tuple(tuple(indices) for indices in about["members"])
        return _build_module(tensors, about, members) if _matches_job(tensors, members, job) else None
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None


def _matches_job(tensors: Mapping[str, Tensor], members: tuple[tuple[int, ...], ...], job: FitJob) -> bool:
    """Return whether tensors have the shapes and dtypes that a result of the job has."""
    spec, dtype = job.updates[0].spec, job.fitter.storage.dtype
    down, up = tensors["down.components"], tensors["up.components"]
    if members != jobs.unread(job).members or (down.dtype, up.dtype) != (dtype, dtype):
        return False
    shapes: dict[str, Sequence[int]] = {
        "down.components": (len(down), spec.in_features),
        "up.components": (len(up), spec.out_features),
        "down.singular_values": (tensors["down.singular_values"].numel(),),
        "up.singular_values": (tensors["up.singular_values"].numel(),),
        _ERRORS: (len(job.updates), 3),
    }
    for index, batch in enumerate(members):
        rank = tensors[f"{index}.down"].shape[1:2]
        shapes |= {
            f"{index}.down": (len(batch), *rank, len(down)),
            f"{index}.up": (len(batch), len(up), *rank),
            f"{index}.scaling": (len(batch),),
        }
    return all(tuple(tensors[name].shape) == tuple(shape) for name, shape in shapes.items())


def _prefixed(name: str, payload: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in (payload or {}).items()}


def _payload(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """Undo `_prefixed`. Return None if there is no such tensor."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)} or None


def _build_module(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], members: tuple[tuple[int, ...], ...]
) -> FittedModule:
    down, up = (
        Basis(
            tensors[f"{side}.components"],
            tensors[f"{side}.singular_values"],
            **about["bases"][side],
            payload=_payload(tensors, f"{side}.payload"),
        )
        for side in keys.SIDES
    )
    return FittedModule(
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
