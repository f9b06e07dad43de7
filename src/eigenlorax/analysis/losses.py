"""What each adapter of a module loses: in the pack, in other bases, and when it is stored in another way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import subspace as spaces
from ..adapter import LoRAFactors
from ..chunks import chunk
from ..subspace import Coefficients, ModuleBases
from .stack import Stack, captured, difference_squares, gram, roots

BLOCK = 64
"""Numbers that share one scale where LoRA factors are rounded to few bits."""
SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """Squared norms of each adapter in one module: of what the pack loses of D, of A and of B, and of A and B."""

    delta: Tensor
    down: Tensor
    up: Tensor
    down_total: Tensor
    up_total: Tensor


def stored(
    one: Stack,
    factors: Sequence[LoRAFactors | None],
    coefficients: Sequence[Coefficients | None],
    bases: ModuleBases,
) -> Stored:
    """What comes back from stored coefficients and bases beside what was there. `one` is the stack of `factors`."""
    down, up = torch.zeros_like(one.down), torch.zeros_like(one.up)
    for index, (original, found) in enumerate(zip(factors, coefficients, strict=True)):
        if original is None or found is None:
            continue
        # what `project` moved from one factor to the other comes back
        shift = float(spaces.shifts(chunk([original], [0.0]).to(torch.float64), found.down.dtype))
        rank = found.rank
        plain = spaces.reconstruct(found, bases)
        down[index, :rank] = plain.down * 2.0**shift
        up[index, :rank] = plain.up.mT * (2.0**-shift * found.scaling)
    unscaled = torch.where(one.scaling == 0, 0.0, one.scaling.square().reciprocal())
    return Stored(
        delta=difference_squares(one, down, up),
        down=(one.down - down).square().sum((1, 2)),
        up=(one.up - up).square().sum((1, 2)) * unscaled,
        down_total=one.down.square().sum((1, 2)),
        up_total=one.up.square().sum((1, 2)) * unscaled,
    )


def kept(one: Stack, down_basis: Float[Tensor, "k n_in"], up_basis: Float[Tensor, "j n_out"]) -> Float[Tensor, " n"]:
    """‖P_U D P_V‖² of each adapter in orthonormal bases."""
    return captured(one.down @ down_basis.mT, one.up @ up_basis.mT)


def kept_by_k(
    one: Stack, down_basis: Float[Tensor, "k n_in"], up_basis: Float[Tensor, "j n_out"], grid: Sequence[int]
) -> Float[Tensor, "n g"]:
    """The same in the first k rows of both bases, for each k of an ascending grid; in all of a basis that has fewer."""
    down, up = one.down @ down_basis.mT, one.up @ up_basis.mT
    found, start = [], 0
    down_gram = torch.zeros(len(one), down.shape[1], down.shape[1], dtype=torch.float64)
    up_gram = torch.zeros_like(down_gram)
    for k in grid:
        down_gram = down_gram + gram(down[:, :, start:k])
        up_gram = up_gram + gram(up[:, :, start:k])
        found.append((down_gram * up_gram).sum((1, 2)).clamp_min(0))
        start = k
    return torch.stack(found, dim=1)


def random_rows(k: int, dimension: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Orthonormal rows of a random subspace."""
    rows, _ = torch.linalg.qr(torch.randn(dimension, k, generator=generator, dtype=torch.float64))
    orthonormal: Tensor = rows.mT
    return orthonormal


def singular_squares(one: Stack) -> Float[Tensor, "n r"]:
    """Squared singular values of each update, descending: the eigenvalues of an r × r matrix."""
    root = roots(one.down)
    found: Tensor = torch.linalg.eigvalsh(root @ gram(one.up) @ root)
    return found.flip(1).clamp_min(0)


def rounded_squares(one: Stack, bits: int) -> Float[Tensor, " n"]:
    """‖D − D'‖² where both factors are rounded to `bits` bits, each block of `BLOCK` numbers of a row to one scale."""
    return difference_squares(one, rounded_rows(one.down, bits), rounded_rows(one.up, bits))


def rounded_rows(rows: Tensor, bits: int) -> Tensor:
    """Rows of whole adapters, (n, r, d), rounded so."""
    levels = 2 ** (bits - 1) - 1
    n, r, d = rows.shape
    blocks = torch.nn.functional.pad(rows, (0, -d % BLOCK)).reshape(n, r, -1, BLOCK)
    # bfloat16 has the range of what it scales, and few digits are enough for a scale
    scale = (blocks.abs().amax(-1, keepdim=True) / levels).to(torch.bfloat16).to(torch.float64)
    steps = (blocks / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-levels, levels)
    found: Tensor = (steps * scale).reshape(n, r, -1)[:, :, :d]
    return found


def rounded_bytes(rank: int, n_out: int, n_in: int, bits: int) -> int:
    """Bytes of one module's factors so rounded, scales with them."""
    blocks = -(-n_in // BLOCK) + -(-n_out // BLOCK)
    return rank * ((bits * (n_in + n_out) + 7) // 8 + SCALE_BYTES * blocks)


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
