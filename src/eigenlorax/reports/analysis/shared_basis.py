"""A baseline of the report: one rounded basis per module and side for all adapters, with rounded coefficients.

The bases are fitted with weighting "delta". Coefficients are solved again after the bases were rounded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.batch import ModuleBatch, delta_squares, gram_roots
from ...core.linalg import dual_rows
from .crowded import Spectrum, swept, weighted
from .losses import BLOCK, SCALE_BYTES, rounded_rows
from .per_adapter import Point, balanced

SHARED_BASIS = "shared basis"
Bits = tuple[int, int]
"""Bits per number of the bases, and of the coefficients."""


class SharedBasis:
    """A collection of n adapters in shared bases of several sizes.

    Args:
        modules: Factors of all adapters, by module.
        bits: Combinations of bits to measure.
        sweeps: Number of alternating refinements of the bases.
    """

    def __init__(self, modules: Mapping[str, ModuleBatch], bits: Sequence[Bits], sweeps: int) -> None:
        self.modules = modules
        self.bits = bits
        self.sweeps = sweeps
        self._spectra: dict[str, tuple[Tensor, Tensor]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.ranks: dict[str, tuple[int, ...]] = {}
        self.total, self.weights = norms(modules)
        tails: list[Tensor] = []
        for name in modules:
            # each access may read the module from files
            module = modules[name]
            self.shapes[name] = module.up.shape[2], module.down.shape[2]
            self.ranks[name] = module.ranks
            tails.append(squared_tails(module, self.weights))
        tail = torch.zeros(2, max((tail.shape[1] for tail in tails), default=1), dtype=torch.float64)
        for module_tail in tails:
            tail[:, : module_tail.shape[1]] += module_tail
        self._lower_bounds = (tail.amax(0) / (self.total > 0).sum().clamp_min(1)).sqrt()

    def lower_bound(self, k: int) -> float:
        """Return a lower bound of the worst error with any k components per side (Eckart–Young)."""
        return float(self._lower_bounds[k]) if k < len(self._lower_bounds) else 0.0

    @property
    def max_components(self) -> int:
        """Largest number of components per side that any module can have."""
        return max(min(sum(self.ranks[name]), max(shape)) for name, shape in self.shapes.items())

    def stored_bytes(self, k: int, bits: Bits) -> int:
        """Return the bytes of the bases with at most k components, and of all coefficients."""
        total = 0
        for name, (n_out, n_in) in self.shapes.items():
            ranks = [rank for rank in self.ranks[name] if rank]
            down, up = (min(k, sum(ranks), width) for width in (n_in, n_out))
            total += rows_bytes(down, n_in, bits[0]) + rows_bytes(up, n_out, bits[0])
            total += sum(coefficient_bytes(min(rank, down, up), down, up, bits[1]) for rank in ranks)
        return total

    def measure(self, k: int) -> dict[Bits, Point]:
        """Return bytes and errors with k components per side, by bits."""
        errors = {bits: torch.zeros_like(self.total) for bits in self.bits}
        for name in self.modules:
            module = self.modules[name]
            if not (self.weights * delta_squares(module)).any():
                continue
            for bits, squared_error in coefficient_losses(module, self._bases(name, module, k), self.bits):
                errors[bits] += squared_error
        return {
            bits: Point.of(self.stored_bytes(k, bits), errors[bits], self.total, {"k": k, "bits": list(bits)})
            for bits in self.bits
        }

    def _bases(self, name: str, module: ModuleBatch, k: int) -> tuple[Tensor, Tensor]:
        if name not in self._spectra:
            down, up = (Spectrum.of(side).vectors for side in weighted(module, self.weights, "delta"))
            self._spectra[name] = down, up
        down, up = self._spectra[name]
        return swept(module, self.weights, (down[:k], up[:k]), self.sweeps)


def norms(modules: Mapping[str, ModuleBatch]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return ‖D‖² over all modules, and 1 / ‖D‖, or 0 if the update is zero."""
    total = torch.stack([delta_squares(modules[name]) for name in modules]).sum(0)
    return total, torch.where(total > 0, total, torch.inf).rsqrt()


def squared_tails(module: ModuleBatch, weights: Tensor) -> Float[Tensor, "2 k"]:
    """Return the weighted squared norm outside the first 0, 1, … components of each side, down first."""
    tails = []
    for rows, opposite in ((module.down, module.up), (module.up, module.down)):
        flat = (weights[:, None, None] * gram_roots(opposite) @ rows).flatten(0, 1)
        small = flat @ flat.mT if flat.shape[0] <= flat.shape[1] else flat.mT @ flat
        tails.append(torch.linalg.eigvalsh(small).clamp_min(0).cumsum(0).flip(0))
    length = max(len(tail) for tail in tails) + 1
    return torch.stack([torch.nn.functional.pad(tail, (0, length - len(tail))) for tail in tails])


def rows_bytes(rows: int, width: int, bits: int) -> int:
    """Return the bytes of rows of `width` numbers rounded to `bits`, with their scales."""
    scales = 0 if bits == 16 else SCALE_BYTES * rows * -(-width // BLOCK)
    return (bits * rows * width + 7) // 8 + scales


def coefficient_bytes(rank: int, k_down: int, k_up: int, bits: int) -> int:
    """Return the bytes of one adapter's rounded coefficients in a module."""
    return sum(rows_bytes(rank, k, bits) if k >= BLOCK else rows_bytes(1, rank * k, bits) for k in (k_down, k_up))


def rounded_bases(rows: tuple[Tensor, Tensor], bits: Sequence[Bits]) -> Iterator[tuple[list[Bits], Tensor, Tensor]]:
    """Yield the bases rounded to each number of bits, with the combinations that use it."""
    for basis_bits in dict.fromkeys(basis_bits for basis_bits, _ in bits):
        down, up = (rounded_rows(side[None], basis_bits)[0] for side in rows)
        yield [combination for combination in bits if combination[0] == basis_bits], down, up


def coordinates(module: ModuleBatch, down: Tensor, up: Tensor) -> ModuleBatch:
    """Return least-squares coefficients of the updates, for bases that rounding has made not exactly orthonormal."""
    return replace(module, down=module.down @ dual_rows(down).mT, up=module.up @ dual_rows(up).mT)


def coefficient_losses(
    module: ModuleBatch, rows: tuple[Tensor, Tensor], bits: Sequence[Bits]
) -> Iterator[tuple[Bits, Float[Tensor, " n"]]]:
    """Yield ‖D − D'‖² of each adapter by bits, with bases `rows` and coefficients both rounded."""
    total = delta_squares(module)
    for combinations, down, up in rounded_bases(rows, bits):
        coefficients = balanced(coordinates(module, down, up))
        in_down, in_up, down_gram, up_gram = module.down @ down.mT, module.up @ up.mT, down @ down.mT, up @ up.mT
        for combination in combinations:
            a, b = (_rounded_coefficients(side, combination[1]) for side in (coefficients.down, coefficients.up))
            inner = ((in_down @ a.mT).mT @ (in_up @ b.mT)).diagonal(dim1=1, dim2=2).sum(1)
            norm = ((a @ down_gram @ a.mT) * (b @ up_gram @ b.mT)).sum((1, 2))
            yield combination, total - 2 * inner + norm


def _rounded_coefficients(rows: Float[Tensor, "n r k"], bits: int) -> Float[Tensor, "n r k"]:
    """Round an adapter's coefficients row by row, or in one block where rows are shorter than a block."""
    return rounded_rows(rows, bits) if rows.shape[2] >= BLOCK else rounded_as_one_row(rows, bits)


def rounded_as_one_row(matrices: Float[Tensor, "n j k"], bits: int) -> Float[Tensor, "n j k"]:
    """Round each matrix as one row of all its numbers, so that blocks cross its rows."""
    return rounded_rows(matrices.flatten(1)[:, None], bits)[:, 0].reshape(matrices.shape)
