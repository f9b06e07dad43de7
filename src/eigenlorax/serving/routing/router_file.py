"""The file of a router: its tensors as safetensors, with all other fields as one JSON text in the metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ...core import atomic_files, limits
from ...core.json_dataclasses import JsonTypeError, from_json, reject_constant
from ...errors import FormatError
from ...formats import safetensors_file
from .calibration import PROBABILITY, SIGNALS, Calibration
from .centroids import Centroids
from .classifier import LinearClassifier
from .standardisation import Standardisation

FORMAT_VERSION = 2
# Values of `RouterFields.embedder`
BASE_MODEL, FUNCTION, UNKNOWN = "base-model", "function", "unknown"
_KEY = "eigenlorax_router"
# 16 centroids of 4,096 numbers for 10,000 adapters
_MAX_BYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class RouterFields:
    """The fields of a router that are not tensors.

    Attributes:
        format_version: Version of the file format.
        adapters: Names of the adapters.
        fingerprint: Fingerprint of the pack's subspace.
        embedder: "base-model" if texts are embedded by the base model, "function" if by a function of the caller;
            "unknown" for a router without either, and in files of version 1.
        modules: Modules of the prototypes, in the order of the standardisation; empty without one.
        calibration: Weights and threshold; None for a router that was not calibrated.
    """

    format_version: int
    adapters: list[str]
    fingerprint: str
    embedder: str
    modules: list[str]
    calibration: Calibration | None


@dataclass(frozen=True, slots=True)
class RouterState:
    """All that a file contains."""

    fields: RouterFields
    centroids: Centroids | None
    classifier: LinearClassifier | None
    standardisation: Standardisation | None


def write(path: Path, state: RouterState, *, overwrite: bool) -> None:
    """Write the file in one step.

    Raises:
        PackExistsError: The file exists, and `overwrite` is not set.
    """
    atomic_files.check_file_free(path, overwrite)
    tensors: dict[str, Tensor] = {}
    for name in ("centroids", "classifier", "standardisation"):
        part = getattr(state, name)
        if part is not None:
            tensors |= {f"{name}.{field}": tensor.contiguous() for field, tensor in asdict(part).items()}
    text = json.dumps(asdict(state.fields), sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_files.ensure_folder(path.parent):
        atomic_files.write_file(path, safetensors_file.to_bytes(tensors, {_KEY: text}))


def read(path: Path) -> RouterState:
    """Read and check a file.

    Raises:
        FormatError: It is missing, damaged, of a newer version, or not the file of a router.
    """
    try:
        data = limits.read_file(path, _MAX_BYTES)
    except FileNotFoundError as error:
        raise FormatError(f"there is no file {path}. Router.save writes one.") from error
    tensors = safetensors_file.from_bytes(data, str(path))
    end = safetensors_file.LENGTH_BYTES + safetensors_file.header_length(data, len(data), str(path))
    _, metadata = safetensors_file.parse_header(data[safetensors_file.LENGTH_BYTES : end], str(path))
    fields = _parse_fields(metadata, path)
    try:
        state = RouterState(
            fields,
            Centroids(**_part(tensors, "centroids")) if "centroids.centres" in tensors else None,
            LinearClassifier(**_part(tensors, "classifier")) if "classifier.weight" in tensors else None,
            Standardisation(**_part(tensors, "standardisation")) if "standardisation.mean" in tensors else None,
        )
    except TypeError as error:
        raise FormatError(f"{path}: tensors {sorted(tensors)} are not those of a router. Save it again.") from error
    _check(state, path)
    return state


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == name}


def _parse_fields(metadata: Mapping[str, str], path: Path) -> RouterFields:
    try:
        document = json.loads(metadata[_KEY], parse_constant=reject_constant)
        version = document["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {version}; this version of eigenlorax reads up to {FORMAT_VERSION}. "
                "Update eigenlorax."
            )
        if version == 1:
            document["embedder"] = UNKNOWN
        fields: RouterFields = from_json(RouterFields, document, _KEY)
    except (KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} is not the file of a router. Router.save writes one.") from error
    except (JsonTypeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is damaged: {error} Save the router again.") from error
    return fields


def _check(state: RouterState, path: Path) -> None:
    """Raise `FormatError` unless tensors and fields fit each other."""
    n, calibration = len(state.fields.adapters), state.fields.calibration
    signals = {name for name in ("centroids", "classifier") if getattr(state, name) is not None} | {"prototypes"}
    is_valid = bool(state.fields.adapters) and state.fields.embedder in (BASE_MODEL, FUNCTION, UNKNOWN)
    if state.centroids is not None:
        centres, owners = state.centroids.centres, state.centroids.owners
        is_valid &= centres.dim() == 2 and owners.shape == centres.shape[:1] and {*owners.tolist()} == {*range(n)}
    if state.classifier is not None:
        weight, bias = state.classifier.weight, state.classifier.bias
        is_valid &= weight.dim() == 2 and len(weight) == n and bias.shape == weight.shape[:1]
    if state.standardisation is not None:
        shape = len(state.fields.modules), n
        is_valid &= state.standardisation.mean.shape == state.standardisation.deviation.shape == shape
    if calibration is not None:
        used = calibration.weights.keys() | ({calibration.confidence} - {PROBABILITY})
        is_valid &= bool(calibration.weights) and used <= signals & set(SIGNALS) & calibration.temperatures.keys()
        is_valid &= all(temperature > 0 for temperature in calibration.temperatures.values())
    if not is_valid:
        raise FormatError(f"{path} is damaged: its tensors do not fit its {n} adapters. Save the router again.")
