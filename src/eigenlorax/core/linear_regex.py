"""Regular expressions of other people's configs, matched in time that is linear in the text: automata, no backtracking.

Python's `re` may take longer than anybody waits for one line of a config. Understood is what selects modules by name:
characters, classes, groups, alternatives, repetitions and anchors, each with the meaning that it has for `re`.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CHARACTERS, MAX_DEPTH, MAX_STATES = 4096, 40, 4096
"""Of one expression: its length, groups within groups, and states of its automaton."""
MAX_STEPS = 4_000_000
"""What the expressions of one config may take: a second or two."""

_START, _END, _VERY_END = 1, 2, 4
_ANCHORS = {"^": _START, r"\A": _START, "$": _END, r"\Z": _VERY_END}
_REPEATED = re.compile(r"(?P<kind>[*+?])|\{(?P<least>\d*)(?P<comma>,)?(?P<most>\d*)\}", re.ASCII)
_OPENED = re.compile(r"\((\?:|\?P<[^\W\d]\w*>)?(?!\?)")
_MOST_KEPT = 10_000


class PatternError(Exception):
    """What is wrong with an expression. For who reads it, who knows which config it is of."""


class StepBudget:
    """The steps that may still be taken."""

    __slots__ = ("_left",)

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        """Take so many steps; `PatternError` where there are not as many left."""
        self._left -= steps
        if self._left < 0:
            raise PatternError(
                "to match all of them with all modules takes too many steps. Write whole names of modules, such as "
                r"^encoder\.layer\.0\.query$, in place of expressions"
            )


@dataclass(frozen=True, slots=True)
class _Character:
    """One character that an expression of `re` for single characters fits, the one of this number."""

    test: int


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A place in the text."""

    place: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: "Sequence[_Node]"


@dataclass(frozen=True, slots=True)
class _Choice:
    options: "Sequence[_Node]"


@dataclass(frozen=True, slots=True)
class _Repeat:
    """most: None for any number of times."""

    part: "_Node"
    least: int
    most: int | None


_Node = _Character | _Anchor | _Sequence | _Choice | _Repeat


class LinearRegex:
    """An expression as an automaton (Thompson's), whose sets of states are found as texts need them, and kept."""

    __slots__ = ("_accepting", "_anchors", "_budget", "_first", "_following", "_moves", "_tested", "_tests")

    def __init__(self, pattern: str, budget: StepBudget) -> None:
        parser = _Parser(pattern, budget)
        self._budget = budget
        self._tests = parser.tests
        # by state: which characters lead on, or at which places one may go on; and where to
        self._tested: list[int | None] = []
        self._anchors: list[int] = []
        self._following: list[tuple[int, ...]] = []
        self._accepting = self._state((), None)
        self._first = self._built(parser.whole(), self._accepting)
        self._moves: dict[tuple[frozenset[int], str, int], frozenset[int]] = {}

    def matches_start(self, text: str) -> bool:
        """Whether the text, or a beginning of it, fits: what `re.match` finds."""
        self._budget.spend(1 + len(text))
        states = self._closed([self._first], _START | self._ends(text, 0))
        for place, character in enumerate(text, start=1):
            if self._accepting in states:
                return True
            if not states:
                return False
            ends = self._ends(text, place)
            key = (states, character, ends)
            following = self._moves.get(key)
            if following is None:
                following = self._move(*key)
                if len(self._moves) >= _MOST_KEPT:
                    self._moves.clear()
                self._moves[key] = following
            states = following
        return self._accepting in states

    @staticmethod
    def _ends(text: str, place: int) -> int:
        left = len(text) - place
        if left > 1:
            return 0
        return _END | _VERY_END if left == 0 else _END * (text[-1] == "\n")

    def _move(self, states: frozenset[int], character: str, ends: int) -> frozenset[int]:
        reached: list[int] = []
        for state in states:
            test = self._tested[state]
            if test is not None and self._tests[test].fullmatch(character):
                reached += self._following[state]
        self._budget.spend(2 * len(states))
        return self._closed(reached, ends)

    def _closed(self, states: list[int], places: int) -> frozenset[int]:
        """The states that these lead to at a place of the text, without another character."""
        found: set[int] = set()
        seen = set(states)
        while states:
            state = states.pop()
            if self._tested[state] is not None or state == self._accepting:
                found.add(state)
            elif self._anchors[state] & ~places == 0:
                new = [one for one in self._following[state] if one not in seen]
                seen.update(new)
                states += new
        self._budget.spend(2 * len(seen))
        return frozenset(found)

    def _state(self, following: tuple[int, ...], test: int | None, anchor: int = 0) -> int:
        if len(self._following) >= MAX_STATES:
            raise PatternError(f"it repeats too much: more than {MAX_STATES} states")
        self._following.append(following)
        self._tested.append(test)
        self._anchors.append(anchor)
        return len(self._following) - 1

    def _built(self, node: _Node, after: int) -> int:
        """The first state of what matches `node` and then goes on with `after`."""
        self._budget.spend(1)
        if isinstance(node, _Character):
            return self._state((after,), node.test)
        if isinstance(node, _Anchor):
            return self._state((after,), None, node.place)
        if isinstance(node, _Sequence):
            for part in reversed(node.parts):
                after = self._built(part, after)
            return after
        if isinstance(node, _Choice):
            return self._state(tuple(self._built(option, after) for option in node.options), None)
        if node.most is None:
            loop = self._state((), None)
            self._following[loop] = (self._built(node.part, loop), after)
            after = loop
        else:
            end = after
            for _ in range(node.most - node.least):
                after = self._state((self._built(node.part, after), end), None)
        for _ in range(node.least):
            after = self._built(node.part, after)
        return after


class _Parser:
    """Reads an expression from its beginning to its end. tests: its single characters, each once, in terms of `re`."""

    def __init__(self, text: str, budget: StepBudget) -> None:
        if len(text) > MAX_CHARACTERS:
            raise PatternError(f"it has {len(text):,} characters, more than {MAX_CHARACTERS:,}")
        budget.spend(5 * len(text))
        self.tests: list[re.Pattern[str]] = []
        self._numbers: dict[str, int] = {}
        self._text, self._at, self._depth = text, 0, 0

    def whole(self) -> _Node:
        """All of it."""
        node = self._choice()
        if self._at < len(self._text):
            raise PatternError(f"it has a ')' too many at {self._at}")
        return node

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._next() == "|":
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(options)

    def _sequence(self) -> _Node:
        parts = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._one()))
        return _Sequence(parts)

    def _one(self) -> _Node:
        """A character, a class, an anchor or a group."""
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._character(self._class())
        if character == "\\":
            return self._escape()
        if self._repetition() is not None:
            raise PatternError(f"nothing is there to be repeated before {self._at}")
        self._at += 1
        if character in _ANCHORS:
            return _Anchor(_ANCHORS[character])
        return self._character(character if character == "." else re.escape(character))

    def _group(self) -> _Node:
        opened = _OPENED.match(self._text, self._at)
        if opened is None:
            raise PatternError(f"look-around, flags and other '(?…' are not taken here, as at {self._at}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"its groups are nested more than {MAX_DEPTH} deep")
        self._at = opened.end()
        node = self._choice()
        if self._next() != ")":
            raise PatternError(f"a '(' is not closed at {opened.start()}")
        self._at += 1
        self._depth -= 1
        return node

    def _class(self) -> str:
        start = self._at
        # a bracket that comes first stands for itself
        end = start + 1 + (self._text[start + 1 : start + 2] == "^")
        end += self._text[end : end + 1] == "]"
        while end < len(self._text) and self._text[end] != "]":
            end += 1 + (self._text[end] == "\\")
        self._at = end + 1
        return self._text[start : self._at]

    def _escape(self) -> _Node:
        escape = self._text[self._at : self._at + 2]
        self._at += 2
        if escape in _ANCHORS:
            return _Anchor(_ANCHORS[escape])
        if len(escape) < 2 or (escape[1].isascii() and escape[1].isalnum() and escape[1] not in "dDsSwWafnrtv"):
            raise PatternError(f"{escape} is not taken here")
        return self._character(escape)

    def _character(self, single: str) -> _Node:
        if single not in self._numbers:
            try:
                with warnings.catch_warnings():
                    # of a class that may mean something else one day
                    warnings.simplefilter("ignore", FutureWarning)
                    self.tests.append(re.compile(single))
            except (re.error, OverflowError) as error:
                raise PatternError(str(error)) from error
            self._numbers[single] = len(self._numbers)
        return _Character(self._numbers[single])

    def _repeated(self, node: _Node) -> _Node:
        found = self._repetition()
        if found is None:
            return node
        if isinstance(node, _Anchor):
            raise PatternError(f"nothing is there to be repeated before {self._at}")
        # how many are tried first makes no difference to whether there is a match
        self._at += self._next() == "?"
        if self._repetition() is not None:
            raise PatternError(f"a repetition is repeated at {self._at}")
        return _Repeat(node, *found)

    def _repetition(self) -> tuple[int, int | None] | None:
        found = _REPEATED.match(self._text, self._at)
        # {} stands for itself
        if found is None or found[0] == "{}":
            return None
        self._at = found.end()
        if found["kind"]:
            return int(found["kind"] == "+"), 1 if found["kind"] == "?" else None
        least = _count(found["least"], 0)
        most = _count(found["most"], None) if found["comma"] else least
        if most is not None and least is not None and most < least:
            raise PatternError(f"{found[0]} is at least more than at most")
        return least or 0, most


def _count(digits: str, none: int | None) -> int | None:
    # more repetitions than there may be states are refused where they are built
    return int(digits[:9]) if digits else none
