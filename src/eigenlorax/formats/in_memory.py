"""Adapters in memory: adapters of a PEFT model, and state dicts with their configs."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from ..core import keys
from ..core.adapter import Adapter
from ..errors import FormatError
from . import files, lora_config, peft, safetensors_file

StateDict = tuple[Mapping[str, Tensor], Any]
"""A state dict of a LoRA, and its `LoraConfig` or the fields of its `adapter_config.json`."""


class PeftModel(Protocol):
    """The part of PEFT's `PeftModel` that is used. PEFT itself is not imported here."""

    peft_config: Any

    def save_pretrained(self, save_directory: str, *, selected_adapters: list[str]) -> None:
        """Write adapters as folders."""


def is_peft_model(source: object) -> TypeGuard[PeftModel]:
    """Return whether the object is a `PeftModel`."""
    # a transformers model whose layers PEFT has wrapped has a `peft_config` too
    return isinstance(getattr(source, "peft_config", None), Mapping) and hasattr(source, "get_base_model")


def is_state_dict(source: object) -> TypeGuard[StateDict]:
    """Return whether the object is a pair (state dict, config)."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping)


def from_peft_model(model: PeftModel) -> list[Adapter]:
    """Return the adapters of a PEFT model, with copies of their tensors, by their names in the model.

    Args:
        model: A `PeftModel` with LoRAs or AdaLoRAs, or with adapters of our own type.

    Raises:
        FormatError: An adapter has another PEFT type.
    """
    return [_saved_adapter(model, name) for name in model.peft_config]


def _saved_adapter(model: PeftModel, name: str) -> Adapter:
    # PEFT's own writer knows which heads, biases and embeddings belong to an adapter
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[name])
        folder = Path(temporary) if name == "default" else Path(temporary) / name
        text = (folder / keys.ADAPTER_CONFIG).read_text("utf-8")
        if json.loads(text)["peft_type"] == keys.PEFT_TYPE:
            return peft.read(folder, name=name)
        tensors = safetensors_file.from_bytes((folder / keys.ADAPTER_WEIGHTS).read_bytes(), keys.ADAPTER_WEIGHTS)
    return _adapter(name, text, tensors, f"adapter {name!r} of the model")


def from_state_dict(state_dict: Mapping[str, Tensor], config: Any, name: str) -> Adapter:
    """Return the adapter of a state dict as `get_peft_model_state_dict` returns it.

    Args:
        state_dict: Tensors by PEFT's keys, such as `base_model.model.….lora_A.weight`.
        config: A `LoraConfig`, or the fields of an `adapter_config.json`.
        name: Name of the adapter.

    Raises:
        FormatError: The config is neither, or a tensor is not understood.
        ShapeError: Factors do not fit each other or the config.
    """
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise FormatError(
            f"the config of {name!r} is {type(config).__name__}: pass (state_dict, LoraConfig(…)), or the fields of "
            "its adapter_config.json."
        )
    text = json.dumps(fields, default=_to_json, indent=2, sort_keys=True)
    return _adapter(name, text, state_dict, f"the state dict of {name!r}")


def to_state_dict(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the factors of an adapter by PEFT's keys, with the fields of a new config: ranks, scalings and modules.

    Raises:
        NonFiniteError: A factor has NaN or Inf.
    """
    tensors = {
        keys.lora_key(module, side): peft.finite(factor, f"{adapter.name!r}, module {module}")
        for module, factors in adapter.modules.items()
        for side, factor in zip(keys.SIDES, factors.weights, strict=True)
    }
    return tensors, json.loads(lora_config.derived(adapter, adapter.config))


def _adapter(name: str, config_text: str, tensors: Mapping[str, Tensor], where: str) -> Adapter:
    files.check_config(json.loads(config_text), f"the config of {where}", (files.LORA, keys.ADALORA_PEFT_TYPE))
    keys.check_tensor_names(tensors, where)
    adapter = peft.from_tensors(name, config_text, tensors, where=where)
    peft.check_complete(adapter, where)
    return replace(adapter, file_bytes=sum(tensor.nbytes for tensor in tensors.values()))


def _to_json(field: Any) -> Any:
    """Return a field of a PEFT config as JSON: PEFT itself writes sets as lists, and enums by their value."""
    if isinstance(field, set | frozenset):
        return sorted(field)
    return getattr(field, "value", None) or str(field)
