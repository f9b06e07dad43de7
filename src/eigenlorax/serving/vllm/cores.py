"""An adapter as a LoRA on the cores of a model that holds the subspace itself. Nothing here imports vLLM.

Such a model has a *core* for each module: a linear layer, k_down → k_up, between the two bases, whose weight is zero.
An adapter's coefficients are a LoRA of it: A (r, k_down), B (k_up, r), in place of r · (in + out) numbers.
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
    """The last part of the cores' names. It names the subspace, so that coefficients in another one never fit."""
    return f"eigen_core_{fingerprint[:12]}"


def on_cores(packed: PackedAdapter, served: SubspaceInfo) -> Adapter:
    """An adapter's coefficients as a LoRA of the cores of a model that holds the subspace `served`.

    Scalings are in B, so that one config holds for all modules. A rank above the number of components that the
    coefficients are on is cut to it, exactly. `ServingError` for one with a rest, for which cores have no place.
    """
    core = core_name(served.fingerprint)
    modules = {}
    for module, coefficients in packed.coefficients.items():
        if coefficients.has_residual:
            raise ServingError(
                f"adapter {packed.name!r} has a rest beside its coefficients in {module!r}, which cores cannot hold. "
                "Serve it expanded, as Pack.adapter gives it."
            )
        place = packed.places[module]
        sizes = served.modules[place]
        modules[f"{place}.{core}"] = _on_core(coefficients, sizes["down"].k, sizes["up"].k)
    source = json.loads(packed.source_config)
    found = from_factors(packed.name, modules, base_model=source.get("base_model_name_or_path"), heads=packed.heads)
    return replace(found, source_config=lora_config.derived(found, source))


def _on_core(coefficients: Coefficients, k_down: int, k_up: int) -> LoRAFactors:
    """One module's coefficients in bases of these sizes, which may have grown since: zeros on the later directions."""
    down, up = coefficients.down.float(), coefficients.up.float() * coefficients.scaling
    own_down, own_up = down.shape[1], up.shape[0]
    if coefficients.rank > min(own_down, own_up):
        product = (up.double() @ down.double()).float()
        down, up = (torch.eye(own_down), product) if own_down <= own_up else (product, torch.eye(own_up))
    wide = pad_coefficients(Coefficients(down, up, 1.0), k_down, k_up)
    return LoRAFactors(wide.down, wide.up, wide.scaling)
