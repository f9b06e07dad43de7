"""`serve`: fast switching of adapters in a model that is not trained, compiled or not."""

import torch
from torch import nn

from ..errors import OptionError
from .layer import EigenLoraxLayer

_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)


def serve(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """
    Make all adapted layers of a model serve their active adapters from one core per subspace.

    Outside of training, each layer multiplies by Σ scaling · C_up · C_down over its active adapters, (k_up, k_down),
    which is zero if none is active. The core is overwritten in place when other adapters become active, so that a model
    compiled with `torch.compile` is not compiled again. Adapters with a residual are served as one LoRA that is filled
    in the same way; its rank is the largest rank of these adapters. If the active adapters need a larger rank together,
    the model is compiled once more. Layers that are adapted later serve too.

    Call this again after writing to coefficients.

    Args:
        model (`nn.Module`):
            A model with EigenLoRAx adapters.
        dtype (`torch.dtype`, *optional*):
            Dtype of the bases. The model's own dtype saves memory and rounds them; `torch.int8` stores 8 bits per entry
            and a scale per row, which is converted for each product. By default the bases are unchanged.
            Coefficients and cores keep their precision.

    Raises:
        OptionError: `dtype` is not one of these, or the model has no adapted layer.
    """
    if dtype not in _DTYPES:
        raise OptionError(
            f"dtype must be a floating-point dtype such as torch.bfloat16, torch.int8, or None; got {dtype!r}."
        )
    layers = [module for module in model.modules() if isinstance(module, EigenLoraxLayer)]
    if not layers:
        raise OptionError("the model has no EigenLoRAx adapter: load one first (PeftModel.from_pretrained).")
    for layer in layers:
        layer.serve(dtype)
