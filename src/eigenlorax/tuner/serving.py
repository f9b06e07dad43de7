"""A model that serves: adapters are chosen, mixed and switched off in one small buffer a layer."""

import torch
from torch import nn

from ..errors import OptionError
from .layer import EigenLoraxLayer

_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)


def serve(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Let all layers of a model that have coefficients serve, those that get some later too.

    Outside of training each layer then multiplies with one core a subspace, Σ scaling · C_up · C_down over what is
    active: (k_up, k_down), however many adapters that is, and zero if none is. Whatever changes what is active fills it
    anew in place, so that a model that was compiled with `torch.compile` is not compiled again. After writing
    coefficients by hand, call this again. Adapters with a rest are one LoRA, filled in the same way: it has room for
    the largest of them, and gets more, and is compiled once more, when several are active that take it.

    dtype: that of the bases from now on: the model's own halves their memory in half precision, and rounds them;
        torch.int8 takes 8 bits for each number and a scale for each row, which a layer makes wide while it multiplies.
        By default they stay as they are. Coefficients and cores stay as precise as they are.
    """
    if dtype not in _DTYPES:
        raise OptionError(
            f"dtype must be a dtype of floating point, such as torch.bfloat16, torch.int8, or None; got {dtype!r}."
        )
    layers = [module for module in model.modules() if isinstance(module, EigenLoraxLayer)]
    if not layers:
        raise OptionError("the model has no EigenLoRAx adapter: load one first (PeftModel.from_pretrained).")
    for layer in layers:
        layer.serve(dtype)
