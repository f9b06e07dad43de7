"""Convolutions as matrix products: supported modules, widths of their bases, and products with images.

A convolution with weight W (out, channels, *kernel) multiplies each patch of its input by the rows of W.flatten(1).
So the rows of a down basis have width channels · kernel, and are convolved in place of W, with the stride, padding,
padding mode and dilation of the module.
"""

import math

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def unsupported_reason(module: nn.Module) -> str | None:
    """Return why a convolution cannot have a LoRA update; None for supported convolutions and for other modules."""
    if isinstance(module, _TRANSPOSED):
        return f"a {type(module).__name__}; transposed convolutions are not supported"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return f"a convolution with groups={module.groups}; grouped convolutions (groups > 1) are not supported"
    return None


def is_supported(module: nn.Module) -> bool:
    """Return whether the module is a convolution, not transposed and with a single group."""
    return isinstance(module, CONVOLUTIONS) and module.groups == 1


def kernel_size(module: nn.Module) -> tuple[int, ...]:
    """Return the kernel size of a convolution, one number per dimension; () for any other module."""
    return tuple(module.kernel_size) if isinstance(module, CONVOLUTIONS) else ()


def row_sizes(module: Convolution) -> tuple[int, int]:
    """Return the widths of rows (down, up): input channels · kernel, and output channels."""
    return module.in_channels // module.groups * math.prod(module.kernel_size), module.out_channels


def kernels_match(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Return whether modules with these kernels have rows of the same layout. A linear module has a kernel of ones."""
    return left == right or set(left) | set(right) <= {1}


def convolve(module: Convolution, images: Tensor, rows: Tensor) -> Tensor:
    """Convolve images with other rows in place of the module's weight.

    Args:
        module: The convolution, whose stride, padding and dilation are used.
        images: Input, (n, channels, …).
        rows: Rows, (m, channels · kernel).

    Returns:
        Output without bias, (n, m, …).
    """
    if not len(rows):
        # torch cannot convolve with an empty weight
        return convolve(module, images, rows.new_zeros(1, rows.shape[1]))[:, :0]
    weight = rows.reshape(len(rows), -1, *module.kernel_size)
    # the private method applies the padding mode as well, which torch's functions do not know
    convolved: Tensor = module._conv_forward(images, weight, None)
    return convolved
