"""The files of the paper's authors: per module and side, components (d, K) and "loadings" (K, r). Read, not written.

Their layer adds B·A·x with A = (V_A·L_A)ᵀ and B = V_B·L_B. The mean that their code subtracts to find V is neither in
the product nor in the file, so it is not part of the adapter. The scaling is not in the file either: the caller or the
config has to give `lora_alpha`. docs/adapter-formats.md describes the cases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import keys, limits
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ..core.keys import Kind
from ..errors import FormatError, ShapeError
from . import files, lora_config
from .files import Header, OpenedFolder

_COMPONENTS, _COEFFICIENTS = keys.OFFICIAL_COMPONENTS, keys.OFFICIAL_COEFFICIENTS
_LETTERS = {side: letter for letter, side in keys.OFFICIAL_SIDES.items()}


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A tensor of an opened folder, by its name in the file."""

    folder: OpenedFolder
    name: str

    @property
    def header(self) -> Header:
        return self.folder.weights.headers[self.name]

    def read(self) -> Tensor:
        return self.folder.weights.load([self.name])[0]

    def __str__(self) -> str:
        return f"{self.name!r} of {self.folder.weights.path}"


_ModuleTensors = dict[tuple[str, str], _StoredTensor]
"""The tensors of a module by side and by `_COMPONENTS` or `_COEFFICIENTS`."""


def is_official(opened: OpenedFolder) -> bool:
    """Return whether a folder is in the authors' format, by its config or by the name of a tensor."""
    return opened.config["peft_type"] == keys.OFFICIAL_PEFT_TYPE or any(
        map(keys.parse_official_key, opened.weights.headers)
    )


def read(
    source: str | Path,
    *,
    lora_alpha: float | None = None,
    components: str | Path | None = None,
    **options: Any,
) -> Adapter:
    """Read an adapter in the authors' format as a LoRA.

    Args:
        source: A local folder, a URL or a Hub id.
        lora_alpha: Numerator of the scaling lora_alpha / r. An adapter trained in the authors' code, whose scaling is
            1, has lora_alpha = r. An adapter that was projected from LoRAs has the lora_alpha of the LoRAs. Default:
            the lora_alpha of the config.
        components: Folder or repository with the components, if `source` has none.
        options: Options of format "peft".

    Raises:
        FormatError: The lora_alpha is unknown, or a tensor is missing or not recognised.
        ShapeError: The shapes of components and loadings do not fit each other.
    """
    opened = files.open_folder(source, **options)
    if components is None:
        return adapter(opened, lora_alpha)
    shared_options = {key: value for key, value in options.items() if key not in ("name", "revision", "subfolder")}
    return adapter(opened, lora_alpha, files.open_folder(components, name="components", **shared_options))


def adapter(opened: OpenedFolder, lora_alpha: float | None = None, basis: OpenedFolder | None = None) -> Adapter:
    """Return the LoRA of an opened folder. Tensors are read at each access; heads are unchanged.

    Args:
        opened: The opened folder.
        lora_alpha: Numerator of the scaling; see `read`.
        basis: A folder whose components are used where `opened` has none.
    """
    path = opened.weights.path
    modules, heads = _classify(opened)
    if not modules:
        raise FormatError(
            f"{path} has neither components nor loadings, though its peft_type is {keys.OFFICIAL_PEFT_TYPE}."
        )
    if basis is not None:
        for module, tensors in _classify(basis)[0].items():
            for side in keys.SIDES:
                if module in modules and (side, _COMPONENTS) in tensors:
                    modules[module].setdefault((side, _COMPONENTS), tensors[side, _COMPONENTS])
    for module, tensors in modules.items():
        _check_complete(path, module, tensors)
    config = {**opened.config, "lora_alpha": _lora_alpha(opened, lora_alpha, modules)}
    numbers = lora_config.ScalingConfig(config, path)
    specs = {module: _spec(path, module, tensors, numbers) for module, tensors in sorted(modules.items())}
    try:
        limits.check_factor_memory(sum(spec.numbers for spec in specs.values()), "its factors")
    except ValueError as error:
        raise ShapeError(f"{path}: {error}.") from error

    lora = Adapter(
        name=opened.name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, specs, modules)),
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        heads=LazyMapping(heads, partial(_read_head, heads)),
        file_bytes=opened.weights.size,
    )
    return replace(lora, source_config=lora_config.derived(lora, config))


def _factors(specs: Mapping[str, ModuleSpec], modules: Mapping[str, _ModuleTensors], module: str) -> LoRAFactors:
    spec, tensors = specs[module], modules[module]
    down, up = (_product(tensors, side) for side in keys.SIDES)
    return LoRAFactors(down.mT.to(spec.dtype).contiguous(), up.to(spec.dtype), spec.scaling)


def _read_head(heads: Mapping[str, _StoredTensor], key: str) -> Tensor:
    return heads[key].read()


def _classify(opened: OpenedFolder) -> tuple[dict[str, _ModuleTensors], Mapping[str, _StoredTensor]]:
    """Return the tensors of each module, and the heads by the keys that PEFT writes.

    Raises:
        FormatError: A tensor is not recognised, or two tensors have the same key.
    """
    modules: dict[str, _ModuleTensors] = {}
    heads: dict[str, _StoredTensor] = {}
    for name in sorted(opened.weights.headers):
        tensor = _StoredTensor(opened, name)
        if parsed := keys.parse_official_key(name):
            module, side, kind = parsed
            first = modules.setdefault(module, {}).setdefault((side, kind), tensor)
        else:
            first = heads.setdefault(_head_key(opened, name), tensor)
        if first is not tensor:
            raise FormatError(
                f"{opened.weights.path}: tensors {first.name!r} and {name!r} have the same key. Remove one of them."
            )
    return modules, heads


def _head_key(opened: OpenedFolder, name: str) -> str:
    """Return the key under which PEFT writes a head; raise `FormatError` for any other tensor."""
    try:
        parsed = keys.parse_peft_key(name, opened.config.get("modules_to_save") or ())
    except FormatError as error:
        raise FormatError(
            f"{opened.weights.path}: tensor {name!r} is neither components nor loadings of eigenlora_A or eigenlora_B, "
            "nor of a saved module. Nothing was read, since the tensor would be dropped."
        ) from error
    if parsed.kind is not Kind.HEAD:
        raise FormatError(
            f"{opened.weights.path}: tensor {name!r} belongs to a LoRA, not to the authors' format. Read it with "
            "format='peft'."
        )
    return parsed.key


def _check_complete(path: str, module: str, tensors: _ModuleTensors) -> None:
    for side in keys.SIDES:
        has_components, has_coefficients = (side, _COMPONENTS) in tensors, (side, _COEFFICIENTS) in tensors
        where = f"{path}: {_LETTERS[side]} of module {module}"
        if has_coefficients and not has_components:
            raise FormatError(
                f"{where} has loadings, but no components to multiply them by, which the authors' code only saves on "
                "request. Pass their folder: read_adapter(path, format='official', components='the folder')."
            )
        if not has_coefficients:
            raise FormatError(
                f"{where} has no loadings: components alone are a basis, not an adapter"
                + ("." if has_components else ", and there are no components either.")
            )


def _lora_alpha(opened: OpenedFolder, requested: float | None, modules: Mapping[str, _ModuleTensors]) -> Any:
    """Return the requested lora_alpha, or else the lora_alpha of the config. There is no default."""
    # only from a config of this type: the authors' scripts write other configs with PEFT's default of 8
    is_official_config = opened.config["peft_type"] == keys.OFFICIAL_PEFT_TYPE
    alpha = requested if requested is not None or not is_official_config else opened.config.get("lora_alpha")
    if alpha is None:
        tensors = next(iter(modules.values()))
        rank = tensors["down", _COEFFICIENTS].header.shape[-1:]
        raise FormatError(
            f"{opened.weights.path} does not state the scaling of its update. If it was trained in the authors' code, "
            f"which scales by 1, lora_alpha is its rank{f', {rank[0]}' if rank else ''}; if it was projected from "
            f'LoRAs, it is theirs. Write it into {keys.ADAPTER_CONFIG} ("peft_type": "{keys.OFFICIAL_PEFT_TYPE}", '
            "\"lora_alpha\": …), or call read_adapter(path, format='official', lora_alpha=…)."
        )
    return alpha


def _spec(path: str, module: str, tensors: _ModuleTensors, numbers: lora_config.ScalingConfig) -> ModuleSpec:
    shapes, dtype = {}, torch.float32
    for side in keys.SIDES:
        components, coefficients = tensors[side, _COMPONENTS], tensors[side, _COEFFICIENTS]
        for tensor in (components, coefficients):
            if tensor.header.dtype is None:
                raise FormatError(f"tensor {tensor} is not float64, float32, float16 or bfloat16.")
            # the product is no less exact than its factors
            dtype = torch.promote_types(dtype, tensor.header.dtype)
        basis_shape, coefficients_shape = components.header.shape, coefficients.header.shape
        if (
            len(basis_shape) != 2
            or len(coefficients_shape) != 2
            or basis_shape[1] != coefficients_shape[0]
            or not coefficients_shape[1]
        ):
            raise ShapeError(
                f"tensor {components} is {basis_shape}, and {coefficients} is {coefficients_shape}: (d, K) and (K, r) "
                "must share one K. They belong to different adapters, or only one of them was augmented."
            )
        shapes[side] = (basis_shape[0], coefficients_shape[1])
    (n_in, rank), (n_out, rank_up) = shapes["down"], shapes["up"]
    if rank != rank_up:
        raise ShapeError(f"{path}, module {module}: rank {rank} of eigenlora_A, {rank_up} of eigenlora_B.")
    stated, scaling = numbers.rank_and_scaling(module, rank)
    if stated != rank:
        raise ShapeError(
            f"{path}, module {module}: its rank is {rank}, but {keys.ADAPTER_CONFIG} says {stated}. Its scaling "
            "lora_alpha / r would be a guess: correct the config."
        )
    return ModuleSpec(rank, n_in, n_out, scaling, dtype)


def _product(tensors: _ModuleTensors, side: str) -> Tensor:
    """Return components times loadings, (d, r), in float64."""
    return tensors[side, _COMPONENTS].read().double() @ tensors[side, _COEFFICIENTS].read().double()
