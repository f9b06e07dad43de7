"""An adapter as a LoRA on the cores of a model that contains the subspace. Nothing here imports vLLM.

Such a model has a *core* for each module: a linear layer, k_down → k_up, between the two bases, whose weight is zero.
An adapter's coefficients are a LoRA on it: A (r, k_down), B (k_up, r), in place of r · (in + out) numbers.
"""

import json
from dataclasses import replace

import torch

from ...core.adapter import Adapter, LoRAFactors, from_factors
from ...core.coefficients import Coefficients, pad_coefficients
from ...errors import ServingError
from ...formats import lora_config
from ...pack.manifest import SubspaceInfo
from ...pack.packed_adapter import PackedAdapter


def core_name(fingerprint: str) -> str:
    """Return the last part of the cores' names, which identifies the subspace, so that other adapters do not fit."""
    return f"eigen_core_{fingerprint[:12]}"


def lora_on_cores(packed: PackedAdapter, served: SubspaceInfo) -> Adapter:
    """Return an adapter's coefficients as a LoRA on the cores of a model that contains the subspace `served`.

    Scalings are multiplied into B, so that one config is valid for all modules. A rank above the number of components
    is reduced to it, without changing the update.

    Raises:
        ServingError: The adapter has residuals.
    """
    core = core_name(served.fingerprint)
    modules = {}
    for module, coefficients in packed.coefficients.items():
        if coefficients.has_residual:
            raise ServingError(
                f"adapter {packed.name!r} has a residual in {module!r}, which cores cannot represent. "
                "Serve it on demand, without a shared basis."
            )
        subspace_name = packed.subspace_names[module]
        sizes = served.modules[subspace_name]
        modules[f"{subspace_name}.{core}"] = _on_core(coefficients, sizes["down"].k, sizes["up"].k)
    config = json.loads(packed.source_config)
    lora = from_factors(packed.name, modules, base_model=config.get("base_model_name_or_path"), heads=packed.heads)
    return replace(lora, source_config=lora_config.derived(lora, config))


def _on_core(coefficients: Coefficients, k_down: int, k_up: int) -> LoRAFactors:
    """Return one module's coefficients as LoRA factors, with zeros for components by which the bases have grown."""
    down, up = coefficients.down.float(), coefficients.up.float() * coefficients.scaling
    n_down, n_up = down.shape[1], up.shape[0]
    if coefficients.rank > min(n_down, n_up):
        product = (up.double() @ down.double()).float()
        down, up = (torch.eye(n_down), product) if n_down <= n_up else (product, torch.eye(n_up))
    wide = pad_coefficients(Coefficients(down, up, 1.0), k_down, k_up)
    return LoRAFactors(wide.down, wide.up, wide.scaling)
