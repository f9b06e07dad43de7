"""Adapters trained on coefficients, as the equivalent ordinary LoRA.

No file is read here: the caller passes the tensors by PEFT's keys. The subspace comes from `core.registry`, or is
embedded in the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..codec.storage.base import ModuleSlot
from ..codec.storage.table import as_float_tensors
from ..codec.tensor_codes import References, decode_heads
from ..core import dtypes, keys, limits, module_names, registry
from ..core import subspace as spaces
from ..core.adapter import Adapter, LoRAFactors, from_factors
from ..core.json_dataclasses import JsonTypeError, from_json
from ..core.keys import Kind
from ..core.subspace import Subspace
from ..errors import FormatError, ModuleNameError, ShapeError
from . import gradient_rows, lora_config

Bases = tuple[Tensor, Tensor]
"""Components (k, d) of a module's down side and of its up side."""


def adapter(name: str, config: dict[str, Any], tensors: Mapping[str, Tensor], *, where: str) -> Adapter:
    """Return the LoRA of an adapter trained on coefficients: A = C_A·V and B = Uᵀ·C_B, plus residuals if it has any.

    The product is computed in float64 and rounded to the dtype of the coefficients. Heads are unchanged.

    Args:
        name: Name of the adapter.
        config: The adapter's `adapter_config.json`.
        tensors: All tensors of the adapter's file, by PEFT's keys.
        where: Path of the file, for error messages.

    Raises:
        FormatError: The subspace is not loaded, or a tensor is missing or not recognised.
        ModuleNameError: The subspace lacks a module.
        ShapeError: Shapes do not fit the rank or the bases, or the factors do not fit in memory.
    """
    if config.get("carried"):
        raise FormatError(
            f"{where} is incomplete: the pack contains more tensors of the adapter. Write all with `eigenlorax export`."
        )
    modules, heads = _classify(config, tensors, where)
    if not modules:
        raise FormatError(
            f"{where} has no coefficients, though its peft_type is {keys.PEFT_TYPE}. Write an adapter of a pack "
            "with `eigenlorax export`."
        )
    fields = _parse_fields(config, where)
    numbers = lora_config.ScalingConfig(config, where)
    bases = _bases(modules, fields, config, where)
    for module, module_tensors in modules.items():
        _check_shapes(module_tensors, numbers.rank_and_scaling(module)[0], bases[module], f"{where}, module {module}")
    _check_memory(modules, bases, where)
    factors = {}
    for module, module_tensors in modules.items():
        _, scaling = numbers.rank_and_scaling(module)
        if keys.CORE in module_tensors:
            plain = from_core(module_tensors[keys.CORE], *bases[module], scaling)
        else:
            down, up = (module_tensors[keys.COEFFICIENTS[side]] for side in keys.SIDES)
            residuals = (module_tensors.get(keys.RESIDUALS[side]) for side in keys.SIDES)
            plain = from_pair(down, up, *bases[module], scaling, *residuals)
        factors[module] = replace(plain, kernel=tuple(fields.kernels.get(module, ())))
    return replace(lora(name, factors, heads, config), subspace=config.get("subspace_fingerprint"))


def _classify(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the tensors of each module by name, as floats, and the heads by key."""
    tensor_names = {*keys.COEFFICIENTS.values(), keys.CORE, *keys.RESIDUALS.values(), *keys.BASIS_TENSORS}
    modules: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    if keys.CODED_HEADS in tensors:
        tensors = decode_heads(tensors, _references(config))
    float_tensors = as_float_tensors(
        tensors,
        lambda: slots(_with_modules(config, where), where),
        lambda: _as_written(_subspace(config, where), config),
    )
    for key, tensor in float_tensors.items():
        module, _, name = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        if name in tensor_names:
            modules.setdefault(module, {})[name] = tensor
        else:
            heads[_check_head(key, config, where)] = tensor
    return modules, heads


def _bases(
    modules: Mapping[str, Mapping[str, Tensor]], fields: "_Fields", config: Mapping[str, Any], where: str
) -> dict[str, Bases]:
    """Return the bases of each module, from the file if all modules have embedded bases, else from the subspace."""
    if all(keys.EMBEDDED["down"] in tensors for tensors in modules.values()):
        return {module: _embedded_bases(tensors, f"{where}, module {module}") for module, tensors in modules.items()}
    n_gradient = config.get("n_gradient") or 0
    if not isinstance(n_gradient, int) or n_gradient < 0:
        raise FormatError(
            f"{where}: n_gradient is {n_gradient!r} in the config; it should be an integer of at least 0."
        )
    # without a pack, an adapter has gradient components only
    subspace = Subspace({}) if n_gradient and not config.get("subspace_fingerprint") else _subspace(config, where)
    if n_gradient and not config.get("n_extra"):
        subspace = _as_written(subspace, config)
    bases: dict[str, Bases] = {}
    for module, tensors in modules.items():
        components = None
        if not n_gradient or module_names.resolve(module, subspace.modules) is not None:
            pair = subspace.modules[_subspace_module(module, fields, subspace, where)]
            components = pair.down.components, pair.up.components
        if n_gradient:
            components = _with_gradient_components(components, tensors, n_gradient, f"{where}, module {module}")
        assert components is not None
        bases[module] = components
    return bases


def _with_gradient_components(
    components: Bases | None, tensors: Mapping[str, Tensor], n_gradient: int, where: str
) -> Bases:
    """Append a module's gradient components to its components in the subspace, None if the subspace lacks it."""
    sides = []
    for index, side in enumerate(keys.SIDES):
        codes, scales = (tensors.get(names[side]) for names in (keys.GRADIENT, keys.GRADIENT_SCALES))
        if components is not None:
            rows = components[index]
        else:
            rows = torch.zeros(0, codes.shape[-1] if codes is not None and codes.dim() else 0)
        k, dimension = rows.shape
        own = gradient_rows.decode(codes, scales, (min(n_gradient, dimension - k), dimension), f"{where}, {side} side")
        sides.append(torch.cat([rows.float(), own]))
    down, up = sides
    return down, up


@dataclass(frozen=True, slots=True)
class _Fields:
    """Fields of an adapter's config.

    Attributes:
        modules: Names of the adapted modules.
        subspace_modules: Name in the subspace, for modules that have another name there.
        kernels: Kernel size of each convolution.
    """

    modules: list[str]
    subspace_modules: dict[str, str]
    kernels: dict[str, list[int]]


def _parse_fields(config: Mapping[str, Any], where: str) -> _Fields:
    """Return the fields of a config; raise `FormatError` if one has the wrong type."""
    names = {"modules": "target_modules", "subspace_modules": "subspace_modules", "kernels": keys.KERNELS}
    types = get_type_hints(_Fields)
    try:
        return _Fields(
            **{field: from_json(types[field], _json_value(config, name, field), name) for field, name in names.items()}
        )
    except JsonTypeError as error:
        raise FormatError(f"{where}: {error}") from error


def _json_value(config: Mapping[str, Any], name: str, field: str) -> Any:
    """Return a field of a config, empty if it is null or missing. PEFT may store the modules as a set or a string."""
    value = config.get(name) or ([] if field == "modules" else {})
    if field == "modules" and isinstance(value, str | set):
        return sorted(value) if isinstance(value, set) else [value]
    return value


def slots(config: Mapping[str, Any], where: str) -> dict[str, ModuleSlot]:
    """Return the slot of each module in the subspace, from the config of an adapter in a pack."""
    numbers, fields = lora_config.ScalingConfig(config, where), _parse_fields(config, where)
    module_slots = {}
    for module in sorted(fields.modules):
        rank, scaling = numbers.rank_and_scaling(module)
        subspace_module = fields.subspace_modules.get(module, module)
        module_slots[module] = ModuleSlot(subspace_module, rank, scaling, tuple(fields.kernels.get(module, ())))
    return module_slots


def _check_head(key: str, config: Mapping[str, Any], where: str) -> str:
    """Return `key` if it is the key of a head in an ordinary LoRA file; otherwise raise `FormatError`."""
    try:
        kind = keys.parse_peft_key(key, config.get("modules_to_save") or ()).kind
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    if kind is not Kind.HEAD:
        raise FormatError(f"{where}: tensor {key!r} belongs to a LoRA; coefficients were expected.")
    return key


def _embedded_bases(tensors: Mapping[str, Tensor], where: str) -> Bases:
    """Return the bases of a module that are embedded in the adapter's file."""
    down, up = (tensors[keys.EMBEDDED[side]] for side in keys.SIDES)
    for name, basis in zip(keys.EMBEDDED.values(), (down, up), strict=True):
        if basis.dim() != 2 or basis.dtype not in dtypes.STORED:
            raise ShapeError(f"{where}: {name} is {tuple(basis.shape)}, {basis.dtype}; rows of floats were expected.")
    return down, up


def _check_shapes(tensors: Mapping[str, Tensor], rank: int, bases: Bases, where: str) -> None:
    """Raise `FormatError` if a module lacks coefficients, and `ShapeError` if they do not fit its rank and bases."""
    (k_down, n_in), (k_up, n_out) = (basis.shape for basis in bases)
    if keys.CORE in tensors:
        expected = {keys.CORE: (k_up, k_down)}
    else:
        expected = {keys.COEFFICIENTS["down"]: (rank, k_down), keys.COEFFICIENTS["up"]: (k_up, rank)}
        residuals = {keys.RESIDUALS["down"]: (rank, n_in), keys.RESIDUALS["up"]: (n_out, rank)}
        expected |= {name: shape for name, shape in residuals.items() if name in tensors}
    for name, shape in expected.items():
        if name not in tensors:
            raise FormatError(f"{where} has no {name}: the file is incomplete.")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes.STORED:
            raise ShapeError(
                f"{where}: {name} is {tuple(tensor.shape)}, {tensor.dtype}; expected a float tensor of shape {shape}. "
                "The file belongs to another rank or subspace."
            )


def _check_memory(modules: Mapping[str, Mapping[str, Tensor]], bases: Mapping[str, Bases], where: str) -> None:
    """Raise `ShapeError` if the factors, products with the bases, do not fit in this machine's memory."""
    numbers = sum(
        tensors[keys.COEFFICIENTS["down"]].shape[0] * sum(basis.shape[1] for basis in bases[module])
        for module, tensors in modules.items()
        if keys.CORE not in tensors
    )
    try:
        limits.check_factor_memory(numbers, "its factors")
    except ValueError as error:
        raise ShapeError(f"{where}: {error}.") from error


def _as_written(subspace: Subspace, config: Mapping[str, Any]) -> Subspace:
    """Return the subspace in the state that the adapter refers to: it may have been extended since."""
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
    """Return the LoRA that coefficients represent, computed in float64 and rounded to their dtype.

    Args:
        down: Down coefficients, (r, k_down).
        up: Up coefficients, (k_up, r).
        down_basis: Components of the down side, (k_down, in).
        up_basis: Components of the up side, (k_up, out).
        scaling: lora_alpha / r.
        down_residual: Residual of the down factor, (r, in).
        up_residual: Residual of the up factor, (out, r).
    """
    full_down, full_up = down.double() @ down_basis.double(), up_basis.double().mT @ up.double()
    if down_residual is not None:
        full_down += down_residual
    if up_residual is not None:
        full_up += up_residual
    return LoRAFactors(full_down.to(down.dtype), full_up.to(up.dtype).contiguous(), scaling)


def from_core(core: Tensor, down_basis: Tensor, up_basis: Tensor, scaling: float) -> LoRAFactors:
    """Return the LoRA that a core represents, with rank min(k_up, k_down).

    Args:
        core: Core, (k_up, k_down).
        down_basis: Components of the down side, (k_down, in).
        up_basis: Components of the up side, (k_up, out).
        scaling: LoRA scaling.
    """
    k_up, k_down = core.shape
    if k_down <= k_up:
        down, up = down_basis.double(), up_basis.double().mT @ core.double()
    else:
        down, up = core.double() @ down_basis.double(), up_basis.double().mT
    return LoRAFactors(down.to(core.dtype).contiguous(), up.to(core.dtype).contiguous(), scaling)


def lora(
    name: str, modules: Mapping[str, LoRAFactors], heads: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Adapter:
    """Return an adapter whose config states the ranks and alphas of `modules`.

    Fields of `config` that mean the same for a LoRA are kept.
    """
    adapter = from_factors(
        name,
        dict(sorted(modules.items())),
        heads=heads,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
    )
    return replace(adapter, source_config=lora_config.derived(adapter, config))


def _subspace(config: Mapping[str, Any], where: str) -> Subspace:
    fingerprint = config.get("subspace_fingerprint")
    subspace = registry.find(fingerprint) if isinstance(fingerprint, str) else None
    if subspace is None:
        raise FormatError(
            f"{where} has coefficients in the subspace {str(fingerprint)[:12]}…, which is not loaded. Open its pack "
            "(eigenlorax.Pack.open('pack/') in Python), or, if it is an adapter of a pack, `eigenlorax export` it."
        )
    n_extra = config.get("n_extra") or 0
    if not n_extra:
        return subspace
    # the pack may have grown since: the adapter's own components came after those that the pack had
    return spaces.augment(_as_written(subspace, config), n_extra, config.get("extra_seed") or 0)


def _references(config: Mapping[str, Any]) -> References:
    """Return the reference tensors of the pack that an adapter is from; none if it is not loaded."""
    fingerprint = config.get("subspace_fingerprint")
    pack = registry.find_pack(fingerprint) if isinstance(fingerprint, str) else None
    return pack.reference_tensors if pack is not None else References()


def _with_modules(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config with all modules of the subspace if it names none: an adapter in a pack may leave them out."""
    if config.get(keys.TARGET_MODULES):
        return dict(config)
    return {**config, keys.TARGET_MODULES: sorted(_subspace(config, where).modules)}


def _subspace_module(module: str, fields: _Fields, subspace: Subspace, where: str) -> str:
    """Return the name of a module in the subspace; raise `ModuleNameError` if it is not there."""
    name = fields.subspace_modules.get(module) or module_names.resolve(module, subspace.modules)
    if name is None or name not in subspace.modules:
        raise ModuleNameError(f"{where}: module {module!r} is not in the subspace.")
    return name
