"""Options of a method comparison: methods, learning rates to try, and training settings.

Imports no torch, because the help of the command line imports this module.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.options import suggestion
from ..errors import OptionError
from .options import DEFAULTS, METRIC, Columns, check_task

LEARNING_RATES: Mapping[str, tuple[float, ...]] = {
    "lora": (1e-3, 3e-3, 9e-3),
    "lora-small": (2e-3, 6e-3, 2e-2),
    "core": (6e-3, 2e-2, 6e-2),
    "factors": (6e-3, 2e-2, 6e-2),
    "random": (6e-3, 2e-2, 6e-2),
    "vera": (2e-2, 6e-2, 2e-1),
    "vblora": (3e-3, 1e-2, 3e-2),
    "lora-xs": (1e-2, 3e-2, 9e-2),
    "init": (1e-3, 3e-3, 9e-3),
    "lora-soap": (3e-3, 1e-2, 3e-2),
    "full": (5e-5, 1.5e-4, 5e-4),
    "head": (6e-2, 2e-1, 6e-1),
}
"""Method → learning rates to try. They apply to the method's parameters, or to the head if the method has no others."""

DEFAULT_METHODS = ("lora", "lora-soap", "lora-small", "core", "factors", "random", "lora-xs", "head")

QUICK_METHODS = ("lora", "lora-soap", "factors", "random")
"""Methods of a quick comparison: LoRA with either optimizer, and factors in the pack's basis and in a random one."""

QUICK_SEEDS = 1
"""Number of runs per method of a quick comparison."""

BASELINE = "lora"
"""Method that the others are compared with. Without it, the first method is the baseline."""

SEEDS = 3
"""Default number of runs per method at the chosen learning rate."""


def quick_rates(methods: Sequence[str]) -> dict[str, list[float]]:
    """Return the learning rates of a quick comparison, which searches none: the middle one of `LEARNING_RATES`.

    Args:
        methods: Keys of `LEARNING_RATES`; other names are left out.
    """
    return {name: [sorted(LEARNING_RATES[name])[1]] for name in methods if name in LEARNING_RATES}


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """Options of one comparison, checked when built.

    Attributes:
        train: File of training rows.
        evaluation: File of test rows.
        task: Only "text-classification" is supported.
        model: Folder or Hub id of the base model. Default: the pack's.
        methods: Keys of `LEARNING_RATES`, without duplicates.
        rates: Method → learning rates to try instead of those in `LEARNING_RATES`. One rate is used without a search.
        seeds: Number of runs per method at the chosen learning rate.
        rank: Rank of LoRA, INIT and factors. Small methods get at most as many parameters as factors of this rank.
        epochs: Number of epochs of each run. Default: that of `train`, at least 3, or more for `MIN_STEPS` steps.
        batch_size: Rows per batch.
        max_length: Maximum number of tokens per row, at least 2. Default: `options.MAX_LENGTH` of the task.
        bf16: Compute in bfloat16 by autocast. Trained parameters stay float32.
        metric: Name of the metric by which learning rates are chosen and methods compared, as in `metrics.find`.
        columns: Names of the columns.

    Raises:
        OptionError: A name is unknown or a duplicate, or a number is out of range.
    """

    train: Path
    evaluation: Path
    task: str = "text-classification"
    model: str | None = None
    methods: Sequence[str] = DEFAULT_METHODS
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seeds: int = SEEDS
    rank: int = 8
    epochs: float | None = None
    batch_size: int = int(DEFAULTS["per_device_train_batch_size"])
    max_length: int | None = None
    bf16: bool = False
    metric: str = METRIC
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.task != "text-classification":
            raise OptionError(
                f"methods are compared by accuracy, which {self.task} does not have. Use text-classification, or "
                "`eigenlorax train` and `eigenlorax evaluate`."
            )
        self._check_methods()
        self._check_rates()
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise OptionError(f"epochs must be a number above 0, got {self.epochs!r}.")
        for name, minimum in (("seeds", 1), ("rank", 1), ("batch_size", 1), ("max_length", 2)):
            number = getattr(self, name)
            if number is not None and number < minimum:
                raise OptionError(f"{name} must be at least {minimum}, got {number!r}.")

    def _check_methods(self) -> None:
        if not self.methods:
            raise OptionError(f"no method is named. There are: {', '.join(LEARNING_RATES)}.")
        for name in self.methods:
            if name not in LEARNING_RATES:
                hint = suggestion(name, LEARNING_RATES)
                raise OptionError(f"there is no method {name!r}.{hint} There are: {', '.join(LEARNING_RATES)}.")
            if list(self.methods).count(name) > 1:
                raise OptionError(f"the method {name!r} is named twice. Name each method once.")

    def _check_rates(self) -> None:
        for name, rates in self.rates.items():
            if name not in self.methods:
                raise OptionError(
                    f"learning rates were passed for {name!r}, which is not one of the methods: "
                    f"{', '.join(self.methods)}.{suggestion(name, self.methods)}"
                )
            if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
                raise OptionError(
                    f"learning rates must be numbers above 0, got {', '.join(map(str, rates))} for {name}."
                )

    @property
    def baseline(self) -> str:
        """Method that the others are compared with."""
        return BASELINE if BASELINE in self.methods else self.methods[0]

    def learning_rates(self, method: str) -> list[float]:
        """Return the learning rates to try for a method, in ascending order."""
        return sorted(set(self.rates.get(method, LEARNING_RATES[method])))

    def searches(self, method: str) -> bool:
        """Return whether a search chooses the method's learning rate."""
        return len(self.learning_rates(method)) > 1
