"""An adapter trained on coefficients, as the ordinary LoRA that it is in the terms of its subspace.

Nothing here reads a file: tensors come by PEFT's keys, and the subspace from `known` or from among the tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import keys, known, storages
from .. import subspace as spaces
from ..adapter import Adapter, LoRAFactors, from_factors
from ..errors import FormatError, ModuleNameError
from ..storages import Slot
from ..subspace import Subspace
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
    parts = [*keys.COEFFICIENTS.values(), keys.CORE, *keys.REST.values(), *keys.EMBEDDED.values()]
    own: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in storages.plain(
        tensors, lambda: slots(config, where), lambda: _of_then(_subspace(config, where), config)
    ).items():
        module, _, part = key.removeprefix(keys.MODEL_PREFIX).rpartition(".")
        if part in parts:
            own.setdefault(module, {})[part] = tensor
        else:
            heads[key] = tensor
    if not own:
        raise FormatError(
            f"{where} has no coefficients, though its peft_type is {keys.PEFT_TYPE}. An adapter of a pack is given "
            "back by `eigenlorax export`."
        )
    embedded = all(keys.EMBEDDED["down"] in found for found in own.values())
    subspace = None if embedded else _subspace(config, where)
    modules = {}
    kernels = config.get(keys.KERNELS) or {}
    numbers = lora_config.Numbers(config, where)
    for module, found in own.items():
        _, scaling = numbers.of(module)
        if subspace is None:
            down_basis, up_basis = found[keys.EMBEDDED["down"]], found[keys.EMBEDDED["up"]]
        else:
            bases = subspace.modules[_place(module, config, subspace, where)]
            down_basis, up_basis = bases.down.components, bases.up.components
        if keys.CORE in found:
            plain = from_core(found[keys.CORE], down_basis, up_basis, scaling)
        else:
            down, up = (found[keys.COEFFICIENTS[side]] for side in keys.SIDES)
            rests = (found.get(keys.REST[side]) for side in keys.SIDES)
            plain = from_pair(down, up, down_basis, up_basis, scaling, *rests)
        modules[module] = replace(plain, kernel=tuple(kernels.get(module, ())))
    return replace(lora(name, modules, heads, config), subspace=config.get("subspace_fingerprint"))


def slots(config: Mapping[str, Any], where: str) -> dict[str, Slot]:
    """What the config of an adapter of a pack says of its modules."""
    numbers, kernels, own = lora_config.Numbers(config, where), config.get(keys.KERNELS) or {}, {}
    for module in sorted(config.get("target_modules") or ()):
        rank, scaling = numbers.of(module)
        place = (config.get("subspace_modules") or {}).get(module, module)
        own[module] = Slot(place, rank, scaling, tuple(kernels.get(module, ())))
    return own


def _of_then(subspace: Subspace, config: Mapping[str, Any]) -> Subspace:
    """The subspace as it was when the adapter was written."""
    return subspace.at(str(config.get("subspace_fingerprint"))) or subspace


def from_pair(
    down: Tensor,
    up: Tensor,
    down_basis: Tensor,
    up_basis: Tensor,
    scaling: float,
    down_rest: Tensor | None = None,
    up_rest: Tensor | None = None,
) -> LoRAFactors:
    """The LoRA of coefficients, down (r, k_down) and up (k_up, r), and of what is beside them, (r, in) and (out, r)."""
    wide_down, wide_up = down.double() @ down_basis.double(), up_basis.double().mT @ up.double()
    if down_rest is not None:
        wide_down += down_rest
    if up_rest is not None:
        wide_up += up_rest
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
    found = known.find(fingerprint) if isinstance(fingerprint, str) else None
    if found is None:
        raise FormatError(
            f"{where} holds coefficients over the subspace {str(fingerprint)[:12]}…, which is not at hand. Open its "
            "pack (eigenlorax.Pack.open('pack/') in Python), or, if it is an adapter of a pack, `eigenlorax export` it."
        )
    n_extra = config.get("n_extra") or 0
    return spaces.augment(found, n_extra, config.get("extra_seed") or 0) if n_extra else found


def _place(module: str, config: Mapping[str, Any], subspace: Subspace, where: str) -> str:
    place = (config.get("subspace_modules") or {}).get(module) or keys.resolve(module, subspace.modules)
    if place is None:
        raise ModuleNameError(f"{where}: module {module!r} is not in the subspace.")
    return str(place)
