"""The methods of `eigenlorax compare` with options that fit one model: small methods get as many parameters as
factors."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import keys
from ..errors import EigenloraxError, EigenloraxWarning, OptionError, reason
from ..pack.pack import Pack
from . import methods
from .methods import CommonConfig

TASK_TYPE = "SEQ_CLS"
SOAP = ("core", "factors", "random", "lora-soap")
"""Methods that are trained with `tuner.SOAP`. The others are trained with AdamW, as in their papers."""
_VBLORA_MAX = 256
"""PEFT's defaults for VB-LoRA, used as upper limits of the number of vectors and of their length."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A method with options that fit one model. kind, options: as in `methods.apply_method`. optimizer: as in
    `comparison_run.Recipe`."""

    kind: str
    options: Mapping[str, Any]
    common: CommonConfig
    optimizer: str

    def apply(self, base: Any) -> Any:
        """Return the base model with the method's parameters, ready to be trained."""
        return methods.apply_method(self.kind, self.options, base, self.common)


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A module of the model that the subspace covers."""

    name: str
    in_features: int
    out_features: int

    @property
    def parameters_per_rank(self) -> int:
        """Parameters of a LoRA of rank 1."""
        return self.in_features + self.out_features


def make_presets(
    pack: Pack, names: Sequence[str], tried: Sequence[str], rank: int, load_base: Callable[[], Any]
) -> dict[str, Preset]:
    """Return the presets of the named methods on the modules of the pack.

    Args:
        names: Methods, keys of `search_space.LEARNING_RATES`.
        tried: Those of them that are applied to a base model once, so that an unsuitable method is an error now.
        rank: Rank of LoRA, INIT and factors.
        load_base: Returns a fresh base model with a head.

    Raises `OptionError` if the model has no head, or a tried method does not support its modules.
    """
    modules, budget = _target_modules(pack, rank, load_base())
    presets = {
        name: _preset(name, methods.random_basis(pack) if name == "random" else pack, rank, modules, budget)
        for name in names
    }
    with warnings.catch_warnings():
        # reading the pack has shown these warnings already
        warnings.simplefilter("ignore", EigenloraxWarning)
        for name in tried:
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
    """Return one preset. budget: number of parameters of factors, which small methods do not exceed."""
    small_rank, small_modules = _small_lora(modules, budget)
    kinds_and_options: Mapping[str, tuple[str, Mapping[str, Any]]] = {
        "lora": ("lora", _lora_options(rank)),
        "lora-small": ("lora", _lora_options(small_rank)),
        "core": ("eigenlorax", {**_lora_options(rank), "core": True}),
        "factors": ("eigenlorax", _lora_options(rank)),
        "random": ("eigenlorax", _lora_options(rank)),
        # VeRA's random matrices are made again from their seed: like a pack's basis, they are not in the file
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
    """Return the highest rank within the budget, and its modules: at rank 1, the last modules that fit."""
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
    """Return the highest rank within the budget that no module's width limits."""
    smallest_width = min(min(module.in_features, module.out_features) for module in modules)
    return min(max(1, math.isqrt(budget // len(modules))), smallest_width)


def _vblora_options(modules: Sequence[TargetModule], budget: int) -> dict[str, Any]:
    """Return options of VB-LoRA within the budget. The length of its vectors has to divide every width."""
    divisor = math.gcd(*(width for module in modules for width in (module.in_features, module.out_features)))
    # n & -n is the largest power of two that divides n
    length = min(divisor & -divisor, _VBLORA_MAX)
    rank, top_k = 4, 2
    # one more vector costs its length, and one logit for each sub-vector of the factors
    parameters_per_vector = length + rank * sum(module.parameters_per_rank for module in modules) // length
    return {
        "r": rank,
        "topk": top_k,
        "num_vectors": min(max(top_k, budget // parameters_per_vector), _VBLORA_MAX),
        "vector_length": length,
        "save_only_topk_weights": True,
    }
