"""Loading of a pack's adapters into an existing `PeftModel`. PEFT itself is not imported."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import formats
from ..core import keys
from ..errors import AdapterNameError, EigenloraxError, ModuleNameError, OptionError, ShapeError
from .contents import PackContents

_LORA = "LORA"


def load_into(pack: PackContents, model: Any, names: Iterable[str]) -> None:
    """Load adapters as ordinary LoRAs, or as coefficients if the model's adapters are of our own type.

    Args:
        pack: The pack. Adapters are loaded as coefficients only if it is on disk.
        model: A `PeftModel`.
        names: Names of adapters and versions, which the model uses too.

    Raises:
        OptionError: The object is not a `PeftModel`, or has adapters of other types.
        AdapterNameError: The model already has an adapter of this name.
        ModuleNameError: The model lacks a module of the adapter.
        ShapeError: The model's modules have other shapes. It is unchanged after an error.
    """
    peft_type = _peft_type(model)
    names = list(names)
    taken = sorted(set(names) & set(model.peft_config))
    if taken:
        raise AdapterNameError(
            f"the model already has an adapter named {taken[0]!r}. Remove it first: model.delete_adapter({taken[0]!r})."
        )
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for name in names:
                if peft_type == keys.PEFT_TYPE:
                    folder = pack.adapter_folder(name)
                else:
                    path = Path(temporary) / keys.file_name(name)
                    folder = formats.write_adapter(pack.adapter(name), path, format=formats.PEFT)
                load_folder(model, name, folder)
        except EigenloraxError:
            for name in set(names) & set(model.peft_config):
                model.delete_adapter(name)
            raise


def _peft_type(model: Any) -> str:
    """Return the PEFT type of the model's adapters: `LORA`, or our own type."""
    configs = getattr(model, "peft_config", None)
    if not configs or not hasattr(model, "load_adapter"):
        raise OptionError(
            f"{type(model).__name__} is not a PeftModel. Export the adapter and pass its folder to "
            "PeftModel.from_pretrained; for a pipeline of diffusers, call eigenlorax.load_into(pipe, pack)."
        )
    # peft_type is an enum with string values
    types = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    if types not in ({_LORA}, {keys.PEFT_TYPE}):
        raise OptionError(
            f"the model's adapters are of type {', '.join(sorted(types))}; adapters of a pack are loaded beside "
            f"{_LORA} or {keys.PEFT_TYPE}."
        )
    return types.pop()


def load_folder(model: Any, name: str, folder: Path, *, is_trainable: bool = False) -> list[str]:
    """Load an adapter from its folder with PEFT, and return the names of the model's LoRA tensors that the file lacks.

    Args:
        model: A `PeftModel`, whose adapter of this name gets the weights if it has one.
        name: Name of the adapter in the model.
        folder: Folder of the adapter.
        is_trainable: Load it for training.

    Raises:
        ShapeError: The model's modules have other shapes.
        ModuleNameError: The model lacks a module of the adapter.
    """
    try:
        loaded = model.load_adapter(str(folder), adapter_name=name, is_trainable=is_trainable)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, EigenloraxError):
            raise
        # torch lists the tensors after a first line that names the model's class
        first, *details = str(error).strip().splitlines()
        raise ShapeError(
            f"adapter {name!r} does not fit the model: {(details[0] if details else first).strip().rstrip('.')}. It "
            "belongs to another base model."
        ) from error
    ignored = sorted(getattr(loaded, "unexpected_keys", None) or ())
    if ignored:
        raise ModuleNameError(
            f"the model has no place for {len(ignored)} tensors of adapter {name!r}, such as {ignored[0]!r}: the "
            "adapter belongs to another base model."
        )
    return sorted(getattr(loaded, "missing_keys", None) or ())
