"""Checkpoint of an entropy-coded fit: the results of its calls, by number, each with a digest of its arguments.

A result is taken only if the call has the arguments that it had. Other numbers of threads may round earlier results
otherwise, and results of short calls are not kept.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..codec.held_updates import HeldUpdates
from ..codec.module_stages import EncodedModule, MeasuredModule, ModuleSurvey, QuantisedModule
from ..codec.module_updates import UpdateSource
from ..codec.packed_codes import PackedCodes
from ..codec.quantised_basis import QuantisedBasis
from ..codec.rate_allocation import RateEstimate, SideStatistics
from ..core import checkpoint as checkpoints
from ..core import limits
from ..core.checkpoint import Checkpoint
from ..core.engine import Engine
from ..core.iterative import RunCalls
from ..version import __version__
from .collection import Collection
from .options import Execution, Target

KEPT_FROM = 0.1
"""Seconds from which on the result of a call is kept: to write a file may take longer than a short call."""
MAX_PART_BYTES = 2**31
"""Size above which a result is neither written nor read."""
PART_COPIES = 4
"""Number of copies of a result in memory while it is read: the file, its content, its tensors, and their arrays."""
_ABOUT = "about"

StageResult = ModuleSurvey | QuantisedModule | MeasuredModule | EncodedModule


class ResumableCalls:
    """Runner of calls that keeps results in a checkpoint, and takes those that are there.

    Args:
        run: Runs the calls whose results are missing.
        checkpoint: The checkpoint; None to keep nothing.
    """

    def __init__(self, run: RunCalls, checkpoint: Checkpoint | None) -> None:
        self._run, self._checkpoint = run, checkpoint
        self._next_number = 0
        self._n_resumed = 0

    @property
    def notes(self) -> list[str]:
        """A sentence on what was taken from the checkpoint, if anything was."""
        if not self._n_resumed:
            return []
        return [
            f"{self._n_resumed} of {self._next_number} results were read from the checkpoint of an interrupted fit."
        ]

    def run(self, calls: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """Yield the results of calls, in their order."""
        if self._checkpoint is None:
            yield from self._run(calls)
            return
        numbered = list(enumerate(calls, start=self._next_number))
        self._next_number += len(numbered)
        digests = {number: _digest_of(call) for number, call in numbered}
        # two readings of each result, in place of all of them in memory at once
        missing = {number for number, digest in digests.items() if self._find(number, digest) is None}
        computed = iter(self._run(partial(_timed, call) for number, call in numbered if number in missing))
        for number, _ in numbered:
            if number not in missing:
                self._n_resumed += 1
                yield self._find(number, digests[number])
                continue
            seconds, outcome = next(computed)
            if seconds >= KEPT_FROM and isinstance(outcome, StageResult):
                self._keep(number, to_bytes(outcome, digests[number]))
            yield outcome

    def _keep(self, number: int, content: bytes) -> None:
        assert self._checkpoint is not None
        # a larger one would not be read
        if len(content) <= _max_part_bytes():
            self._checkpoint.keep(number, content)

    def _find(self, number: int, digest: str) -> StageResult | None:
        assert self._checkpoint is not None
        content = self._checkpoint.find(number, _max_part_bytes())
        return from_bytes(content, digest) if content is not None else None


def _max_part_bytes() -> int:
    """Return the largest size of a result that is read: one whose copies fit into the memory of this machine."""
    return int(min(MAX_PART_BYTES, limits.machine_memory() / PART_COPIES))


def _digest_of(call: Callable[[], Any]) -> str:
    """Return a digest of a function and its arguments."""
    digest = sha256()
    _add_to_digest(digest, call)
    return digest.hexdigest()


def _add_to_digest(digest: Any, value: Any) -> None:
    """Add an argument to a digest, with everything in it that a result depends on."""
    if isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.data)
    elif isinstance(value, partial):
        digest.update(value.func.__qualname__.encode())
        _add_to_digest(digest, value.args)
    elif isinstance(value, UpdateSource):
        # the key of the checkpoint has the content of the adapters
        digest.update(f"adapter {value.index}".encode())
    elif isinstance(value, list | tuple | range):
        digest.update(f"{len(value)} values".encode())
        for each in value:
            _add_to_digest(digest, each)
    elif is_dataclass(value):
        digest.update(type(value).__name__.encode())
        for field in fields(value):
            _add_to_digest(digest, getattr(value, field.name))
    elif not isinstance(value, HeldUpdates):
        digest.update(f"{value!r};".encode())


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    outcome = call()
    return time.perf_counter() - started, outcome


@contextmanager
def resumable_calls(
    collection: Collection, target: Target, execution: Execution, engine: Engine, training_basis: int
) -> Iterator[ResumableCalls]:
    """Open the checkpoint of a fit, if it has one, and run calls with it.

    Args:
        collection: The adapters.
        target: Error bound or size.
        execution: The folder of the checkpoint is used.
        engine: Runs the calls.
        training_basis: Bytes of the basis for training, which count in the size.
    """
    if execution.checkpoint is None:
        yield ResumableCalls(engine.run, None)
        return
    key = {
        "version": __version__,
        "options": {**asdict(target.options), "head_error": target.head_error, "training_basis": training_basis},
        "storage": "coded",
        **collection.checkpoint_key,
    }
    with checkpoints.open_checkpoint(execution.checkpoint, key) as checkpoint:
        yield ResumableCalls(engine.run, checkpoint)


def to_bytes(outcome: StageResult, digest: str) -> bytes:
    """Return the result of a call as a safetensors file, which `from_bytes` reads.

    Args:
        outcome: The result.
        digest: Digest of the arguments of the call.
    """
    to_tensors, _ = _KINDS[type(outcome).__name__]
    tensors, about = to_tensors(outcome)
    about |= {"kind": type(outcome).__name__, "digest": digest}
    tensors[_ABOUT] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return to_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})


def from_bytes(data: bytes, digest: str) -> StageResult | None:
    """Parse a result from `to_bytes`; return None if the bytes are anything else.

    The checkpoint has checked the bytes, but another build of the same version may have written them.

    Args:
        data: The bytes.
        digest: Digest of the arguments that the call must have had.
    """
    try:
        tensors = from_safetensors(data)
        about = json.loads(tensors[_ABOUT].numpy().tobytes())
        if about["digest"] != digest:
            return None
        _, build = _KINDS[about["kind"]]
        outcome: StageResult = build(tensors, about)
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, RuntimeError):
        return None
    return outcome


def _survey_tensors(survey: ModuleSurvey) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"squares": survey.squares}
    for number, estimate in enumerate(survey.estimates):
        tensors[f"{number}.bits"] = torch.from_numpy(estimate.bits)
        tensors[f"{number}.squared_errors"] = torch.from_numpy(estimate.squared_errors)
    for number, side in enumerate(survey.sides):
        tensors[f"{number}.directions"] = side.directions
        tensors[f"{number}.energies"] = torch.from_numpy(side.energies)
    return tensors, {
        "k": [estimate.k for estimate in survey.estimates],
        "basis_bits": [estimate.basis_bits for estimate in survey.estimates],
        "sides": [(side.dimension, side.has_combinations) for side in survey.sides],
    }


def _build_survey(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> ModuleSurvey:
    estimates = [
        RateEstimate(
            (k[0], k[1]), basis_bits, tensors[f"{number}.bits"].numpy(), tensors[f"{number}.squared_errors"].numpy()
        )
        for number, (k, basis_bits) in enumerate(zip(about["k"], about["basis_bits"], strict=True))
    ]
    down, up = (
        SideStatistics(
            tensors[f"{number}.directions"], tensors[f"{number}.energies"].numpy(), dimension, has_combinations
        )
        for number, (dimension, has_combinations) in enumerate(about["sides"])
    )
    return ModuleSurvey(estimates, (down, up), tensors["squares"])


def _quantised_tensors(module: QuantisedModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"squared_errors": module.squared_errors}
    for number, basis in enumerate(module.bases):
        tensors[f"{number}.codes"] = basis.codes
        tensors[f"{number}.fineness"] = torch.from_numpy(basis.fineness)
        tensors[f"{number}.profile"] = torch.from_numpy(basis.profile)
    return tensors, {"energies": module.energies}


def _build_quantised(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> QuantisedModule:
    down, up = (
        QuantisedBasis(
            tensors[f"{number}.codes"], tensors[f"{number}.fineness"].numpy(), tensors[f"{number}.profile"].numpy()
        )
        for number in range(2)
    )
    square, captured_down, captured_up = about["energies"]
    return QuantisedModule((down, up), (square, captured_down, captured_up), tensors["squared_errors"])


def _measured_tensors(module: MeasuredModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"bits": module.bits, "squared_errors": module.squared_errors}, {}


def _build_measured(tensors: Mapping[str, Tensor], _about: Mapping[str, Any]) -> MeasuredModule:
    return MeasuredModule(tensors["bits"], tensors["squared_errors"])


def _encoded_tensors(module: EncodedModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    packed = {name: torch.from_numpy(array) for name, array in module.codes.arrays().items()}
    return {"squared_errors": module.squared_errors, **packed}, {}


def _build_encoded(tensors: Mapping[str, Tensor], _about: Mapping[str, Any]) -> EncodedModule:
    arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in tensors.items()}
    codes = PackedCodes(**{name: arrays[name] for name in PackedCodes.names()})
    return EncodedModule(tensors["squared_errors"], codes)


_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    ModuleSurvey.__name__: (_survey_tensors, _build_survey),
    QuantisedModule.__name__: (_quantised_tensors, _build_quantised),
    MeasuredModule.__name__: (_measured_tensors, _build_measured),
    EncodedModule.__name__: (_encoded_tensors, _build_encoded),
}
