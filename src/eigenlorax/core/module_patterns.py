"""PEFT's `rank_pattern` and `alpha_pattern`: values of modules by regular expressions over their names."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import FormatError
from .linear_regex import LinearRegex, PatternError, StepBudget

# A plain name, in which a dot may be escaped or match any character. No automaton is needed to match it.
_LITERAL = re.compile(r"(?P<anchor>\^?)(?P<name>(?:[A-Za-z0-9_.-]|\\[^A-Za-z0-9\s\\])*)\$?")


class ModulePatterns:
    """A `rank_pattern` or `alpha_pattern` that is looked up for many modules.

    Args:
        pattern: Values by regular expression, in PEFT's order of precedence.
        budget: Steps that matching may take in all; a new budget by default. Configs are untrusted: matching could
            be made to take very long.
    """

    __slots__ = ("_budget", "_exact", "_expressions", "_matchers", "_pattern")

    def __init__(self, pattern: Mapping[str, Any], budget: StepBudget | None = None) -> None:
        self._pattern, self._budget = pattern, budget or StepBudget()
        # files of image models may have an expression for each of a thousand modules (`^name$`): a dictionary
        # answers for those, and only the others are matched one by one
        self._exact: dict[str, int] = {}
        self._expressions: list[tuple[int, str]] = []
        self._matchers: list[Callable[[str], bool]] = []
        for position, expression in enumerate(pattern):
            name = re.sub(r"\\([^A-Za-z0-9])", r"\1", expression[1:-1])
            if expression == exact_pattern(name):
                self._exact[name] = position
            else:
                self._expressions.append((position, expression))

    def value(self, module: str, default: Any) -> Any:
        """Return the value of a module, as `peft.utils.other.get_pattern_key` finds it.

        That is the value of the first expression that fits the whole name or its last components. If no expression
        fits, it is the value under the name itself, or `default`.

        Raises:
            FormatError: An expression is invalid, or matching takes too many steps.
        """
        exact_position = self._exact.get(module)
        for number, (position, expression) in enumerate(self._expressions):
            if exact_position is not None and position > exact_position:
                break
            try:
                if number == len(self._matchers):
                    # built when first needed: most modules are answered by the first few expressions
                    self._matchers.append(_matcher(expression, self._budget))
                fits = self._matchers[number](module)
            except PatternError as error:
                raise FormatError(
                    f"the key {expression!r} of rank_pattern or alpha_pattern cannot be used as a regular expression: "
                    f"{error}."
                ) from error
            if fits:
                return self._pattern[expression]
        if exact_position is None:
            return self._pattern.get(module, default)
        return self._pattern[exact_pattern(module)]


def _matcher(expression: str, budget: StepBudget) -> Callable[[str], bool]:
    """Return a function that tests whether the expression fits a module name in PEFT's sense."""
    literal = _LITERAL.fullmatch(expression)
    if literal is not None:
        return partial(_fits_literal, literal["anchor"] == "^", *_split_literal(literal["name"]), budget)
    return LinearRegex(rf"(.*\.)?({expression})$", budget).matches_start


def _split_literal(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Split a literal expression at unescaped dots, which match any character.

    Returns:
        Length of the names that it fits, and its pieces with their offsets.
    """
    length, pieces = 0, []
    for piece in re.split(r"(?<!\\)\.", name):
        text = piece.replace("\\", "")
        pieces.append((length, text))
        length += len(text) + 1
    return length - 1, pieces


def _fits_literal(
    anchored: bool, length: int, pieces: Sequence[tuple[int, str]], budget: StepBudget, module: str
) -> bool:
    budget.spend(1)
    start = len(module) - length
    if start < 0 or (start > 0 and (anchored or module[start - 1] != ".")):
        return False
    # from the end, because names mostly differ in their last components
    return all(module.startswith(piece, start + offset) for offset, piece in reversed(pieces))


def exact_pattern(module: str) -> str:
    """Return an expression that fits this module alone: without its `^`, `0.query` would fit `decoder.0.query` too."""
    return f"^{re.escape(module)}$"
