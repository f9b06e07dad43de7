"""Modules of a model that can have coefficients: linear layers, quantised layers included, and convolutions."""

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core import convolution


def is_supported(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, quantised or not, or a convolution with groups=1."""
    if isinstance(module, nn.Linear | Conv1D) or convolution.is_supported(module):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a module; for a convolution (input channels · kernel size, output channels)."""
    if isinstance(module, convolution.CONVOLUTIONS):
        return convolution.row_sizes(module)
    in_features, out_features = _get_in_out_features(module)
    return in_features, out_features
