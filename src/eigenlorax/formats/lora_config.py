"""Ranks and scalings in a LoRA's `adapter_config.json`: read as PEFT reads them, and written."""

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

# PEFT's defaults, for configs that are older than the field
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8
# fields in the config of another PEFT method that mean the same for a LoRA
_COMMON_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "fan_in_fan_out",
    "lora_dropout",
    "modules_to_save",
    "trainable_token_indices",
)


class ScalingConfig:
    """Ranks and scalings of modules by a config: `r` and `lora_alpha` with their patterns, as PEFT matches them.

    The scaling is lora_alpha / r, or lora_alpha / √r with rsLoRA.

    Args:
        config: The parsed `adapter_config.json`.
        where: Path of the file, for error messages.
        budget: Steps that matching of patterns may take. Configs of one file share a budget.

    Raises:
        FormatError: A pattern is not a JSON object.
    """

    def __init__(self, config: Mapping[str, Any], where: str, budget: StepBudget | None = None) -> None:
        self._config, self._where = config, where
        patterns = [config.get(field) or {} for field in ("rank_pattern", "alpha_pattern")]
        if not all(isinstance(pattern, dict) for pattern in patterns):
            raise FormatError(f"{where}: rank_pattern and alpha_pattern must be JSON objects, got {patterns}.")
        budget = budget or StepBudget()
        self._ranks, self._alphas = (module_patterns.ModulePatterns(pattern, budget) for pattern in patterns)

    def rank_and_scaling(self, module: str, rank: int = _DEFAULT_RANK) -> tuple[int, float]:
        """Return rank and scaling of a module.

        Args:
            module: Name of the module.
            rank: Rank if the config states none.

        Raises:
            FormatError: The config states numbers that give no finite scaling.
        """
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
        # its square is part of every norm of the update
        if not math.isfinite(scaling * scaling):
            raise FormatError(
                f"{where}: r={rank!r} and lora_alpha={alpha!r} of module {module} in {keys.ADAPTER_CONFIG} are not "
                "usable numbers."
            )
        return rank, scaling

    def check(self, module: str, spec: ModuleSpec) -> None:
        """Raise `FormatError` if the config states another rank or scaling than the spec of a module."""
        rank, scaling = self.rank_and_scaling(module)
        if rank != spec.rank or not math.isclose(scaling, spec.scaling, rel_tol=1e-9):
            raise FormatError(
                f"adapter {self._where!r}, module {module}: rank {spec.rank} and scaling {spec.scaling:g} differ "
                f"from its config, {rank} and {scaling:g}. Set source_config=None to write a matching one."
            )


def make(adapter: Adapter) -> str:
    """Return an `adapter_config.json` with the ranks and scalings of an adapter that was made in memory."""
    ranks = {module: spec.rank for module, spec in adapter.specs.items()}
    alphas = {module: lora_alpha(spec.rank, spec.scaling) for module, spec in adapter.specs.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module_patterns.exact_pattern(m): value for m, value in ranks.items() if value != rank},
        "alpha_pattern": {module_patterns.exact_pattern(m): value for m, value in alphas.items() if value != alpha},
        "target_modules": sorted(adapter.specs),
    }
    return json.dumps(config, indent=2, sort_keys=True)


def with_ranks(config: str, adapter: Adapter, ranks: Mapping[str, int]) -> str:
    """Return an adapter's `adapter_config.json` after the ranks of some modules have changed and no scaling has.

    Args:
        config: Text of the config before the change.
        adapter: The adapter, with its earlier ranks.
        ranks: New rank by module.
    """
    fields = json.loads(config)
    new_ranks = {module: ranks.get(module, spec.rank) for module, spec in adapter.specs.items()}
    alphas = {
        module: spec.scaling * math.sqrt(new_ranks[module])
        if fields.get("use_rslora")
        else lora_alpha(new_ranks[module], spec.scaling)
        for module, spec in adapter.specs.items()
    }
    settings: list[tuple[str, str, Mapping[str, int | float], Any]] = [
        ("r", "rank_pattern", new_ranks, _DEFAULT_RANK),
        ("lora_alpha", "alpha_pattern", alphas, _DEFAULT_ALPHA),
    ]
    for field, pattern_field, values, default in settings:
        old_patterns: Mapping[str, Any] = {}
        if adapter.carried:
            # the config also states the rank of carried tensors, such as embeddings, which must not change
            usual, old_patterns = fields.get(field, default), fields.get(pattern_field) or {}
        else:
            usual = _most_common(values.values())
        # any module may match an old pattern, so each needs its own pattern in addition
        patterns = {
            module_patterns.exact_pattern(module): value
            for module, value in values.items()
            if value != usual or old_patterns
        }
        remaining = {pattern: value for pattern, value in old_patterns.items() if pattern not in patterns}
        fields[field], fields[pattern_field] = usual, patterns | remaining
    # keys are not sorted: PEFT takes the first pattern that matches
    return json.dumps(fields, indent=2)


def derived(adapter: Adapter, config: Mapping[str, Any]) -> str:
    """Return an `adapter_config.json` for an adapter that another PEFT method trained.

    Args:
        adapter: The adapter as a LoRA.
        config: Config of the other method. Fields that mean the same for a LoRA are kept.
    """
    # values such as "eigenlorax_only" mean the biases of the adapted modules
    stated = str(config.get("bias", "none"))
    bias = "lora_only" if re.fullmatch(r"\w+_only", stated) else stated
    fields = {
        **json.loads(make(adapter)),
        **{key: config[key] for key in _COMMON_FIELDS if key in config},
        "bias": bias,
    }
    return json.dumps(fields, indent=2, sort_keys=True)


def lora_alpha(rank: int, scaling: float) -> float:
    """Return the lora_alpha of a scaling, as a whole number if that gives exactly the scaling."""
    alpha = float(scaling * rank)
    return float(round(alpha)) if round(alpha) / rank == scaling else alpha


def _most_common(values: Iterable[Number]) -> Number:
    """Return the most common value, the first of several."""
    return Counter(values).most_common(1)[0][0]
