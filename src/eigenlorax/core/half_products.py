"""Products of a half-precision layer's input and output with rows in float32, a block of tokens at a time.

`x.float() @ V.T` and `(output + hidden @ U).to(output.dtype)` make temporary tensors in float32 that are as wide as the
layer, in the forward and in the backward pass. In a model with checkpointed blocks, those of its widest layer were the
peak of a training step. The functions here convert a block of tokens at a time, and save nothing for backward but the
rows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# A block of 1 MiB in float32 stays in a CPU's cache. There are few blocks, because each takes several kernels on a GPU.
_MIN_BLOCK_NUMBERS, _MAX_BLOCKS = 1 << 18, 8


def is_by_blocks(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether products of `x` in `dtype` are computed by blocks: if `x` is narrower, and more than one block.

    A compiler fuses the conversion with the product, and autocast would undo it.
    """
    return (
        x.dtype.itemsize < dtype.itemsize
        and x.numel() > _MIN_BLOCK_NUMBERS
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


def project_by_blocks(x: Tensor, rows: Tensor) -> Tensor:
    """Return x (…, d) @ rows.T (d, k) in the dtype of the frozen rows, without a copy of `x` in that dtype."""
    return _project(x, rows)


def add_product_by_blocks(output: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
    """Return output (…, d) + hidden (…, k) @ rows (k, d), rounded once to the dtype of `output`.

    The sum is computed in the dtype of `hidden` and of the frozen rows, without a copy of `output` in that dtype.
    """
    return _add_product(output, hidden, rows)


# Each backward is one of these products again, so that second derivatives work too.
class _Project(torch.autograd.Function):
    """x (…, d) → (…, k), in the dtype of the rows (k, d)."""

    @staticmethod
    def forward(x: Tensor, rows: Tensor) -> Tensor:
        tokens = _as_matrix(x)
        product = rows.new_empty(len(tokens), len(rows))
        with torch.autocast(x.device.type, enabled=False):
            for block in _blocks(tokens):
                torch.mm(tokens[block].to(rows.dtype), rows.mT, out=product[block])
        return product.view(*x.shape[:-1], len(rows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, rows = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _expand(gradient, rows, ctx.dtype), None


class _Expand(torch.autograd.Function):
    """hidden (…, k) → (…, d) in a dtype; the product with rows (k, d) is in their dtype."""

    @staticmethod
    def forward(hidden: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = _as_matrix(hidden)
        product = rows.new_empty(len(tokens), rows.shape[1], dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for block in _blocks(product):
                product[block] = torch.mm(tokens[block].to(rows.dtype), rows)
        return product.view(*hidden.shape[:-1], rows.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
        _, rows, _ = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return _project(gradient, rows), None, None


class _AddProduct(torch.autograd.Function):
    """output (…, d), hidden (…, k) → output + hidden @ rows, in the dtype of the output."""

    @staticmethod
    def forward(output: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        summands, tokens = output.reshape(-1, output.shape[-1]), _as_matrix(hidden)
        total = torch.empty_like(summands)
        with torch.autocast(output.device.type, enabled=False):
            for block in _blocks(summands):
                total[block] = torch.addmm(summands[block].to(rows.dtype), tokens[block], rows)
        return total.view(output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, _, rows = inputs
        ctx.save_for_backward(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        return gradient, _project(gradient, rows) if ctx.needs_input_grad[1] else None, None


_project: Callable[..., Tensor] = _Project.apply
_expand: Callable[..., Tensor] = _Expand.apply
_add_product: Callable[..., Tensor] = _AddProduct.apply


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return (…, n) as a matrix with one row per token; n may be 0, as in a basis without components."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _blocks(tokens: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a matrix, at most `_MAX_BLOCKS`."""
    n, width = tokens.shape
    size = max(_MIN_BLOCK_NUMBERS // max(width, 1), -(-n // _MAX_BLOCKS), 1)
    return (slice(start, start + size) for start in range(0, n, size))
