"""Read LoRA files of image models: one safetensors file, in any of the dialects of kohya, diffusers and others.

The header lists the layers. Alphas are read at once, factors at each access. docs/adapter-formats.md describes the
cases.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core import dtypes, keys
from ...core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ...core.linear_regex import StepBudget
from ...core.origin import Origin
from ...errors import FormatError, NonFiniteError, ShapeError, SourceWarning
from .. import files, lora_config
from ..files import Header, OpenedFile
from ..folders import AdapterLocation
from ..lora_config import ScalingConfig
from . import flux, tensor_keys
from .flux import Part, Rows
from .tensor_keys import ALPHA, BIAS, DOWN, MAGNITUDE, MID, UP, Layer

METADATA = "lora_adapter_metadata"
"""Metadata key of diffusers for LoRA configs: JSON whose fields start with the name of a component."""
_ALPHA_DTYPES = (*dtypes.STORED, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class _LayerTensors:
    """Tensors of one layer of the file.

    Attributes:
        stem: Name of the layer.
        style: Spelling of the factors.
        keys: Name of the tensor by part: `DOWN`, `UP`, `ALPHA`, …
    """

    stem: str
    style: str
    keys: dict[str, str]


@dataclass(frozen=True, slots=True)
class _ModuleRows:
    """A module as rows of a layer of the file.

    Attributes:
        layer: Tensors of the layer.
        rows: First row, and end of the rows.
        swapped: Whether the two halves of the rows are exchanged.
    """

    layer: _LayerTensors
    rows: tuple[int, int]
    swapped: bool = False


def read(source: str | Path | AdapterLocation, dialect: str | None = None, **options: Any) -> Adapter:
    """Read the LoRA in a single file on disk, behind a URL or on the Hub.

    Args:
        source: Path, URL, Hub id or location of the file.
        dialect: Dialect that the file must have. Default: any.
        options: Options of `files.open_file`.

    Raises:
        FormatError: The file is not a LoRA, is incomplete, or belongs to an unknown model.
        ShapeError: The shapes of a layer do not fit each other or the model.
        NonFiniteError: An alpha is NaN or Inf.
    """
    return adapter(files.open_file(source, **options), dialect)


def adapter(opened: OpenedFile, dialect: str | None = None) -> Adapter:
    """Return the LoRA of an opened file; see `read` for `dialect` and errors."""
    path = opened.weights.path
    tensors_by_stem = _group_by_layer(opened)
    layers = _resolve_layers(tensors_by_stem, path)
    origin = _origin(layers.values(), opened.weights.metadata)
    if dialect is not None and dialect != origin.format:
        raise FormatError(f"{path} is a file in the dialect {origin.format!r}, not {dialect!r}. Remove format.")
    configs = _configs(opened)
    alphas = _alphas(opened, tensors_by_stem)
    modules: dict[str, _ModuleRows] = {}
    specs: dict[str, ModuleSpec] = {}
    carried: dict[str, tuple[_LayerTensors, str]] = {}
    without_alpha = []
    for stem, tensors in tensors_by_stem.items():
        down, up = _factor_headers(tensors, opened.weights.headers, path)
        rank = down.shape[0]
        for part in layers[stem].parts:
            module = part.module
            config = configs.get(module.partition(".")[0])
            if stem in alphas:
                scaling = alphas[stem] / rank
            elif config is not None:
                scaling = _configured_scaling(module, rank, config, path)
            else:
                scaling = 1.0
                without_alpha.append(module)
            rows = _module_rows(part, tensors, down, up, path)
            if module in modules:
                raise FormatError(
                    f"{path}: layers {modules[module].layer.stem!r} and {stem!r} are the same module, {module!r}. "
                    "Remove one of them."
                )
            modules[module] = rows
            spec = _spec(rows, down, up, opened.weights.headers, scaling)
            specs[module] = replace(spec, shared=len(layers[stem].parts))
            for kind in (MAGNITUDE, BIAS):
                if kind in tensors.keys:
                    carried[_carried_key(module, kind)] = (tensors, kind)
    _warn_of_missing_alphas(path, without_alpha, len(specs), origin.format)
    _warn_of_mid_factors(path, [stem for stem, tensors in tensors_by_stem.items() if MID in tensors.keys])
    specs = dict(sorted(specs.items()))
    lora = Adapter(
        name=opened.name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, opened, specs, modules)),
        carried=LazyMapping(carried, partial(_carried, opened, modules, carried)),
        file_bytes=opened.weights.size,
        origin=origin,
    )
    return replace(lora, source_config=lora_config.make(lora))


def _group_by_layer(opened: OpenedFile) -> dict[str, _LayerTensors]:
    """Return the tensors of each layer by its name; raise `FormatError` for a file that is not a LoRA."""
    layers: dict[str, _LayerTensors] = {}
    unknown = []
    for name in sorted(opened.weights.headers):
        key = tensor_keys.key(name)
        if key is None:
            unknown.append(name)
            continue
        layer = layers.setdefault(key.stem, _LayerTensors(key.stem, key.style, {}))
        if key.style and not layer.style:
            # the first tensor of a layer may have the same spelling in all styles, such as its alpha
            layers[key.stem] = layer = replace(layer, style=key.style)
        if layer.keys.setdefault(key.part, name) != name:
            raise FormatError(
                f"{opened.weights.path}: tensors {layer.keys[key.part]!r} and {name!r} have the same "
                "meaning. Remove one of them."
            )
    if unknown or not layers:
        raise _no_lora(opened, unknown)
    return layers


def _no_lora(opened: OpenedFile, unknown: list[str]) -> FormatError:
    """Return the error for a file in which the tensors `unknown` do not belong to a LoRA."""
    path, n_tensors = opened.weights.path, len(opened.weights.headers)
    if not n_tensors:
        return FormatError(f"{path} has no tensors.")
    if kind := tensor_keys.other_kind(sorted(opened.weights.headers)):
        return tensor_keys.refused(path, *kind)
    if len(unknown) == n_tensors:
        return FormatError(
            f"{path} is not a LoRA: none of its {n_tensors:,} tensors, such as {unknown[0]!r}, has a name like "
            "…lora_down.weight, …lora_A.weight or …lora.down.weight."
        )
    return FormatError(
        f"{path}: {len(unknown):,} of {n_tensors:,} tensors do not belong to a LoRA, such as {unknown[0]!r}. "
        "Nothing was read, since they would be dropped. Remove them from the file."
    )


def _resolve_layers(tensors_by_stem: Mapping[str, _LayerTensors], path: str) -> dict[str, Layer]:
    """Return the modules of each layer; raise `FormatError` for a layer of an unknown model."""
    has_flux = any("double_blocks" in stem or "single_blocks" in stem for stem in tensors_by_stem)
    layers: dict[str, Layer] = {}
    unknown = []
    for stem, tensors in tensors_by_stem.items():
        layer = tensor_keys.layer(stem, tensors.style, has_flux=has_flux)
        if layer is None:
            unknown.append(stem)
        else:
            layers[stem] = layer
    if not any(tensor_keys.is_of_image_model(part.module) for layer in layers.values() for part in layer.parts):
        # names of text models resolve too: `transformer.h.0.attn.c_attn` of GPT-2 starts with a component
        unknown = list(tensors_by_stem)
    if unknown:
        if all(stem.startswith(keys.MODEL_PREFIX) for stem in unknown):
            raise FormatError(
                f"{path} is a LoRA as PEFT saves it, but its folder has no {keys.ADAPTER_CONFIG}, which states its "
                "scaling. Pass a folder with both files."
            )
        raise FormatError(
            f"{path}: {len(unknown):,} of {len(tensors_by_stem):,} modules belong to no supported model, such as "
            f"{unknown[0]!r}. Supported are the UNets of Stable Diffusion 1, 2 and XL, FLUX, and their text encoders."
        )
    return layers


def _origin(layers: Iterable[Layer], metadata: Mapping[str, str]) -> Origin:
    """Return the most common dialect of the layers, with the spellings of the layers in this dialect."""
    layers = list(layers)
    counts = Counter(layer.dialect for layer in layers)
    dialect = max(counts, key=lambda name: (counts[name], -tensor_keys.DIALECTS.index(name)))
    spellings = frozenset().union(*(layer.spelling for layer in layers if layer.dialect == dialect))
    ordered = tuple(spelling for spelling in tensor_keys.SPELLINGS if spelling in spellings)
    return Origin(dialect, ordered, dict(sorted(metadata.items())))


def _configs(opened: OpenedFile) -> dict[str, ScalingConfig]:
    """Return the ranks and scalings by component from the metadata that diffusers writes."""
    text = opened.weights.metadata.get(METADATA)
    return {} if text is None else _parse_configs(text, f"{opened.weights.path} ({METADATA})")


def metadata_matches(text: str, specs: Mapping[str, ModuleSpec]) -> bool:
    """Return whether diffusers' metadata state the ranks and scalings of `specs`, by diffusers' module names."""
    configs = _parse_configs(text, METADATA)
    for module, spec in specs.items():
        numbers = configs.get(module.partition(".")[0])
        rank, scaling = _rank_and_scaling(module, numbers) if numbers is not None else (0, 0.0)
        if rank != spec.rank or not math.isclose(scaling, spec.scaling):
            return False
    return True


def _parse_configs(text: str, where: str) -> dict[str, ScalingConfig]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{where} is not a JSON object.")
    configs: dict[str, dict[str, Any]] = {}
    for name, setting in fields.items():
        component, _, field = name.partition(".")
        configs.setdefault(component, {})[field] = setting
    # one budget for all components, so that a hostile file cannot multiply it
    budget = StepBudget()
    return {component: ScalingConfig(config, where, budget) for component, config in configs.items() if "r" in config}


def _configured_scaling(module: str, rank: int, numbers: ScalingConfig, where: str) -> float:
    """Return the scaling of a module by its component's config; raise `ShapeError` if that states another rank."""
    stated, scaling = _rank_and_scaling(module, numbers)
    if stated != rank:
        raise ShapeError(
            f"{where}: module {module} has rank {rank}, but {METADATA} says {stated}. Its scaling would be a guess."
        )
    return scaling


def _rank_and_scaling(module: str, numbers: ScalingConfig) -> tuple[int, float]:
    """Return the rank and the scaling that a component's config states for one of its modules."""
    name = module.partition(".")[2]
    stated = numbers.rank_and_scaling(name)
    # later releases of transformers have no `text_model` in the modules of a text encoder
    return (
        numbers.rank_and_scaling(name.removeprefix("text_model.")) if stated == numbers.rank_and_scaling("") else stated
    )


def _alphas(opened: OpenedFile, tensors_by_stem: Mapping[str, _LayerTensors]) -> dict[str, float]:
    """Read the alphas of the layers that have one."""
    path, headers = opened.weights.path, opened.weights.headers
    alpha_keys = {stem: tensors.keys[ALPHA] for stem, tensors in tensors_by_stem.items() if ALPHA in tensors.keys}
    for stem, key in alpha_keys.items():
        if math.prod(headers[key].shape) != 1:
            raise ShapeError(f"{path}: {key!r} has shape {headers[key].shape}; an alpha is one number.")
        if not {DOWN, UP} & set(tensors_by_stem[stem].keys):
            raise FormatError(f"{path}: {key!r} is the alpha of a layer that has no factors: the file is incomplete.")
    alphas = {}
    tensors = opened.weights.load(list(alpha_keys.values()))
    for (stem, key), tensor in zip(alpha_keys.items(), tensors, strict=True):
        if tensor.dtype not in _ALPHA_DTYPES:
            raise FormatError(f"{path}: {key!r} is {tensor.dtype}; an alpha is a float or an integer.")
        alpha = float(tensor.reshape(()).item())
        # its square is part of every norm of the update
        if not math.isfinite(alpha * alpha):
            raise NonFiniteError(f"{path}: {key!r} is {alpha}; an alpha is a number.")
        alphas[stem] = alpha
    return alphas


def _factor_headers(tensors: _LayerTensors, headers: Mapping[str, Header], where: str) -> tuple[Header, Header]:
    """Return the headers of the down and up factors.

    Raises:
        FormatError: A factor is missing or has another dtype than `dtypes.STORED`.
        ShapeError: The shapes do not fit each other.
    """
    for part, partner in ((DOWN, UP), (UP, DOWN)):
        if part not in tensors.keys:
            name = tensors.keys.get(partner) or next(iter(tensors.keys.values()))
            raise FormatError(f"{where}: tensor {name!r} has no partner ({part}): the file is incomplete.")
    for part in (DOWN, UP, MID):
        if part in tensors.keys and headers[tensors.keys[part]].dtype is None:
            raise FormatError(f"{where}: tensor {tensors.keys[part]!r} is not float64, float32, float16 or bfloat16.")
    down_key, up_key = tensors.keys[DOWN], tensors.keys[UP]
    down, up = headers[down_key], headers[up_key]
    if len(down.shape) not in (2, 4) or len(up.shape) not in (2, 4) or set(up.shape[2:]) - {1}:
        raise ShapeError(
            f"{where}: {down_key!r} is {down.shape} and {up_key!r} is {up.shape}: expected (rank, in) and (out, rank), "
            "or the shapes of a convolution."
        )
    if down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise ShapeError(
            f"{where}: {down_key!r} is {down.shape} and {up_key!r} is {up.shape}: (rank, in) and (out, rank) must "
            "share one rank of at least 1."
        )
    if MID in tensors.keys:
        mid = headers[tensors.keys[MID]].shape
        if len(mid) != 4 or mid[:2] != (down.shape[0],) * 2 or set(down.shape[2:]) - {1} or 0 in mid:
            raise ShapeError(
                f"{where}: {tensors.keys[MID]!r} is {mid}, between {down_key!r}, {down.shape}, and {up_key!r}, "
                f"{up.shape}: (rank, rank, height, width) between two convolutions of kernel 1 was expected."
            )
    return down, up


def _module_rows(part: Part, tensors: _LayerTensors, down: Header, up: Header, where: str) -> _ModuleRows:
    """Return a module as rows of a layer; raise `ShapeError` if the layer does not have the shape of FLUX's."""
    rows = flux.span(part, up.shape[0], math.prod(down.shape[1:]))
    if rows is None:
        raise ShapeError(
            f"{where}: {tensors.keys[UP]!r} is {up.shape}, and {tensors.keys[DOWN]!r} is {down.shape}: these are not "
            f"the sizes of FLUX's {tensors.stem!r}, of which {part.module!r} is a part."
        )
    return _ModuleRows(tensors, rows, part.rows is Rows.SWAPPED)


def _spec(module: _ModuleRows, down: Header, up: Header, headers: Mapping[str, Header], scaling: float) -> ModuleSpec:
    mid_key = module.layer.keys.get(MID)
    assert down.dtype is not None
    assert up.dtype is not None
    kernel = (down if mid_key is None else headers[mid_key]).shape[2:]
    return ModuleSpec(
        rank=down.shape[0],
        in_features=down.shape[1] * math.prod(kernel),
        out_features=module.rows[1] - module.rows[0],
        scaling=scaling,
        dtype=torch.promote_types(down.dtype, up.dtype),
        kernel=kernel,
    )


def _warn_of_missing_alphas(path: str, modules: list[str], n_modules: int, dialect: str) -> None:
    """Warn of modules without an alpha, unless a whole file has none and its dialect needs none."""
    if modules and (len(modules) < n_modules or dialect == tensor_keys.KOHYA):
        warnings.warn(
            f"{path}: {len(modules)} of {n_modules} modules have no alpha, such as {modules[0]!r}; assuming a "
            "scaling of 1, like kohya's programs.",
            SourceWarning,
            stacklevel=5,
        )


def _warn_of_mid_factors(path: str, stems: list[str]) -> None:
    if stems:
        warnings.warn(
            f"{path}: {len(stems)} convolutions of three factors (lora_mid), such as {stems[0]!r}, are read as the "
            "same updates in two factors.",
            SourceWarning,
            stacklevel=5,
        )


# `partial` of module functions, not closures: an adapter has to be picklable.


def _factors(
    opened: OpenedFile, specs: Mapping[str, ModuleSpec], modules: Mapping[str, _ModuleRows], module: str
) -> LoRAFactors:
    layer_keys = modules[module].layer.keys
    parts = [part for part in (DOWN, UP, MID) if part in layer_keys]
    tensors = dict(zip(parts, opened.weights.load([layer_keys[part] for part in parts]), strict=True))
    down, up = tensors[DOWN], _select_rows(tensors[UP], modules[module])
    if MID in tensors:
        # exact: the convolutions of kernel 1 before and after the middle one are matrices
        down = torch.einsum("rqhw,qc->rchw", tensors[MID].double(), down.flatten(1).double()).to(down.dtype)
    return LoRAFactors.from_weights(down, up, specs[module].scaling)


def _select_rows(tensor: Tensor, module: _ModuleRows) -> Tensor:
    """Return the rows of a layer's tensor that belong to a module."""
    if module.swapped:
        return torch.cat(tuple(reversed(tensor.chunk(2))))
    begin, end = module.rows
    # a slice would keep the memory of the whole tensor alive
    return tensor if (begin, end) == (0, len(tensor)) else tensor[begin:end].clone()


def _carried_key(module: str, part: str) -> str:
    return f"{keys.MODEL_PREFIX}{module}." + ("lora_magnitude_vector" if part == MAGNITUDE else "lora_B.bias")


def _carried(
    opened: OpenedFile,
    modules: Mapping[str, _ModuleRows],
    carried: Mapping[str, tuple[_LayerTensors, str]],
    key: str,
) -> Tensor:
    tensors, part = carried[key]
    module = modules[
        key.removeprefix(keys.MODEL_PREFIX).removesuffix(".lora_magnitude_vector").removesuffix(".lora_B.bias")
    ]
    tensor = opened.weights.load([tensors.keys[part]])[0]
    # a magnitude of the shape (1, in) has no rows to select
    return _select_rows(tensor, module) if tensor.ndim and len(tensor) > 1 else tensor
