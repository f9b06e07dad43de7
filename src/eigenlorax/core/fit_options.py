"""Options of a fit, validated when they are created."""

import math
from dataclasses import dataclass

from ..errors import OptionError
from .options import check_choice, to_byte_count, to_float, to_int

WEIGHTINGS = ("delta", "factors")
SWEEPS = 2
"""Default number of alternating sweeps."""
BYTE_TARGETS = ("max_error", "max_bytes", "ratio")
"""Options under which the codec distributes bytes, unless a float dtype is asked for."""
SIZE_OPTIONS = ("n_components", "energy", "max_error", "max_bytes", "ratio")
"""Options that determine the size of a pack; exactly one of them is given."""
PURPOSES = ("storage", "training", "serving")
"""Purposes of a pack, which determine the options of a fit that are not given."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Options of a fit: its size, its weighting and its sweeps.

    Exactly one of `SIZE_OPTIONS` is given. Numbers of NumPy and torch are converted to Python's.

    Attributes:
        n_components: Maximum number of components per module and side.
        energy: Fraction of squared norm that each side keeps with as few components as possible, above 0, at most 1.
        max_error: Bound on every adapter's relative error, between 0 and 1, met with as few bytes as possible.
        max_bytes: Bound on the size of the pack, within which the largest relative error is minimised.
        ratio: Bound on the size of the pack as a ratio: bytes of the adapters as 16-bit LoRA files, divided by the
            bytes of the pack; at least 1.
        weighting: "delta" weights the rows of each factor by the other one, which minimises the error of the update;
            "factors" stacks the factors as they are (arXiv 2502.04700, §3).
        sweeps: Number of alternating sweeps of a "delta" fit. No sweep increases the objective.

    Raises:
        OptionError: An option is out of its range, or not exactly one of `SIZE_OPTIONS` is given.
    """

    n_components: int | None = None
    energy: float | None = None
    weighting: str = "delta"
    sweeps: int = SWEEPS
    max_error: float | None = None
    max_bytes: int | float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        self._convert_numbers()
        sizes = {name: getattr(self, name) for name in SIZE_OPTIONS}
        if sum(value is not None for value in sizes.values()) != 1:
            passed = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None) or "none of them"
            raise OptionError(
                f"pass exactly one of {', '.join(SIZE_OPTIONS[:-1])} and {SIZE_OPTIONS[-1]}: got {passed}. "
                "For example n_components=32, energy=0.9, max_error=0.3, or ratio=18."
            )
        if self.n_components is not None or self.energy is not None:
            check_size(self.n_components, self.energy)
        elif self.max_error is not None and not 0 < self.max_error < 1:
            raise OptionError(f"max_error is a relative error, above 0 and below 1, got {self.max_error}.")
        elif self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise OptionError(
                f"ratio is the size of the adapters divided by that of the pack, at least 1, got {self.ratio}."
            )
        check_choice("weighting", self.weighting, WEIGHTINGS)
        if self.sweeps < 0:
            raise OptionError(f"sweeps must be 0 or more, got {self.sweeps}.")

    def _convert_numbers(self) -> None:
        converters = {
            "n_components": to_int,
            "energy": to_float,
            "max_error": to_float,
            "ratio": to_float,
            "max_bytes": to_byte_count,
            "sweeps": to_int,
        }
        for name, convert in converters.items():
            option = getattr(self, name)
            if option is not None:
                # frozen: `object` sets the field, before the instance is used
                object.__setattr__(self, name, convert(name, option))


def check_size(n_components: int | None, energy: float | None) -> None:
    """Raise `OptionError` unless exactly one of the two is given, and in its range."""
    if (n_components is None) == (energy is None):
        raise OptionError(
            f"pass either n_components or energy, not both or neither: got {n_components=}, {energy=}. "
            "For example n_components=32, or energy=0.9."
        )
    if n_components is not None and n_components < 1:
        raise OptionError(f"n_components must be at least 1, got {n_components}.")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy is a fraction of squared norm, above 0 and at most 1, got {energy}.")
