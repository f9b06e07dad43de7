"""The update of one layer as a mixture of adapters for each token (Arrow, arXiv 2405.11157).

The score of adapter e for the input x of a module is |x·v_e|, with its prototype v_e (`prototypes`). The adapters with
the n largest scores are weighted by the softmax of their scores. With shared bases V and U, x·Vᵀ gives the scores of
all adapters from k numbers each, and the mixture of their updates is formed in the coordinates of U.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .coefficients import Coefficients
from .int8_rows import as_float
from .layer_update import LayerBases, add_product, add_scaled, project
from .prototypes import ModulePrototypes, module_prototypes


@dataclass(frozen=True, slots=True)
class LayerMixture:
    """Adapters of one layer, ready to be mixed. Their ranks may differ.

    Attributes:
        prototypes: Prototypes of the adapters.
        down: Down coefficients of all adapters, one below the other, (R, k_down) with R the sum of their ranks.
        up: Up coefficients, one beside the other, (k_up, R), with the scalings multiplied into them.
        owners: Index of the adapter of each component, (R,).
        top: Number of adapters per token.
        temperature: Divisor of the scores before the softmax.
        down_residual: Residuals of the down factors, (R, in); None if no adapter has one.
        up_residual: Residuals of the up factors, (out, R), with the scalings; None if no adapter has one.
    """

    prototypes: ModulePrototypes
    down: Tensor
    up: Tensor
    owners: Tensor
    top: int
    temperature: float
    down_residual: Tensor | None = None
    up_residual: Tensor | None = None

    def to(self, device: torch.device) -> "LayerMixture":
        """Return the mixture on another device."""
        down_residual, up_residual = (
            None if residual is None else residual.to(device) for residual in (self.down_residual, self.up_residual)
        )
        return LayerMixture(
            self.prototypes.to(device),
            self.down.to(device),
            self.up.to(device),
            self.owners.to(device),
            self.top,
            self.temperature,
            down_residual,
            up_residual,
        )


def layer_mixture(
    adapters: Sequence[Coefficients], bases: LayerBases, top: int, temperature: float, dtype: torch.dtype
) -> LayerMixture:
    """Return the mixture of adapters that all change one layer.

    Args:
        adapters: Coefficients of each adapter.
        bases: Bases of the layer.
        top: Number of adapters per token. If there are fewer, all of them are mixed.
        temperature: Divisor of the scores before the softmax.
        dtype: Dtype of the products.
    """
    basis_rows = as_float(bases.down, torch.float64), as_float(bases.up, torch.float64)
    ranks = torch.tensor([adapter.rank for adapter in adapters], device=bases.down.device)
    return LayerMixture(
        module_prototypes(adapters, *basis_rows).to(dtype=dtype),
        torch.cat([adapter.down for adapter in adapters]).to(dtype),
        torch.cat([adapter.up.to(dtype) * adapter.scaling for adapter in adapters], dim=1),
        torch.arange(len(adapters), device=ranks.device).repeat_interleave(ranks),
        min(top, len(adapters)),
        temperature,
        _join_residuals([(adapter.down_residual, adapter.rank) for adapter in adapters], dtype),
        _join_up_residuals(adapters, dtype),
    )


def _join_up_residuals(adapters: Sequence[Coefficients], dtype: torch.dtype) -> Tensor | None:
    rows = [
        (None if adapter.up_residual is None else adapter.up_residual.mT * adapter.scaling, adapter.rank)
        for adapter in adapters
    ]
    joined = _join_residuals(rows, dtype)
    return None if joined is None else joined.mT.contiguous()


def _join_residuals(residuals: Sequence[tuple[Tensor | None, int]], dtype: torch.dtype) -> Tensor | None:
    """Join residuals (rank, d), with zeros where an adapter has none; None if none of them has one."""
    present = next((residual for residual, _ in residuals if residual is not None), None)
    if present is None:
        return None
    width = present.shape[1]
    rows = [present.new_zeros(rank, width) if residual is None else residual for residual, rank in residuals]
    return torch.cat(rows).to(dtype)


def add_mixture(output: Tensor, x: Tensor, bases: LayerBases, mixture: LayerMixture) -> Tensor:
    """Add to the output of a layer, at each token, the mixture of the adapters whose prototypes fit its input best.

    Args:
        output: Output of the layer without adapters, (…, out); of a convolution (n, out, …).
        x: Input of the layer, (…, in); of a convolution (n, channels, …), whose positions are the tokens.
        bases: Bases of the layer.
        mixture: The adapters.

    Returns:
        Output with the update, in the dtype of `output`.
    """
    dtype, convolution = mixture.down.dtype, bases.convolution
    x = x.to(dtype)
    projected = project(x, as_float(bases.down, dtype), convolution)
    scores = linear(projected, mixture.prototypes.coordinates)
    if mixture.prototypes.outside is not None:
        scores = scores + project(x, mixture.prototypes.outside, convolution)
    hidden = linear(projected, mixture.down)
    if mixture.down_residual is not None:
        hidden = hidden + project(x, mixture.down_residual, convolution)
    hidden = hidden * token_weights(scores, mixture.top, mixture.temperature)[..., mixture.owners]
    if mixture.up_residual is not None:
        output = add_scaled(output, linear(hidden, mixture.up_residual), 1.0, False, convolution)
    return add_product(output, linear(hidden, mixture.up), as_float(bases.up, dtype), 1.0, False, convolution)


def token_weights(scores: Tensor, top: int, temperature: float) -> Tensor:
    """Return the weight of each adapter for each token, (…, n), which sum to 1.

    Args:
        scores: Products x·v of inputs and prototypes, (…, n). Their signs have no meaning.
        top: Number of adapters per token whose weight is not zero.
        temperature: Divisor of the scores before the softmax.
    """
    largest, indices = scores.abs().topk(top, dim=-1)
    return torch.zeros_like(scores).scatter(-1, indices, (largest / temperature).softmax(-1))
