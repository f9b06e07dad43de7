"""The files of the paper's authors: per module and side, components (d, K) and "loadings" (K, r). Read, not written.

Their layer adds B·A·x with A = (V_A·L_A)ᵀ and B = V_B·L_B: the mean that they subtract to find V is not in the product,
nor in the file, and so is no part of the adapter. Neither is a scaling, which is why it has to be said here.
docs/adapter-formats.md has the cases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import boundary, keys
from ..core.adapter import Adapter, LazyMapping, LoRAFactors, ModuleSpec
from ..core.keys import Kind
from ..errors import FormatError, ShapeError
from . import files, lora_config
from .files import Header, Opened

_COMPONENTS, _COEFFICIENTS = keys.OFFICIAL_COMPONENTS, keys.OFFICIAL_COEFFICIENTS
_LETTERS = {side: name for name, side in keys.OFFICIAL_SIDES.items()}


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor: the file that has it, and its key there."""

    file: Opened
    raw: str

    @property
    def header(self) -> Header:
        return self.file.headers[self.raw]

    def read(self) -> Tensor:
        return self.file.load([self.raw])[0]

    def __str__(self) -> str:
        return f"{self.raw!r} of {self.file.weights}"


_Module = dict[tuple[str, str], _Part]


def is_one(found: Opened) -> bool:
    """Whether a folder is one of the authors': its config says so, or the name of a tensor does."""
    return found.config["peft_type"] == keys.OFFICIAL_PEFT_TYPE or any(map(keys.parse_official_key, found.headers))


def read(
    source: str | Path,
    *,
    lora_alpha: float | None = None,
    components: str | Path | None = None,
    **options: Any,
) -> Adapter:
    """The LoRA that an adapter of the authors' is: a local folder, or a repository on the Hub.

    lora_alpha: the scaling is lora_alpha / r. Their layer computes with a scaling of 1, so that what was trained in it
        has lora_alpha = r; what was projected from LoRAs has that of those. Where the config has it, it need not be
        given.
    components: the folder, or repository, that has them, where the adapter's own does not.
    options: those of format "peft".
    """
    found = files.opened(source, **options)
    if components is None:
        return adapter(found, lora_alpha)
    there = {key: value for key, value in options.items() if key not in ("name", "revision", "subfolder")}
    return adapter(found, lora_alpha, files.opened(components, name="components", **there))


def adapter(found: Opened, lora_alpha: float | None = None, basis: Opened | None = None) -> Adapter:
    """The LoRA of an opened folder, tensors read when they are asked for, heads word for word.

    basis: another one to take components from where this one has none.
    """
    modules, heads = _sorted_out(found)
    if not modules:
        raise FormatError(
            f"{found.weights} has neither components nor loadings, though its peft_type is {keys.OFFICIAL_PEFT_TYPE}."
        )
    if basis is not None:
        for module, parts in _sorted_out(basis)[0].items():
            for side in keys.SIDES:
                if module in modules and (side, _COMPONENTS) in parts:
                    modules[module].setdefault((side, _COMPONENTS), parts[side, _COMPONENTS])
    for module, parts in modules.items():
        _check_whole(found, module, parts)
    config = {**found.config, "lora_alpha": _alpha(found, lora_alpha, modules)}
    numbers = lora_config.Numbers(config, str(found.weights))
    specs = {module: _spec(found, module, parts, numbers) for module, parts in sorted(modules.items())}
    try:
        boundary.check_factor_memory(sum(spec.numbers for spec in specs.values()), "its factors")
    except ValueError as error:
        raise ShapeError(f"{found.weights}: {error}.") from error

    made = Adapter(
        name=found.name,
        specs=specs,
        modules=LazyMapping(specs, partial(_factors, specs, modules)),
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        heads=LazyMapping(heads, partial(_read_head, heads)),
        file_bytes=found.file_bytes,
    )
    return replace(made, source_config=lora_config.derived(made, config))


def _factors(specs: Mapping[str, ModuleSpec], modules: Mapping[str, _Module], module: str) -> LoRAFactors:
    spec, parts = specs[module], modules[module]
    down, up = (_product(parts, side) for side in keys.SIDES)
    return LoRAFactors(down.mT.to(spec.dtype).contiguous(), up.to(spec.dtype), spec.scaling)


def _read_head(heads: Mapping[str, _Part], key: str) -> Tensor:
    return heads[key].read()


def _sorted_out(found: Opened) -> tuple[dict[str, _Module], Mapping[str, _Part]]:
    """The parts of each module, and the heads by the keys PEFT writes; an error for a tensor that is neither."""
    modules: dict[str, _Module] = {}
    heads: dict[str, _Part] = {}
    for raw in sorted(found.headers):
        part = _Part(found, raw)
        if place := keys.parse_official_key(raw):
            module, *what = place
            known = modules.setdefault(module, {}).setdefault((what[0], what[1]), part)
        else:
            known = heads.setdefault(_head(found, raw), part)
        if known is not part:
            raise FormatError(f"{found.weights}: tensors {known.raw!r} and {raw!r} stand for the same one.")
    return modules, heads


def _head(found: Opened, raw: str) -> str:
    """The key PEFT writes a head under; an error for a tensor that is none."""
    try:
        head = keys.parse_peft_key(raw, found.config.get("modules_to_save") or ())
    except FormatError as error:
        raise FormatError(
            f"{found.weights}: tensor {raw!r} is not one of eigenlora_A.components, eigenlora_A.loadings, the same of "
            "eigenlora_B, and saved modules. It would be lost, so nothing was read."
        ) from error
    if head.kind is not Kind.HEAD:
        raise FormatError(
            f"{found.weights}: tensor {raw!r} is one of a LoRA, not of the authors' format. LoRAs are of format 'peft'."
        )
    return head.key


def _check_whole(found: Opened, module: str, parts: _Module) -> None:
    for side in keys.SIDES:
        has_components, has_coefficients = ((side, what) in parts for what in (_COMPONENTS, _COEFFICIENTS))
        what = f"{found.weights}: {_LETTERS[side]} of module {module}"
        if has_coefficients and not has_components:
            raise FormatError(
                f"{what} has loadings, but no components to multiply them with: the authors' code saves none unless it "
                "is told to. Say where they are: read_adapter(path, format='official', components='the folder')."
            )
        if not has_coefficients:
            raise FormatError(
                f"{what} has no loadings: components alone are a basis, not an adapter"
                + ("." if has_components else ", and even those are not there.")
            )


def _alpha(found: Opened, given: float | None, modules: Mapping[str, _Module]) -> Any:
    """The lora_alpha that was given, or that the config of an adapter of this kind has. There is no default."""
    # one of another kind may be PEFT's own default: the authors' scripts write such configs beside what they export
    stated = found.config.get("lora_alpha") if found.config["peft_type"] == keys.OFFICIAL_PEFT_TYPE else None
    alpha = given if given is not None else stated
    if alpha is None:
        parts = next(iter(modules.values()))
        rank = parts["down", _COEFFICIENTS].header.shape[-1:]
        raise FormatError(
            f"{found.weights} does not say by what its update is scaled. If it was trained in the authors' code, which "
            f"scales by 1, lora_alpha is its rank{f', {rank[0]}' if rank else ''}; if it was projected from LoRAs, it "
            f'is theirs. Write it into {keys.ADAPTER_CONFIG} ("peft_type": "{keys.OFFICIAL_PEFT_TYPE}", '
            "\"lora_alpha\": …), or call read_adapter(path, format='official', lora_alpha=…)."
        )
    return alpha


def _spec(found: Opened, module: str, parts: _Module, numbers: lora_config.Numbers) -> ModuleSpec:
    shapes, dtype = {}, torch.float32
    for side in keys.SIDES:
        components, coefficients = parts[side, _COMPONENTS], parts[side, _COEFFICIENTS]
        for part in (components, coefficients):
            if part.header.dtype is None:
                raise FormatError(f"tensor {part} is not float64, float32, float16 or bfloat16.")
            # the product is no less exact than its factors
            dtype = torch.promote_types(dtype, part.header.dtype)
        first, second = components.header.shape, coefficients.header.shape
        if len(first) != 2 or len(second) != 2 or first[1] != second[0] or not second[1]:
            raise ShapeError(
                f"tensor {components} is {first}, and {coefficients} is {second}: (d, K) and (K, r) must share one K. "
                "They are not of one adapter, or one of them was augmented without the other."
            )
        shapes[side] = (first[0], second[1])
    (n_in, rank), (n_out, rank_up) = shapes["down"], shapes["up"]
    if rank != rank_up:
        raise ShapeError(f"{found.weights}, module {module}: rank {rank} of eigenlora_A, {rank_up} of eigenlora_B.")
    stated, scaling = numbers.of(module, rank)
    if stated != rank:
        raise ShapeError(
            f"{found.weights}, module {module}: its rank is {rank}, but {keys.ADAPTER_CONFIG} says {stated}. Its "
            "scaling lora_alpha / r would be a guess: mend the config."
        )
    return ModuleSpec(rank, n_in, n_out, scaling, dtype)


def _product(parts: _Module, side: str) -> Tensor:
    """Components times what stands for coefficients there, (d, r), in float64."""
    return parts[side, _COMPONENTS].read().double() @ parts[side, _COEFFICIENTS].read().double()
