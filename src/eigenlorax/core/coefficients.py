"""Adapters as coefficients in the bases of a module: one adapter, or a batch of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from .linalg import append_zeros


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One module of one adapter in its two bases, V (down) and U (up).

    delta_weight = scaling · (U.mT @ up + up_residual) @ (down @ V + down_residual).

    The rank may differ from the one that the adapter was trained with.

    Attributes:
        down: Coefficients of the down factor's rows.
        up: Coefficients of the up factor's columns.
        scaling: LoRA scaling, alpha / r or alpha / √r.
        kernel: Kernel size of a convolution; empty for a linear module.
        down_residual: Part of the down factor that V does not represent; None where it is not stored.
        up_residual: Part of the up factor that U does not represent; None where it is not stored.
    """

    down: Float[Tensor, "r k_down"]
    up: Float[Tensor, "k_up r"]
    scaling: float
    kernel: tuple[int, ...] = ()
    down_residual: Float[Tensor, "r n_in"] | None = None
    up_residual: Float[Tensor, "n_out r"] | None = None

    @property
    def rank(self) -> int:
        """Rank r of the coefficients."""
        return self.down.shape[0]

    @property
    def has_residual(self) -> bool:
        """True if a residual is stored beside the coefficients of either side."""
        return self.down_residual is not None or self.up_residual is not None

    def residual(self, side: str) -> Tensor | None:
        """Return the residual of one side, shaped as the factor; None where none is stored."""
        return self.down_residual if side == "down" else self.up_residual

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, residuals included."""
        tensors = (self.down, self.up, self.down_residual, self.up_residual)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class CoefficientBatch:
    """Coefficients of several adapters in one module.

    Attributes:
        down: Coefficients of the down factors' rows.
        up: Coefficients of the up factors' columns.
        scaling: LoRA scaling of each adapter.
        payload: Tensors that a file stores in place of `down` and `up`, such as integers and their scales, each with
            the adapters along its first dimension and on the CPU. None where the coefficients are stored as they are.
    """

    down: Float[Tensor, "n r k_down"]
    up: Float[Tensor, "n k_up r"]
    scaling: Float[Tensor, " n"]
    payload: Mapping[str, Tensor] | None = None

    def to(self, device: torch.device) -> "CoefficientBatch":
        """Return the batch on `device`; the payload stays on the CPU."""
        return CoefficientBatch(self.down.to(device), self.up.to(device), self.scaling.to(device), self.payload)


def join_batches(batches: Sequence[CoefficientBatch]) -> CoefficientBatch:
    """Return one batch with the adapters of all `batches`, in order. Either all of them have a payload, or none."""
    payloads = [batch.payload for batch in batches if batch.payload is not None]
    return CoefficientBatch(
        torch.cat([batch.down for batch in batches]),
        torch.cat([batch.up for batch in batches]),
        torch.cat([batch.scaling for batch in batches]),
        {name: torch.cat([payload[name] for payload in payloads]) for name in payloads[0]} if payloads else None,
    )


def pad_coefficients(coefficients: Coefficients, k_down: int, k_up: int) -> Coefficients:
    """Return the coefficients padded with zeros to `k_down` and `k_up` components.

    A subspace only grows by appending components, so zeros leave the update as it was.

    Raises:
        ShapeError: The coefficients have more than `k_down` or `k_up` components.
    """
    more_down, more_up = k_down - coefficients.down.shape[1], k_up - coefficients.up.shape[0]
    if not (more_down or more_up):
        return coefficients
    if min(more_down, more_up) < 0:
        raise ShapeError(
            f"coefficients of {coefficients.down.shape[1]} and {coefficients.up.shape[0]} components are wider than "
            f"their bases, which have {k_down} and {k_up}."
        )
    # `down` grows by columns and `up` by rows: their component axes
    return replace(
        coefficients,
        down=append_zeros(coefficients.down, more_down, dim=-1),
        up=append_zeros(coefficients.up, more_up),
    )
