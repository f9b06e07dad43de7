"""What each adapter of a module loses: in the pack, in other bases, and when it is stored in another way."""

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
"""Numbers that share one scale where LoRA factors are rounded to few bits."""
SCALE_BYTES = 2
_SHORTER = (1.0, 0.95, 0.9, 0.85, 0.8)
_CLIPS = {2: (1.0, 0.8, 0.7, 0.6, 0.5), 3: _SHORTER, 4: _SHORTER, 5: _SHORTER}
"""Shares of a block's largest number that its scale may stop at, by bits; all of it with more of them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Squared norms of each adapter in one module: of what the pack loses of D, of A and of B, and of A and B."""

    delta: Tensor
    down: Tensor
    up: Tensor
    down_total: Tensor
    up_total: Tensor


def stored(
    one: ModuleBatch,
    factors: Sequence[LoRAFactors | None],
    coefficients: Sequence[Coefficients | None],
    bases: ModuleBases,
) -> Stored:
    """What comes back from stored coefficients and bases beside what was there. `one` is the stack of `factors`.

    What is lost of A and of B alone means something where coefficients are of the adapters' own factors.
    """
    # what comes back between paired rows has a rank of its own
    more = max([0, *(c.rank - one.down.shape[1] for c in coefficients if c is not None)])
    one = replace(one, down=pad(one.down, (0, 0, 0, more)), up=pad(one.up, (0, 0, 0, more)))
    down, up = torch.zeros_like(one.down), torch.zeros_like(one.up)
    for index, (original, found) in enumerate(zip(factors, coefficients, strict=True)):
        if original is None or found is None:
            continue
        # what `project` moved from one factor to the other comes back
        shift = float(
            projection.balance_exponents(stack_factors([original], [0.0]).to(torch.float64), found.down.dtype)
        )
        rank = found.rank
        plain = projection.reconstruct(found, bases)
        down[index, :rank] = plain.down * 2.0**shift
        up[index, :rank] = plain.up.mT * (2.0**-shift * found.scaling)
    unscaled = torch.where(one.applied_scaling == 0, 0.0, one.applied_scaling.square().reciprocal())
    return Stored(
        delta=difference_squares(one, down, up),
        down=(one.down - down).square().sum((1, 2)),
        up=(one.up - up).square().sum((1, 2)) * unscaled,
        down_total=one.down.square().sum((1, 2)),
        up_total=one.up.square().sum((1, 2)) * unscaled,
    )


def kept(
    one: ModuleBatch, down_basis: Float[Tensor, "k n_in"], up_basis: Float[Tensor, "j n_out"]
) -> Float[Tensor, " n"]:
    """‖P_U D P_V‖² of each adapter in orthonormal bases."""
    return captured_squares(one.down @ down_basis.mT, one.up @ up_basis.mT)


def kept_by_k(
    one: ModuleBatch, down_basis: Float[Tensor, "k n_in"], up_basis: Float[Tensor, "j n_out"], grid: Sequence[int]
) -> Float[Tensor, "n g"]:
    """The same in the first k rows of both bases, for each k of an ascending grid; in all of a basis that has fewer."""
    return captured_by_k(one.down @ down_basis.mT, one.up @ up_basis.mT, grid)


def captured_by_k(
    down: Float[Tensor, "n r k"], up: Float[Tensor, "n r j"], grid: Sequence[int]
) -> Float[Tensor, "n g"]:
    """The same from the rows' coordinates in the bases."""
    found, start = [], 0
    down_gram = torch.zeros(len(down), down.shape[1], down.shape[1], dtype=torch.float64)
    up_gram = torch.zeros_like(down_gram)
    for k in grid:
        down_gram = down_gram + gram_matrices(down[:, :, start:k])
        up_gram = up_gram + gram_matrices(up[:, :, start:k])
        found.append((down_gram * up_gram).sum((1, 2)).clamp_min(0))
        start = k
    return torch.stack(found, dim=1)


def random_rows(k: int, dimension: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Orthonormal rows of a random subspace."""
    rows, _ = torch.linalg.qr(torch.randn(dimension, k, generator=generator, dtype=torch.float64))
    orthonormal: Tensor = rows.mT
    return orthonormal


def singular_squares(one: ModuleBatch) -> Float[Tensor, "n r"]:
    """Squared singular values of each update, descending: the eigenvalues of an r × r matrix."""
    root = gram_roots(one.down)
    found: Tensor = torch.linalg.eigvalsh(root @ gram_matrices(one.up) @ root)
    return found.flip(1).clamp_min(0)


def rounded_squares(one: ModuleBatch, bits: int) -> Float[Tensor, " n"]:
    """‖D − D'‖² where both factors are rounded to `bits` bits, each block of `BLOCK` numbers of a row to one scale."""
    return difference_squares(one, rounded_rows(one.down, bits), rounded_rows(one.up, bits))


def rounded_rows(rows: Float[Tensor, "n r d"], bits: int) -> Float[Tensor, "n r d"]:
    """Rows of whole adapters rounded so: to float16 by 16 bits, to whole steps of each block by 2 to 8.

    A block's largest number takes the one code that has no counterpart of the other sign, and its scale, a float16 with
    a sign, is the best of that and some shorter ones: with 2 bits, the steps lie at halves. Each adapter's rows are
    brought to a size near 1 first, by a power of two.
    """
    size = torch.exp2(rows.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny).log2().floor())
    rows = rows / size
    if bits == 16:
        return rows.to(torch.float16).to(rows.dtype) * size
    n, r, d = rows.shape
    blocks = torch.nn.functional.pad(rows, (0, -d % BLOCK)).reshape(n, r, -1, BLOCK)
    most = 2 ** (bits - 1)
    half = 0.5 if bits == 2 else 0.0
    largest = -blocks.gather(3, blocks.abs().argmax(3, keepdim=True)) / (most - half)
    best, least = torch.zeros_like(blocks), blocks.square().sum(3, keepdim=True)
    for clip in _CLIPS.get(bits, (1.0,)):
        scale = (clip * largest).to(torch.float16).to(rows.dtype)
        steps = (blocks / scale.where(scale != 0, torch.ones_like(scale)) - half).round_().clamp_(-most, most - 1)
        tried = (steps + half) * scale
        lost = (tried - blocks).square().sum(3, keepdim=True)
        best, least = torch.where(lost < least, tried, best), torch.minimum(lost, least)
    found: Tensor = best.reshape(n, r, -1)[:, :, :d] * size
    return found


def rounded_bytes(rank: int, n_out: int, n_in: int, bits: int) -> int:
    """Bytes of one module's factors so rounded, scales with them."""
    return rank * pair_bytes(n_out, n_in, bits)


def pair_bytes(n_out: int, n_in: int, bits: int) -> int:
    """Those of one row of either factor."""
    scales = 0 if bits == 16 else -(-n_in // BLOCK) + -(-n_out // BLOCK)
    return (bits * (n_in + n_out) + 7) // 8 + SCALE_BYTES * scales


def truncated(values: Sequence[Tensor], costs: Sequence[int], budget: float) -> float:
    """Squared norm that is kept of one adapter cut by SVD to a number of bytes.

    values: squared singular values of each module; costs: bytes of one singular direction in each. The directions that
    keep most for a byte are taken first, as long as they fit.
    """
    found = [
        (float(value) / cost, float(value), cost) for row, cost in zip(values, costs, strict=True) for value in row
    ]
    total = 0.0
    for _, value, cost in sorted(found, reverse=True):
        if value > 0 and cost <= budget:
            total += value
            budget -= cost
    return total
