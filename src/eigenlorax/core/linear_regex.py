"""Regular expressions from untrusted configs, matched in linear time by an automaton without backtracking.

Python's `re` may take exponential time for a single line of a config. The supported syntax is enough to select modules
by name: characters, classes, groups, alternatives, repetitions and anchors, each with the meaning that it has in `re`.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CHARACTERS, MAX_DEPTH, MAX_STATES = 4096, 40, 4096
"""Limits of one expression: its length, the depth of nested groups, and the states of its automaton."""
MAX_STEPS = 4_000_000
"""Steps that all expressions of one config may take together: a second or two."""

_START, _END, _VERY_END = 1, 2, 4
_ANCHORS = {"^": _START, r"\A": _START, "$": _END, r"\Z": _VERY_END}
_REPEATED = re.compile(r"(?P<kind>[*+?])|\{(?P<minimum>\d*)(?P<comma>,)?(?P<maximum>\d*)\}", re.ASCII)
_OPENED = re.compile(r"\((\?:|\?P<[^\W\d]\w*>)?(?!\?)")
_MAX_CACHED_MOVES = 10_000


class PatternError(Exception):
    """An invalid or too expensive expression. The caller adds the name of the config."""


class StepBudget:
    """The number of steps that may still be taken."""

    __slots__ = ("_left",)

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        """Subtract some steps; raise `PatternError` if fewer are left."""
        self._left -= steps
        if self._left < 0:
            raise PatternError(
                "matching all expressions with all modules takes too many steps. Write full names of modules, such as "
                r"^encoder\.layer\.0\.query$, instead of expressions"
            )


@dataclass(frozen=True, slots=True)
class _Character:
    """A single character, tested by the expression of this number in `_Parser.tests`."""

    test: int


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A position in the text, such as its start: a combination of `_START`, `_END` and `_VERY_END`."""

    position: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: "Sequence[_Node]"


@dataclass(frozen=True, slots=True)
class _Choice:
    options: "Sequence[_Node]"


@dataclass(frozen=True, slots=True)
class _Repeat:
    """A part that repeats at least `minimum` and at most `maximum` times; None is no limit."""

    part: "_Node"
    minimum: int
    maximum: int | None


_Node = _Character | _Anchor | _Sequence | _Choice | _Repeat


class LinearRegex:
    """An expression as a nondeterministic automaton (Thompson's construction).

    All states that the text may have reached are followed at once. Transitions between sets of states are computed when
    a text first needs them, and cached.

    Args:
        pattern: The expression.
        budget: Steps that may be taken, shared by all expressions of a config.

    Raises:
        PatternError: The expression is invalid, unsupported, or too large.
    """

    __slots__ = ("_accepting", "_anchors", "_budget", "_first", "_following", "_moves", "_tested", "_tests")

    def __init__(self, pattern: str, budget: StepBudget) -> None:
        parser = _Parser(pattern, budget)
        self._budget = budget
        self._tests = parser.tests
        # per state: the test that a character has to pass, or the anchor that has to hold here, and the next states
        self._tested: list[int | None] = []
        self._anchors: list[int] = []
        self._following: list[tuple[int, ...]] = []
        self._accepting = self._state((), None)
        self._first = self._build(parser.whole(), self._accepting)
        self._moves: dict[tuple[frozenset[int], str, int], frozenset[int]] = {}

    def matches_start(self, text: str) -> bool:
        """Return whether the expression fits the text or a prefix of it, like `re.match`."""
        self._budget.spend(1 + len(text))
        states = self._closed([self._first], _START | self._end_anchors(text, 0))
        for position, character in enumerate(text, start=1):
            if self._accepting in states:
                return True
            if not states:
                return False
            # the anchors that hold are part of the key: `$` may lead on at one position and not at another
            ends = self._end_anchors(text, position)
            key = (states, character, ends)
            following = self._moves.get(key)
            if following is None:
                following = self._move(*key)
                # an adversarial pattern can make new state sets without end
                if len(self._moves) >= _MAX_CACHED_MOVES:
                    self._moves.clear()
                self._moves[key] = following
            states = following
        return self._accepting in states

    @staticmethod
    def _end_anchors(text: str, position: int) -> int:
        """Return the end anchors that hold at a position. `$` also holds before a final line break."""
        remaining = len(text) - position
        if remaining > 1:
            return 0
        return _END | _VERY_END if remaining == 0 else _END * (text[-1] == "\n")

    def _move(self, states: frozenset[int], character: str, ends: int) -> frozenset[int]:
        reached: list[int] = []
        for state in states:
            test = self._tested[state]
            if test is not None and self._tests[test].fullmatch(character):
                reached += self._following[state]
        self._budget.spend(2 * len(states))
        return self._closed(reached, ends)

    def _closed(self, states: list[int], anchors: int) -> frozenset[int]:
        """Return the states that are reached without reading a character, where these anchors hold."""
        reached: set[int] = set()
        seen = set(states)
        while states:
            state = states.pop()
            if self._tested[state] is not None or state == self._accepting:
                reached.add(state)
            elif self._anchors[state] & ~anchors == 0:
                new = [following for following in self._following[state] if following not in seen]
                seen.update(new)
                states += new
        self._budget.spend(2 * len(seen))
        return frozenset(reached)

    def _state(self, following: tuple[int, ...], test: int | None, anchor: int = 0) -> int:
        if len(self._following) >= MAX_STATES:
            raise PatternError(f"it repeats too much: more than {MAX_STATES} states")
        self._following.append(following)
        self._tested.append(test)
        self._anchors.append(anchor)
        return len(self._following) - 1

    def _build(self, node: _Node, after: int) -> int:
        """Return the first state of an automaton that matches `node` and continues with state `after`."""
        self._budget.spend(1)
        if isinstance(node, _Character):
            return self._state((after,), node.test)
        if isinstance(node, _Anchor):
            return self._state((after,), None, node.position)
        if isinstance(node, _Sequence):
            # from the end, because each part needs to know where to continue
            for element in reversed(node.parts):
                after = self._build(element, after)
            return after
        if isinstance(node, _Choice):
            return self._state(tuple(self._build(option, after) for option in node.options), None)
        if node.maximum is None:
            # its following states are set later, because the part leads back to it
            loop = self._state((), None)
            self._following[loop] = (self._build(node.part, loop), after)
            after = loop
        else:
            # optional repetitions: each may also skip to the end
            end = after
            for _ in range(node.maximum - node.minimum):
                after = self._state((self._build(node.part, after), end), None)
        for _ in range(node.minimum):
            after = self._build(node.part, after)
        return after


class _Parser:
    """A recursive-descent parser of one expression.

    Attributes:
        tests: The distinct single characters and classes of the expression, compiled by `re`.
    """

    def __init__(self, text: str, budget: StepBudget) -> None:
        if len(text) > MAX_CHARACTERS:
            raise PatternError(f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
        budget.spend(5 * len(text))
        self.tests: list[re.Pattern[str]] = []
        self._numbers: dict[str, int] = {}
        self._text, self._position, self._depth = text, 0, 0

    def whole(self) -> _Node:
        """Parse the whole expression."""
        node = self._choice()
        if self._position < len(self._text):
            raise PatternError(f"it has an unmatched ')' at {self._position}")
        return node

    def _next(self) -> str:
        return self._text[self._position : self._position + 1]

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._next() == "|":
            self._position += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(options)

    def _sequence(self) -> _Node:
        elements = []
        while self._next() not in ("", "|", ")"):
            elements.append(self._repeated(self._atom()))
        return _Sequence(elements)

    def _atom(self) -> _Node:
        """Parse a character, a class, an anchor or a group."""
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._character(self._class())
        if character == "\\":
            return self._escape()
        if self._repetition() is not None:
            raise PatternError(f"there is nothing to repeat before {self._position}")
        self._position += 1
        if character in _ANCHORS:
            return _Anchor(_ANCHORS[character])
        return self._character(character if character == "." else re.escape(character))

    def _group(self) -> _Node:
        opened = _OPENED.match(self._text, self._position)
        if opened is None:
            raise PatternError(f"look-around, flags and other '(?…' are not supported, as at {self._position}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"its groups are nested more than {MAX_DEPTH} deep")
        self._position = opened.end()
        node = self._choice()
        if self._next() != ")":
            raise PatternError(f"a '(' is not closed at {opened.start()}")
        self._position += 1
        self._depth -= 1
        return node

    def _class(self) -> str:
        start = self._position
        # a closing bracket that comes first is a member of the class
        end = start + 1 + (self._text[start + 1 : start + 2] == "^")
        end += self._text[end : end + 1] == "]"
        while end < len(self._text) and self._text[end] != "]":
            end += 1 + (self._text[end] == "\\")
        self._position = end + 1
        return self._text[start : self._position]

    def _escape(self) -> _Node:
        escape = self._text[self._position : self._position + 2]
        self._position += 2
        if escape in _ANCHORS:
            return _Anchor(_ANCHORS[escape])
        if len(escape) < 2 or (escape[1].isascii() and escape[1].isalnum() and escape[1] not in "dDsSwWafnrtv"):
            raise PatternError(f"{escape} is not supported")
        return self._character(escape)

    def _character(self, single: str) -> _Node:
        if single not in self._numbers:
            try:
                with warnings.catch_warnings():
                    # about classes that may mean something else in later versions of Python
                    warnings.simplefilter("ignore", FutureWarning)
                    self.tests.append(re.compile(single))
            except (re.error, OverflowError) as error:
                raise PatternError(str(error)) from error
            self._numbers[single] = len(self._numbers)
        return _Character(self._numbers[single])

    def _repeated(self, node: _Node) -> _Node:
        counts = self._repetition()
        if counts is None:
            return node
        if isinstance(node, _Anchor):
            raise PatternError(f"there is nothing to repeat before {self._position}")
        # a lazy repetition matches the same texts
        self._position += self._next() == "?"
        if self._repetition() is not None:
            raise PatternError(f"a repetition is repeated at {self._position}")
        return _Repeat(node, *counts)

    def _repetition(self) -> tuple[int, int | None] | None:
        match = _REPEATED.match(self._text, self._position)
        # `re` reads {} literally
        if match is None or match[0] == "{}":
            return None
        self._position = match.end()
        if match["kind"]:
            return int(match["kind"] == "+"), 1 if match["kind"] == "?" else None
        minimum = _parse_count(match["minimum"], 0)
        maximum = _parse_count(match["maximum"], None) if match["comma"] else minimum
        if maximum is not None and minimum is not None and maximum < minimum:
            raise PatternError(f"the minimum of {match[0]} is above its maximum")
        return minimum or 0, maximum


def _parse_count(digits: str, default: int | None) -> int | None:
    # nine digits are more repetitions than states are allowed, which is checked where the states are made
    return int(digits[:9]) if digits else default
