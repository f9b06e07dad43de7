"""Adapters of a pack on the layers of a model, all of them at once.

PEFT adds one adapter at a time, and goes through the whole model and all that is there for each. Here a layer is made
when it gets its first adapter, and what is there already is not looked at.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core import atomic_files
from ...core.subspace import Subspace
from ...errors import OptionError
from ...pack.packed_adapter import PackedAdapter
from ...tuner.adapted import wrap_layer
from ...tuner.config import EigenLoraxConfig
from ...tuner.layer import EigenLoraxLayer
from ...tuner.supported_modules import in_out_features, is_supported
from .parts import Place


class PackedConfig(EigenLoraxConfig):
    """Of an adapter that was put on a model to run there: what it is stays in its pack, and is saved from there."""

    def check_saving(self, adapter_name: str) -> None:
        raise OptionError(
            f"adapter {adapter_name!r} is in a model to run there, and is saved from the pack that it is from: "
            "`eigenlorax export` writes a LoRA that pipe.load_lora_weights loads, pack.adapter(name) is one in memory."
        )


def put(
    adapters: Mapping[str, PackedAdapter],
    places: Mapping[str, Place],
    subspace: Subspace,
    fingerprint: str,
    dtype: torch.dtype | None,
) -> dict[str, dict[str, int]]:
    """Give layers the coefficients of adapters, and the bases that these are on; how many layers of each part each
    adapter has.

    adapters: by the names that they get. places: of modules of the subspace. dtype: of the bases; None for that of each
    layer's weight.
    """
    counts: dict[str, dict[str, int]] = {}
    layers: dict[str, EigenLoraxLayer] = {}
    for name, packed in adapters.items():
        modules: dict[str, dict[str, str]] = {}
        for module, coefficients in packed.coefficients.items():
            source = packed.places[module]
            place = places.get(source)
            if place is None:
                continue
            if place.name not in layers:
                layers[place.name] = _layer(place, dtype)
            # a pack may have two modules for one layer, under its old name and its new one, each with bases of its own
            key = fingerprint if source == place.name else f"{fingerprint}_{atomic_files.digest(source.encode())[:8]}"
            layers[place.name].add_for_inference(name, subspace.modules[source], key, coefficients)
            modules.setdefault(place.part.name, {})[place.layer] = module
        parts = {place.part.name: place.part for place in places.values()}
        for part, inside in modules.items():
            _configure(parts[part].model, name, packed, inside, fingerprint)
        counts[name] = {part: len(inside) for part, inside in modules.items()}
    for layer in layers.values():
        layer.blend()
    return counts


def _layer(place: Place, dtype: torch.dtype | None) -> EigenLoraxLayer:
    """The layer of ours in this place, put there if need be, which serves."""
    for one in nested(place.module):
        if isinstance(one, EigenLoraxLayer):
            if dtype is not None or one.serving is None:
                one.serve(dtype)
            return one
    target, base = place.module, base_of(place.module)
    made = wrap_layer(target, "", isinstance(base, Conv1D), **get_quantization_kwargs(place.part.model))
    made.serve(dtype or made.dtype)
    # whatever mode the model is in, what is put there is not trained
    made.training = False
    if isinstance(target, BaseTunerLayer):
        made._active_adapter, made._disable_adapters = target._active_adapter, target._disable_adapters
    parent, _, name = place.layer.rpartition(".")
    setattr(place.part.model.get_submodule(parent), name, made)
    return made


def nested(module: nn.Module) -> Iterator[nn.Module]:
    """A layer, and what it is wrapped around, from outside inwards."""
    yield module
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
        yield module


def base_of(module: nn.Module) -> nn.Module:
    """The model's own layer, whatever adapters are around it."""
    *_, base = nested(module)
    return base


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer that can have an update; None of one that cannot."""
    base = base_of(module)
    if not is_supported(base):
        return None
    n_in, n_out = in_out_features(base)
    return n_out, n_in


def merged(place: Place) -> list[str]:
    """The adapters of ours that are in the layer's weight at the moment."""
    ours = (one for one in nested(place.module) if isinstance(one, EigenLoraxLayer))
    return [name for one in ours for name in one.merged_adapters]


def tuner_layers(models: Iterable[nn.Module]) -> Iterator[BaseTunerLayer]:
    """All adapted layers of models, of every method."""
    return (module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer))


def _configure(
    model: nn.Module, name: str, packed: PackedAdapter, modules: Mapping[str, str], fingerprint: str
) -> None:
    """Note an adapter on a model as PEFT does. modules: the adapter's own name of each layer."""
    found = {layer: packed.coefficients[module] for layer, module in modules.items()}
    ranks = {layer: one.rank for layer, one in found.items()}
    alphas = {layer: one.scaling * one.rank for layer, one in found.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = PackedConfig(
        subspace_fingerprint=fingerprint,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={layer: one for layer, one in ranks.items() if one != rank},
        alpha_pattern={layer: one for layer, one in alphas.items() if one != alpha},
        target_modules=sorted(found),
        subspace_modules={layer: packed.places[modules[layer]] for layer in found},
        kernels={layer: list(one.kernel) for layer, one in found.items() if one.kernel},
        inference_mode=True,
    )
    # in these two attributes PEFT, diffusers and transformers look for the adapters of a model
    model.__dict__.setdefault("peft_config", {})[name] = config
    model.__dict__["_hf_peft_config_loaded"] = True
