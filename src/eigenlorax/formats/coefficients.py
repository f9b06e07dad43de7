"""An adapter trained on coefficients, as the ordinary LoRA that it is in the terms of its subspace.

Nothing here reads a file: tensors come by PEFT's keys, and the subspace from `known` or from among the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from torch import Tensor

from ..codec.storage.base import ModuleSlot
from ..codec.storage.table import as_float_tensors
from ..core import boundary, dtypes, keys, module_names, registry
from ..core import subspace as spaces
from ..core.adapter import Adapter, LoRAFactors, from_factors
from ..core.json_dataclasses import JsonTypeError, from_json
from ..core.keys import Kind
from ..core.subspace import Subspace
from ..errors import FormatError, ModuleNameError, ShapeError
from . import lora_config


def adapter(name: str, config: dict[str, Any], tensors: Mapping[str, Tensor], *, where: str) -> Adapter:
    """The LoRA: A = C_A·V and B = Uᵀ·C_B, and a rest where there is one, exact, in the coefficients' dtype; heads word
    for word.

    `where` stands before what is wrong with it.
    """
    if config.get("carried"):
        raise FormatError(
            f"{where} is not all of the adapter: its pack holds more tensors of it. `eigenlorax export` gives all."
        )
    parts = [*keys.COEFFICIENTS.values(), keys.CORE, *keys.RESIDUALS.values(), *keys.EMBEDDED.values()]
    own: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    fields = _fields(config, where)
    for key, tensor in as_float_tensors(
        tensors, lambda: slots(config, where), lambda: _of_then(_subspace(config, where), config)
    ).items():
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        if part in parts:
            own.setdefault(module, {})[part] = tensor
        else:
            heads[_checked_head(key, config, where)] = tensor
    if not own:
        raise FormatError(
            f"{where} has no coefficients, though its peft_type is {keys.PEFT_TYPE}. An adapter of a pack is given "
            "back by `eigenlorax export`."
        )
    embedded = all(keys.EMBEDDED["down"] in found for found in own.values())
    subspace = None if embedded else _subspace(config, where)
    numbers, bases = lora_config.Numbers(config, where), {}
    for module, found in own.items():
        if subspace is None:
            bases[module] = _embedded(found, f"{where}, module {module}")
        else:
            pair = subspace.modules[_place(module, fields, subspace, where)]
            bases[module] = pair.down.components, pair.up.components
        _check_sizes(found, numbers.of(module)[0], bases[module], f"{where}, module {module}")
    _check_factors(own, bases, where)
    modules = {}
    for module, found in own.items():
        _, scaling = numbers.of(module)
        if keys.CORE in found:
            plain = from_core(found[keys.CORE], *bases[module], scaling)
        else:
            down, up = (found[keys.COEFFICIENTS[side]] for side in keys.SIDES)
            rests = (found.get(keys.RESIDUALS[side]) for side in keys.SIDES)
            plain = from_pair(down, up, *bases[module], scaling, *rests)
        modules[module] = replace(plain, kernel=tuple(fields.kernels.get(module, ())))
    return replace(lora(name, modules, heads, config), subspace=config.get("subspace_fingerprint"))


@dataclass(frozen=True, slots=True)
class _Fields:
    """What the config of an adapter says of its coefficients. places: names in the subspace that are others there."""

    modules: list[str]
    places: dict[str, str]
    kernels: dict[str, list[int]]


def _fields(config: Mapping[str, Any], where: str) -> _Fields:
    """These fields, each of its type. `FormatError` where one is not."""
    names = {"modules": "target_modules", "places": "subspace_modules", "kernels": keys.KERNELS}
    hints = get_type_hints(_Fields)
    try:
        found = {field: from_json(hints[field], _given(config, name, field), name) for field, name in names.items()}
    except JsonTypeError as error:
        raise FormatError(f"{where}: {error}") from error
    return _Fields(**found)


def _given(config: Mapping[str, Any], name: str, field: str) -> Any:
    """A field of a config, empty where it is null or missing. PEFT may keep the modules as a set, or a text."""
    value = config.get(name) or ([] if field == "modules" else {})
    if field == "modules" and isinstance(value, str | set):
        return sorted(value) if isinstance(value, set) else [value]
    return value


def slots(config: Mapping[str, Any], where: str) -> dict[str, ModuleSlot]:
    """What the config of an adapter of a pack says of its modules."""
    numbers, fields, own = lora_config.Numbers(config, where), _fields(config, where), {}
    for module in sorted(fields.modules):
        rank, scaling = numbers.of(module)
        place = fields.places.get(module, module)
        own[module] = ModuleSlot(place, rank, scaling, tuple(fields.kernels.get(module, ())))
    return own


def _checked_head(key: str, config: Mapping[str, Any], where: str) -> str:
    """`key`, if it is one that an ordinary LoRA may have for a head: a file of one is what the adapter becomes."""
    try:
        kind = keys.parse_peft_key(key, config.get("modules_to_save") or ()).kind
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    if kind is not Kind.HEAD:
        raise FormatError(f"{where}: tensor {key!r} is one of a LoRA, and no coefficients.")
    return key


def _embedded(found: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """The bases that an adapter has of its own."""
    down, up = (found[keys.EMBEDDED[side]] for side in keys.SIDES)
    for part, basis in zip(keys.EMBEDDED.values(), (down, up), strict=True):
        if basis.dim() != 2 or basis.dtype not in dtypes.STORED:
            raise ShapeError(f"{where}: {part} is {tuple(basis.shape)}, {basis.dtype}; rows of floats were expected.")
    return down, up


Bases = tuple[Tensor, Tensor]
"""Rows (k, d) of a module's down side and of its up side."""


def _check_sizes(found: Mapping[str, Tensor], rank: int, bases: Bases, where: str) -> None:
    """`FormatError` where a module lacks coefficients, `ShapeError` where they are not of its rank and bases."""
    (k_down, n_in), (k_up, n_out) = (basis.shape for basis in bases)
    if keys.CORE in found:
        wanted = {keys.CORE: (k_up, k_down)}
    else:
        wanted = {keys.COEFFICIENTS["down"]: (rank, k_down), keys.COEFFICIENTS["up"]: (k_up, rank)}
        rests = {keys.RESIDUALS["down"]: (rank, n_in), keys.RESIDUALS["up"]: (n_out, rank)}
        wanted |= {part: shape for part, shape in rests.items() if part in found}
    for part, shape in wanted.items():
        if part not in found:
            raise FormatError(f"{where} has no {part}: the file is not complete.")
        if tuple(found[part].shape) != shape or found[part].dtype not in dtypes.STORED:
            raise ShapeError(
                f"{where}: {part} is {tuple(found[part].shape)}, {found[part].dtype}, where floats of {shape} go with "
                "its rank and its subspace. They are not of one adapter."
            )


def _check_factors(own: Mapping[str, Mapping[str, Tensor]], bases: Mapping[str, Bases], where: str) -> None:
    """`ShapeError` where products with the bases do not fit in this machine's memory."""
    numbers = sum(
        found[keys.COEFFICIENTS["down"]].shape[0] * sum(basis.shape[1] for basis in bases[module])
        for module, found in own.items()
        if keys.CORE not in found
    )
    try:
        boundary.check_factor_memory(numbers, "its factors")
    except ValueError as error:
        raise ShapeError(f"{where}: {error}.") from error


def _of_then(subspace: Subspace, config: Mapping[str, Any]) -> Subspace:
    """The subspace as it was when the adapter was written."""
    return subspace.at(str(config.get("subspace_fingerprint"))) or subspace


def from_pair(
    down: Tensor,
    up: Tensor,
    down_basis: Tensor,
    up_basis: Tensor,
    scaling: float,
    down_residual: Tensor | None = None,
    up_residual: Tensor | None = None,
) -> LoRAFactors:
    """The LoRA of coefficients, down (r, k_down) and up (k_up, r), and of what is beside them, (r, in) and (out, r)."""
    wide_down, wide_up = down.double() @ down_basis.double(), up_basis.double().mT @ up.double()
    if down_residual is not None:
        wide_down += down_residual
    if up_residual is not None:
        wide_up += up_residual
    return LoRAFactors(wide_down.to(down.dtype), wide_up.to(up.dtype).contiguous(), scaling)


def from_core(core: Tensor, down_basis: Tensor, up_basis: Tensor, scaling: float) -> LoRAFactors:
    """The LoRA of a core (k_up, k_down), of rank min(k_up, k_down)."""
    k_up, k_down = core.shape
    if k_down <= k_up:
        down, up = down_basis.double(), up_basis.double().mT @ core.double()
    else:
        down, up = core.double() @ down_basis.double(), up_basis.double().mT
    return LoRAFactors(down.to(core.dtype).contiguous(), up.to(core.dtype).contiguous(), scaling)


def lora(
    name: str, modules: Mapping[str, LoRAFactors], heads: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Adapter:
    """An adapter with a LoRA's config: ranks and alphas of the modules, and what `config` has that still holds."""
    found = from_factors(
        name,
        dict(sorted(modules.items())),
        heads=heads,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
    )
    return replace(found, source_config=lora_config.derived(found, config))


def _subspace(config: Mapping[str, Any], where: str) -> Subspace:
    fingerprint = config.get("subspace_fingerprint")
    found = registry.find(fingerprint) if isinstance(fingerprint, str) else None
    if found is None:
        raise FormatError(
            f"{where} holds coefficients over the subspace {str(fingerprint)[:12]}…, which is not at hand. Open its "
            "pack (eigenlorax.Pack.open('pack/') in Python), or, if it is an adapter of a pack, `eigenlorax export` it."
        )
    n_extra = config.get("n_extra") or 0
    return spaces.augment(found, n_extra, config.get("extra_seed") or 0) if n_extra else found


def _place(module: str, fields: _Fields, subspace: Subspace, where: str) -> str:
    place = fields.places.get(module) or module_names.resolve(module, subspace.modules)
    if place is None or place not in subspace.modules:
        raise ModuleNameError(f"{where}: module {module!r} is not in the subspace.")
    return place
