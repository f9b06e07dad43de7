"""What the scores of several methods say: a line of the table for each, differences with intervals, and words.

Nothing here trains, or knows what a model is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

DRAWS = 10_000
_REACHED = 0.98
_COEFFICIENTS = ("core", "factors")
_SMALL = ("lora-small", "vera", "vblora", "lora-xs")


@dataclass(frozen=True, slots=True)
class Run:
    """One training of a method, and how it did on the rows that it was tested on.

    seed: None where it served to choose a rate. score: the share of right answers, None where the training diverged;
    loss: the mean cross-entropy of the same rows, in nats. right: a character for each of them, 1 or 0; empty where
    nobody needs it. steps, scores: points on the way, on some of the rows. seconds: of training alone.
    """

    method: str
    learning_rate: float
    seed: int | None
    numbers: int
    head_numbers: int
    file_bytes: int
    score: float | None
    loss: float | None
    right: str
    steps: list[int]
    scores: list[float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two methods' scores, and the interval that holds it in 95 of 100 cases."""

    value: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether none at all would fit as well."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True)
class Line:
    """One method of the table.

    numbers: trained ones, head aside. file_bytes: of what is saved, head included. rates: each that was tried, with its
    score on the rows held out, None where it diverged or there was no choice. scores: of each seed, on all rows for
    evaluation; mean, spread: theirs (the standard deviation; None of one seed). difference: from the yardstick. curve:
    the mean score at each point on the way, on the rows for that. steps: how many until 98 % of the yardstick's last
    score on these, as far as points tell; None where that was not reached. seconds: of a training, the mean.
    """

    method: str
    learning_rate: float
    rates: dict[str, float | None]
    numbers: int
    head_numbers: int
    file_bytes: int
    scores: list[float]
    mean: float
    spread: float | None
    difference: Difference | None
    curve: list[float]
    steps: int | None
    seconds: float


def difference(mine: Sequence[str], theirs: Sequence[str]) -> Difference:
    """Between mean scores of two methods over the same seeds and rows. Seeds and rows are drawn again and again, each
    with what both methods made of it (a paired bootstrap, always with the same draws)."""
    signs = _digits(mine) - _digits(theirs)
    seeds, rows = signs.shape
    # rows on which both did the same by every seed are alike: a few kinds of rows stand for thousands
    kinds, counts = np.unique(signs, axis=1, return_counts=True)
    chance = np.random.default_rng(0)
    drawn_seeds = chance.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS) / seeds
    drawn_rows = chance.multinomial(rows, counts / rows, size=DRAWS) / rows
    found = np.einsum("ds,sk,dk->d", drawn_seeds, kinds, drawn_rows, optimize=True)
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(float(signs.mean()), float(low), float(high))


def _digits(right: Sequence[str]) -> np.ndarray:
    return np.array([[int(one) for one in row] for row in right], dtype=np.float64)


def lines(
    runs: Mapping[str, Sequence[Run]],
    tried: Mapping[str, Mapping[float, float | None]],
    yardstick: str,
) -> list[Line]:
    """The table. runs: of each method, by seed; tried: of each, the score of each rate on the rows held out."""
    wanted = _REACHED * fmean(run.scores[-1] for run in runs[yardstick])
    return [
        Line(
            method=method,
            learning_rate=found[0].learning_rate,
            rates={f"{rate:g}": score for rate, score in tried[method].items()},
            numbers=found[0].numbers,
            head_numbers=found[0].head_numbers,
            file_bytes=found[0].file_bytes,
            scores=(scores := [run.score for run in found if run.score is not None]),
            mean=fmean(scores),
            spread=stdev(scores) if len(scores) > 1 else None,
            difference=_between(runs, method, yardstick) if method != yardstick else None,
            curve=[score for _, score in _curve(found)],
            steps=next((step for step, score in _curve(found) if score >= wanted), None),
            seconds=fmean(run.seconds for run in found),
        )
        for method, found in runs.items()
    ]


def _curve(runs: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """Steps, and the mean score by then."""
    for place, step in enumerate(runs[0].steps):
        yield step, fmean(run.scores[place] for run in runs)


def _between(runs: Mapping[str, Sequence[Run]], one: str, other: str) -> Difference:
    return difference([run.right for run in runs[one]], [run.right for run in runs[other]])


def words(
    runs: Mapping[str, Sequence[Run]],
    table: Sequence[Line],
    yardstick: str,
    rows: int,
    majority: float,
    basis_bytes: int,
) -> list[str]:
    """What the table says of coefficients, a sentence each; nothing that its figures do not carry.

    rows: for evaluation; majority: the share of the most frequent class among them.
    """
    by_name = {line.method: line for line in table}
    found = []
    untaught = [line.method for line in table if line.mean <= majority]
    if untaught:
        found.append(
            f"no better than the most frequent class alone: {', '.join(untaught)}. What has learned nothing says "
            "nothing of a method; more rows, more epochs or other rates may."
        )
    for name in _COEFFICIENTS:
        if name in by_name and name != yardstick:
            line = by_name[name]
            size = _size(line.numbers, by_name[yardstick].numbers)
            found.append(f"{name}: {_said(line.difference, yardstick)}{size}.")
    if {"factors", "random"} <= by_name.keys():
        worth = _between(runs, "factors", "random")
        if worth.is_noise:
            text = "what the sources are worth cannot be told from noise here: factors are"
        elif worth.value > 0:
            text = "the sources are worth something for this task: factors are"
        else:
            text = "the sources do harm to this task: factors are"
        found.append(f"random basis: {text} {_said(worth, 'the same over random directions')}.")
    small = [name for name in _SMALL if name in by_name]
    if "factors" in by_name and small:
        each = [f"{name} ({by_name[name].numbers:,}) {_said(_between(runs, name, 'factors'))}" for name in small]
        found.append(f"beside factors ({by_name['factors'].numbers:,} numbers): {them(each)}.")
    ours = [name for name in _COEFFICIENTS if name in by_name]
    if ours:
        found.append(
            f"basis: {them(ours)} {'need' if len(ours) > 1 else 'needs'} the pack's basis beside, {basis_bytes:,} "
            "bytes, once for all adapters of the pack."
        )
    if len(table) > 1:
        n = len(table[0].scores)
        over = f"{n} seeds and {rows:,} rows" if n > 1 else f"{rows:,} rows; one seed says nothing of others"
        found.append(f"in brackets: 95 % intervals, over {over}.")
    at_edge = [line.method for line in table if _is_at_edge(line)]
    if at_edge:
        found.append(
            f"rates: the one chosen is the lowest or the highest tried for {', '.join(at_edge)}; another one may be "
            "better: --learning-rates METHOD=A,B,C with --resume (rates=, resume=True)."
        )
    return found


def them(parts: Sequence[str]) -> str:
    """A list as one reads it."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def some(number: int | float, what: str) -> str:
    """So many of something."""
    whole = number == int(number)
    return f"{int(number) if whole else number:{',' if whole else 'g'}} {what}{'' if number == 1 else 's'}"


def _is_at_edge(line: Line) -> bool:
    tried = [float(rate) for rate in line.rates]
    return len(tried) > 1 and line.learning_rate in (min(tried), max(tried))


def points(found: Difference) -> str:
    """A difference in percentage points, signed, with its interval."""
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _said(found: Difference | None, what: str = "") -> str:
    """Where a method stands, beside what."""
    assert found is not None
    size = abs(100 * found.value)
    if size >= 0.05:
        where = f"{size:.1f} points {'below' if found.value < 0 else 'above'} {what}".rstrip()
    else:
        where = f"level with {what}" if what else "level"
    noise = ", which may be noise" if found.is_noise else ""
    return f"{where} ({100 * found.low:+.1f} to {100 * found.high:+.1f}{noise})"


def _size(mine: int, theirs: int) -> str:
    """How the sizes compare."""
    if mine == 0 or theirs == 0:
        return ""
    if theirs >= 2 * mine:
        return f", with 1/{theirs / mine:.0f} of its numbers"
    return f", with {mine / theirs:.2g} times its numbers" if mine != theirs else ", with as many numbers"
