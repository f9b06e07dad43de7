"""Rows of a batch grouped by the adapter that they use, so that one product serves several rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows are grouped by adapter if the groups, padded to the longest one, have at most this many times the batch's rows.
_MAX_PADDING = 1.5


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Groups of batch rows that use the same adapter.

    Attributes:
        groups: Number of groups.
        rows: Number of batch rows.
        index: Row indices, group by group, (groups · width); shorter groups repeat a row. None if groups have equally
            many rows, one group after the other.
        inverse: Position of each row in `index`, (rows,); None if `index` is.
        owners: Group of each row, (rows,); None if `index` is.
    """

    groups: int
    rows: int
    index: Tensor | None = None
    inverse: Tensor | None = None
    owners: Tensor | None = None

    def to(self, device: torch.device) -> "RowGroups":
        """Return the groups on another device."""
        if self.index is None or self.inverse is None or self.owners is None:
            return self
        index, inverse, owners = (tensor.to(device) for tensor in (self.index, self.inverse, self.owners))
        return replace(self, index=index, inverse=inverse, owners=owners)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows by group, (rows, t, d) → (groups, width · t, d)."""
        by_group = rows if self.index is None else rows[self.index]
        return by_group.reshape(self.groups, len(by_group) * rows.shape[1] // self.groups, rows.shape[2])

    def scatter(self, grouped: Tensor) -> Tensor:
        """Return the rows in the order of the batch, (groups, width · t, d) → (rows, t, d): the inverse of `gather`."""
        n_rows = self.rows if self.index is None else len(self.index)
        by_index = grouped.reshape(n_rows, grouped.shape[0] * grouped.shape[1] // n_rows, grouped.shape[2])
        return by_index if self.inverse is None else by_index[self.inverse]

    def multiply(self, rows: Tensor, *matrices: Tensor) -> Tensor:
        """Multiply each row by the matrices of its group, one after the other.

        Args:
            rows: Rows of the batch, (rows, t, a).
            matrices: Matrices (groups, a, …), …, (groups, …, b).

        Returns:
            The products, (rows, t, b).
        """
        by_row = self._copies_matrices(rows, *matrices)
        product = rows if by_row else self.gather(rows)
        for matrix in matrices:
            product = torch.bmm(product, matrix[self.owners] if by_row else matrix)
        return product if by_row else self.scatter(product)

    def add_product(self, output: Tensor, rows: Tensor, matrices: Tensor, scaling: float) -> None:
        """Add scaling · rows @ matrices to a contiguous output, (rows, t, b), in place; arguments as for `multiply`."""
        if self._copies_matrices(rows, matrices):
            output.baddbmm_(rows, matrices[self.owners], alpha=scaling)
        elif self.index is None:
            by_group = output.view(self.groups, -1, output.shape[2])
            # one pass over the output, which is wide
            by_group.baddbmm_(self.gather(rows), matrices, alpha=scaling)
        else:
            output.add_(self.multiply(rows, matrices), alpha=scaling)

    def _copies_matrices(self, rows: Tensor, *matrices: Tensor) -> bool:
        """Return whether a copy of the matrices for each row is smaller than one of the rows by group."""
        if self.index is None:
            return False
        copied = sum(matrix.shape[1] * matrix.shape[2] for matrix in matrices)
        return copied <= rows.shape[1] * (rows.shape[2] + matrices[-1].shape[2])


def group_rows(owners: Sequence[int]) -> tuple[list[int], RowGroups]:
    """Group the rows of a batch by adapter where the padding is small, otherwise make each row a group.

    Args:
        owners: Index of each row's adapter.

    Returns:
        Index of each group's adapter, and the groups.
    """
    rows_by_owner: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        rows_by_owner.setdefault(owner, []).append(row)
    width = max(map(len, rows_by_owner.values()))
    if width == 1 or len(rows_by_owner) * width > _MAX_PADDING * len(owners):
        return list(owners), RowGroups(len(owners), len(owners))
    index, inverse = [], [0] * len(owners)
    for group, rows in enumerate(rows_by_owner.values()):
        for position, row in enumerate(rows):
            inverse[row] = group * width + position
        # padding by a row of the group needs no mask: `inverse` never points to the repeated rows
        index += rows + rows[:1] * (width - len(rows))
    if index == list(range(len(owners))):
        return list(rows_by_owner), RowGroups(len(rows_by_owner), len(owners))
    positions = torch.tensor(inverse)
    groups = RowGroups(len(rows_by_owner), len(owners), torch.tensor(index), positions, positions // width)
    return list(rows_by_owner), groups
