"""The method on trial, ours or in-tree VeRA as the control, and how its rows get into PEFT's parametrisations.

PEFT's tests are parametrised over lists, which pytest reads after their modules are imported: what is in them by then
is what is tested.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from peft import PeftConfig, VeraConfig

from eigenlorax import EigenLoraxConfig

control = False
quick = False

# r is what PEFT's tests of conversion to LoRA take for a rank: with it they have to come out exact. Scalings are small,
# since an update that is several times as large as the weight loses what is merged into it to rounding
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 4},
    "core": {"r": 4, "lora_alpha": 4, "core": True},
    "extra": {"r": 4, "lora_alpha": 4, "n_extra": 3, "extra_seed": 1},
    "embedded": {"r": 4, "lora_alpha": 4, "embed_subspace": True},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "dropout": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.1},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj|c_attn|query|q": 2},
        "alpha_pattern": {r"layers?\.0\..*|h\.0\..*|block\.0\..*": 8},
    },
}
QUICK_VARIANTS = ("plain", "core", "embedded")


def config_class() -> type[PeftConfig]:
    """The config class of the method on trial."""
    return VeraConfig if control else EigenLoraxConfig


def rows(listed: list, ours: list) -> None:
    """Put our rows into a list of PEFT's tests in place of all others; the control's are there already, or none is."""
    listed[:] = [row for row in listed if concerns(row)] or listed if control else ours


def variants(**kwargs: Any) -> list:
    """One row (config class, config kwargs) for each of our variants."""
    names = QUICK_VARIANTS if quick else VARIANTS
    return [pytest.param(EigenLoraxConfig, {**kwargs, **VARIANTS[name]}, id=f"eigenlorax-{name}") for name in names]


def written(function: Callable) -> list:
    """The list that is written out in a test's own parametrisation."""
    (found,) = (mark.args[1] for mark in function.pytestmark if mark.name == "parametrize" and "config" in mark.args[0])
    return found


def with_subspace(name: str, subspace: str) -> Callable[..., PeftConfig]:
    """Our config class for tests that give it no argument but the modules: with a subspace."""

    def config(**kwargs: Any) -> EigenLoraxConfig:
        return EigenLoraxConfig(subspace=subspace, **kwargs)

    config.__name__ = name
    config.stands_for = EigenLoraxConfig
    return config


def concerns(row: Any) -> bool:
    """Whether a row, or one value of it, is of the method on trial."""
    return any(
        value is config_class() or isinstance(value, config_class()) or hasattr(value, "stands_for")
        for value in _values(row)
    )


def _values(row: Any) -> Iterator[Any]:
    yield row
    if isinstance(row, tuple | list):
        for value in row:
            yield from _values(value)
