"""Squared errors of each adapter in one module: in the pack, in other bases, truncated, or rounded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ...core import projection
from ...core.adapter import LoRAFactors
from ...core.batch import ModuleBatch, captured_squares, difference_squares, gram_matrices, gram_roots, stack_factors
from ...core.coefficients import Coefficients
from ...core.subspace import ModuleBases

BLOCK = 64
"""Number of elements that share one scale when LoRA factors are rounded to few bits."""
SCALE_BYTES = 2
_SHORTER = (1.0, 0.95, 0.9, 0.85, 0.8)
_CLIPS = {2: (1.0, 0.8, 0.7, 0.6, 0.5), 3: _SHORTER, 4: _SHORTER, 5: _SHORTER}
"""Clipping thresholds to try, relative to the largest number of a block, by bits; with more bits nothing is clipped."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Squared errors of n adapters in one module of the pack.

    Attributes:
        delta: Squared error of the update D, (n,).
        down, up: Squared errors of A and of B, (n,).
        down_total, up_total: Squared norms of A and of B, (n,).
    """

    delta: Tensor
    down: Tensor
    up: Tensor
    down_total: Tensor
    up_total: Tensor


def stored(
    batch: ModuleBatch,
    factors: Sequence[LoRAFactors | None],
    coefficients: Sequence[Coefficients | None],
    bases: ModuleBases,
) -> Stored:
    """Compare the adapters reconstructed from stored coefficients and bases with the originals.

    The errors of A and of B alone are meaningful only for storages that keep the factors.

    Args:
        batch: The original factors, padded.
        factors: The original factors; None for an adapter without the module.
        coefficients: Stored coefficients; None for an adapter without the module.
        bases: Stored bases of the module.
    """
    # diagonal cores have a larger rank than the original
    n_extra = max([0, *(c.rank - batch.down.shape[1] for c in coefficients if c is not None)])
    batch = replace(batch, down=pad(batch.down, (0, 0, 0, n_extra)), up=pad(batch.up, (0, 0, 0, n_extra)))
    down, up = torch.zeros_like(batch.down), torch.zeros_like(batch.up)
    for index, (original, stored_coefficients) in enumerate(zip(factors, coefficients, strict=True)):
        if original is None or stored_coefficients is None:
            continue
        # `project` moves a power of two from one factor to the other
        shift = float(
            projection.balance_exponents(
                stack_factors([original], [0.0]).to(torch.float64), stored_coefficients.down.dtype
            )
        )
        rank = stored_coefficients.rank
        plain = projection.reconstruct(stored_coefficients, bases)
        down[index, :rank] = plain.down * 2.0**shift
        up[index, :rank] = plain.up.mT * (2.0**-shift * stored_coefficients.scaling)
    unscaled = torch.where(batch.applied_scaling == 0, 0.0, batch.applied_scaling.square().reciprocal())
    return Stored(
        delta=difference_squares(batch, down, up),
        down=(batch.down - down).square().sum((1, 2)),
        up=(batch.up - up).square().sum((1, 2)) * unscaled,
        down_total=batch.down.square().sum((1, 2)),
        up_total=batch.up.square().sum((1, 2)) * unscaled,
    )


def kept(
    batch: ModuleBatch, down_basis: Float[Tensor, "k n_in"], up_basis: Float[Tensor, "j n_out"]
) -> Float[Tensor, " n"]:
    """Return the squared norm ‖P_U D P_V‖² of each adapter in orthonormal bases."""
    return captured_squares(batch.down @ down_basis.mT, batch.up @ up_basis.mT)


def kept_by_k(
    batch: ModuleBatch, down_basis: Float[Tensor, "k n_in"], up_basis: Float[Tensor, "j n_out"], grid: Sequence[int]
) -> Float[Tensor, "n g"]:
    """Return `kept` in at most k leading components of both bases, for each k of an ascending grid."""
    return captured_by_k(batch.down @ down_basis.mT, batch.up @ up_basis.mT, grid)


def captured_by_k(
    down: Float[Tensor, "n r k"], up: Float[Tensor, "n r j"], grid: Sequence[int]
) -> Float[Tensor, "n g"]:
    """Return `kept_by_k` from factors that are already projected on the bases."""
    squares, start = [], 0
    down_gram = torch.zeros(len(down), down.shape[1], down.shape[1], dtype=torch.float64)
    up_gram = torch.zeros_like(down_gram)
    for k in grid:
        down_gram = down_gram + gram_matrices(down[:, :, start:k])
        up_gram = up_gram + gram_matrices(up[:, :, start:k])
        squares.append((down_gram * up_gram).sum((1, 2)).clamp_min(0))
        start = k
    return torch.stack(squares, dim=1)


def random_rows(k: int, dimension: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Return orthonormal rows of a random subspace."""
    rows, _ = torch.linalg.qr(torch.randn(dimension, k, generator=generator, dtype=torch.float64))
    orthonormal: Tensor = rows.mT
    return orthonormal


def singular_squares(batch: ModuleBatch) -> Float[Tensor, "n r"]:
    """Return the squared singular values of each update, descending, as eigenvalues of an r × r matrix."""
    root = gram_roots(batch.down)
    squares: Tensor = torch.linalg.eigvalsh(root @ gram_matrices(batch.up) @ root)
    return squares.flip(1).clamp_min(0)


def rounded_squares(batch: ModuleBatch, bits: int) -> Float[Tensor, " n"]:
    """Return the squared error ‖D − D'‖² if both factors are rounded by `rounded_rows`."""
    return difference_squares(batch, rounded_rows(batch.down, bits), rounded_rows(batch.up, bits))


def rounded_rows(rows: Float[Tensor, "n r d"], bits: int) -> Float[Tensor, "n r d"]:
    """Round the rows of each adapter to float16 (16 bits), or to integers with one scale per block (2 to 8 bits).

    A block is `BLOCK` numbers of a row. Its scale is a float16 with a sign, so that the largest number uses the most
    negative integer, which has no positive counterpart. The best of the full scale and some clipped ones is chosen.
    With 2 bits, the integers are shifted by one half. Rows are first scaled to about 1 by a power of two.

    Args:
        rows: Rows of n adapters.
        bits: Bits per number: 16, or 2 to 8.
    """
    size = torch.exp2(rows.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny).log2().floor())
    rows = rows / size
    if bits == 16:
        return rows.to(torch.float16).to(rows.dtype) * size
    n, r, d = rows.shape
    blocks = torch.nn.functional.pad(rows, (0, -d % BLOCK)).reshape(n, r, -1, BLOCK)
    n_codes = 2 ** (bits - 1)
    shift = 0.5 if bits == 2 else 0.0
    full_scale = -blocks.gather(3, blocks.abs().argmax(3, keepdim=True)) / (n_codes - shift)
    scale, squared_error = torch.zeros_like(full_scale), blocks.square().sum(3, keepdim=True)
    for clip in _CLIPS.get(bits, (1.0,)):
        clipped = (clip * full_scale).to(torch.float16).to(rows.dtype)
        clipped_error = _on_scale(blocks, clipped, shift, n_codes).sub_(blocks).square_().sum(3, keepdim=True)
        scale = torch.where(clipped_error < squared_error, clipped, scale)
        squared_error = torch.minimum(clipped_error, squared_error)
    reconstructed: Tensor = _on_scale(blocks, scale, shift, n_codes).reshape(n, r, -1)[:, :, :d] * size
    return reconstructed


def _on_scale(blocks: Tensor, scale: Tensor, shift: float, n_codes: int) -> Tensor:
    """Return blocks rounded to the integers from -n_codes to n_codes - 1, shifted, times their scale."""
    # in place: blocks are the largest tensors here
    codes = (blocks / scale.where(scale != 0, torch.ones_like(scale))).sub_(shift).round_()
    return codes.clamp_(-n_codes, n_codes - 1).add_(shift).mul_(scale)


def rounded_bytes(rank: int, n_out: int, n_in: int, bits: int) -> int:
    """Return the bytes of one module's rounded factors with their scales."""
    return rank * pair_bytes(n_out, n_in, bits)


def pair_bytes(n_out: int, n_in: int, bits: int) -> int:
    """Return the bytes of one component: one rounded row of each factor, with scales."""
    scales = 0 if bits == 16 else -(-n_in // BLOCK) + -(-n_out // BLOCK)
    return (bits * (n_in + n_out) + 7) // 8 + SCALE_BYTES * scales


def truncated(values: Sequence[Tensor], costs: Sequence[int], budget: float) -> float:
    """Return the squared norm that is kept of one adapter truncated by SVD to a number of bytes.

    Components with the largest squared norm per byte are taken first, while they are within the budget.

    Args:
        values: Squared singular values, by module.
        costs: Bytes of one component, by module.
        budget: Maximum number of bytes.
    """
    total = 0.0
    for value, cost in _by_gain(values, costs):
        if value > 0 and cost <= budget:
            total += value
            budget -= cost
    return total


def truncated_in_sample(values: Sequence[Tensor], costs: Sequence[int], budget: float) -> float:
    """Return `truncated` of some modules of an adapter, with their share of the bytes.

    A part of the last component is taken too: the bytes that are left over in few modules would buy components in
    other modules.
    """
    total = 0.0
    for value, cost in _by_gain(values, costs):
        if cost >= budget:
            return total + value * budget / cost
        total += value
        budget -= cost
    return total


def _by_gain(values: Sequence[Tensor], costs: Sequence[int]) -> list[tuple[float, int]]:
    """Return (squared norm, bytes) of all components, the largest squared norm per byte first."""
    candidates = [
        (float(value) / cost, float(value), cost) for row, cost in zip(values, costs, strict=True) for value in row
    ]
    return [(value, cost) for _, value, cost in sorted(candidates, reverse=True)]
