"""Decompositions of stacked rows, norms of low-rank products, orthonormalisation. Everything is float64.

A stack of n rows of width d is decomposed through the smaller of its two Gram matrices.
The n × n one is formed once and serves every reweighting of the rows, so that a sweep of a fit costs an n × n
eigenproblem and never touches the rows. Where singular values decay beyond what a Gram matrix resolves, and
components beyond that are needed, a thin SVD is used.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# A Gram matrix squares the condition number, which halves the digits: its singular values below this fraction of the
# largest one are noise.
GRAM_RESOLUTION = 1e-5
# Smallest diagonal entry of a Cholesky factor, relative to the largest one, from which a second one corrects the first
_CHOLESKY_RESOLUTION = 1e-6
# Rows of `symmetric_product` that are multiplied at once: enough for the full speed of a product
_SYMMETRIC_BLOCK = 128
# Rounding, as a fraction of a squared norm, from which on its Gram matrices are not exact enough
_MAX_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class LeadingVectors:
    """Leading right singular vectors of a weighted stack of rows.

    Attributes:
        singular_values: All singular values of the weighted stack, descending, (min(n, d),).
        projection: The *unweighted* rows projected on the k vectors, (n, k). The sign of each column is arbitrary.
        components: Function that returns the vectors as orthonormal rows with fixed signs, (k, d). It is a function
            because a sweep needs the projection alone, and computing the vectors takes a product with all rows.
    """

    singular_values: Tensor
    projection: Tensor
    components: Callable[[], Tensor]

    @property
    def k(self) -> int:
        """Number of vectors."""
        return self.projection.shape[1]


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """A stack of blocks of rows, (n, d), whose blocks can be weighted and decomposed again and again.

    Attributes:
        rows: All rows, float64.
        blocks: Rows of each block, as slices.
        gram: rows @ rowsᵀ, (n, n), if n ≤ d; otherwise None.
    """

    rows: Tensor
    blocks: list[slice]
    gram: Tensor | None

    @classmethod
    def stack(cls, blocks: Sequence[Tensor]) -> "RowBlocks":
        """Stack blocks of rows, (n_i, d), and compute their Gram matrix if that is the smaller one."""
        rows = torch.cat([block.to(torch.float64) for block in blocks])
        # row numbers at which blocks start and stop
        boundaries = torch.tensor([0, *(block.shape[0] for block in blocks)]).cumsum(0).tolist()
        slices = [slice(start, stop) for start, stop in pairwise(boundaries)]
        is_wide = rows.shape[0] <= rows.shape[1]
        return cls(rows, slices, rows @ rows.mT if is_wide else None)

    def without(self, index: int) -> "RowBlocks":
        """Return the stack without one block. The Gram matrix is cut, not computed again."""
        removed = self.blocks[index]
        size = removed.stop - removed.start
        remaining = torch.cat([torch.arange(removed.start), torch.arange(removed.stop, self.rows.shape[0])])
        gram = self.gram[remaining][:, remaining] if self.gram is not None else None
        later = [slice(block.start - size, block.stop - size) for block in self.blocks[index + 1 :]]
        return RowBlocks(self.rows[remaining], [*self.blocks[:index], *later], gram)

    def weighted(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the rows with each block multiplied from the left by its own square matrix, (n, d)."""
        return block_multiply(self.rows, self.blocks, weights)

    def leading(self, weights: Sequence[Tensor], rule: Callable[[Tensor, tuple[int, int]], int]) -> LeadingVectors:
        """Return the leading right singular vectors of the weighted stack.

        Args:
            weights: One square matrix per block.
            rule: Function that returns the number of vectors to keep, from the singular values and the shape (n, d). It
                is called again with the singular values of an SVD where those of the Gram matrix do not resolve that
                many.
        """
        shape = (self.rows.shape[0], self.rows.shape[1])
        if self.gram is None:
            stack = self.weighted(weights)
            # eigenvectors of the d × d matrix are the right singular vectors themselves
            squares, vectors = descending_eigh(stack.mT @ stack)
        else:
            # W·G·Wᵀ is the Gram matrix of the weighted rows W·R, without the rows themselves
            half = block_multiply(self.gram, self.blocks, weights)
            squares, vectors = descending_eigh(block_multiply(half.mT, self.blocks, weights))
        sigma = squares.clamp_min(0).sqrt()
        k = rule(sigma, shape)
        if k > int((sigma > GRAM_RESOLUTION * sigma[0]).sum()):
            return self._leading_by_svd(self.weighted(weights), rule)
        if self.gram is None:
            return self._from_components(sigma, vectors[:, :k].mT)
        # right singular vectors are Σ⁻¹·Qᵀ·W·R; the product with the rows R is postponed until it is needed
        combination = block_multiply(vectors[:, :k] / sigma[:k], self.blocks, [w.mT for w in weights]).mT
        return LeadingVectors(sigma, self.gram @ combination.mT, lambda: orthonormal_rows(combination @ self.rows))

    def _leading_by_svd(self, stack: Tensor, rule: Callable[[Tensor, tuple[int, int]], int]) -> LeadingVectors:
        _, sigma, right = torch.linalg.svd(stack, full_matrices=False)
        return self._from_components(sigma, right[: rule(sigma, (stack.shape[0], stack.shape[1]))])

    def _from_components(self, sigma: Tensor, components: Tensor) -> LeadingVectors:
        components = orthonormal_rows(components)
        return LeadingVectors(sigma, self.rows @ components.mT, lambda: components)


def symmetric_product(rows: Tensor) -> Tensor:
    """Return rows @ rowsᵀ, (n, n), and multiply each pair of rows once rather than twice."""
    n = rows.shape[0]
    product = rows.new_empty(n, n)
    for start in range(0, n, _SYMMETRIC_BLOCK):
        stop = start + _SYMMETRIC_BLOCK
        product[start:, start:stop] = rows[start:] @ rows[start:stop].mT
        product[start:stop, stop:] = product[stop:, start:stop].mT
    return product


def triangular_factor(columns: Tensor) -> Tensor:
    """Return R of the QR decomposition columns = Q·R."""
    r: Tensor = torch.linalg.qr(columns, mode="r").R
    return r


def triangular_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return L and Q with rows = L·Q, where the rows of Q are orthonormal, for each matrix of a stack.

    Two Cholesky decompositions of Gram matrices ("CholeskyQR2", Fukaya et al. 2014): the second corrects the rounding
    errors of the first, and both take a fraction of the time of a QR decomposition, which is the fallback.

    Args:
        rows: Matrices, (n, r, d) float64.

    Returns:
        L, (n, r, min(r, d)), and Q, (n, min(r, d), d).
    """
    first, info = torch.linalg.cholesky_ex(rows @ rows.mT)
    diagonal = first.diagonal(dim1=1, dim2=2)
    has_failed = (info != 0) | (diagonal.amin(1) < _CHOLESKY_RESOLUTION * diagonal.amax(1))
    if bool(has_failed.any()):
        # one matrix at a time, so that no result depends on the other matrices of a stack
        decomposed = [_qr_rows(matrix) if failed else None for matrix, failed in zip(rows, has_failed, strict=True)]
        triangular_stack = [triangular_rows(rows[i : i + 1]) if qr is None else qr for i, qr in enumerate(decomposed)]
        left, right = zip(*triangular_stack, strict=True)
        return torch.cat(left), torch.cat(right)
    identity = torch.eye(rows.shape[1], dtype=rows.dtype).expand_as(first)
    nearly = torch.linalg.solve_triangular(first, identity, upper=False) @ rows
    second = torch.linalg.cholesky(nearly @ nearly.mT)
    return first @ second, torch.linalg.solve_triangular(second, identity, upper=False) @ nearly


def _qr_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `triangular_rows` returns for one matrix (r, d), by a QR decomposition."""
    q, r = torch.linalg.qr(rows.mT)
    return r.mT[None], q.mT[None]


def symmetric_inverse(gram: Tensor) -> Tensor:
    """Return the inverse of the Gram matrix of rows, (k, k) float64, or its pseudoinverse where rows are dependent."""
    cholesky, has_failed = torch.linalg.cholesky_ex(gram)
    pivots = cholesky.diagonal()
    # rounding errors may leave dependent rows a factor with tiny pivots, about 1e-3 where products were in float32
    if bool(has_failed) or (len(gram) and float(pivots.min()) < 2e-3 * float(pivots.max())):
        inverse: Tensor = torch.linalg.pinv(gram, rtol=1e-5, hermitian=True)
        return inverse
    return torch.cholesky_inverse(cholesky)


def block_multiply(matrix: Tensor, blocks: Sequence[slice], weights: Sequence[Tensor]) -> Tensor:
    """Return diag(weights) @ matrix, block by block."""
    if len({weight.shape for weight in weights}) == 1:
        # one batched product: many small ones would mostly be overhead
        product = torch.stack(list(weights)) @ matrix.reshape(len(weights), weights[0].shape[1], matrix.shape[1])
        return product.flatten(0, 1)
    return torch.cat([weight @ matrix[block] for block, weight in zip(blocks, weights, strict=True)])


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix, largest first, and its eigenvectors as columns."""
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return eigenvalues.flip(0), eigenvectors.flip(1)


def numerical_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """Return the number of singular values above max(n, d) · eps · σ₁, for descending values of an n × d matrix."""
    floor = max(shape) * torch.finfo(singular_values.dtype).eps * singular_values[0]
    return int((singular_values > floor).sum())


def psd_root(gram: Tensor) -> Tensor:
    """Return the symmetric square root of positive semi-definite matrices, (…, r, r) float64."""
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    # rounding makes zero eigenvalues slightly negative
    root: Tensor = (eigenvectors * eigenvalues.clamp_min(0).sqrt()[..., None, :]) @ eigenvectors.mT
    return root


def graded_root(gram: Tensor) -> Tensor:
    """Return S with SᵀS = gram for positive semi-definite matrices, (…, r, r) float64.

    It is accurate relative to each entry √(gramᵢᵢ·gramⱼⱼ), where `psd_root` is accurate relative to the largest entry:
    columns of S may differ in norm by many decades.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    # a matrix with a unit diagonal; rows of zeros stay zero
    divisors = torch.where(norms > 0, norms, 1.0)
    return psd_root(gram / divisors[..., None, :] / divisors[..., None]) * norms[..., None, :]


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Return orthonormal rows of the same span, the largest entry of each row positive.

    QR rather than a polar decomposition: rows that are nearly orthonormal keep their order and meaning. The sign
    convention makes the result unique, so that it does not depend on the LAPACK build.

    Args:
        rows: Matrix of full row rank, (k, d) with k ≤ d.
    """
    q, _ = torch.linalg.qr(rows.mT)
    rows = q.mT.contiguous()
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    # not `sign()`: it is 0 for a zero entry
    signs = torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))
    return rows * signs


def orthonormalised(rows: Tensor) -> Tensor:
    """Return nearly orthonormal rows, (k, d), as orthonormal ones of the same order, faster than `orthonormal_rows`."""
    cholesky, has_failed = torch.linalg.cholesky_ex(rows @ rows.mT)
    if bool(has_failed):
        return orthonormal_rows(rows)
    inverse: Tensor = torch.linalg.solve_triangular(cholesky, torch.eye(len(rows), dtype=rows.dtype), upper=False)
    return inverse @ rows


def orthogonal_complement_rows(rows: Tensor, components: Tensor) -> Tensor:
    """Return `rows` made orthonormal and orthogonal to `components`, (m, d).

    Args:
        rows: Rows in general position, (m, d).
        components: Nearly orthonormal rows, (k, d) with k + m ≤ d. They may have been rounded to a narrower dtype.
    """
    exact = orthonormal_rows(components) if components.shape[0] else components
    # twice is enough (Kahan and Parlett): one pass of Gram–Schmidt leaves an error in proportion to the part that it
    # removed
    for _ in range(2):
        rows = rows - (rows @ exact.mT) @ exact
        rows = orthonormal_rows(rows)
    return rows


def dual_rows(components: Tensor) -> Tensor:
    """Return the rows P, (k, d), for which x @ Pᵀ are the least-squares coordinates of x in `components`.

    P equals the components where these are exactly orthonormal. Rounding to a stored dtype leaves them slightly off,
    and the dual rows correct for that: P = (V Vᵀ)⁻¹ V. Where rows are linearly dependent, P is the pseudoinverse.
    """
    # rows that are linearly dependent have no Cholesky factor; `_ex` reports that instead of raising
    cholesky, failed = torch.linalg.cholesky_ex(components @ components.mT)
    if bool(failed):
        pseudoinverse: Tensor = torch.linalg.pinv(components, rtol=1e-6).mT
        return pseudoinverse
    return torch.cholesky_solve(components, cholesky)


def svd_factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product upᵀ @ down that are its singular vectors, scaled with √σ on both sides.

    Row i of both results has the norm √σᵢ; rows beyond the rank of the product are zero.

    Args:
        down: Rows, (…, r, n) float64.
        up: Rows, (…, r, m) float64.
    """
    # an SVD of the r × r core between the two Q factors, not of the m × n product
    (q_down, r_down), (q_up, r_up) = (torch.linalg.qr(rows.mT) for rows in (down, up))
    left, sigma, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    # r may exceed the width of a side, and then the product has fewer singular values than rows
    roots, missing = sigma.sqrt()[..., None], down.shape[-2] - sigma.shape[-1]
    return append_zeros(roots * (right @ q_down.mT), missing), append_zeros(roots * (left.mT @ q_up.mT), missing)


def append_zeros(tensor: Tensor, n: int, dim: int = -2) -> Tensor:
    """Append n zeros along a dimension. Another may be 0, which `torch.nn.functional.pad` of torch 2.6 refuses."""
    shape = list(tensor.shape)
    shape[dim] = n
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def mixing_matrix(r: int) -> Tensor:
    """Return an orthogonal matrix, (r, r) float64, whose entries are all of about the same size.

    It is a Hadamard matrix for the power of two in r, and a discrete Hartley transform for the odd part.
    """
    # the largest power of two that divides r
    power = r & -r
    # Sylvester's construction doubles the matrix at each step
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], dim=1), torch.cat([hadamard, -hadamard], dim=1)])
    positions = torch.arange(r // power, dtype=torch.float64)
    angles = torch.outer(positions, positions) * (2 * math.pi / len(positions))
    # cos + sin: the Hartley transform is a real, symmetric Fourier transform
    return torch.kron(hadamard, angles.cos() + angles.sin()) / math.sqrt(r)


def product_square(left: Tensor, right: Tensor) -> Tensor:
    """Return ‖left @ right‖²_F, float64, through r × r Gram matrices.

    Args:
        left: Matrices, (…, m, r).
        right: Matrices, (…, r, n).
    """
    return _inner_product(left, left, right, right)


def difference_square(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    """Return ‖L·R − L'·R'‖²_F, accurate also where the two products are nearly equal.

    L·R − L'·R' = (L − L')·R + L'·(R − R'), so that no two large numbers are subtracted, as they would be in
    ‖L·R‖² − 2⟨L·R, L'·R'⟩ + ‖L'·R'‖². Where the factors are so much larger than their products that r × r Gram matrices
    lose the digits, as in the factors B·G and G⁻¹·A with an ill-conditioned G, triangular factors take their place.

    Args:
        left: L, (…, m, r).
        right: R, (…, r, n).
        other_left: L', shaped like L. Its columns correspond to those of L, as after rounding.
        other_right: R', shaped like R.
    """
    left_error, right_error = left - other_left, right - other_right
    terms = (
        _inner_products(left_error, left_error, right, right),
        2 * _inner_products(left_error, other_left, right, right_error),
        _inner_products(other_left, other_left, right_error, right_error),
    )
    square = sum((term.sum((-2, -1)) for term in terms[1:]), terms[0].sum((-2, -1))).clamp_min(0)
    cancelled = is_cancelled(square, terms, left.dtype)
    if bool(cancelled.any()):
        columns = torch.cat([left_error[cancelled], other_left[cancelled]], dim=-1)
        rows = torch.cat([right[cancelled], right_error[cancelled]], dim=-2)
        square[cancelled] = triangular_product_square(columns, rows)
    return square


def is_cancelled(square: Tensor, terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return whether the rounding of terms, (…, r, r), computed in `dtype`, exceeds a thousandth of their sum (…)."""
    size = sum((term.abs().sum((-2, -1)) for term in terms[1:]), terms[0].abs().sum((-2, -1)))
    return torch.finfo(dtype).eps * size > _MAX_ROUNDING * square


def triangular_product_square(left: Tensor, right: Tensor) -> Tensor:
    """Return `product_square` through triangular factors: twice the digits of Gram matrices, in several times the time.

    Args:
        left: Matrices, (…, m, r).
        right: Matrices, (…, r, n).
    """
    # QR leaves each column as exact as it was, however its norm differs from those of the others
    core = triangular_factor(left.to(torch.float64)) @ triangular_factor(right.to(torch.float64).mT).mT
    return core.square().sum((-2, -1))


def _inner_product(left: Tensor, other_left: Tensor, right: Tensor, other_right: Tensor) -> Tensor:
    """Return ⟨left @ right, other_left @ other_right⟩, float64, through r × r matrices."""
    return _inner_products(left, other_left, right, other_right).sum((-2, -1))


def _inner_products(left: Tensor, other_left: Tensor, right: Tensor, other_right: Tensor) -> Tensor:
    """Return the terms of `_inner_product`, (…, r, r) float64."""
    # tr(Rᵀ·Lᵀ·L'·R') = tr(Lᵀ·L' · R'·Rᵀ); products in the dtype of the factors, their sum in float64
    return (left.mT @ other_left).to(torch.float64) * (right @ other_right.mT).to(torch.float64)
