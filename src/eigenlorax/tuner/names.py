"""Names of modules that a config or file has from another version of transformers, as the model has them."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from ..core import keys, module_names, module_patterns, renamed_modules
from ..errors import ModuleNameError
from .config import EigenLoraxConfig

Matches = Callable[[EigenLoraxConfig, str], Any]
"""PEFT's own: whether the targets of a config, without what it excludes, have a module of this name."""


def follow(
    config: EigenLoraxConfig, modules: Collection[str], places: Callable[[], Mapping[str, str | None]], matches: Matches
) -> None:
    """Let a config name its targets, ranks and alphas as the model does, where it has names of before or after a
    renaming. What the model has under the names given stays.

    modules: the names of all modules of the model.
    places: of those that can be adapted, what they are called in the subspace; asked only where it is needed.
    """
    targets = config.target_modules
    if targets is None:
        return
    own: dict[str, str] = {}
    if isinstance(targets, str):
        if any(matches(config, name) for name in modules):
            return
        own = {name: place for name, place in places().items() if place is not None and matches(config, place)}
        config.target_modules = set(own) or targets
    else:
        there = {ending for name in modules for ending in module_names.suffixes(name)}
        lacking = set(targets) - there
        if not lacking:
            return
        found, kept = places(), set(targets) - lacking
        for target in lacking:
            meant = _meant(config, target, found, matches)
            own |= meant
            kept |= set(meant) or {target}
        config.target_modules = kept
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field)
        known = module_patterns.ModulePatterns(pattern)
        more = {
            module_patterns.exact_pattern(name): value
            for name, before in own.items()
            if known.value(name, None) is None and (value := known.value(before, None)) is not None
        }
        setattr(config, field, {**more, **pattern})


def _meant(config: EigenLoraxConfig, target: str, places: Mapping[str, str | None], matches: Matches) -> dict[str, str]:
    """The modules that a target means which the model lacks, and the name that each had."""
    alone = copy.copy(config)
    alone.target_modules = {target}
    found = {name: place for name, place in places.items() if place is not None and matches(alone, place)}
    if found:
        return found
    # of a whole name the model may have less; what is the end of a name may stand for many modules
    now = renamed_modules.newest_name(target)
    ends = {name: target for name in places if _ends_with(renamed_modules.newest_name(name), now)}
    return ends or {name: target for name in places if _ends_with(now, renamed_modules.newest_name(name))}


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def of_the_model(state_dict: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """An adapter's tensors under the model's names of the modules that are adapted; an error names one that is not."""
    owners = {key: keys.module_of_key(key) for key in state_dict}
    names = {owner for owner in owners.values() if owner is not None}
    coefficients = {owner for key, owner in owners.items() if owner is not None and not key.endswith(".bias")}
    if names <= set(modules):
        return dict(state_dict)
    places = module_names.resolve_all(names, modules)
    lacking = sorted(name for name, place in places.items() if place is None and name in coefficients)
    if lacking:
        raise ModuleNameError(
            f"the adapter has coefficients of {lacking[0]!r}, which is not among the {len(modules)} modules that it "
            "was put on: they would be lost. Its target_modules, or the model, are not those that it was saved with."
        )
    found = {}
    for key, tensor in state_dict.items():
        owner = owners[key]
        place = places[owner] if owner is not None else None
        found[key.replace(owner, place, 1) if owner is not None and place is not None else key] = tensor
    return found
