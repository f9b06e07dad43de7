"""Translation of module names from another version of transformers to the names in the model."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from ..core import keys, module_names, module_patterns, renamed_modules
from ..errors import ModuleNameError
from .config import EigenLoraxConfig

IsTarget = Callable[[EigenLoraxConfig, str], Any]
"""Function that returns whether a config targets a module name, as PEFT decides it."""


def rename_targets(
    config: EigenLoraxConfig,
    modules: Collection[str],
    subspace_names: Callable[[], Mapping[str, str | None]],
    is_target: IsTarget,
) -> None:
    """Rename targets, ranks and alphas of a config whose modules have another name in the model.

    Names that the model has are unchanged.

    Args:
        config: The config, which is changed.
        modules: The names of all modules of the model.
        subspace_names: Function that returns the name in the subspace of each module that can be adapted. It is only
            called if a target is missing, because it compares all names.
        is_target: PEFT's check of targets.
    """
    targets = config.target_modules
    if targets is None:
        return
    old_names: dict[str, str] = {}
    if isinstance(targets, str):
        if any(is_target(config, name) for name in modules):
            return
        old_names = {
            name: subspace_name
            for name, subspace_name in subspace_names().items()
            if subspace_name is not None and is_target(config, subspace_name)
        }
        config.target_modules = set(old_names) or targets
    else:
        suffixes = {suffix for name in modules for suffix in module_names.suffixes(name)}
        missing = set(targets) - suffixes
        if not missing:
            return
        candidates, renamed = subspace_names(), set(targets) - missing
        for target in missing:
            matches = _renamed_modules(config, target, candidates, is_target)
            old_names |= matches
            renamed |= set(matches) or {target}
        config.target_modules = renamed
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, {**_patterns_of_renamed(getattr(config, field), old_names), **getattr(config, field)})


def _patterns_of_renamed(pattern: Mapping[str, Any], old_names: Mapping[str, str]) -> dict[str, Any]:
    """Return entries for modules that a rank or alpha pattern matches under their old name only."""
    patterns = module_patterns.ModulePatterns(pattern)
    return {
        module_patterns.exact_pattern(name): value
        for name, old_name in old_names.items()
        if patterns.value(name, None) is None and (value := patterns.value(old_name, None)) is not None
    }


def _renamed_modules(
    config: EigenLoraxConfig, target: str, subspace_names: Mapping[str, str | None], is_target: IsTarget
) -> dict[str, str]:
    """Return the modules of the model that a missing target refers to, with the old name of each."""
    single = copy.copy(config)
    single.target_modules = {target}
    matches = {
        name: subspace_name
        for name, subspace_name in subspace_names.items()
        if subspace_name is not None and is_target(single, subspace_name)
    }
    if matches:
        return matches
    # a target may be the end of several module names, or a full name that is shorter in the model
    newest = renamed_modules.newest_name(target)
    ends = {name: target for name in subspace_names if _ends_with(renamed_modules.newest_name(name), newest)}
    return ends or {name: target for name in subspace_names if _ends_with(newest, renamed_modules.newest_name(name))}


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def rename_state_dict(state_dict: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """Return an adapter's tensors with the names that its modules have in the model.

    Args:
        state_dict: Tensors by the keys that the adapter was saved with.
        modules: Names of the adapted modules.

    Raises:
        ModuleNameError: Coefficients belong to a module that is not adapted.
    """
    owners = {key: keys.module_of_key(key) for key in state_dict}
    names = {owner for owner in owners.values() if owner is not None}
    if names <= set(modules):
        return dict(state_dict)
    model_names = module_names.resolve_all(names, modules)
    with_coefficients = {owner for key, owner in owners.items() if owner is not None and not key.endswith(".bias")}
    missing = sorted(name for name in with_coefficients if model_names[name] is None)
    if missing:
        raise ModuleNameError(
            f"the adapter has coefficients of {missing[0]!r}, which is not among its {len(modules)} modules in the "
            "model: they would be dropped. Load it with the target_modules and on the model that it was saved with."
        )
    renamed = {}
    for key, tensor in state_dict.items():
        owner = owners[key]
        model_name = model_names[owner] if owner is not None else None
        renamed[key if owner is None or model_name is None else key.replace(owner, model_name, 1)] = tensor
    return renamed
