"""Gradient components in an adapter's file: 8-bit integers with a scale for each row."""

import torch
from torch import Tensor

from ..core.int8_rows import dequantise
from ..errors import FormatError, ShapeError


def decode(codes: Tensor | None, scales: Tensor | None, shape: tuple[int, int], where: str) -> Tensor:
    """Return the gradient components of one side of a module, (k, d) float32.

    Args:
        codes: Integers, (k, d) int8; None if the file has none.
        scales: Scale of each row, (k, 1).
        shape: The expected shape (k, d).
        where: Place in the file, for error messages.

    Raises:
        FormatError: The file lacks them.
        ShapeError: They have another shape or dtype, or a scale is not finite.
    """
    if codes is None or scales is None:
        raise FormatError(
            f"{where}: the file has no gradient components, which its config announces (n_gradient). Save the adapter "
            "again from the model that it was trained in."
        )
    is_expected = tuple(codes.shape) == shape and codes.dtype == torch.int8 and tuple(scales.shape) == (shape[0], 1)
    if not is_expected or not scales.is_floating_point() or not bool(scales.float().isfinite().all()):
        raise ShapeError(
            f"{where}: the gradient components are {tuple(codes.shape)}, {codes.dtype}, with scales "
            f"{tuple(scales.shape)}, {scales.dtype}; expected int8 of shape {shape} and a finite float for each row. "
            "The file is damaged, or belongs to another subspace or model."
        )
    return dequantise(codes, scales, torch.float32)
