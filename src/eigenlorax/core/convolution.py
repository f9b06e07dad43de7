"""Convolutions as products: which modules are one, how long the rows of their bases are, and what these rows make of
images. Nothing here knows of adapters.

A convolution whose weight is W (out, channels, *kernel) multiplies each patch of its input with the rows of
W.flatten(1). A basis of `channels · kernel` numbers a row is convolved in W's place, with all else that the module
does to its input: stride, padding and its mode, dilation.
"""

import math

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why a convolution cannot have an update of two products; None of one that can, and of any other module."""
    if isinstance(module, _TRANSPOSED):
        return f"a transposed convolution ({type(module).__name__}), whose rows are no patches of its input"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return f"a convolution of {module.groups} groups, which has a row for a part of the channels only"
    return None


def is_supported(module: nn.Module) -> bool:
    """Whether the module is a convolution, not transposed and of one group."""
    return isinstance(module, CONVOLUTIONS) and module.groups == 1


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    """(height, width), or as many numbers as the convolution has dimensions; () for any other module."""
    return tuple(module.kernel_size) if isinstance(module, CONVOLUTIONS) else ()


def row_sizes(module: Convolution) -> tuple[int, int]:
    """The lengths of rows on both sides: channels in · kernel, and channels out."""
    return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels


def kernels_match(kernel: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether modules of these kernels have the same rows. A linear module has a kernel of ones."""
    return kernel == other or set(kernel) | set(other) <= {1}


def convolve(module: Convolution, images: Tensor, rows: Tensor) -> Tensor:
    """The images (n, channels, …) convolved with rows (m, channels · kernel) as the module does: (n, m, …)."""
    if not len(rows):
        # torch convolves with nothing less than one row
        return convolve(module, images, rows.new_zeros(1, rows.shape[1]))[:, :0]
    weight = rows.reshape(len(rows), -1, *module.kernel_size)
    found: Tensor = module._conv_forward(images, weight, None)
    return found
