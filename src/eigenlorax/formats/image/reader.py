"""LoRA files of image models, read: one safetensors file, in any of the dialects of kohya, diffusers and others.

The header says which layers there are. Alphas are read at once, factors when they are asked for.
docs/adapter-formats.md has the cases.
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
from ...core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec, Origin
from ...core.linear_regex import StepBudget
from ...errors import FormatError, NonFiniteError, ShapeError, SourceWarning
from .. import files, lora_config
from ..files import Header, OpenedFile
from ..folders import Place
from ..lora_config import Numbers
from . import flux, names
from .flux import Part, Rows
from .names import ALPHA, BIAS, DOWN, MAGNITUDE, MID, UP, Layer

METADATA = "lora_adapter_metadata"
"""Under what diffusers keeps the configs of a file's LoRAs, JSON with a component's name before each field."""
_ALPHA_DTYPES = (*dtypes.STORED, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The keys of one layer's tensors by part, and how its factors are spelled."""

    stem: str
    style: str
    keys: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Module:
    """A module: the layer of the file it is, or a part of."""

    layer: _Tensors
    rows: tuple[int, int]
    swapped: bool = False


def read(source: str | Path | Place, dialect: str | None = None, **options: Any) -> Adapter:
    """The LoRA in a single file: on disk, behind a URL, or on the Hub.

    dialect: the only one in which it may be; whichever it is, by default. options: those of `files.opened_file`.
    """
    return adapter(files.opened_file(source, **options), dialect)


def adapter(opened: OpenedFile, wanted: str | None = None) -> Adapter:
    """The LoRA that a file is. wanted: the only dialect in which it may be."""
    where = opened.weights
    layers, others = _layers(opened)
    if others or not layers:
        _refuse(opened, others)
    understood = _understood(layers, where)
    origin = _origin(understood.values(), opened.metadata)
    if wanted is not None and wanted != origin.format:
        raise FormatError(f"{where} is a file in the dialect {origin.format!r}, not {wanted!r}. Leave the format away.")
    configs = _configs(opened)
    alphas = _alphas(opened, layers)
    modules: dict[str, _Module] = {}
    specs: dict[str, ModuleSpec] = {}
    carried: dict[str, tuple[_Tensors, str]] = {}
    silent = []
    for stem, tensors in layers.items():
        down, up = _factor_headers(tensors, opened.headers, where)
        rank = down.shape[0]
        said = tensors.keys.get(ALPHA) is not None
        for part in understood[stem].parts:
            config = configs.get(part.module.partition(".")[0])
            known = said or config is not None
            scaling = alphas[stem] / rank if said else _configured(part.module, rank, config, where)
            if not known:
                silent.append(part.module)
            module = _module(part, tensors, down, up, where)
            if part.module in modules:
                raise FormatError(
                    f"{where}: layers {modules[part.module].layer.stem!r} and {stem!r} stand for the same module, "
                    f"{part.module!r}."
                )
            modules[part.module] = module
            spec = _spec(module, down, up, tensors, opened.headers, scaling)
            specs[part.module] = replace(spec, shared=len(understood[stem].parts))
            for kind in (MAGNITUDE, BIAS):
                if kind in tensors.keys:
                    carried[_carried_key(part.module, kind)] = (tensors, kind)
    _note_alphas(where, silent, len(specs), origin.format)
    folded = [stem for stem, tensors in layers.items() if MID in tensors.keys]
    if folded:
        warnings.warn(
            f"{where}: {len(folded)} convolutions of three factors (lora_mid), such as {folded[0]!r}, are read as the "
            "same updates in two.",
            SourceWarning,
            stacklevel=4,
        )
    specs = dict(sorted(specs.items()))
    made = Adapter(
        name=opened.name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, opened, specs, modules)),
        carried=LazyMapping(carried, partial(_carried, opened, modules, carried)),
        file_bytes=opened.file_bytes,
        origin=origin,
    )
    return replace(made, source_config=lora_config.make(made))


def _layers(opened: OpenedFile) -> tuple[dict[str, _Tensors], list[str]]:
    """The layers of a file by name, and the keys that are no part of any."""
    layers: dict[str, _Tensors] = {}
    others = []
    for raw in sorted(opened.headers):
        found = names.key(raw)
        if found is None:
            others.append(raw)
            continue
        known = layers.setdefault(found.stem, _Tensors(found.stem, found.style, {}))
        if found.style and not known.style:
            layers[found.stem] = known = replace(known, style=found.style)
        if known.keys.setdefault(found.part, raw) != raw:
            raise FormatError(
                f"{opened.weights}: tensors {known.keys[found.part]!r} and {raw!r} stand for the same one."
            )
    return layers, others


def _refuse(opened: OpenedFile, others: list[str]) -> None:
    """The error for a file with tensors that are no part of a LoRA."""
    where = opened.weights
    if not opened.headers:
        raise FormatError(f"{where} has no tensors.")
    if kind := names.other_kind(sorted(opened.headers)):
        raise names.refused(where, *kind)
    if len(others) == len(opened.headers):
        raise FormatError(
            f"{where} is no LoRA: none of its {len(others):,} tensors, such as {others[0]!r}, has a name like "
            "…lora_down.weight, …lora_A.weight or …lora.down.weight."
        )
    raise FormatError(
        f"{where}: {len(others):,} of {len(opened.headers):,} tensors are no part of a LoRA, such as {others[0]!r}. "
        "They would be lost, so nothing was read."
    )


def _understood(layers: Mapping[str, _Tensors], where: str) -> dict[str, Layer]:
    """What each layer stands for; an error that names the first that is not known."""
    has_flux = any("double_blocks" in stem or "single_blocks" in stem for stem in layers)
    found: dict[str, Layer] = {}
    unknown = []
    for stem, tensors in layers.items():
        one = names.layer(stem, tensors.style, has_flux=has_flux)
        if one is None:
            unknown.append(stem)
        else:
            found[stem] = one
    if not any(names.is_of_image_model(part.module) for one in found.values() for part in one.parts):
        # a name such as `transformer.h.0.attn.c_attn` is below a component and of a text model all the same
        unknown = list(layers)
    if unknown:
        if all(stem.startswith(keys.MODEL_PREFIX) for stem in unknown):
            raise FormatError(
                f"{where} is a LoRA as PEFT saves it, but there is no {keys.ADAPTER_CONFIG} beside it that says how it "
                "is scaled. Name the folder that holds both."
            )
        raise FormatError(
            f"{where}: {len(unknown):,} of {len(layers):,} modules are of no model that is known here, such as "
            f"{unknown[0]!r}. Known are the UNets of Stable Diffusion 1, 2 and XL, FLUX, and their text encoders."
        )
    return found


def _origin(layers: Iterable[Layer], metadata: Mapping[str, str]) -> Origin:
    """The commonest dialect of the layers, and the spellings that its layers have."""
    layers = list(layers)
    counts = Counter(one.dialect for one in layers)
    dialect = max(counts, key=lambda name: (counts[name], -names.DIALECTS.index(name)))
    spelling = frozenset().union(*(one.spelling for one in layers if one.dialect == dialect))
    return Origin(dialect, tuple(one for one in names.SPELLINGS if one in spelling), dict(sorted(metadata.items())))


def _configs(opened: OpenedFile) -> dict[str, Numbers]:
    """What the file's metadata says of the ranks and scalings of each component's LoRA."""
    text = opened.metadata.get(METADATA)
    return {} if text is None else _numbers(text, f"{opened.weights} ({METADATA})")


def says(text: str, specs: Mapping[str, ModuleSpec]) -> bool:
    """Whether such metadata say the ranks and scalings of modules by diffusers' names."""
    configs = _numbers(text, METADATA)
    for module, spec in specs.items():
        numbers = configs.get(module.partition(".")[0])
        rank, scaling = _stated(module, numbers) if numbers is not None else (0, 0.0)
        if rank != spec.rank or not math.isclose(scaling, spec.scaling):
            return False
    return True


def _numbers(text: str, where: str) -> dict[str, Numbers]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{where} is not a JSON object.")
    found: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        found.setdefault(component, {})[field] = value
    effort = StepBudget()
    return {component: Numbers(config, where, effort) for component, config in found.items() if "r" in config}


def _configured(module: str, rank: int, numbers: Numbers | None, where: str) -> float:
    """The scaling of a module whose alpha is no tensor: the config's, or 1 where there is none."""
    if numbers is None:
        return 1.0
    stated, scaling = _stated(module, numbers)
    if stated != rank:
        raise ShapeError(
            f"{where}: module {module} has rank {rank}, but {METADATA} says {stated}. Its scaling would be a guess."
        )
    return scaling


def _stated(module: str, numbers: Numbers) -> tuple[int, float]:
    """The rank and the scaling that a component's config has for one of its modules."""
    name = module.partition(".")[2]
    found = numbers.of(name)
    # in later releases of transformers, a text encoder's modules have no such component
    return numbers.of(name.removeprefix("text_model.")) if found == numbers.of("") else found


def _alphas(opened: OpenedFile, layers: Mapping[str, _Tensors]) -> dict[str, float]:
    """The alphas of those layers that have one."""
    where = opened.weights
    raw = {stem: tensors.keys[ALPHA] for stem, tensors in layers.items() if ALPHA in tensors.keys}
    for stem, key in raw.items():
        if math.prod(opened.headers[key].shape) != 1:
            raise ShapeError(f"{where}: {key!r} is {opened.headers[key].shape}; an alpha is one number.")
        if not {DOWN, UP} & set(layers[stem].keys):
            raise FormatError(
                f"{where}: {key!r} is the alpha of a layer that has no factors: the file is not complete."
            )
    values = opened.load(list(raw.values()))
    for key, tensor in zip(raw.values(), values, strict=True):
        if tensor.dtype not in _ALPHA_DTYPES:
            raise FormatError(f"{where}: {key!r} is {tensor.dtype}; an alpha is a float or an integer.")
    found = {stem: float(value.reshape(()).item()) for stem, value in zip(raw, values, strict=True)}
    for stem, value in found.items():
        if not math.isfinite(value * value):
            raise NonFiniteError(f"{where}: {raw[stem]!r} is {value}; an alpha is a number.")
    return found


def _factor_headers(tensors: _Tensors, headers: Mapping[str, Header], where: str) -> tuple[Header, Header]:
    """Those of down and up; an error where they do not fit each other."""
    for part, other in ((DOWN, UP), (UP, DOWN)):
        if part not in tensors.keys:
            has = tensors.keys.get(other) or next(iter(tensors.keys.values()))
            raise FormatError(f"{where}: tensor {has!r} has no partner ({part}): the file is not complete.")
    for part in (DOWN, UP, MID):
        if part in tensors.keys and headers[tensors.keys[part]].dtype is None:
            raise FormatError(f"{where}: tensor {tensors.keys[part]!r} is not float64, float32, float16 or bfloat16.")
    raw = tensors.keys[DOWN], tensors.keys[UP]
    down, up = headers[raw[0]], headers[raw[1]]
    if len(down.shape) not in (2, 4) or len(up.shape) not in (2, 4) or set(up.shape[2:]) - {1}:
        raise ShapeError(
            f"{where}: {raw[0]!r} is {down.shape} and {raw[1]!r} is {up.shape}: (rank, in) and (out, rank), or the "
            "same of a convolution, were expected."
        )
    if down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise ShapeError(
            f"{where}: {raw[0]!r} is {down.shape} and {raw[1]!r} is {up.shape}: (rank, in) and (out, rank) must share "
            "one rank of at least 1."
        )
    if MID in tensors.keys:
        mid = headers[tensors.keys[MID]].shape
        if len(mid) != 4 or mid[:2] != (down.shape[0],) * 2 or set(down.shape[2:]) - {1} or 0 in mid:
            raise ShapeError(
                f"{where}: {tensors.keys[MID]!r} is {mid}, between {raw[0]!r}, {down.shape}, and {raw[1]!r}, {up.shape}"
                ": (rank, rank, height, width) between two convolutions of kernel 1 was expected."
            )
    return down, up


def _module(part: Part, tensors: _Tensors, down: Header, up: Header, where: str) -> _Module:
    rows = flux.span(part, up.shape[0], math.prod(down.shape[1:]))
    if rows is None:
        raise ShapeError(
            f"{where}: {tensors.keys[UP]!r} is {up.shape}, and {tensors.keys[DOWN]!r} is {down.shape}: these are not "
            f"the sizes of FLUX's {tensors.stem!r}, of which {part.module!r} is a part."
        )
    return _Module(tensors, rows, part.rows is Rows.SWAPPED)


def _spec(
    module: _Module, down: Header, up: Header, tensors: _Tensors, headers: Mapping[str, Header], scaling: float
) -> ModuleSpec:
    assert down.dtype is not None
    assert up.dtype is not None
    mid = headers[tensors.keys[MID]].shape if MID in tensors.keys else None
    kernel = (mid if mid is not None else down.shape)[2:]
    return ModuleSpec(
        rank=down.shape[0],
        in_features=down.shape[1] * math.prod(kernel),
        out_features=module.rows[1] - module.rows[0],
        scaling=scaling,
        dtype=torch.promote_types(down.dtype, up.dtype),
        kernel=kernel,
    )


def _note_alphas(where: str, silent: list[str], modules: int, dialect: str) -> None:
    """Warn of modules without an alpha, but for whole files of the dialects that need none."""
    if silent and (len(silent) < modules or dialect == names.KOHYA):
        warnings.warn(
            f"{where}: {len(silent)} of {modules} modules have no alpha, such as {silent[0]!r}; their scaling is taken "
            "to be 1, as kohya's programs take it.",
            SourceWarning,
            stacklevel=5,
        )


# Functions of the module, bound by `partial`: an adapter can be sent to another process, which a closure cannot.


def _factors(
    opened: OpenedFile, specs: Mapping[str, ModuleSpec], modules: Mapping[str, _Module], module: str
) -> LoRAFactors:
    one = modules[module]
    tensors = one.layer.keys
    wanted = [part for part in (DOWN, UP, MID) if part in tensors]
    read = dict(zip(wanted, opened.load([tensors[part] for part in wanted]), strict=True))
    down, up = read[DOWN], _rows(read[UP], one)
    if MID in read:
        # exact: the two convolutions of kernel 1 are matrices on either side of it
        down = torch.einsum("rqhw,qc->rchw", read[MID].double(), down.flatten(1).double()).to(down.dtype)
    return LoRAFactors.from_weights(down, up, specs[module].scaling)


def _rows(tensor: Tensor, module: _Module) -> Tensor:
    if module.swapped:
        return torch.cat(tuple(reversed(tensor.chunk(2))))
    begin, end = module.rows
    # a slice would keep all of it alive
    return tensor if (begin, end) == (0, len(tensor)) else tensor[begin:end].clone()


def _carried_key(module: str, part: str) -> str:
    return f"{keys.MODEL_PREFIX}{module}." + ("lora_magnitude_vector" if part == MAGNITUDE else "lora_B.bias")


def _carried(
    opened: OpenedFile,
    modules: Mapping[str, _Module],
    carried: Mapping[str, tuple[_Tensors, str]],
    key: str,
) -> Tensor:
    tensors, part = carried[key]
    module = modules[
        key.removeprefix(keys.MODEL_PREFIX).removesuffix(".lora_magnitude_vector").removesuffix(".lora_B.bias")
    ]
    found = opened.load([tensors.keys[part]])[0]
    if found.ndim and len(found) > 1:
        return _rows(found, module)
    return found
