"""Which adapters of a pack vLLM can serve, and at which rank. Nothing here imports vLLM, or knows the served model.

What vLLM refuses to load is refused here first, with a reason; so is what it would load, and compute something else.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...core import keys
from ...pack.packed_adapter import PackedAdapter
from .plan import RANKS

_HEADS = ("score", "classifier")
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` that leave the base model's weights as they are; vLLM has the same list."""
BASE_WEIGHTS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Ends of keys under which PEFT saves embeddings of the base model beside a LoRA of them. They were not trained, and
vLLM does not read them."""
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


def refusal(found: PackedAdapter, *, shared: bool) -> str | None:
    """`reason_against` in a sentence, with the adapter's name."""
    why = reason_against(found, shared=shared)
    return why and f"adapter {found.name!r} cannot be served: {why}."


def reason_against(found: PackedAdapter, *, shared: bool) -> str | None:
    """Why vLLM cannot serve an adapter; None if nothing speaks against it.

    shared: by the subspace in the model, which serves what lies in the subspace, and nothing beside it.
    """
    config = json.loads(found.source_config)
    why = (
        _of_config(config)
        or _of_heads(found.heads, config)
        or _of_carried(found.carried)
        or _of_kernels({module: c.kernel for module, c in found.coefficients.items() if c.kernel})
    )
    if why is None and shared and found.carried:
        why = f"it has {_some(found.carried)} outside the subspace; without a shared basis it can be served"
    if why is None and shared:
        why = _of_rests([module for module, c in found.coefficients.items() if c.has_residual])
    if why is None and not found.coefficients and (shared or not found.carried):
        why = "it has no LoRA module"
    if why is None and (rank := shared_rank(found) if shared else expanded_rank(found)) > RANKS[-1]:
        why = f"its rank is {rank}, and vLLM's largest {RANKS[-1]}"
    if why is None and found.carried and any(module != place for module, place in found.places.items()):
        why = (
            "its modules lack the first part of the model's names, and it has tensors outside the subspace, whose "
            "names are not known"
        )
    return why


def shared_rank(found: PackedAdapter) -> int:
    """The rank that `--max-lora-rank` has to allow with a shared basis: in each module at most the number of components
    of either side."""
    return max((min(c.rank, c.down.shape[1], c.up.shape[0]) for c in found.coefficients.values()), default=0)


def expanded_rank(found: PackedAdapter) -> int:
    """The rank that vLLM finds in an expanded adapter, and `--max-lora-rank` has to allow."""
    config = json.loads(found.source_config)
    # of the config: vLLM reads what it says of modules that are not there, too
    said = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return max([one for one in said if type(one) is int] + [c.rank for c in found.coefficients.values()], default=0)


def _of_config(config: Mapping[str, Any]) -> str | None:
    start, bias = config.get("init_lora_weights"), config.get("bias", "none")
    missing = [field for field in _NEEDED if field not in config]
    if missing:
        return f"its {keys.ADAPTER_CONFIG} has no {missing[0]}, which vLLM needs"
    for option, what in _OPTIONS.items():
        if config.get(option):
            return f"vLLM does not support {what}"
    if bias != "none":
        return f"vLLM does not support trained biases (bias={bias!r})"
    if isinstance(start, str) and start.lower() not in _STARTS:
        return f"it was trained from init_lora_weights={start!r}, which changes weights of the base model"
    return None


def _of_heads(heads: Iterable[str], config: Mapping[str, Any]) -> str | None:
    saved = config.get("modules_to_save") or ()
    others = sorted(set(saved) - set(_HEADS))
    if others:
        return f"vLLM supports no trained modules but {' and '.join(_HEADS)} (modules_to_save has {others[0]!r})"
    found = set()
    for key in heads:
        if key.endswith(BASE_WEIGHTS):
            continue
        *_, module, last = ["", *key.split(".")]
        if module not in saved or last not in ("weight", "bias"):
            return f"vLLM supports no trained modules but {' and '.join(_HEADS)}, and it has {key!r}"
        found.add(module)
    if len(found) > 1:
        return "vLLM supports one trained head an adapter, and it has two"
    return None


def _of_carried(carried: Mapping[str, Any]) -> str | None:
    for key, tensor in carried.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")):
            return f"vLLM does not support the tensor {key!r}"
        if tensor.ndim != 2:
            return f"vLLM does not support LoRA of convolutions ({key!r})"
    return None


def _of_kernels(kernels: Mapping[str, tuple[int, ...]]) -> str | None:
    return f"vLLM does not support LoRA of convolutions ({min(kernels)!r})" if kernels else None


def _of_rests(modules: Collection[str]) -> str | None:
    if not modules:
        return None
    return (
        f"it has a rest beside its coefficients in {min(modules)!r}{_others(modules, 'modules')}, which the cores of a "
        "shared basis cannot hold; without a shared basis it can be served"
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"{min(names)!r}{_others(names, 'tensors')}"


def _others(names: Collection[str], what: str) -> str:
    return f" and {len(names) - 1} more {what}" if len(names) > 1 else ""
