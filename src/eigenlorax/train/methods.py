"""The ways to train a task that are compared: what each of them adds to a base model. No training here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.adapter import LoRAFactors, from_factors
from ..core.basis import Basis
from ..core.options import suggestion
from ..core.subspace import ModuleBases, Subspace
from ..errors import OptionError
from ..fitting.fit import fit
from ..pack import manifest
from ..pack.pack import Pack

HEAD = ("classifier", "score", "modules_to_save")
"""What names of a task's own layers hold: they are trained by every method, and counted apart."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train. kind is a name of `KINDS`; options are fields of that kind's config."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = suggestion(self.kind, KINDS)
            raise OptionError(f"there is no method {self.kind!r}.{near} There are: {', '.join(KINDS)}.")


@dataclass(frozen=True, slots=True)
class Setting:
    """What all methods of a comparison have in common. pack: for the methods that have a subspace."""

    targets: Sequence[str]
    task_type: str | None
    modules_to_save: Sequence[str] | None = None
    pack: Pack | None = None

    def peft(self) -> dict[str, Any]:
        """Fields that every config of PEFT's has."""
        saved = None if self.modules_to_save is None else list(self.modules_to_save)
        return {"target_modules": list(self.targets), "task_type": self.task_type, "modules_to_save": saved}

    def subspace(self) -> Pack:
        """The pack, or `OptionError` where there is none."""
        if self.pack is None:
            raise OptionError("this method trains in a subspace: name a pack.")
        return self.pack


def applied(method: Method, base: Any, setting: Setting) -> Any:
    """The base model, ready to be trained by a method. Its numbers come from torch's own generator."""
    return KINDS[method.kind](base, setting, **method.options)


def counted(model: Any) -> tuple[int, int]:
    """Trained numbers of the method, and those of heads."""
    method = head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_head(name):
            head += parameter.numel()
        elif parameter.requires_grad:
            method += parameter.numel()
    return method, head


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a task's own layers."""
    return any(part in HEAD for part in name.split("."))


def random_basis(pack: Pack, *, seed: int = 0) -> Pack:
    """A subspace of the same shapes that nobody has trained: that of an adapter of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    size = max(max(bases.down.k, bases.up.k) for bases in pack.subspace.modules.values())

    def factors(in_features: int, out_features: int) -> LoRAFactors:
        down = torch.randn(size, in_features, generator=generator)
        return LoRAFactors(down, torch.randn(out_features, size, generator=generator), 1.0)

    modules = {name: factors(b.down.dimension, b.up.dimension) for name, b in pack.subspace.modules.items()}
    found = fit([from_factors("random", modules)], n_components=size)
    sizes = {name: (bases.down.k, bases.up.k) for name, bases in pack.subspace.modules.items()}
    return found if all(k == (size, size) for k in sizes.values()) else _cut(found, sizes)


def _cut(pack: Pack, sizes: Mapping[str, tuple[int, int]]) -> Pack:
    """The first components (down, up) of each module. What leads among random directions is as random as the rest."""
    modules = {
        name: ModuleBases(_first(bases.down, sizes[name][0]), _first(bases.up, sizes[name][1]))
        for name, bases in pack.subspace.modules.items()
    }
    subspace = Subspace(modules)
    return Pack(
        subspace,
        manifest.describe(subspace),
        {},
        pack.fit_info,
        base_model=pack.base_model,
        revision=pack.revision,
        coefficient_dtype=pack.coefficient_dtype,
    )


def _first(basis: Basis, k: int) -> Basis:
    square = basis.singular_values.double().square()
    # a slice would keep all rows alive
    return replace(basis, components=basis.components[:k].clone(), energy=float(square[:k].sum()) / basis.square)


def _head(base: Any, setting: Setting) -> Any:
    kept = [*HEAD, *(setting.modules_to_save or ())]
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(any(part in kept for part in name.split(".")))
    return base


def _full(base: Any, setting: Setting) -> Any:
    return base.requires_grad_(True)


def _lora(base: Any, setting: Setting, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base, LoraConfig(**setting.peft(), **options))


def _vera(base: Any, setting: Setting, **options: Any) -> Any:
    from peft import VeraConfig, get_peft_model

    return get_peft_model(base, VeraConfig(**setting.peft(), **options))


def _vblora(base: Any, setting: Setting, **options: Any) -> Any:
    from peft import VBLoRAConfig, get_peft_model

    return get_peft_model(base, VBLoRAConfig(**setting.peft(), **options))


def _lora_xs(base: Any, setting: Setting, r: int, **options: Any) -> Any:
    """LoRA-XS (arXiv 2405.17604) through PEFT's PSOFT: a free r × r matrix between factors of the weight's SVD."""
    from peft import PsoftConfig, get_peft_model

    form = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False, "ab_svd_init": "pissa_init"}
    return get_peft_model(base, PsoftConfig(**setting.peft(), r=r, psoft_alpha=r, **form, **options))


def _eigenlorax(base: Any, setting: Setting, **options: Any) -> Any:
    from peft import get_peft_model

    from ..tuner import EigenLoraxConfig

    return get_peft_model(base, EigenLoraxConfig(subspace=setting.subspace(), **setting.peft(), **options))


def _init(base: Any, setting: Setting, **options: Any) -> Any:
    """The paper's INIT: a LoRA that starts from the components and is trained whole."""
    from ..tuner import lora_from_components

    return lora_from_components(base, setting.subspace(), **setting.peft(), **options)


KINDS: Mapping[str, Callable[..., Any]] = {
    "head": _head,
    "full": _full,
    "lora": _lora,
    "vera": _vera,
    "vblora": _vblora,
    "lora_xs": _lora_xs,
    "eigenlorax": _eigenlorax,
    "init": _init,
}
"""Name → what makes the model."""
