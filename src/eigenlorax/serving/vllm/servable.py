"""Checks whether vLLM can serve an adapter, and at which rank. Nothing here imports vLLM or knows the served model.

Adapters that vLLM does not load, or would compute wrongly, are rejected here with a reason.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...codec.storage.coded import CodedCoefficients, coefficient_metadata
from ...core import keys
from ...core.adapter import Adapter
from ...pack.packed_adapter import PackedAdapter
from .plan import RANKS

_HEADS = ("score", "classifier")
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` that do not change the base model's weights; vLLM has the same list."""
BASE_WEIGHTS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Suffixes under which PEFT saves embeddings of the base model if they have a LoRA. They are not trained, and vLLM does
not use them."""
_NEEDED = ("r", "lora_alpha", "target_modules")
_OPTIONS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in its factors (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
}


def refusal(packed: PackedAdapter, *, shared: bool) -> str | None:
    """Return a message with the adapter's name and the result of `refusal_reason`; None if vLLM can serve it."""
    reason = refusal_reason(packed, shared=shared)
    return reason and f"adapter {packed.name!r} cannot be served: {reason}."


def refusal_reason(packed: PackedAdapter, *, shared: bool) -> str | None:
    """Return why vLLM cannot serve an adapter; None if it can.

    Args:
        packed: The adapter.
        shared: Whether the model contains the subspace, so that only coefficients can be served.
    """
    config = json.loads(packed.source_config)
    reason = (
        _config_reason(config)
        or _head_reason(packed.heads, config)
        or _carried_reason(packed.carried)
        or _kernel_reason({module: c.kernel for module, c in packed.coefficients.items() if c.kernel})
    )
    if reason is None and shared and packed.carried:
        reason = f"it has {_first_of(packed.carried)} outside the subspace; without a shared basis it can be served"
    if reason is None and shared:
        reason = _residual_reason([module for module, c in packed.coefficients.items() if c.has_residual])
    if reason is None and not packed.coefficients and (shared or not packed.carried):
        reason = "it has no LoRA module"
    if reason is None:
        reason = _rank_reason(shared_rank(packed) if shared else expanded_rank(packed))
    if reason is None and packed.carried and any(module != name for module, name in packed.subspace_names.items()):
        reason = (
            "its modules lack the first part of the model's names, and it has tensors outside the subspace, whose "
            "full names are unknown"
        )
    return reason


def version_refusal_reason(version: Adapter) -> str | None:
    """Return why vLLM cannot serve a version of a history, which is an ordinary LoRA; None if it can."""
    config = version.config
    reason = (
        _config_reason(config)
        or _head_reason(version.heads, config)
        or _carried_reason(version.carried)
        or _kernel_reason({module: spec.kernel for module, spec in version.specs.items() if spec.kernel})
    )
    if reason is None and not version.specs and not version.carried:
        reason = "it has no LoRA module"
    return reason or _rank_reason(version_rank(version))


def tensors_refusal_reason(adapter: Adapter) -> str | None:
    """Return why engines cannot load an adapter from the factors of its linear layers alone; None if they can."""
    outside = sorted([key for key in adapter.heads if not key.endswith(BASE_WEIGHTS)] + list(adapter.carried))
    if outside:
        return f"it has {_first_of(outside)} beside the factors of its linear layers"
    # DoRA, for one, is known by its config too; a made adapter has no config
    reason = _config_reason(adapter.config) if adapter.source_config is not None else None
    reason = reason or _kernel_reason({module: spec.kernel for module, spec in adapter.specs.items() if spec.kernel})
    return reason or (None if adapter.specs else "it has no LoRA module")


def version_rank(version: Adapter) -> int:
    """Return the rank of a version as vLLM computes it."""
    return _largest_rank(version.config, version.ranks)


def shared_rank(packed: PackedAdapter) -> int:
    """Return the rank of an adapter as a LoRA of cores, which is at most the number of components per side."""
    return max((min(c.rank, c.down.shape[1], c.up.shape[0]) for c in packed.coefficients.values()), default=0)


def expanded_rank(packed: PackedAdapter) -> int:
    """Return the rank of an expanded adapter as vLLM computes it."""
    return reduced_rank(packed) or _source_rank(packed)


def reduced_rank(packed: PackedAdapter) -> int | None:
    """Return the rank to which an adapter can be reduced without changing its update; None if it cannot.

    An entropy-coded adapter has fewer components than its rank where the others are below its error bound.
    """
    # factors outside the subspace have the rank of the source
    if packed.carried or not isinstance(packed.coefficients, CodedCoefficients):
        return None
    stored = max((metadata.stored_rank for metadata in packed.coefficients.metadata.values()), default=0)
    return max(stored, 1) if stored < _source_rank(packed) else None


def _source_rank(packed: PackedAdapter) -> int:
    ranks = [metadata.rank for metadata in coefficient_metadata(packed.coefficients).values()]
    return _largest_rank(json.loads(packed.source_config), ranks)


def _largest_rank(config: Mapping[str, Any], ranks: Iterable[int]) -> int:
    """Return the largest of the ranks of modules and of a config, since vLLM also reads those that no module has."""
    config_ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return max([*ranks, *(rank for rank in config_ranks if type(rank) is int)], default=0)


def _rank_reason(rank: int) -> str | None:
    """Return why vLLM cannot serve a rank; None if it can."""
    return f"its rank is {rank}, and vLLM's largest rank is {RANKS[-1]}" if rank > RANKS[-1] else None


def _config_reason(config: Mapping[str, Any]) -> str | None:
    """Return why vLLM cannot serve a LoRA with this config; None if it can."""
    start, bias = config.get("init_lora_weights"), config.get("bias", "none")
    missing = [field for field in _NEEDED if field not in config]
    if missing:
        return f"its {keys.ADAPTER_CONFIG} has no {missing[0]}, which vLLM needs"
    for option, description in _OPTIONS.items():
        if config.get(option):
            return f"vLLM does not support {description}"
    if bias != "none":
        return f"vLLM does not support trained biases (bias={bias!r})"
    if isinstance(start, str) and start.lower() not in _STARTS:
        return f"it was trained from init_lora_weights={start!r}, which changes weights of the base model"
    return None


def _head_reason(heads: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Return why vLLM cannot serve heads with these keys; None if it can."""
    saved = config.get("modules_to_save") or ()
    others = sorted(set(saved) - set(_HEADS))
    if others:
        return f"vLLM supports no trained modules but {' and '.join(_HEADS)} (modules_to_save has {others[0]!r})"
    modules_with_head = set()
    for key in heads:
        if key.endswith(BASE_WEIGHTS):
            continue
        *_, module, last = ["", *key.split(".")]
        if module not in saved or last not in ("weight", "bias"):
            return f"vLLM supports no trained modules but {' and '.join(_HEADS)}, and it has {key!r}"
        modules_with_head.add(module)
    if len(modules_with_head) > 1:
        return "vLLM supports one trained head per adapter, and it has two"
    return None


def _carried_reason(carried: Mapping[str, Any]) -> str | None:
    """Return why vLLM cannot serve these tensors outside the subspace; None if it can."""
    for key, tensor in carried.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")):
            return f"vLLM does not support the tensor {key!r}"
        if tensor.ndim != 2:
            return f"vLLM does not support LoRA on convolutions ({key!r})"
    return None


def _kernel_reason(kernels: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why vLLM cannot serve convolutions with these kernels by module; None if there are none."""
    return f"vLLM does not support LoRA on convolutions ({min(kernels)!r})" if kernels else None


def _residual_reason(modules: Collection[str]) -> str | None:
    """Return why a shared basis cannot serve residuals in these modules; None if there are none."""
    if not modules:
        return None
    return (
        f"it has a residual in {min(modules)!r}{_others(modules, 'modules')}, which the cores of a shared basis cannot "
        "represent; without a shared basis it can be served. A pack that is fitted for serving (purpose='serving', "
        "--for serving) represents it, and one with a basis of few components (basis=32, --basis 32) may"
    )


def _first_of(names: Iterable[str]) -> str:
    names = list(names)
    return f"{min(names)!r}{_others(names, 'tensors')}"


def _others(names: Collection[str], noun: str) -> str:
    return f" and {len(names) - 1} more {noun}" if len(names) > 1 else ""
