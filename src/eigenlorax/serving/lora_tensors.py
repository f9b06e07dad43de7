"""Adapters of a pack as tensors and a config, for engines that load LoRAs from memory. No engine is imported."""

from dataclasses import replace

import torch
from torch import Tensor

from ..core import keys, narrowing
from ..core.adapter import LoRAFactors, padded
from ..errors import ServingError
from ..formats import in_memory
from ..pack.pack import Pack
from .vllm import servable


def lora_tensors(
    pack: Pack, name: str, *, rank: int | None = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return an adapter or a version of a pack as one state dict of PEFT and its config, without files.

    All modules get one rank, and the scaling is multiplied into `lora_B`, so that `r` equals `lora_alpha` and no
    pattern is needed. Engines that read `r` and `lora_alpha` alone then compute the same as those that read patterns
    and `use_rslora` as well. Missing components of a module are zeros.

    Args:
        pack: The pack.
        name: Name of the adapter, or of a version such as "run@latest".
        rank: Rank of all modules, at least the largest one of the adapter. Default: the largest one.
        dtype: Dtype of the tensors. Default: the dtype of the adapter.

    Returns:
        Tensors by PEFT's keys, `base_model.model.<module>.lora_A.weight` (r, in) and `….lora_B.weight` (out, r), on the
        CPU; and the fields of `adapter_config.json`.

    Raises:
        AdapterNameError: The pack has no adapter of that name.
        ServingError: The adapter has more than the factors of linear layers (heads, DoRA, biases, convolutions), it was
            trained from changed base weights, or its rank is above `rank`.
        NonFiniteError: A factor has NaN or Inf, or is too large for `dtype`.

    Example:
        >>> tensors, config = eigenlorax.lora_tensors(pack, "a", rank=16)
        >>> sorted(tensors)[0], config["r"], config["lora_alpha"]
        ('base_model.model.encoder.layer.0.query.lora_A.weight', 16, 16.0)
    """
    adapter = pack.adapter(name)
    reason = servable.tensors_refusal_reason(adapter)
    if reason is not None:
        raise ServingError(f"adapter {name!r} cannot be loaded from tensors: {reason}.")
    largest = max(adapter.ranks)
    if rank is not None and rank < largest:
        raise ServingError(f"adapter {name!r} has rank {largest}, which is above rank={rank}. Pass {largest} or more.")
    # engines ignore names that lack the first parts of the model's names
    names = {} if keys.is_version(name) else pack.packed(name).subspace_names
    modules = {
        names.get(module, module): at_rank(factors, rank or largest) for module, factors in adapter.modules.items()
    }
    if dtype is not None:
        modules = dict(narrowing.narrow_adapter(name, modules, dtype))
    return in_memory.to_state_dict(replace(adapter, specs={m: f.spec for m, f in modules.items()}, modules=modules))


def at_rank(factors: LoRAFactors, rank: int) -> LoRAFactors:
    """Return the update of the first `rank` components, with zeros for those that the factors lack.

    The scaling is multiplied into B, so that one config is valid for all modules.
    """
    return padded(LoRAFactors(factors.down[:rank], factors.scaling * factors.up[:, :rank], 1.0), rank)
