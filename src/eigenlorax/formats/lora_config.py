"""The numbers of a LoRA's `adapter_config.json`: read as PEFT reads them, and written for adapters that have none."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..core import keys, module_patterns
from ..core.adapter import Adapter, ModuleSpec
from ..core.linear_regex import StepBudget
from ..errors import FormatError

Number = TypeVar("Number", int, float)

# PEFT's own defaults, for configs older than the field.
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8
# What the config of another method says that holds of a LoRA as well.
_KEPT = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "fan_in_fan_out",
    "lora_dropout",
    "modules_to_save",
)


class Numbers:
    """Ranks and scalings by one config, as PEFT finds them: r and lora_alpha with their patterns; rsLoRA divides by √r.

    where: stands before what is wrong with them. effort: what matching the patterns may take in all.
    """

    def __init__(self, config: Mapping[str, Any], where: str, effort: StepBudget | None = None) -> None:
        self._config, self._where = config, where
        patterns = [config.get(field) or {} for field in ("rank_pattern", "alpha_pattern")]
        if not all(isinstance(pattern, dict) for pattern in patterns):
            raise FormatError(f"{where}: rank_pattern and alpha_pattern must be JSON objects, got {patterns}.")
        effort = effort or StepBudget()
        self._ranks, self._alphas = (module_patterns.ModulePatterns(pattern, effort) for pattern in patterns)

    def of(self, module: str, rank: int = _DEFAULT_RANK) -> tuple[int, float]:
        """Rank and scaling of a module. rank: what it is where the config has none."""
        config, where = self._config, self._where
        try:
            rank = self._ranks.value(module, config.get("r", rank))
            alpha = self._alphas.value(module, config.get("lora_alpha", _DEFAULT_ALPHA))
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        usable = type(rank) is int and rank >= 1 and type(alpha) in (int, float)
        try:
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if usable else math.nan
        except OverflowError:
            scaling = math.inf
        # squared, it enters every norm of the update
        if not math.isfinite(scaling * scaling):
            raise FormatError(
                f"{where}: r={rank!r} and lora_alpha={alpha!r} of module {module} in {keys.ADAPTER_CONFIG} are not "
                "usable numbers."
            )
        return rank, scaling

    def check(self, module: str, spec: ModuleSpec) -> None:
        """`FormatError` where they are not those of a module's factors."""
        rank, scaling = self.of(module)
        if rank != spec.rank or not math.isclose(scaling, spec.scaling, rel_tol=1e-9):
            raise FormatError(
                f"adapter {self._where!r}, module {module}: rank {spec.rank} and scaling {spec.scaling:g} are not "
                f"those of its config, {rank} and {scaling:g}. Clear source_config, and a fitting one is written."
            )


def make(adapter: Adapter) -> str:
    """An `adapter_config.json` for an adapter that was made in memory: ranks and scalings by module, nothing else."""
    ranks = {module: spec.rank for module, spec in adapter.specs.items()}
    alphas = {module: alpha_of(spec.rank, spec.scaling) for module, spec in adapter.specs.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module_patterns.exact_pattern(m): one for m, one in ranks.items() if one != rank},
        "alpha_pattern": {module_patterns.exact_pattern(m): one for m, one in alphas.items() if one != alpha},
        "target_modules": sorted(adapter.specs),
    }
    return json.dumps(config, indent=2, sort_keys=True)


def of_ranks(config: str, adapter: Adapter, ranks: Mapping[str, int]) -> str:
    """An adapter's `adapter_config.json` where some of its modules have other ranks, and the scalings that they had."""
    fields = json.loads(config)
    now = {module: ranks.get(module, spec.rank) for module, spec in adapter.specs.items()}
    alphas = {
        module: spec.scaling * math.sqrt(now[module])
        if fields.get("use_rslora")
        else alpha_of(now[module], spec.scaling)
        for module, spec in adapter.specs.items()
    }
    usual: list[tuple[str, str, Mapping[str, int | float], Any]] = [
        ("r", "rank_pattern", now, _DEFAULT_RANK),
        ("lora_alpha", "alpha_pattern", alphas, _DEFAULT_ALPHA),
    ]
    for field, pattern, values, default in usual:
        others: Mapping[str, Any] = {}
        if adapter.carried:
            # what is carried beside modules, such as embeddings, has its rank by what the config says now
            most, others = fields.get(field, default), fields.get(pattern) or {}
        else:
            most = _commonest(values.values())
        # a pattern that stays may fit any of them
        own = {
            module_patterns.exact_pattern(module): value for module, value in values.items() if value != most or others
        }
        fields[field], fields[pattern] = most, own | {key: value for key, value in others.items() if key not in own}
    # the order of patterns counts: keys are not sorted
    return json.dumps(fields, indent=2)


def derived(adapter: Adapter, config: Mapping[str, Any]) -> str:
    """The same for an adapter that another method trained, with what that method's config has that still holds."""
    # "eigenlorax_only" and its like: the biases of the modules that have an adapter
    stated = str(config.get("bias", "none"))
    bias = "lora_only" if re.fullmatch(r"\w+_only", stated) else stated
    fields = {**json.loads(make(adapter)), **{key: config[key] for key in _KEPT if key in config}, "bias": bias}
    return json.dumps(fields, indent=2, sort_keys=True)


def alpha_of(rank: int, scaling: float) -> float:
    """The lora_alpha of a scaling: a whole number where one gives the same scaling."""
    alpha = float(scaling * rank)
    return float(round(alpha)) if round(alpha) / rank == scaling else alpha


def _commonest(values: Iterable[Number]) -> Number:
    """The value that is there most often; of several, the first: what differs from it has to be listed."""
    return Counter(values).most_common(1)[0][0]
