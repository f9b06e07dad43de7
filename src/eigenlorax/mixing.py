"""Rows of one batch, each with coefficients of its own over bases that all of them share.

Tensors alone: nothing here knows of adapters, models or requests. What is added to a layer's output is
scaling · x·Vᵀ·C_Aᵀ·C_Bᵀ·U, in one of two orders. Shared: the products with the bases V and U are made once for all
rows, k wide, and coefficients between them. Folded: C_A·V and C_Bᵀ·U are made first, and what remains is a plain LoRA
of rank r. Folding costs r·k·d a side and adapter and saves (k − r)·d a token, so that it pays for many tokens of one
adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

# Folded where tokens · (k − r) > factor · r · k. By operations the factor is 1, and with one adapter for all rows,
# whose products are kept, it is: the tokens are all that it has had. With one a row they are those of one adapter in
# one call, and products of many small matrices take up to four times as long as one of the same size.
FOLD_ALONE, FOLD_MIXED = 1.0, 4.0
# Rows are grouped by adapter where that, with groups filled up to the longest, leaves at most this many rows a row.
_FILLING = 1.5


class Folded:
    """The two products of one adapter's coefficients and bases, made once it has had the tokens that pay for them."""

    __slots__ = ("_pair", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0
        self._pair: tuple[Tensor, Tensor] | None = None

    def after(self, tokens: int, part: "Part", down_basis: Tensor, up_basis: Tensor) -> tuple[Tensor, Tensor] | None:
        """(r, in) and (r, out), once these and all tokens before them pay for it."""
        if self._pair is None:
            self._tokens += tokens
            if folds(self._tokens, len(part.down), min(len(down_basis), len(up_basis)), FOLD_ALONE):
                with constant(down_basis.device):
                    self._pair = part.down @ down_basis, part.up.mT @ up_basis
        return self._pair


@dataclass(frozen=True, slots=True)
class Part:
    """What one module multiplies with: down (r, k_down) and up (k_up, r), or with one more leading dimension, a pair
    for each group of rows."""

    down: Tensor
    up: Tensor
    scaling: float
    folded: Folded = field(default_factory=Folded)


@contextmanager
def constant(device: torch.device) -> Iterator[None]:
    """What is computed in this block may be kept, and used in whatever mode: of autograd, inference or autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True, slots=True)
class Order:
    """How rows of a batch are gathered into groups of one owner each.

    index: (groups · width) rows, where shorter groups repeat a row; inverse: (rows), where each row is in it. Both are
    None where every row is a group.
    """

    groups: int
    rows: int
    index: Tensor | None = None
    inverse: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, t, d) → (groups, width · t, d)."""
        if self.index is None:
            return rows
        return rows[self.index.to(rows.device)].reshape(self.groups, -1, rows.shape[-1])

    def scatter(self, grouped: Tensor) -> Tensor:
        """(groups, width · t, d) → (rows, t, d): the inverse of `gather`."""
        if self.index is None or self.inverse is None:
            return grouped
        spread = grouped.reshape(len(self.index), -1, grouped.shape[-1])
        return spread[self.inverse.to(grouped.device)]


def arrange(owners: Sequence[int]) -> tuple[list[int], Order]:
    """Whose each group is, and the order: rows of one owner together where that pays, or each row by itself."""
    places: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        places.setdefault(owner, []).append(row)
    width = max(map(len, places.values()))
    if width == 1 or len(places) * width > _FILLING * len(owners):
        return list(owners), Order(len(owners), len(owners))
    index, inverse = [], [0] * len(owners)
    for group, rows in enumerate(places.values()):
        for place, row in enumerate(rows):
            inverse[row] = group * width + place
        index += rows + rows[:1] * (width - len(rows))
    return list(places), Order(len(places), len(owners), torch.tensor(index), torch.tensor(inverse))


def folds(tokens: int, rank: int, k: int, factor: float) -> bool:
    """Whether so many tokens pay for a product of coefficients and basis."""
    return tokens * (k - rank) > factor * rank * k


def add_alone(result: Tensor, x: Tensor, down_basis: Tensor, up_basis: Tensor, part: Part, *, in_place: bool) -> Tensor:
    """`result` (…, out) and the update of x (…, in), all rows having one adapter. Bases: (k_down, in), (k_up, out)."""
    flat = x.reshape(-1, x.shape[-1]).to(part.down.dtype)
    folded = part.folded.after(len(flat), part, down_basis, up_basis)
    if folded is not None:
        return _add_product(result, linear(flat, folded[0]), folded[1], part.scaling, in_place)
    hidden = linear(linear(linear(flat, down_basis), part.down), part.up)
    return _add_product(result, hidden, up_basis, part.scaling, in_place)


def add_mixed(
    result: Tensor, x: Tensor, down_basis: Tensor, up_basis: Tensor, part: Part, order: Order, *, in_place: bool
) -> Tensor:
    """The same where each group of rows has its own coefficients. The rows of x are those of `order`, each repeated
    equally often."""
    rows = x.reshape(order.rows, -1, x.shape[-1]).to(part.down.dtype)
    rank = part.down.shape[1]
    tokens = order.rows * rows.shape[1] // order.groups
    if folds(tokens, rank, len(down_basis), FOLD_MIXED):
        folded = (part.down.reshape(-1, len(down_basis)) @ down_basis).view(order.groups, rank, -1)
        hidden = torch.bmm(order.gather(rows), folded.mT)
    else:
        hidden = torch.bmm(order.gather(linear(rows, down_basis)), part.down.mT)
    if folds(tokens, rank, len(up_basis), FOLD_MIXED):
        folded = (part.up.mT.reshape(-1, len(up_basis)) @ up_basis).view(order.groups, rank, -1)
        update = order.scatter(torch.bmm(hidden, folded)).reshape(result.shape)
        update = update if part.scaling == 1 else update * part.scaling
        return result.add_(update.to(result.dtype)) if in_place else result + update.to(result.dtype)
    hidden = order.scatter(torch.bmm(hidden, part.up.mT))
    return _add_product(result, hidden.reshape(-1, len(up_basis)), up_basis, part.scaling, in_place)


def _add_product(result: Tensor, hidden: Tensor, basis: Tensor, scaling: float, in_place: bool) -> Tensor:
    """`result` (…, out) + scaling · hidden (n, k) @ basis (k, out)."""
    if result.dtype != hidden.dtype:
        update = ((hidden @ basis) * scaling).view(result.shape).to(result.dtype)
        return result.add_(update) if in_place else result + update
    flat = result.view(-1, result.shape[-1]) if in_place else result.reshape(-1, result.shape[-1])
    added = flat.addmm_(hidden, basis, alpha=scaling) if in_place else torch.addmm(flat, hidden, basis, alpha=scaling)
    return added.view(result.shape)
