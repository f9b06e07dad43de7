"""The INIT variant of the paper: an ordinary LoRA whose factors are initialised with principal components."""

import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..core import keys
from ..errors import ModuleNameError, OptionError
from ..pack.pack import Pack
from .config import EigenLoraxConfig
from .resolve import resolve_subspace
from .supported_modules import in_out_features

STARTS = ("zero", "components")


def lora_from_components(
    model: nn.Module,
    subspace: "str | os.PathLike[str] | Pack",
    *,
    r: int = 32,
    start: str = "zero",
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModel:
    """
    Add a LoRA to the modules of a subspace, with lora_A initialised with the first `r` components of the down side.

    Args:
        model (`nn.Module`):
            The model to be adapted.
        subspace (`str`, `os.PathLike` or [`Pack`]):
            The pack whose subspace is used.
        r (`int`):
            The rank. Rows beyond the number of components are initialised as in PEFT. Defaults to `32`.
        start (`str`):
            Passing `'zero'` (default) sets lora_B to zero, so that training starts from the base model. Passing
            `'components'` sets it to the components of the up side, as in the paper ("EigenLoRAx-INIT"). The initial
            update then has the norm √r times the scaling in every module.
        adapter_name (`str`):
            The name of the adapter. Defaults to `'default'`.
        fields:
            Passed to [`LoraConfig`].

    Returns:
        `PeftModel`: A plain LoRA, of which all parameters are trained.

    Raises:
        OptionError: `start` is unknown.
        ModuleNameError: The model has no module of the subspace.
    """
    if start not in STARTS:
        raise OptionError(f"start must be one of {', '.join(STARTS)}, got {start!r}.")
    config = EigenLoraxConfig(subspace=subspace, target_modules=fields.get("target_modules"))
    resolved = resolve_subspace(config)
    modules = [
        name
        for name, module in model.named_modules()
        if in_out_features(module)[0] is not None and resolved.subspace_name(name, config) is not None
    ]
    if not modules:
        raise ModuleNameError("the model has none of the modules of the subspace. It is a different base model.")
    fields.setdefault("target_modules", sorted(modules))
    adapted = get_peft_model(model, LoraConfig(r=r, **fields), adapter_name=adapter_name)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            module_name = name.removeprefix(keys.MODEL_PREFIX)
            bases = resolved.bases(module_name, config, *in_out_features(layer.get_base_layer()))
            _copy_rows(layer.lora_A[adapter_name].weight, bases.down.components)
            if start == "components":
                _copy_rows(layer.lora_B[adapter_name].weight.transpose(0, 1), bases.up.components)
    return adapted


def _copy_rows(weight: torch.Tensor, components: torch.Tensor) -> None:
    """Overwrite the first rows of a weight by components, which are reshaped for a convolution."""
    n_rows = min(len(weight), len(components))
    with torch.no_grad():
        weight[:n_rows].copy_(components[:n_rows].view(n_rows, *weight.shape[1:]))
