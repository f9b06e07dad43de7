"""The paper's INIT variant: an ordinary LoRA that starts from the principal components, and is trained whole."""

import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..core import keys
from ..errors import ModuleNameError, OptionError
from ..pack.pack import Pack
from . import reference as references
from .config import EigenLoraxConfig
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
    """The model with a LoRA of rank `r` on the modules of a subspace, its factors started from the components.

    lora_A is the first `r` components of each module's down side. start: "zero" leaves lora_B zero, so that the first
    outputs are the base model's; "components" takes the up side's, as the paper does ("EigenLoRAx-INIT"), which is an
    update of norm √r times the scaling in every module. Rows beyond a side's components stay as PEFT starts them, zero
    in lora_B. What comes back is plain PEFT: 100 % of a LoRA is trained. `fields` are those of `LoraConfig`.
    """
    if start not in STARTS:
        raise OptionError(f"start must be one of {', '.join(STARTS)}, got {start!r}.")
    config = EigenLoraxConfig(subspace=subspace, target_modules=fields.get("target_modules"))
    reference = references.resolve(config)
    places = {
        name: place
        for name, module in model.named_modules()
        if isinstance(module, nn.Module)
        and in_out_features(module)[0] is not None
        and (place := reference.place(name, config)) is not None
    }
    if not places:
        raise ModuleNameError("the model has none of the modules of the subspace. It is a different base model.")
    fields.setdefault("target_modules", sorted(places))
    adapted = get_peft_model(model, LoraConfig(r=r, **fields), adapter_name=adapter_name)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            module = name.removeprefix(keys.MODEL_PREFIX)
            bases = reference.bases(module, config, *in_out_features(layer.get_base_layer()))
            _put(layer.lora_A[adapter_name].weight, bases.down.components)
            if start == "components":
                _put(layer.lora_B[adapter_name].weight.transpose(0, 1), bases.up.components)
    return adapted


def _put(weight: torch.Tensor, rows: torch.Tensor) -> None:
    """The first rows of a weight, as many as there are; each is shaped as those of a convolution are."""
    kept = min(len(weight), len(rows))
    with torch.no_grad():
        weight[:kept].copy_(rows[:kept].view(kept, *weight.shape[1:]))
