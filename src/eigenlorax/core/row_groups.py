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
        index: Row indices, group by group, (groups · width); shorter groups repeat a row. None if each row is a group.
        inverse: Position of each row in `index`, (rows,); None if each row is a group.
    """

    groups: int
    rows: int
    index: Tensor | None = None
    inverse: Tensor | None = None

    def to(self, device: torch.device) -> "RowGroups":
        """Return the groups on another device."""
        if self.index is None or self.inverse is None:
            return self
        return replace(self, index=self.index.to(device), inverse=self.inverse.to(device))

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows by group, (rows, t, d) → (groups, width · t, d)."""
        if self.index is None:
            return rows
        width = len(self.index) // self.groups
        return rows[self.index].reshape(self.groups, width * rows.shape[1], rows.shape[2])

    def scatter(self, grouped: Tensor) -> Tensor:
        """Return the rows in the order of the batch, (groups, width · t, d) → (rows, t, d): the inverse of `gather`."""
        if self.index is None or self.inverse is None:
            return grouped
        width = len(self.index) // self.groups
        by_index = grouped.reshape(len(self.index), grouped.shape[1] // width, grouped.shape[2])
        return by_index[self.inverse]


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
    groups = RowGroups(len(rows_by_owner), len(owners), torch.tensor(index), torch.tensor(inverse))
    return list(rows_by_owner), groups
