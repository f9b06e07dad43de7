"""Training methods of a comparison. Each adds trainable parameters to a base model."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core.options import suggestion
from ..errors import OptionError
from ..pack.pack import Pack

HEAD = ("classifier", "score", "modules_to_save")
"""Parts of parameter names that mark a task head. Every method trains the head. Its parameters are counted apart."""


@dataclass(frozen=True, slots=True)
class CommonConfig:
    """Config fields that all methods of a comparison share.

    Attributes:
        target_modules: Names of the modules that get parameters.
        task_type: PEFT's task type.
        modules_to_save: Other modules that are trained and saved, such as the head.
        pack: Pack with the subspace, for methods that train in a subspace.
    """

    target_modules: Sequence[str]
    task_type: str | None
    modules_to_save: Sequence[str] | None = None
    pack: Pack | None = None

    def peft_fields(self) -> dict[str, Any]:
        """Return the fields that every PEFT config has."""
        return {
            "target_modules": list(self.target_modules),
            "task_type": self.task_type,
            "modules_to_save": list(self.modules_to_save) if self.modules_to_save else None,
        }

    def subspace(self) -> Pack:
        """Return the pack. Raises `OptionError` if there is none."""
        if self.pack is None:
            raise OptionError("this method trains in a subspace. Pass a pack.")
        return self.pack


def apply_method(kind: str, options: Mapping[str, Any], base: Any, common: CommonConfig) -> Any:
    """Add a method's parameters to a base model.

    Random initial values come from torch's global generator, as in PEFT. Set its seed first.

    Args:
        kind: Key of `BUILDERS`.
        options: Fields of the method's PEFT config.
        base: Base model, which is changed.
        common: Config fields that all methods share.

    Returns:
        Model to train.

    Raises:
        OptionError: There is no such method, or it needs a pack and `common` has none.
    """
    if kind not in BUILDERS:
        hint = suggestion(kind, BUILDERS)
        raise OptionError(f"there is no method {kind!r}.{hint} There are: {', '.join(BUILDERS)}.")
    return BUILDERS[kind](base, common, **options)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of the method's trained parameters, and of the head's."""
    method = head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_head(name):
            head += parameter.numel()
        elif parameter.requires_grad:
            method += parameter.numel()
    return method, head


def is_head(parameter_name: str) -> bool:
    """Return whether a parameter belongs to the task head."""
    return not set(HEAD).isdisjoint(parameter_name.split("."))


def saved_bytes(model: Any) -> int:
    """Return the size in bytes of the file that PEFT saves, including the head.

    For a model without an adapter, this is the size of its trained parameters.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return sum(parameter.numel() * parameter.element_size() for parameter in trained)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _head_only(base: Any, common: CommonConfig) -> Any:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(is_head(name))
    return base


def _full(base: Any, common: CommonConfig) -> Any:
    return base.requires_grad_(True)


def _add_adapter(config_class: str, base: Any, common: CommonConfig, **options: Any) -> Any:
    """Add one of PEFT's adapters. config_class: name of its config class in PEFT."""
    import peft

    config = getattr(peft, config_class)(**common.peft_fields(), **options)
    return peft.get_peft_model(base, config)


def _lora_xs(base: Any, common: CommonConfig, r: int) -> Any:
    """Add LoRA-XS (arXiv 2405.17604): an r × r matrix between factors of the weight's SVD.

    PEFT has no LoRA-XS. Its PSOFT without orthogonality and magnitudes computes the same update.
    """
    psoft_options = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "ab_svd_init": "pissa_init"}
    return _add_adapter("PsoftConfig", base, common, r=r, psoft_alpha=r, **psoft_options)


def _eigenlorax(base: Any, common: CommonConfig, **options: Any) -> Any:
    from peft import get_peft_model

    from ..tuner import EigenLoraxConfig

    # with gradient components, no pack is needed
    pack = common.pack if options.get("n_gradient") else common.subspace()
    return get_peft_model(base, EigenLoraxConfig(subspace=pack, **common.peft_fields(), **options))


def _init(base: Any, common: CommonConfig, **options: Any) -> Any:
    """Add the paper's INIT: a LoRA that is initialised with components of the subspace."""
    from ..tuner import lora_from_components

    return lora_from_components(base, common.subspace(), **common.peft_fields(), **options)


BUILDERS: Mapping[str, Callable[..., Any]] = {
    "head": _head_only,
    "full": _full,
    "lora": partial(_add_adapter, "LoraConfig"),
    "vera": partial(_add_adapter, "VeraConfig"),
    "vblora": partial(_add_adapter, "VBLoRAConfig"),
    "lora_xs": _lora_xs,
    "eigenlorax": _eigenlorax,
    "init": _init,
}
"""Kind of method → function (base model, common config fields, options) that returns the model to train."""
