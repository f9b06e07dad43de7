"""`load_into`: adapters of a pack in a pipeline, checked as a whole before anything is changed."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ...core import convolution, dtypes, keys
from ...core.options import name_list as listed
from ...errors import (
    AdapterNameError,
    MissingPartWarning,
    ModuleNameError,
    OptionError,
    ShapeError,
    WrappedModelWarning,
)
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from . import layers, parts
from .parts import Found, Place


def load_into(
    pipe: object,
    pack: "Pack | str | os.PathLike[str]",
    names: str | Sequence[str] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
) -> dict[str, dict[str, int]]:
    """Load adapters of a pack into a pipeline of diffusers: how many layers of each of its models each adapter has.

    All of them run from one basis, which every layer holds once; nothing is expanded. Afterwards they are adapters of
    the pipeline like any other, for `set_adapters`, `disable_lora`, `fuse_lora`, `delete_adapters` and the rest. As
    with `load_lora_weights`, the one that was loaded last is active, alone.

    pipe: a pipeline, or one model of it. pack: a pack, its folder, or a repository on the Hub.
    names: the adapters to load, and to fetch; all by default. A dot in a name becomes `_` in the pipeline.
    dtype: of the bases; by default that of each layer's weight. "int8" keeps a scale for each row and 8 bits for each
        number, which a layer makes wide while it multiplies.
    """
    wanted = list(dict.fromkeys(listed(names))) if names is not None else None
    opened = _opened(pack, wanted)
    adapters = _read(opened, opened.names if wanted is None else wanted)
    models = [model for model in parts.models_of(pipe).values() if model is not None]
    _check_free(adapters, models)
    parsed = torch.int8 if dtype in ("int8", torch.int8) else dtypes.parse(dtype)
    found = parts.find({place for one in adapters.values() for place in one.places.values()}, pipe)
    _check(adapters, found, opened, pipe)
    off = any(layer.disable_adapters for layer in layers.tuner_layers(models))
    counts = layers.put(adapters, found.places, opened.subspace, opened.info.fingerprint, parsed)
    for layer in layers.tuner_layers(models):
        layer.set_adapter([*adapters][-1:], inference_mode=True)
        if off:
            layer.enable_adapters(False)
    _regroup(models)
    _warn_of_wrapped(pipe, counts)
    return counts


def _opened(pack: "Pack | str | os.PathLike[str]", names: list[str] | None) -> Pack:
    if not isinstance(pack, Pack):
        return Pack.from_pretrained(pack, adapters=names)
    for name in names or ():
        keys.check_known(name, pack.names)
    return pack


def _read(pack: Pack, names: list[str]) -> dict[str, PackedAdapter]:
    """The adapters by the names that they get. `OptionError` for one that is more than coefficients."""
    if not names:
        raise OptionError("no adapter is named, or the pack has none: load_into(pipe, pack, ['toy', 'sketch']).")
    found: dict[str, PackedAdapter] = {}
    for name in names:
        packed = pack.packed(name)
        if packed.heads:
            raise OptionError(
                f"adapter {name!r} has a head, or biases, of its own, such as {min(packed.heads)!r}, for which a "
                "pipeline has no place. eigenlorax.AdapterBank(model, pack) serves such adapters, and PEFT loads them."
            )
        if packed.carried:
            where = pack.path if pack.path is not None else "pack/"
            raise OptionError(
                f"adapter {name!r} has tensors that coefficients cannot express, such as {min(packed.carried)!r}. Name "
                f"the others; load this one as a LoRA: `eigenlorax export {where} {name} -o loras/ --format diffusers` "
                "gives what pipe.load_lora_weights takes."
            )
        short = name.replace(".", "_")
        if short in found:
            raise AdapterNameError(
                f"adapters {found[short].name!r} and {name!r} would both be {short!r} in the pipeline, since the names "
                "of PEFT have no dots. Load one of them."
            )
        found[short] = packed
    return found


def _check_free(adapters: Mapping[str, PackedAdapter], models: Sequence[nn.Module]) -> None:
    """`AdapterNameError` for a name that is in use, or that PEFT has no room for."""
    taken = {name for model in models for name in getattr(model, "peft_config", {})}
    for name in adapters:
        if name in taken:
            raise AdapterNameError(
                f"the pipeline has an adapter {name!r} already. pipe.delete_adapters({name!r}) takes it off first."
            )
        if hasattr(nn.ParameterDict(), name):
            raise AdapterNameError(
                f"{name!r} cannot be the name of an adapter in a pipeline: it is one of torch's own on the containers "
                "that PEFT keeps adapters in. Give the adapter another name where the pack is made, NAME=PATH."
            )


def _check(adapters: Mapping[str, PackedAdapter], found: Found, pack: Pack, pipe: object) -> None:
    """Whether all modules of the adapters have their place, before a layer is touched."""
    where = type(pipe).__name__
    wrong = f"The pack is for another base model{f': {pack.base_model}' if pack.base_model else ''}."
    for one in adapters.values():
        for module, coefficients in one.coefficients.items():
            place = found.places.get(one.places[module])
            if place is not None:
                sides = pack.info.modules[one.places[module]]
                wanted = sides["up"].dimension, sides["down"].dimension
                _check_shape(place, wanted, coefficients.kernel, where, wrong)
    if found.lacking:
        more = f" and {len(found.lacking) - 1} more are" if len(found.lacking) > 1 else " is"
        kept = ", ".join(sorted({place.part.name for place in found.places.values()}))
        raise ModuleNameError(
            f"{found.lacking[0]}{more} not in this {where}, which has "
            f"{f'others, of {kept}' if kept else 'no module of these adapters'}. The pack is for another base model"
            f"{f', {pack.base_model},' if pack.base_model else ''} or another kind of pipeline."
        )
    for name, one in adapters.items():
        _check_apart(name, one, found)
        if not any(place in found.places for place in one.places.values()):
            raise ModuleNameError(
                f"adapter {name!r} has nothing for this {where}: its {len(one.places)} modules, such as "
                f"{min(one.places.values())}, are of models that are not here."
            )
    if found.absent and not isinstance(pipe, nn.Module):
        missing = ", ".join(sorted({module.partition(".")[0] for module in found.absent}))
        warnings.warn(
            f"this {where} was made without {missing}: {len(found.absent)} modules of the adapters are left out.",
            MissingPartWarning,
            stacklevel=3,
        )
    merged = {name for place in found.places.values() for name in layers.merged(place)}
    if merged:
        raise OptionError(
            f"adapters are fused into the pipeline: {', '.join(sorted(merged))}. Call pipe.unfuse_lora() first."
        )


def _check_apart(name: str, packed: PackedAdapter, found: Found) -> None:
    """Whether no two modules of an adapter are one layer, as under its old name and its new one."""
    owners: dict[str, str] = {}
    for module, source in packed.places.items():
        place = found.places.get(source)
        if place is not None and owners.setdefault(place.name, module) != module:
            raise ModuleNameError(
                f"modules {owners[place.name]!r} and {module!r} of adapter {name!r} are both the layer {place.name} of "
                "the pipeline. One of them is left over: take it out of the adapter's file."
            )


def _check_shape(place: Place, wanted: tuple[int, int], kernel: tuple[int, ...], where: str, wrong: str) -> None:
    own = layers.shape_of(place.module)
    if own is None:
        kind = type(layers.base_of(place.module)).__name__
        raise ModuleNameError(f"{place.name} is a {kind} in this {where}, which no update can be added to. {wrong}")
    if own != wanted:
        raise ShapeError(f"{place.name}: (out, in) is {own} in this {where} and {wanted} in the pack. {wrong}")
    if layers.base_of(place.module).weight.is_meta:
        raise OptionError(
            f"{place.name} has no weight at the moment, as under enable_sequential_cpu_offload, where bases could not "
            "be beside it. Use enable_model_cpu_offload or group offloading, or load the model's weights first."
        )
    has = convolution.kernel_of(layers.base_of(place.module))
    if not convolution.kernels_match(kernel, has):
        raise ShapeError(f"{place.name}: the kernel is {has} in this {where} and {kernel} in the pack. {wrong}")


def _warn_of_wrapped(pipe: object, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Warn of models that `pipe.set_adapters` passes by in silence."""
    for part in sorted({part for one in counts.values() for part in one}):
        model = getattr(pipe, part, None)
        if model is not None and parts.unwrapped(model) is not model:
            warnings.warn(
                f"pipe.{part} is what torch.compile(pipe.{part}) gave back, in which diffusers sees no adapters: "
                f"pipe.set_adapters passes it by. Compile in place, pipe.{part}.compile(), or call "
                f"pipe.{part}.set_adapters.",
                WrappedModelWarning,
                stacklevel=3,
            )


def _regroup(models: Sequence[nn.Module]) -> None:
    """Let diffusers' offloading of groups know of the tensors that were not there when it was switched on."""
    if "diffusers" in sys.modules:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        for model in models:
            _maybe_remove_and_reapply_group_offloading(model)
