"""Requests in which each token of each layer uses a mixture of adapters."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.nn.functional import pad

from ...core.coefficients import Coefficients
from ...core.layer_update import LayerBases, LayerCoefficients, without_autograd
from ...core.token_mixture import LayerMixture, layer_mixture
from .bank_adapter import BankAdapter
from .requests import RequestPlan


def plan_mixture(
    adapters: Sequence[BankAdapter],
    bases: Mapping[str, LayerBases],
    *,
    top: int,
    temperature: float,
    dtype: torch.dtype,
) -> RequestPlan:
    """Return the plan of a request in which each token mixes the adapters whose prototypes fit it best.

    In a module that some adapters do not change, the others are mixed.

    Args:
        adapters: The adapters, at least one.
        bases: Bases by module name in the subspace.
        top: Number of adapters per token.
        temperature: Divisor of the scores before the softmax.
        dtype: Dtype of the products.
    """
    by_module: dict[str, list[Coefficients]] = {}
    with without_autograd(adapters[0].flat.device):
        for adapter in adapters:
            for module, coefficients in adapter.coefficients(dtype).items():
                by_module.setdefault(module, []).append(_with_residual(coefficients))
        mix = partial(layer_mixture, top=top, temperature=temperature, dtype=dtype)
        mixtures: dict[str, LayerMixture] = {
            module: mix(members, bases[module].to(members[0].down.device)) for module, members in by_module.items()
        }
    return RequestPlan(mixtures=mixtures)


def _with_residual(layer: LayerCoefficients) -> Coefficients:
    """Return the coefficients of one adapter with its residuals padded to all components."""
    assert layer.up is not None
    rank = len(layer.down)
    down_residual = up_residual = None
    for residual in layer.residuals:
        if residual.down is not None:
            down_residual = pad(residual.down, (0, 0, 0, rank - len(residual.down)))
        if residual.up is not None:
            missing = rank - residual.up_start - residual.up.shape[1]
            up_residual = pad(residual.up, (residual.up_start, missing))
    return Coefficients(layer.down, layer.up, layer.scaling, (), down_residual, up_residual)
