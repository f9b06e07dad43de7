"""The update that adapters add to the output of one layer.

The update of a linear layer is scaling · x·Vᵀ·C_Aᵀ·C_Bᵀ·U, with bases V (k_down × in) and U (k_up × out) and
coefficients C_A (r × k_down) and C_B (k_up × r). There are two orders of multiplication:

- *shared*: one product with V and one with U for all rows of a batch, and each row's coefficients in between;
- *folded*: C_A·V and C_Bᵀ·U first, which leaves a LoRA of rank r.

Folding costs r·k·d operations per side and adapter and saves (k − r)·d per token, so it pays for many tokens of one
adapter. A *residual*, the part of an adapter's two factors that the bases do not represent, is as wide as a LoRA and
multiplied like one; in a folded pair it costs nothing. In a convolution, tokens are the positions of an image, and the
product with V is the convolution.

The tuner, the bank and the layers of image pipelines call these functions. They see tensors only: no adapter names,
models or requests.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from .convolution import Convolution, convolve
from .half_products import add_product_by_blocks, is_by_blocks, project_by_blocks
from .int8_rows import BasisRows, as_float
from .row_groups import RowGroups

# Fold where tokens · (k − r) > factor · r · k. By the number of operations the factor is 1. That holds with one adapter
# for all rows, because its folded pair is reused: the tokens are those of all calls so far. With one adapter per row
# the tokens are those of one adapter in one call, and many small products are slower than one large product. Measured
# on a CPU (widths 384 to 2048, k 32 to 128, r 8 and 16), both orders are equally fast at a factor between 1.5 and 5,
# mostly between 2 and 3.
FOLD_ALONE, FOLD_MIXED = 1.0, 2.5


# a named tuple, because torch.compile does not construct every dataclass
class LayerResidual(NamedTuple):
    """The part of one adapter's two factors that the bases do not represent.

    Rows of `down` belong to the first components of the adapter, and columns of `up` to those from `up_start` on, so
    that components without a residual cost nothing.

    Attributes:
        down: Residual of the down factor, (r_down, in); None if it is zero.
        up: Residual of the up factor, (out, r_up); None if it is zero.
        rows: Batch rows that use this adapter, as a slice or as indices; None for all rows.
        scaling: Factor in addition to the scaling of the coefficients that the residual belongs to.
        up_start: First component of `up`.
    """

    down: Tensor | None
    up: Tensor | None
    rows: slice | Tensor | None = None
    scaling: float = 1.0
    up_start: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.down, self.up) if tensor is not None]

    @property
    def rank(self) -> int:
        """The smaller rank of the two sides."""
        return min(0 if self.down is None else len(self.down), 0 if self.up is None else self.up.shape[1])

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "LayerResidual":
        """Return the residual on another device or in another dtype."""
        down, up = (None if tensor is None else tensor.to(device, dtype) for tensor in (self.down, self.up))
        rows = self.rows.to(device) if isinstance(self.rows, Tensor) else self.rows
        return self._replace(down=down, up=up, rows=rows)

    def up_input(self, hidden: Tensor) -> Tensor:
        """Return the components of `hidden`, (…, r), that `up` multiplies, (…, r_up)."""
        assert self.up is not None
        return hidden[..., self.up_start : self.up_start + self.up.shape[1]]


_NO_RESIDUAL = LayerResidual(None, None)


@dataclass(frozen=True, slots=True)
class LayerBases:
    """The bases of one layer, ready to be multiplied.

    Attributes:
        down: Down basis, (k_down, in).
        up: Up basis, (k_up, out).
        convolution: The layer, if it is a convolution.
    """

    down: BasisRows
    up: BasisRows
    convolution: Convolution | None = None

    def to(self, device: torch.device) -> "LayerBases":
        """Return the bases on another device."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))


class FoldedProducts:
    """Products of one adapter's coefficients with the bases, computed once the adapter has processed enough tokens."""

    __slots__ = ("_factors", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0
        self._factors: tuple[Tensor, Tensor] | None = None

    def after(self, tokens: int, coefficients: "LayerCoefficients", bases: LayerBases) -> tuple[Tensor, Tensor] | None:
        """Count `tokens` and return the factors (r, in) and (r, out), or None as long as folding does not pay."""
        if self._factors is None:
            self._tokens += tokens
            # both sides are folded at the same time, so the smaller basis, where folding saves less, decides
            k, rank = min(len(bases.down), len(bases.up)), len(coefficients.down)
            residual_rank = min((residual.rank for residual in coefficients.residuals), default=0)
            if is_folding_cheaper(self._tokens, rank, k, FOLD_ALONE, residual_rank=residual_rank):
                with without_autograd(bases.down.device):
                    self._factors = _fold(coefficients, bases)
        return self._factors


def _fold(coefficients: "LayerCoefficients", bases: LayerBases) -> tuple[Tensor, Tensor]:
    assert coefficients.up is not None
    down = coefficients.down @ as_float(bases.down, coefficients.down.dtype)
    up = coefficients.up.mT @ as_float(bases.up, coefficients.up.dtype)
    for residual in coefficients.residuals:
        if residual.down is not None:
            down[: len(residual.down)] += residual.down
        if residual.up is not None:
            up[residual.up_start : residual.up_start + residual.up.shape[1]] += residual.up.mT
    # an entropy-coded adapter is padded to the rank of its source
    used = down.any(1) & up.any(1)
    return (down, up) if bool(used.all()) else (down[used], up[used])


@dataclass(frozen=True, slots=True)
class LayerCoefficients:
    """Coefficients of one layer, ready to be multiplied: of one adapter, or of one adapter per group of rows.

    Attributes:
        down: Down coefficients, (r, k_down), or (groups, r, k_down).
        up: Up coefficients, (k_up, r), or (groups, k_up, r). None if `down` is a core, (groups, k_up, k_down).
        scaling: Factor of the whole update.
        residuals: At most one for one adapter; with groups, one per adapter that has a residual.
        folded: Cache of the folded factors of one adapter.
    """

    down: Tensor
    up: Tensor | None
    scaling: float
    residuals: tuple[LayerResidual, ...] = ()
    folded: FoldedProducts = field(default_factory=FoldedProducts)

    def to(self, device: torch.device) -> "LayerCoefficients":
        """Return the coefficients on another device, with nothing folded yet."""
        up = None if self.up is None else self.up.to(device)
        residuals = tuple(residual.to(device) for residual in self.residuals)
        return LayerCoefficients(self.down.to(device), up, self.scaling, residuals)


@contextmanager
def without_autograd(device: torch.device) -> Iterator[None]:
    """Disable autograd, inference mode and autocast, for tensors that are computed once and used in any mode later."""
    # a tensor made in inference mode could not be saved for a backward pass, one made under autocast would be rounded
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def is_folding_cheaper(tokens: int, rank: int, k: int, factor: float, *, residual_rank: int = 0) -> bool:
    """Return whether folding saves more operations than the product of coefficients and basis costs.

    Args:
        tokens: Number of tokens that use the folded factors.
        rank: Rank of the coefficients.
        k: Number of components of the basis.
        factor: `FOLD_ALONE` or `FOLD_MIXED`.
        residual_rank: Rank of the residual, which folding makes part of the factors.
    """
    return tokens * (k + residual_rank - rank) > factor * rank * k


def add_update(
    output: Tensor,
    x: Tensor,
    bases: LayerBases,
    coefficients: LayerCoefficients,
    *,
    in_place: bool = False,
) -> Tensor:
    """Add the update of one adapter to the output of a layer.

    Args:
        output: Output of the layer without adapters, (…, out); of a convolution (n, out, …).
        x: Input of the layer, (…, in); of a convolution (n, channels, …).
        bases: Bases of the layer.
        coefficients: Coefficients of the adapter.
        in_place: Whether `output` may be written to. Not used for convolutions.

    Returns:
        Output with the update, in the dtype of `output`.
    """
    dtype = coefficients.down.dtype
    x = x.to(dtype)
    convolution = bases.convolution
    tokens = output.numel() // bases.up.shape[1]
    folded = coefficients.folded.after(tokens, coefficients, bases)
    if folded is not None:
        down, up = folded
        return add_product(output, project(x, down, convolution), up, coefficients.scaling, in_place, convolution)
    (residual,) = coefficients.residuals or (_NO_RESIDUAL,)
    hidden, residual_update = apply_coefficients(
        project(x, as_float(bases.down, dtype), convolution),
        x,
        (coefficients.down, coefficients.up),
        residual,
        convolution,
    )
    if residual_update is not None:
        output = add_scaled(output, residual_update, coefficients.scaling, in_place, convolution)
    return add_product(output, hidden, as_float(bases.up, dtype), coefficients.scaling, in_place, convolution)


def add_grouped_update(
    output: Tensor,
    x: Tensor,
    bases: LayerBases,
    coefficients: LayerCoefficients,
    groups: RowGroups,
    *,
    in_place: bool = False,
) -> Tensor:
    """Add to each row of the output the update of its own adapter.

    Args:
        output: Output of the layer without adapters, as for `add_update`. Its rows are the rows of `groups`, each
            repeated equally often (tokens, beams).
        x: Input of the layer, with the same rows.
        bases: Bases of the layer.
        coefficients: Coefficients of one adapter per group.
        groups: Groups of batch rows.
        in_place: Whether `output` may be written to. Not used for convolutions.

    Returns:
        Output with the updates, in the dtype of `output`.
    """
    dtype = coefficients.down.dtype
    x = x.to(dtype)
    rank, up = coefficients.down.shape[1], coefficients.up
    down_basis, up_basis, convolution = bases.down, bases.up, bases.convolution
    positions = output.numel() // up_basis.shape[1]
    per_group, per_row = positions // groups.groups, positions // groups.rows
    # a convolution of each group with its own rows cannot be written as a batched matrix product
    if convolution is None and is_folding_cheaper(per_group, rank, len(down_basis), FOLD_MIXED):
        # one product of all groups' coefficients with the basis, as one matrix of groups · r rows
        folded = coefficients.down.reshape(-1, len(down_basis)) @ as_float(down_basis, dtype)
        factors: tuple[Tensor, ...] = (folded.view(groups.groups, rank, -1).mT,)
        by_row = x.reshape(groups.rows, per_row, x.shape[-1])
    else:
        factors = (coefficients.down.mT,)
        by_row = project(x, as_float(down_basis, dtype), convolution).reshape(groups.rows, per_row, len(down_basis))
    folds_up = up is not None and is_folding_cheaper(per_group, rank, len(up_basis), FOLD_MIXED)
    if up is not None and not folds_up and not coefficients.residuals:
        factors = (*factors, up.mT)
    hidden = groups.multiply(by_row, *factors)
    if coefficients.residuals:
        x_shape = (per_row, x.shape[-1]) if convolution is None else (len(x) // groups.rows, *x.shape[1:])
        x_by_row = x.reshape(groups.rows, *x_shape)
        output = _add_residuals(output, hidden, x_by_row, coefficients, in_place, convolution)
        if up is not None and not folds_up:
            hidden = groups.multiply(hidden, up.mT)
    if up is None or not folds_up:
        return add_product(output, hidden, as_float(up_basis, dtype), coefficients.scaling, in_place, convolution)
    folded = (up.mT.reshape(-1, len(up_basis)) @ as_float(up_basis, dtype)).view(groups.groups, rank, -1)
    if in_place and convolution is None and output.dtype == dtype:
        groups.add_product(output.view(groups.rows, per_row, output.shape[-1]), hidden, folded, coefficients.scaling)
        return output
    return add_scaled(output, groups.multiply(hidden, folded), coefficients.scaling, in_place, convolution)


def project(x: Tensor, rows: Tensor, convolution: Convolution | None = None) -> Tensor:
    """Multiply the input of a layer by frozen rows (m, in), in their dtype: (…, in) → (…, m).

    The positions of images (n, channels, …) become one dimension: (n, positions, m).
    """
    if convolution is None:
        return project_by_blocks(x, rows) if is_by_blocks(x, rows.dtype) else linear(x.to(rows.dtype), rows)
    # the negative index also holds for a single image without a batch dimension
    return convolve(convolution, x.to(rows.dtype), rows).flatten(-len(convolution.kernel_size)).mT


def apply_coefficients(
    projected: Tensor,
    x: Tensor,
    factors: tuple[Tensor, Tensor | None],
    residual: LayerResidual,
    convolution: Convolution | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multiply the projected input by the coefficients of one adapter.

    Args:
        projected: Input `x` projected on the down basis, (…, k_down).
        x: Input of the layer, (…, in). Only used with a residual.
        factors: Down (r, k_down) and up (k_up, r), or a core (k_up, k_down) and None.
        residual: Residual of the adapter. Its scaling is not applied.
        convolution: The layer, if it is a convolution.

    Returns:
        Coefficients of the update in the up basis, (…, k_up), and the update by the up residual, (…, out) or None. The
        scaling is not applied.
    """
    down, up = factors
    hidden = linear(projected, down)
    if residual.down is not None:
        outside_basis = project(x, residual.down, convolution)
        hidden = hidden + pad(outside_basis, (0, hidden.shape[-1] - outside_basis.shape[-1]))
    residual_update = None if residual.up is None else linear(residual.up_input(hidden), residual.up)
    return hidden if up is None else linear(hidden, up), residual_update


def _add_residuals(
    output: Tensor,
    hidden: Tensor,
    x: Tensor,
    coefficients: LayerCoefficients,
    in_place: bool,
    convolution: Convolution | None,
) -> Tensor:
    """Add the down residuals to `hidden`, in place, and return the output with the updates by the up residuals.

    There is one product per adapter: a batched product would copy the residuals for each row.

    Args:
        output: Output of the layer.
        hidden: Rows of `x` multiplied by the down coefficients, (rows, t, r).
        x: Input of the layer, (rows, t, in); of a convolution (rows, m, channels, …).
        coefficients: Coefficients with one residual per adapter that has one.
        in_place: Whether `output` may be written to.
        convolution: The layer, if it is a convolution.
    """
    shape = *hidden.shape[:2], output.shape[-1 if convolution is None else -len(convolution.kernel_size) - 1]
    writes_output = in_place and convolution is None and output.dtype == hidden.dtype and coefficients.scaling == 1
    update = output.view(shape) if writes_output else hidden.new_zeros(shape)
    for residual in coefficients.residuals:
        rows = residual.rows
        assert rows is not None
        # a view of a slice, a copy of single rows
        part = hidden[rows]
        if residual.down is not None:
            projected = project(x[rows] if convolution is None else x[rows].flatten(0, 1), residual.down, convolution)
            part[..., : len(residual.down)] += projected.reshape(*part.shape[:2], len(residual.down))
            if isinstance(rows, Tensor):
                hidden[rows] = part
        if residual.up is not None:
            factors = residual.up_input(part).flatten(0, 1), residual.up.mT
            if isinstance(rows, slice):
                update[rows].flatten(0, 1).addmm_(*factors, alpha=residual.scaling)
            else:
                update[rows] += (residual.scaling * torch.mm(*factors)).view(len(part), *shape[1:])
    return output if writes_output else add_scaled(output, update, coefficients.scaling, in_place, convolution)


def in_output_shape(update: Tensor, shape: torch.Size, convolution: Convolution | None) -> Tensor:
    """Reshape an update with one row per position, (…, out), to the output shape; of a convolution (n, out, …)."""
    if convolution is None:
        return update.reshape(shape)
    channels = update.shape[-1]
    return update.reshape(*shape[: -len(convolution.kernel_size) - 1], -1, channels).mT.reshape(shape)


def add_scaled(
    output: Tensor, update: Tensor, scaling: float, in_place: bool = False, convolution: Convolution | None = None
) -> Tensor:
    """Return `output` + scaling · update, rounded once to the dtype of the output."""
    update = in_output_shape(update if scaling == 1 else update * scaling, output.shape, convolution)
    return output.add_(update) if in_place and convolution is None else (output + update).to(output.dtype)


def add_product(
    output: Tensor,
    hidden: Tensor,
    basis: Tensor,
    scaling: float = 1.0,
    in_place: bool = False,
    convolution: Convolution | None = None,
) -> Tensor:
    """Return `output` (…, out) + scaling · hidden (…, k) @ frozen basis (k, out), in the dtype of the output."""
    if convolution is None and not in_place and is_by_blocks(output, hidden.dtype):
        return add_product_by_blocks(output, hidden if scaling == 1 else hidden * scaling, basis)
    if convolution is not None or output.dtype != hidden.dtype:
        return add_scaled(output, hidden @ basis, scaling, in_place, convolution)
    # addmm multiplies and adds in one pass over the output. It takes matrices of one dtype
    hidden = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    flat = output.view(-1, output.shape[-1]) if in_place else output.reshape(-1, output.shape[-1])
    total = flat.addmm_(hidden, basis, alpha=scaling) if in_place else torch.addmm(flat, hidden, basis, alpha=scaling)
    return total.view(output.shape)
