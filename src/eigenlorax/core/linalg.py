"""Every decomposition of the package, in float64. Matrices and blocks of rows; nothing here knows what a LoRA is.

A stack of n rows of width d is fitted through the smaller of its two Gram matrices. The n × n one is formed once and
serves every reweighting of the rows, so a sweep costs an n × n eigenproblem and never touches the rows again. Where
singular values decay beyond what a Gram matrix resolves, and those directions are wanted, a thin SVD takes over.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Squaring halves the digits: below this share of the largest singular value, those of a Gram matrix are noise.
GRAM_RESOLUTION = 1e-5


@dataclass(frozen=True, slots=True)
class Leading:
    """Leading right singular vectors of a weighted stack.

    singular_values: every one of the weighted stack, descending, (min(n, d),).
    projection: the *unweighted* rows in the directions kept, (n, k), each direction up to its sign.
    components: orthonormal rows, signs fixed, (k, d); built when called, since a sweep needs the projection alone.
    """

    singular_values: Tensor
    projection: Tensor
    components: Callable[[], Tensor]

    @property
    def k(self) -> int:
        return self.projection.shape[1]


class RowStack:
    """Blocks of rows, one below the other, (n, d) in all, ready to be weighted block by block."""

    __slots__ = ("blocks", "gram", "rows")

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self.rows = torch.cat([block.to(torch.float64) for block in blocks])
        stops = torch.tensor([0, *(block.shape[0] for block in blocks)]).cumsum(0).tolist()
        self.blocks = [slice(start, stop) for start, stop in pairwise(stops)]
        wide = self.rows.shape[0] <= self.rows.shape[1]
        self.gram = self.rows @ self.rows.mT if wide else None

    def without(self, index: int) -> "RowStack":
        """The same rows but for one block. Inner products that are there are kept, not formed again."""
        left_out, size = self.blocks[index], self.blocks[index].stop - self.blocks[index].start
        keep = torch.cat([torch.arange(left_out.start), torch.arange(left_out.stop, self.rows.shape[0])])
        found = object.__new__(RowStack)
        found.rows = self.rows[keep]
        found.gram = self.gram[keep][:, keep] if self.gram is not None else None
        later = [slice(block.start - size, block.stop - size) for block in self.blocks[index + 1 :]]
        found.blocks = [*self.blocks[:index], *later]
        return found

    def weighted(self, weights: Sequence[Tensor]) -> Tensor:
        """Each block multiplied from the left by its own square matrix; (n, d)."""
        return _block_multiply(self.rows, self.blocks, weights)

    def leading(self, weights: Sequence[Tensor], choose: Callable[[Tensor, tuple[int, int]], int]) -> Leading:
        """Leading directions of the weighted stack.

        choose(singular values, (n, d)) says how many to keep; it is asked again with exact values where the first
        ones were too small for a Gram matrix to resolve.
        """
        shape = (self.rows.shape[0], self.rows.shape[1])
        if self.gram is None:
            stack = self.weighted(weights)
            squares, vectors = descending_eigh(stack.mT @ stack)
        else:
            stack = None
            half = _block_multiply(self.gram, self.blocks, weights)
            squares, vectors = descending_eigh(_block_multiply(half.mT, self.blocks, weights))
        sigma = squares.clamp_min(0).sqrt()
        k = choose(sigma, shape)
        if k > int((sigma > GRAM_RESOLUTION * sigma[0]).sum()):
            return self._leading_by_svd(self.weighted(weights), choose)
        if self.gram is None:
            return self._finished(sigma, vectors[:, :k].mT)
        # components = Σ⁻¹ Qᵀ W rows: only the small matrix in front of the rows is kept for now
        mixing = _block_multiply(vectors[:, :k] / sigma[:k], self.blocks, [w.mT for w in weights]).mT
        return Leading(sigma, self.gram @ mixing.mT, lambda: orthonormal_rows(mixing @ self.rows))

    def _leading_by_svd(self, stack: Tensor, choose: Callable[[Tensor, tuple[int, int]], int]) -> Leading:
        _, sigma, right = torch.linalg.svd(stack, full_matrices=False)
        return self._finished(sigma, right[: choose(sigma, (stack.shape[0], stack.shape[1]))])

    def _finished(self, sigma: Tensor, components: Tensor) -> Leading:
        components = orthonormal_rows(components)
        return Leading(sigma, self.rows @ components.mT, lambda: components)


def triangle(columns: Tensor) -> Tensor:
    """The triangular factor R of a QR decomposition: columns = Q·R."""
    found: Tensor = torch.linalg.qr(columns, mode="r").R
    return found


def leading_rows(rows: Tensor, most: int) -> Tensor:
    """Leading right singular vectors of a matrix, (k, d), at most so many, and those that its Gram matrix resolves."""
    wide = rows.shape[0] <= rows.shape[1]
    squares, vectors = descending_eigh(rows @ rows.mT if wide else rows.mT @ rows)
    sigma = squares.clamp_min(0).sqrt()
    k = min(most, int((sigma > GRAM_RESOLUTION * sigma[0]).sum()))
    return orthonormal_rows((vectors[:, :k] / sigma[:k]).mT @ rows if wide else vectors[:, :k].mT)


def _block_multiply(matrix: Tensor, blocks: Sequence[slice], weights: Sequence[Tensor]) -> Tensor:
    """diag(weights) @ matrix, block by block."""
    return torch.cat([weight @ matrix[block] for block, weight in zip(blocks, weights, strict=True)])


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def numerical_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """Number of singular values above max(n, d) · eps · σ₁."""
    floor = max(shape) * torch.finfo(singular_values.dtype).eps * singular_values[0]
    return int((singular_values > floor).sum())


def psd_root(gram: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix, (…, r, r) float64."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
    return root


def orthonormal_rows(rows: Tensor) -> Tensor:
    """The same span with orthonormal rows, and each row's largest entry positive; (k, d), k ≤ d, full rank.

    Rows that are nearly orthonormal already keep their order and meaning.
    """
    q, _ = torch.linalg.qr(rows.mT)
    rows = q.mT.contiguous()
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))
    return rows * signs


def orthogonal_complement_rows(rows: Tensor, components: Tensor) -> Tensor:
    """`rows` made orthonormal, and orthogonal to `components`: two passes of Gram–Schmidt, then QR; (m, d).

    components: (k, d), nearly orthonormal (it may have been rounded to a narrower dtype), k + m ≤ d.
    """
    clean = orthonormal_rows(components) if components.shape[0] else components
    for _ in range(2):
        rows = rows - (rows @ clean.mT) @ clean
        rows = orthonormal_rows(rows)
    return rows


def dual_rows(components: Tensor) -> Tensor:
    """The rows P, (k, d), with which x @ Pᵀ are the least-squares coordinates of x in `components`.

    Equal to the components where they are exactly orthonormal; rounding to a stored dtype leaves them a little off.
    Rows that depend on each other share what lies in their span.
    """
    root, failed = torch.linalg.cholesky_ex(components @ components.mT)
    if bool(failed):
        shared: Tensor = torch.linalg.pinv(components, rtol=1e-6).mT
        return shared
    return torch.cholesky_solve(components, root)


def even_rows(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, (…, r, n) and (…, r, m) float64, with the same products upᵀ @ down, whose singular vectors they are: row i
    of both has the norm √σᵢ, and rows beyond the rank of a product are zero."""
    (q_down, r_down), (q_up, r_up) = (torch.linalg.qr(rows.mT) for rows in (down, up))
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    roots, more = values.sqrt()[..., None], down.shape[-2] - values.shape[-1]
    rows = roots * (right @ q_down.mT), roots * (left.mT @ q_up.mT)
    down, up = (torch.nn.functional.pad(each, (0, 0, 0, more)) for each in rows)
    return down, up


def mixing(r: int) -> Tensor:
    """An orthogonal matrix, (r, r) float64, whose rows take about as much of each column: a Hadamard matrix as far as
    r has factors 2, and beyond that a Hartley transform."""
    power = r & -r
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], dim=1), torch.cat([hadamard, -hadamard], dim=1)])
    numbers = torch.arange(r // power, dtype=torch.float64)
    angles = torch.outer(numbers, numbers) * (2 * math.pi / len(numbers))
    return torch.kron(hadamard, angles.cos() + angles.sin()) / math.sqrt(r)


def product_square(left: Tensor, right: Tensor) -> Tensor:
    """‖left @ right‖²_F, float64, through r × r Gram matrices; left (…, m, r), right (…, r, n)."""
    return _inner(left, left, right, right)


def difference_square(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    """‖left @ right − other_left @ other_right‖²_F, accurate also where the two are nearly equal.

    The four have one shape per side, (…, m, r) and (…, r, n), and one gauge. L·R − L'·R' = (L − L')·R + L'·(R − R'),
    so no two large numbers are subtracted.
    """
    off_left, off_right = left - other_left, right - other_right
    square = (
        _inner(off_left, off_left, right, right)
        + 2 * _inner(off_left, other_left, right, off_right)
        + _inner(other_left, other_left, off_right, off_right)
    )
    return square.clamp_min(0)


def _inner(left: Tensor, other_left: Tensor, right: Tensor, other_right: Tensor) -> Tensor:
    """⟨left @ right, other_left @ other_right⟩, float64, through r × r matrices."""
    return ((left.mT @ other_left).to(torch.float64) * (right @ other_right.mT).to(torch.float64)).sum((-2, -1))
