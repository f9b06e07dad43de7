"""Checks that the adapters of a pack fit the model that vLLM has loaded, and that vLLM applies all of an adapter.

vLLM compares neither sizes nor full names: it loads adapters of a narrower or a deeper model and gives wrong answers.
Modules of a pack's subspace are checked when the model is loaded, and those of versions, which may have others, when
the version is.
It also silently ignores modules of an adapter that it has no slot for.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from ...errors import ModuleNameError, ServingError
from ...pack.manifest import SubspaceInfo
from .install import Projection, check_shape, lora_names, names_in, projections_of


def check_fits(model: nn.Module, info: SubspaceInfo) -> None:
    """Check that the modules of a subspace match a loaded model.

    Modules that are not linear layers in vLLM (experts, embeddings) are not checked: vLLM rejects unknown ones itself.

    Raises:
        ModuleNameError: The model lacks a module.
        ShapeError: A module has another shape in the model.
    """
    projections, names = projections_of(model), names_in(model, info.modules)
    kinds = {name.rpartition(".")[2] for name in projections}
    missing = [module for module, name in names.items() if name not in projections and _is_layer(name, kinds)]
    if missing:
        raise ModuleNameError(
            f"{type(model).__name__} has no linear layer for {len(missing)} of the {len(names)} modules of the pack's "
            f"subspace, such as {missing[0]!r}. Serve the base model that the pack's adapters are for."
        )
    for module, name in names.items():
        if name in projections:
            sides = info.modules[module]
            check_shape(module, (sides["up"].dimension, sides["down"].dimension), projections[name])


def check_all_have_slots(
    modules: Iterable[str], slots: Iterable[str], fused: Mapping[str, Sequence[str]], targets: Sequence[str] | None
) -> None:
    """Raise `ServingError` if modules of an adapter have no slot in vLLM, which would ignore them.

    Args:
        modules: Modules of the adapter.
        slots: Names of the layers with slots in vLLM.
        fused: vLLM's table of the projections that are fused in each kind of layer.
        targets: `--lora-target-modules`; None for all layers.
    """
    with_slot = {name for path in slots for name in lora_names(path, fused)}
    all_modules = sorted(modules)
    # modules of experts have other names in the model than in the adapter
    ignored = [module for module in all_modules if module not in with_slot and "experts" not in module.split(".")]
    if ignored:
        only = f", which only has slots for {', '.join(sorted(targets))} (--lora-target-modules)" if targets else ""
        raise ServingError(
            f"{len(ignored)} of {len(all_modules)} modules of an adapter would be ignored by this server, such as "
            f"{ignored[0]!r}{only}. `eigenlorax serve-check` prints the flags for the current pack. A model "
            "with the bases of a pack can only serve adapters of that pack."
        )


def check_sizes(
    factors: Mapping[str, Any], layers: Mapping[str, nn.Module], fused: Mapping[str, Sequence[str]]
) -> None:
    """Raise `ShapeError` if a module of an adapter has another size than the linear layer that it is for.

    Args:
        factors: vLLM's LoRA factors of the adapter, by module.
        layers: vLLM's layers with slots, by name.
        fused: vLLM's table of the projections that are fused in each kind of layer.
    """
    for path, layer in layers.items():
        linear, names = getattr(layer, "base_layer", None), lora_names(path, fused)
        for index, name in enumerate(names):
            if name in factors and isinstance(linear, LinearBase):
                shape = factors[name].output_dim, factors[name].input_dim
                check_shape(name, shape, Projection(name, linear, index, len(names) > 1))


def _is_layer(name: str, kinds: set[str]) -> bool:
    return ".experts." not in name and name.rpartition(".")[2] in kinds
