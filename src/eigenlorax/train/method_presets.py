"""Methods of `eigenlorax compare` with options for one model. Small methods get at most as many parameters as factors
of coefficients have.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import keys
from ..errors import EigenloraxError, EigenloraxWarning, OptionError, reason
from ..pack.pack import Pack
from ..pack.random_pack import random_pack
from . import methods
from .methods import CommonConfig

TASK_TYPE = "SEQ_CLS"
"""PEFT's task type of all methods."""
SOAP = ("core", "factors", "random", "lora-soap")
"""Methods that are trained with `tuner.SOAP`. The others are trained with AdamW, as in their papers."""
_VBLORA_MAX = 256
"""PEFT's default for the number of vectors of VB-LoRA and for their length, used as an upper limit of both."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A method with options for one model.

    Attributes:
        kind: Key of `methods.BUILDERS`.
        options: Fields of the method's PEFT config.
        common: Config fields that all methods share.
        optimizer: "adamw" or "soap", as in `comparison_run.Recipe`.
    """

    kind: str
    options: Mapping[str, Any]
    common: CommonConfig
    optimizer: str

    def apply(self, base: Any) -> Any:
        """Return the base model with the method's parameters, ready to be trained."""
        return methods.apply_method(self.kind, self.options, base, self.common)


@dataclass(frozen=True, slots=True)
class TargetModule:
    """Module of the model that the subspace covers."""

    name: str
    in_features: int
    out_features: int

    @property
    def parameters_per_rank(self) -> int:
        """Number of parameters of a LoRA of rank 1."""
        return self.in_features + self.out_features


def make_presets(
    pack: Pack, names: Sequence[str], unfinished: Sequence[str], rank: int, load_base: Callable[[], Any]
) -> dict[str, Preset]:
    """Return the presets of methods on the modules of a pack.

    Args:
        pack: Pack with the subspace.
        names: Methods, keys of `search_space.LEARNING_RATES`.
        unfinished: Methods that will be trained. Each is applied to a base model once, to find errors before training.
        rank: Rank of LoRA, INIT and factors.
        load_base: Function that loads the base model with a head.

    Returns:
        Method → its preset.

    Raises:
        OptionError: The model has no head, or an unfinished method does not support its modules.
    """
    modules, budget = _target_modules(pack, rank, load_base())
    presets = {
        name: _preset(name, random_pack(pack) if name == "random" else pack, rank, modules, budget) for name in names
    }
    with warnings.catch_warnings():
        # reading the pack has shown these warnings already
        warnings.simplefilter("ignore", EigenloraxWarning)
        for name in unfinished:
            try:
                presets[name].apply(load_base())
            except EigenloraxError:
                raise
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                raise OptionError(
                    f"{name} does not work on the modules of this pack: {reason(error)} Remove it from methods= "
                    "(--methods)."
                ) from error
    return presets


def _target_modules(pack: Pack, rank: int, base: Any) -> tuple[list[TargetModule], int]:
    """Return the modules in the model's order, and the number of parameters of factors of this rank."""
    from peft import get_peft_model

    from ..tuner import EigenLoraxConfig
    from ..tuner.layer import EigenLoraxLayer

    config = EigenLoraxConfig(subspace=pack, r=rank, lora_alpha=rank, core=False, task_type=TASK_TYPE)
    model = get_peft_model(base, config)
    parameters, head_parameters = methods.count_parameters(model)
    if not head_parameters:
        raise OptionError(
            f"the model's head is named neither {' nor '.join(methods.HEAD[:2])}, the names that PEFT trains: no "
            "method could learn the classes. Pass another model."
        )
    modules = [
        TargetModule(name.removeprefix(keys.MODEL_PREFIX), layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, EigenLoraxLayer)
    ]
    return modules, parameters


def _preset(name: str, pack: Pack, rank: int, modules: Sequence[TargetModule], budget: int) -> Preset:
    """Return the preset of one method.

    Args:
        name: Key of `search_space.LEARNING_RATES`.
        pack: Pack with the subspace of the method.
        rank: Rank of LoRA, INIT and factors.
        modules: Modules in the model's order.
        budget: Number of parameters of factors, which small methods do not exceed.
    """
    small_rank, small_modules = _small_lora(modules, budget)
    kinds_and_options: Mapping[str, tuple[str, Mapping[str, Any]]] = {
        "lora": ("lora", _lora_options(rank)),
        "lora-small": ("lora", _lora_options(small_rank)),
        "core": ("eigenlorax", {**_lora_options(rank), "core": True}),
        "factors": ("eigenlorax", _lora_options(rank)),
        "random": ("eigenlorax", _lora_options(rank)),
        # VeRA's random matrices are not saved, because their seed determines them
        "vera": ("vera", {"save_projection": False}),
        "vblora": ("vblora", _vblora_options(modules, budget)),
        "lora-xs": ("lora_xs", {"r": _lora_xs_rank(modules, budget)}),
        "init": ("init", _lora_options(rank)),
        "lora-soap": ("lora", _lora_options(rank)),
        "full": ("full", {}),
        "head": ("head", {}),
    }
    kind, options = kinds_and_options[name]
    target_modules = small_modules if name == "lora-small" else [module.name for module in modules]
    common = CommonConfig(target_modules, TASK_TYPE, pack=pack)
    return Preset(kind, options, common, "soap" if name in SOAP else "adamw")


def _lora_options(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank}


def _small_lora(modules: Sequence[TargetModule], budget: int) -> tuple[int, list[str]]:
    """Return the highest LoRA rank within the budget, and the modules.

    If rank 1 on all modules exceeds the budget, only the model's last modules within the budget are returned.
    """
    rank = budget // sum(module.parameters_per_rank for module in modules)
    if rank:
        return rank, [module.name for module in modules]
    chosen: list[str] = []
    for module in reversed(modules):
        budget -= module.parameters_per_rank
        if budget < 0 and chosen:
            break
        chosen.append(module.name)
    return 1, chosen


def _lora_xs_rank(modules: Sequence[TargetModule], budget: int) -> int:
    """Return the highest rank within the budget, at most the smallest width of a module."""
    smallest_width = min(min(module.in_features, module.out_features) for module in modules)
    return min(max(1, math.isqrt(budget // len(modules))), smallest_width)


def _vblora_options(modules: Sequence[TargetModule], budget: int) -> dict[str, Any]:
    """Return options of VB-LoRA within the budget. The length of its vectors must divide every width."""
    divisor = math.gcd(*(width for module in modules for width in (module.in_features, module.out_features)))
    # n & -n is the largest power of two that divides n
    length = min(divisor & -divisor, _VBLORA_MAX)
    rank, top_k = 4, 2
    # each vector has `length` parameters, and one logit for each sub-vector of the factors
    parameters_per_vector = length + rank * sum(module.parameters_per_rank for module in modules) // length
    return {
        "r": rank,
        "topk": top_k,
        "num_vectors": min(max(top_k, budget // parameters_per_vector), _VBLORA_MAX),
        "vector_length": length,
        "save_only_topk_weights": True,
    }
