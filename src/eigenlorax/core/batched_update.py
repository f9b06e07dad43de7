"""Rows of one batch, each with coefficients of its own over bases that all of them share.

Tensors alone: nothing here knows of adapters, models or requests. What is added to a layer's output is
scaling · x·Vᵀ·C_Aᵀ·C_Bᵀ·U, in one of two orders. Shared: the products with the bases V and U are made once for all
rows, k wide, and coefficients between them. Folded: C_A·V and C_Bᵀ·U are made first, and what remains is a plain LoRA
of rank r. Folding costs r·k·d a side and adapter and saves (k − r)·d a token, so that it pays for many tokens of one
adapter. In a convolution tokens are the places of an image, and the product with V is the convolution.

What an adapter has beside the bases, a *rest*, is added to the two factors: it is as wide as a LoRA, and multiplied as
one. Folded it is a part of the plain LoRA, and costs nothing more.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from .int8_rows import BasisRows, as_float

# Folded where tokens · (k − r) > factor · r · k. By operations the factor is 1, and with one adapter for all rows,
# whose products are kept, it is: the tokens are all that it has had. With one a row they are those of one adapter in
# one call, and many small products take longer than one of the same size: measured on a CPU at widths of 384 to 2048,
# k of 32 to 128 and r of 8 and 16, both orders are equally fast at a factor of 1.5 to 5, and mostly between 2 and 3.
FOLD_ALONE, FOLD_MIXED = 1.0, 2.5
# Rows are grouped by adapter where that, with groups filled up to the longest, leaves at most this many rows a row.
_FILLING = 1.5


Convolve = Callable[[Tensor, Tensor], Tensor]
"""Images (n, channels, …) and rows (m, channels · kernel) → the images convolved with each row, (n, m, …)."""


class FoldedProducts:
    """The two products of one adapter's coefficients and bases, made once it has had the tokens that pay for them."""

    __slots__ = ("_pair", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0
        self._pair: tuple[Tensor, Tensor] | None = None

    def after(
        self, tokens: int, part: "LayerCoefficients", down_basis: BasisRows, up_basis: BasisRows
    ) -> tuple[Tensor, Tensor] | None:
        """(r, in) and (r, out), once these and all tokens before them pay for it."""
        if self._pair is None:
            self._tokens += tokens
            k, rank = min(len(down_basis), len(up_basis)), len(part.down)
            if is_folding_cheaper(self._tokens, rank, k, FOLD_ALONE, beside=bool(part.residuals)):
                with without_autograd(down_basis.device):
                    self._pair = self._folded(part, down_basis, up_basis)
        return self._pair

    def _folded(self, part: "LayerCoefficients", down_basis: BasisRows, up_basis: BasisRows) -> tuple[Tensor, Tensor]:
        down = part.down @ as_float(down_basis, part.down.dtype)
        up = part.up.mT @ as_float(up_basis, part.up.dtype)
        for rest in part.residuals:
            down = down if rest.down is None else down + rest.down
            up = up if rest.up is None else up + rest.up.mT
        return down, up


@dataclass(frozen=True, slots=True)
class LayerResidual:
    """What one adapter has beside the bases: down (r, in) and up (out, r), None where it has nothing.

    rows: those of the batch that have this adapter; None for all. scaling: on top of that of the part.
    """

    down: Tensor | None
    up: Tensor | None
    rows: Tensor | None = None
    scaling: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.down, self.up) if tensor is not None]

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "LayerResidual":
        """The same on a device, or in a dtype."""
        down, up = (None if tensor is None else tensor.to(device, dtype) for tensor in (self.down, self.up))
        return replace(self, down=down, up=up, rows=None if self.rows is None else self.rows.to(device))


@dataclass(frozen=True, slots=True)
class LayerCoefficients:
    """What one module multiplies with: down (r, k_down) and up (k_up, r), or with one more leading dimension, a pair
    for each group of rows; and what adapters have beside the bases."""

    down: Tensor
    up: Tensor
    scaling: float
    residuals: tuple[LayerResidual, ...] = ()
    folded: FoldedProducts = field(default_factory=FoldedProducts)

    def to(self, device: torch.device) -> "LayerCoefficients":
        """The same on a device, where nothing is folded yet."""
        rests = tuple(rest.to(device) for rest in self.residuals)
        return LayerCoefficients(self.down.to(device), self.up.to(device), self.scaling, rests)


@contextmanager
def without_autograd(device: torch.device) -> Iterator[None]:
    """What is computed in this block may be kept, and used in whatever mode: of autograd, inference or autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True, slots=True)
class RowGroups:
    """How rows of a batch are gathered into groups of one owner each.

    index: (groups · width) rows, where shorter groups repeat a row; inverse: (rows), where each row is in it. Both are
    None where every row is a group.
    """

    groups: int
    rows: int
    index: Tensor | None = None
    inverse: Tensor | None = None

    def to(self, device: torch.device) -> "RowGroups":
        """The same on a device: not for each layer of each step anew."""
        if self.index is None or self.inverse is None:
            return self
        return replace(self, index=self.index.to(device), inverse=self.inverse.to(device))

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, t, d) → (groups, width · t, d)."""
        if self.index is None:
            return rows
        width = len(self.index) // self.groups
        return rows[self.index].reshape(self.groups, width * rows.shape[1], rows.shape[2])

    def scatter(self, grouped: Tensor) -> Tensor:
        """(groups, width · t, d) → (rows, t, d): the inverse of `gather`."""
        if self.index is None or self.inverse is None:
            return grouped
        width = len(self.index) // self.groups
        spread = grouped.reshape(len(self.index), grouped.shape[1] // width, grouped.shape[2])
        return spread[self.inverse]


def group_rows(owners: Sequence[int]) -> tuple[list[int], RowGroups]:
    """Whose each group is, and the order: rows of one owner together where that pays, or each row by itself."""
    places: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        places.setdefault(owner, []).append(row)
    width = max(map(len, places.values()))
    if width == 1 or len(places) * width > _FILLING * len(owners):
        return list(owners), RowGroups(len(owners), len(owners))
    index, inverse = [], [0] * len(owners)
    for group, rows in enumerate(places.values()):
        for place, row in enumerate(rows):
            inverse[row] = group * width + place
        index += rows + rows[:1] * (width - len(rows))
    return list(places), RowGroups(len(places), len(owners), torch.tensor(index), torch.tensor(inverse))


def is_folding_cheaper(tokens: int, rank: int, k: int, factor: float, *, beside: bool = False) -> bool:
    """Whether so many tokens pay for a product of coefficients and basis.

    beside: whether there is a rest, so that a product of rank r is made in any case, and folding saves all of the
    other.
    """
    return tokens * (k if beside else k - rank) > factor * rank * k


def add_update(
    result: Tensor,
    x: Tensor,
    down_basis: BasisRows,
    up_basis: BasisRows,
    part: LayerCoefficients,
    *,
    in_place: bool = False,
    convolve: Convolve | None = None,
) -> Tensor:
    """`result` (…, out) and the update of x (…, in), all rows having one adapter. Bases: (k_down, in), (k_up, out).

    convolve: of a convolution, whose result is (n, out, …) and x (n, channels, …).
    """
    dtype = part.down.dtype
    x = x.to(dtype)
    tokens = result.numel() // up_basis.shape[1]
    folded = part.folded.after(tokens, part, down_basis, up_basis)
    if folded is None:
        up = as_float(up_basis, dtype)
        hidden = linear(_projected(x, as_float(down_basis, dtype), convolve), part.down)
        for rest in part.residuals:
            if rest.down is not None:
                hidden = hidden + _projected(x, rest.down, convolve)
            if rest.up is not None:
                beside = linear(hidden, rest.up)
                result = _add(result, beside, part.scaling, images=convolve is not None, in_place=in_place)
        hidden = linear(hidden, part.up)
    else:
        down, up = folded
        hidden = _projected(x, down, convolve)
    if convolve is not None:
        return _add_images(result, hidden @ up, part.scaling)
    return _add_product(result, hidden, up, part.scaling, in_place)


def add_grouped_update(
    result: Tensor,
    x: Tensor,
    down_basis: BasisRows,
    up_basis: BasisRows,
    part: LayerCoefficients,
    order: RowGroups,
    *,
    in_place: bool = False,
    convolve: Convolve | None = None,
) -> Tensor:
    """The same where each group of rows has its own coefficients. The rows of x are those of `order`, each repeated
    equally often."""
    dtype = part.down.dtype
    x = x.to(dtype)
    rank, images = part.down.shape[1], convolve is not None
    places = result.numel() // up_basis.shape[1]
    tokens, of_row = places // order.groups, places // order.rows
    # a convolution of each group with rows of its own is no product of batches
    if not images and is_folding_cheaper(tokens, rank, len(down_basis), FOLD_MIXED):
        folded = (part.down.reshape(-1, len(down_basis)) @ as_float(down_basis, dtype)).view(order.groups, rank, -1)
        hidden = torch.bmm(order.gather(x.reshape(order.rows, of_row, x.shape[-1])), folded.mT)
    else:
        projected = _projected(x, as_float(down_basis, dtype), convolve)
        hidden = torch.bmm(order.gather(projected.reshape(order.rows, of_row, len(down_basis))), part.down.mT)
    if part.residuals:
        by_row = order.scatter(hidden)
        beside = _beside(by_row, x.reshape(order.rows, -1, *x.shape[1:]), up_basis.shape[1], part.residuals, convolve)
        result = _add(result, beside, part.scaling, images=images, in_place=in_place)
        hidden = order.gather(by_row)
    if is_folding_cheaper(tokens, rank, len(up_basis), FOLD_MIXED):
        folded = (part.up.mT.reshape(-1, len(up_basis)) @ as_float(up_basis, dtype)).view(order.groups, rank, -1)
        return _add(result, order.scatter(torch.bmm(hidden, folded)), part.scaling, images=images, in_place=in_place)
    hidden = order.scatter(torch.bmm(hidden, part.up.mT))
    up = as_float(up_basis, dtype)
    if images:
        return _add_images(result, hidden.reshape(len(result), places // len(result), len(up_basis)) @ up, part.scaling)
    return _add_product(result, hidden, up, part.scaling, in_place)


def _beside(hidden: Tensor, x: Tensor, n_out: int, rests: Sequence[LayerResidual], convolve: Convolve | None) -> Tensor:
    """Let each row have what its adapter has beside the down basis, in place, and the same of the up basis:
    (rows, t, out).

    hidden: (rows, t, r), what the coefficients of the down side made of x (rows, m, …). Adapters come one after the
    other: side by side, their rests would be copied for each row.
    """
    update = hidden.new_zeros(*hidden.shape[:2], n_out)
    for rest in rests:
        assert rest.rows is not None
        if rest.down is not None:
            rank = len(rest.down)
            more = _projected(x[rest.rows].flatten(0, 1), rest.down, convolve)
            hidden[rest.rows, :, :rank] += more.reshape(len(rest.rows), hidden.shape[1], rank)
        if rest.up is not None:
            update[rest.rows] = rest.scaling * linear(hidden[rest.rows, :, : rest.up.shape[1]], rest.up)
    return update


def _add(result: Tensor, update: Tensor, scaling: float, *, images: bool, in_place: bool) -> Tensor:
    """`result` + scaling · update, whose rows have places one after the other, (…, out)."""
    if images:
        return _add_images(result, update.reshape(len(result), -1, update.shape[-1]), scaling)
    update = update.reshape(result.shape)
    update = (update if scaling == 1 else update * scaling).to(result.dtype)
    return result.add_(update) if in_place else result + update


def _projected(x: Tensor, rows: Tensor, convolve: Convolve | None) -> Tensor:
    """x (…, in) multiplied with rows (m, in): (…, m). Of images (n, channels, …), their places one after the other:
    (n, t, m)."""
    if convolve is None:
        return linear(x, rows)
    return convolve(x, rows).flatten(2).mT


def _add_images(result: Tensor, update: Tensor, scaling: float) -> Tensor:
    """`result` (n, out, …) + scaling · update (n, t, out)."""
    update = update.mT.reshape(result.shape)
    return result + (update if scaling == 1 else update * scaling).to(result.dtype)


def _add_product(result: Tensor, hidden: Tensor, basis: Tensor, scaling: float, in_place: bool) -> Tensor:
    """`result` (…, out) + scaling · hidden (…, k) @ basis (k, out)."""
    hidden = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    if result.dtype != hidden.dtype:
        update = ((hidden @ basis) * scaling).view(result.shape).to(result.dtype)
        return result.add_(update) if in_place else result + update
    flat = result.view(-1, result.shape[-1]) if in_place else result.reshape(-1, result.shape[-1])
    added = flat.addmm_(hidden, basis, alpha=scaling) if in_place else torch.addmm(flat, hidden, basis, alpha=scaling)
    return added.view(result.shape)
