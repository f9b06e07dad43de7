"""Several adapters of one rank in one module, as two batches of rows; and what one round of a fit asks of them.

What comes out of a round is a sum over adapters, so that results of any two chunks may be added, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import linalg
from .adapter import LoRAFactors

CHUNK = 64
"""Adapters that are taken together, at most."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """delta_weight of adapter i = scaling[i] · up[i].mT @ down[i], (out, in).

    scale: what the rows of adapter i count for in the fit, |scaling| · weight; 0 where it takes no part.
    """

    down: Float[Tensor, "n r n_in"]
    up: Float[Tensor, "n r n_out"]
    scaling: Float[Tensor, " n"]
    scale: Float[Tensor, " n"]

    def __len__(self) -> int:
        return self.down.shape[0]

    def rows(self, side: str) -> Tensor:
        """The rows of one side, (n, r, d)."""
        return self.down if side == "down" else self.up

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Chunk":
        """The same with its rows in `dtype`, or on another device."""
        return Chunk(
            self.down.to(device, dtype), self.up.to(device, dtype), self.scaling.to(device), self.scale.to(device)
        )

    def part(self, start: int, stop: int) -> "Chunk":
        """Some of the adapters, each row's numbers side by side."""
        # rows of `up` lie across each other: what is done with them again and again is faster on a copy
        return Chunk(*(tensor[start:stop].contiguous() for tensor in (self.down, self.up, self.scaling, self.scale)))


@dataclass(frozen=True, slots=True)
class CoefficientChunk:
    """The same adapters in the bases of the module.

    payload: what lies in files where that is not the same numbers (`codec.storage`), one after the other, on the CPU.
    """

    down: Float[Tensor, "n r k_down"]
    up: Float[Tensor, "n k_up r"]
    scaling: Float[Tensor, " n"]
    payload: Mapping[str, Tensor] | None = None

    def to(self, device: torch.device) -> "CoefficientChunk":
        """The same on another device."""
        return CoefficientChunk(self.down.to(device), self.up.to(device), self.scaling.to(device), self.payload)


def chunk(factors: Sequence[LoRAFactors], weights: Sequence[float]) -> Chunk:
    """Factors of one rank, side by side, in their widest dtype; weight 0 for those that take no part in the fit."""
    first = factors[0]
    dtype = first.spec.dtype
    for one in factors[1:]:
        dtype = torch.promote_types(dtype, one.spec.dtype)
    rank, n = first.down.shape[0], len(factors)
    down = torch.empty(n, rank, first.down.shape[1], dtype=dtype)
    # columns side by side: turning each adapter's `up` around would cost more than reading it
    columns = torch.empty(first.up.shape[0], n * rank, dtype=dtype)
    for index, one in enumerate(factors):
        down[index] = one.down
        columns[:, index * rank : (index + 1) * rank] = one.up
    scaling = torch.tensor([one.scaling for one in factors], dtype=torch.float64)
    return Chunk(
        down=down,
        up=columns.mT.view(n, rank, -1),
        scaling=scaling,
        scale=scaling.abs() * torch.tensor(weights, dtype=torch.float64),
    )


def factors(one: Chunk, index: int) -> LoRAFactors:
    """One of the adapters by itself."""
    return LoRAFactors(one.down[index], one.up[index].mT, float(one.scaling[index]))


def joined(parts: Sequence[CoefficientChunk]) -> CoefficientChunk:
    """Adapters of several parts, one after the other."""
    payloads = [part.payload for part in parts if part.payload is not None]
    return CoefficientChunk(
        torch.cat([part.down for part in parts]),
        torch.cat([part.up for part in parts]),
        torch.cat([part.scaling for part in parts]),
        {name: torch.cat([one[name] for one in payloads]) for name in payloads[0]} if payloads else None,
    )


def even(one: Chunk) -> Chunk:
    """The same updates in the factors of their singular value decompositions (`linalg.even_rows`), float64."""
    down, up = linalg.even_rows(one.down.to(torch.float64), one.up.to(torch.float64))
    return Chunk(down, up, one.scaling, one.scale)


def grams(one: Chunk, dtype: torch.dtype = torch.float64) -> tuple[Float[Tensor, "n r r"], Float[Tensor, "n r r"]]:
    """Inner products of each adapter's own rows, down and up, multiplied in `dtype`, float64."""
    down, up = (one.rows(side).to(dtype) for side in ("down", "up"))
    return (down @ down.mT).to(torch.float64), (up @ up.mT).to(torch.float64)


def norms(one: Chunk, side: str) -> Float[Tensor, " n"]:
    """Of each adapter's factor, float64; inf, or nan, where the dtype of the rows has no room for squares."""
    rows = one.rows(side)
    return (rows @ rows.mT).diagonal(dim1=1, dim2=2).to(torch.float64).sum(1).sqrt()


def multiply(
    one: Chunk, side: str, inner: Float[Tensor, "n r r"], columns: Float[Tensor, "d b"]
) -> Float[Tensor, "d b"]:
    """Σ rowsᵀ · inner · rows · columns, in the dtype of the columns."""
    return gather(one, side, inner, project(one, side, columns))


def project(one: Chunk, side: str, columns: Float[Tensor, "d b"]) -> Float[Tensor, "n r b"]:
    """The rows in the directions of the columns, in the dtype of the columns."""
    rows = one.rows(side).to(columns.dtype)
    flat = rows.flatten(0, 1)
    # a product is faster by half with its large matrix as it lies in memory
    found = flat @ columns if flat.is_contiguous() else (columns.mT @ flat.mT).mT
    return found.reshape(*rows.shape[:2], -1)


def gather(
    one: Chunk, side: str, inner: Float[Tensor, "n r r"], projected: Float[Tensor, "n r b"]
) -> Float[Tensor, "d b"]:
    """Σ rowsᵀ · inner · projected: the second half of `multiply`."""
    flat = one.rows(side).to(projected.dtype).flatten(0, 1)
    weighted = (inner.to(projected.dtype) @ projected).flatten(0, 1)
    # as in `project`
    return (weighted.mT @ flat).mT if flat.is_contiguous() else flat.mT @ weighted
