"""Who takes part in a contest of methods, the learning rates that are tried, and what a contest is asked for.

Nothing here imports torch: the command's help reads it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.options import suggestion
from ..errors import OptionError
from .options import DEFAULTS, Columns, check_task

ENTRANTS: Mapping[str, tuple[float, ...]] = {
    "lora": (1e-3, 3e-3, 9e-3),
    "lora-small": (2e-3, 6e-3, 2e-2),
    "core": (6e-3, 2e-2, 6e-2),
    "factors": (6e-3, 2e-2, 6e-2),
    "random": (6e-3, 2e-2, 6e-2),
    "vera": (2e-2, 6e-2, 2e-1),
    "vblora": (3e-3, 1e-2, 3e-2),
    "lora-xs": (1e-2, 3e-2, 9e-2),
    "init": (1e-3, 3e-3, 9e-3),
    "lora-soap": (2e-3, 6e-3, 2e-2),
    "full": (5e-5, 1.5e-4, 5e-4),
    "head": (6e-2, 2e-1, 6e-1),
}
"""Name → the learning rates that are tried: of the method's own numbers; of the head where there are no others."""

METHODS = ("lora", "lora-small", "core", "factors", "random", "vera", "lora-xs", "head")
"""Those that take part unless others are named."""

YARDSTICK = "lora"
"""What all are measured against, if it takes part; else the first that is named."""

SEEDS = 3


@dataclass(frozen=True, slots=True)
class Contest:
    """What is compared, on which rows, and how each method is trained. None stands for a default, as in `Training`.

    methods: names of `ENTRANTS`, once each. rates: by method, where they are not those of `ENTRANTS`; a single one
    leaves nothing to choose. seeds: trainings of each method. rank: of LoRA, INIT and factors, which set the size that
    small methods are cut to.
    """

    train: Path
    evaluation: Path
    task: str = "text-classification"
    model: str | None = None
    methods: Sequence[str] = METHODS
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seeds: int = SEEDS
    rank: int = 8
    epochs: float = float(DEFAULTS["num_train_epochs"])
    batch_size: int = int(DEFAULTS["per_device_train_batch_size"])
    max_length: int | None = None
    bf16: bool = False
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.task != "text-classification":
            raise OptionError(
                f"methods are compared on text-classification alone, not on {self.task}: what is counted are right "
                "answers. `eigenlorax train` and `evaluate` do the latter."
            )
        if not self.methods:
            raise OptionError(f"no method is named. There are: {', '.join(ENTRANTS)}.")
        for name in self.methods:
            if name not in ENTRANTS:
                near = suggestion(name, ENTRANTS)
                raise OptionError(f"there is no method {name!r}.{near} There are: {', '.join(ENTRANTS)}.")
            if list(self.methods).count(name) > 1:
                raise OptionError(f"the method {name!r} is named twice. Name each once.")
        for name, rates in self.rates.items():
            if name not in self.methods:
                raise OptionError(
                    f"learning rates are given for {name!r}, which is none of the methods that take part: "
                    f"{', '.join(self.methods)}.{suggestion(name, self.methods)}"
                )
            if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
                raise OptionError(
                    f"learning rates must be numbers above 0, got {', '.join(map(str, rates))} of {name}."
                )
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise OptionError(f"epochs must be a number above 0, got {self.epochs!r}.")
        for field_, least in (("seeds", 1), ("rank", 1), ("batch_size", 1), ("max_length", 2)):
            value = getattr(self, field_)
            if value is not None and value < least:
                raise OptionError(f"{field_} must be at least {least}, got {value!r}.")

    @property
    def yardstick(self) -> str:
        return YARDSTICK if YARDSTICK in self.methods else self.methods[0]

    def rates_of(self, method: str) -> list[float]:
        """What is tried, ascending."""
        return sorted(set(self.rates.get(method, ENTRANTS[method])))


def read_rates(given: Sequence[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """`METHOD=A,B,C`, each of one method, and `A,B,C`, of all that are not named."""
    found: dict[str, list[float]] = {}
    named: list[str] = []
    for text in sorted(given, key=lambda one: "=" in one):
        name, equals, rest = text.partition("=")
        try:
            rates = [float(one) for one in (rest if equals else text).split(",")]
        except ValueError as error:
            raise OptionError(f"{text!r} are not learning rates. METHOD=A,B,C or A,B,C was expected.") from error
        of = name if equals else ""
        if of in named:
            raise OptionError(
                f"learning rates {f'of {of}' if of else 'of all'} are given twice. Give them once, A,B,C."
            )
        named.append(of)
        found |= {name: rates} if equals else dict.fromkeys(methods, rates)
    return found
