"""Differences between two adapters of one base model, such as two versions of one run, by module and side.

No out × in matrix is formed, and no figure depends on how an update is factored.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from . import linalg
from .adapter import Adapter, LoRAFactors
from .module_names import natural_order

# Singular values below this fraction of the largest one are rounding errors of float32 factors
_RESOLUTION = 1e-6
# Relative differences below this are rounding errors of float64
_ROUNDING = 1e-14


@dataclass(frozen=True, slots=True)
class UpdateChange:
    """Difference between an update D and a later one D', of one module or of all modules together.

    Attributes:
        change: ‖D' − D‖ / ‖D‖; None if D is zero and D' is not.
        norm_ratio: ‖D'‖ / ‖D‖; None likewise.
        down: Part of D' with new input directions, ‖D' (I − P)‖ / ‖D'‖ from 0 to 1. P projects on the row space of D.
        up: Part of D' with new output directions, ‖(I − Q) D'‖ / ‖D'‖ from 0 to 1. Q projects on the column space of D.
    """

    change: float | None
    norm_ratio: float | None
    down: float
    up: float


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """Difference between two adapters.

    Attributes:
        before: Name of the first adapter.
        after: Name of the second adapter.
        total: Difference of all modules together.
        modules: Difference of each module by name, layers in the order of their numbers.
        tensors: ‖T' − T‖ / ‖T‖ of each head or other float tensor that both adapters have in one shape, by PEFT's key;
            None if T is zero and T' is not.
    """

    before: str
    after: str
    total: UpdateChange
    modules: Mapping[str, UpdateChange]
    tensors: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class _Squares:
    """Squared norms of D, D', D' − D, and of the parts of D' with new directions on either side."""

    before: float = 0.0
    after: float = 0.0
    difference: float = 0.0
    down: float = 0.0
    up: float = 0.0

    def change(self) -> UpdateChange:
        """Return the relative figures."""
        relative = (_ratio(self.difference, self.before), _ratio(self.after, self.before))
        new = (_ratio(square, self.after) or 0.0 for square in (self.down, self.up))
        return UpdateChange(*relative, *(min(part, 1.0) for part in new))


def compare(before: Adapter, after: Adapter) -> AdapterChange:
    """Compare two adapters. A module that only one of them has counts as a zero update of the other.

    Args:
        before: The earlier adapter, to which changes are relative.
        after: The later adapter.

    Raises:
        ShapeError: A module has other sizes in the second adapter.
    """
    squares: dict[str, _Squares] = {}
    for module in sorted(before.specs.keys() | after.specs.keys(), key=natural_order):
        _check_sizes(module, before, after)
        squares[module] = _compare_updates(before.modules.get(module), after.modules.get(module))
    tensors = {
        key: _tensor_change(tensor, later[key])
        for earlier, later in ((before.heads, after.heads), (before.carried, after.carried))
        for key, tensor in sorted(earlier.items())
        if key in later and later[key].shape == tensor.shape and tensor.is_floating_point()
    }
    return AdapterChange(
        before=before.name,
        after=after.name,
        total=_sum(squares.values()).change(),
        modules={module: square.change() for module, square in squares.items()},
        tensors=tensors,
    )


def _check_sizes(module: str, before: Adapter, after: Adapter) -> None:
    sizes = [
        (adapter.specs[module].out_features, adapter.specs[module].in_features)
        for adapter in (before, after)
        if module in adapter.specs
    ]
    if sizes[0] != sizes[-1]:
        raise ShapeError(
            f"Module {module} is {sizes[0]} (out, in) in {before.name!r} and {sizes[-1]} in {after.name!r}: they "
            "belong to different base models. Compare adapters of one base model."
        )


def _sum(squares: Iterable[_Squares]) -> _Squares:
    # fsum rounds once, so that the order of modules does not matter
    return _Squares(*(math.fsum(fields) for fields in zip(*map(astuple, squares), strict=True)))


def _compare_updates(before: LoRAFactors | None, after: LoRAFactors | None) -> _Squares:
    if before is None or after is None:
        ((down, up),) = (_singular_rows(factors) for factors in (before, after) if factors is not None)
        square = float(_squares(down) @ _squares(up))
        return _Squares(before=square, difference=square) if after is None else _Squares(0.0, *[square] * 4)
    (down, up), (later_down, later_up) = _singular_rows(before), _singular_rows(after)
    square, later_square = float(_squares(down) @ _squares(up)), float(_squares(later_down) @ _squares(later_up))
    # D' − D as one product of stacked factors, (out, 2r) and (2r, in), through their triangular factors
    left, right = torch.cat([later_up, -up]).mT, torch.cat([later_down, down]).mT
    product = linalg.triangular_factor(left) @ linalg.triangular_factor(right).mT
    difference = float(product.square().sum())
    return _Squares(
        before=square,
        after=later_square,
        difference=difference if difference > _ROUNDING**2 * max(square, later_square) else 0.0,
        # rows of one side are orthogonal, so that parts of D' add up in squares
        down=float(_squares(_outside(later_down, down)) @ _squares(later_up)),
        up=float(_squares(_outside(later_up, up)) @ _squares(later_down)),
    )


def _singular_rows(factors: LoRAFactors) -> tuple[Tensor, Tensor]:
    """Return the singular vectors of an update as rows scaled with √σ, (r, in) and (r, out) float64."""
    down, up = factors.down.to(torch.float64), factors.scaling * factors.up.to(torch.float64).mT
    return linalg.svd_factors(down, up)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1)


def _outside(rows: Tensor, others: Tensor) -> Tensor:
    """Return the parts of rows that are orthogonal to the span of `others`, which are orthogonal to each other."""
    lengths = _squares(others).sqrt()
    # lengths are √σ
    unit = others[lengths > math.sqrt(_RESOLUTION) * lengths.max()]
    unit = unit / unit.norm(dim=1, keepdim=True)
    remainder: Tensor = rows - (rows @ unit.mT) @ unit
    return remainder


def _tensor_change(before: Tensor, after: Tensor) -> float | None:
    before, after = before.to(torch.float64), after.to(torch.float64)
    return _ratio(float((after - before).square().sum()), float(before.square().sum()))


def _ratio(square: float, reference: float) -> float | None:
    """Return √(square / reference): 0 if both are zero, and None if the reference alone is."""
    if reference == 0:
        return 0.0 if square == 0 else None
    return math.sqrt(square / reference)
