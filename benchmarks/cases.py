"""What the runner measures: each case is one measurement, made by a process of its own. `plan` lists them in order."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from collection import Shape

Json = dict[str, Any]

SECTIONS = ("fit", "growth", "use", "serving", "bytes", "errors", "large")
WIDE = Shape(adapters=32, rank=16, dimension=4096, modules=1)
"""The collection of the section `fit`."""
BASE = Shape(adapters=64, rank=16, dimension=1024, modules=1)
"""The collection around which sizes grow, one at a time."""
USED = Shape(adapters=32, rank=8, dimension=768, modules=24)
"""The collection of the section `use`."""
K, VLORA_K, LARGE_K = 32, 16, 64

# Of each method, the sizes of each axis. The time of `authors` and `lorashare` is that of d × d eigenproblems.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "delta": {
        "adapters": (8, 16, 32, 64, 128, 256, 512),
        "dimension": (256, 512, 1024, 2048, 4096, 8192),
        "rank": (4, 8, 16, 32, 64),
        "k": (8, 16, 32, 64, 128),
        "modules": (1, 2, 4, 8, 16),
    },
    "lorashare": {
        "adapters": (8, 64, 512),
        "dimension": (256, 512, 1024, 2048),
        "rank": (4, 16, 64),
        "k": (8, 32, 128),
        "modules": (1, 4, 16),
    },
    "vlora": {
        "adapters": (32, 64, 128, 256, 512),
        "dimension": (256, 1024, 2048, 4096),
        "rank": (4, 16, 64),
        "k": (4, 16, 32),
        "modules": (1, 4, 16),
    },
    "authors": {
        "adapters": (8, 64, 512),
        "dimension": (256, 512, 1024, 2048),
        "rank": (4, 16, 64),
        "k": (8, 32, 128),
        "modules": (1,),
    },
}
QUICK_WIDE, QUICK_BASE, QUICK_USED = Shape(6, 4, 96, 1), Shape(6, 4, 64, 1), Shape(4, 4, 64, 2)
QUICK_SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    method: {"adapters": (6, 12), "dimension": (64, 128)} for method in ("delta", "lorashare", "authors")
}


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. measure: a function of `child.py`; method: what has to be installed.

    options: what it is given, and the result records; inputs: folders that it is given besides.
    shape: the collection it wants on disk, of which it takes the first `shape.adapters` of one that may be larger.
    """

    section: str
    key: str
    measure: str
    method: str
    options: Json = field(default_factory=dict)
    shape: Shape | None = None
    inputs: Json = field(default_factory=dict)


def plan(quick: bool, large: Path | None, adapters: Path) -> list[Case]:
    """Every case, in the order in which they are measured.

    quick: small sizes, and no model of the section `serving`. large: the folder that `large.py` wrote; without it that
    section is empty. adapters: real ones, of the section `errors`.
    """
    return [
        *_fit(quick),
        *_growth(quick),
        *_use(quick),
        *_serving(quick),
        *_bytes(quick),
        *_errors(quick, adapters),
        *(_large(large) if large else ()),
    ]


def components(method: str, k: int = K) -> int:
    """vlora's are whole flattened factors: of 32 adapters 31 span everything, and nothing would be left out."""
    return min(k, VLORA_K) if method == "vlora" else k


def fit_case(section: str, method: str, shape: Shape, k: int, turn: int | None = None, **options: Any) -> Case:
    """A fit by one method of one collection; `turn` numbers those that are measured several times."""
    words = f"{method} N={shape.adapters} r={shape.rank} d={shape.dimension} M={shape.modules} k={k}"
    again = "" if turn is None else f" round {turn}"
    return Case(section, f"{section}: {words}{again}", "fit", method, {"method": method, "k": k, **options}, shape)


def _fit(quick: bool) -> Iterator[Case]:
    """Rounds, each starting with another method; the authors' algorithm, which takes minutes, once."""
    shape, k, rounds = (QUICK_WIDE, 4, 1) if quick else (WIDE, K, 3)
    methods = ["delta", "factors", "lorashare", "vlora"]
    for turn in range(rounds):
        first = turn % len(methods)
        for method in methods[first:] + methods[:first]:
            yield fit_case("fit", method, shape, components(method, k), turn=turn, errors=turn == 0, repetitions=1)
    yield fit_case("fit", "authors", shape, k, turn=0, errors=True, repetitions=1)


def _growth(quick: bool) -> Iterator[Case]:
    base, k = (QUICK_BASE, 4) if quick else (BASE, K)
    seen = set()
    for method, axes in (QUICK_SIZES if quick else SIZES).items():
        for axis, sizes in axes.items():
            for size in sizes:
                shape = base if axis == "k" else replace(base, **{axis: size})
                case = fit_case(
                    "growth", method, shape, size if axis == "k" else components(method, k), errors=False, repetitions=3
                )
                if case.key not in seen:
                    seen.add(case.key)
                    yield case


def _use(quick: bool) -> Iterator[Case]:
    shape, k, repetitions = (QUICK_USED, 4, 2) if quick else (USED, K, 9)
    for method in ("delta", "lorashare", "vlora"):
        options = {"method": method, "k": components(method, k), "repetitions": repetitions}
        yield Case("use", f"use: {method}", "use", method, options, shape)


def _serving(quick: bool) -> Iterator[Case]:
    if not quick:
        yield Case("serving", "serving: loading", "serving", "peft", {"part": "loading", "adapters": 1000})
        for part, rounds in (("decode", 6), ("encoder", 3), ("prefill", 3)):
            yield Case("serving", f"serving: {part}", "serving", "peft", {"part": part, "rounds": rounds})
        yield Case("serving", "serving: activations", "activations", "peft")


def _bytes(quick: bool) -> Iterator[Case]:
    shape, k, numbers = ((64, 2), 4, (4, 8)) if quick else ((768, 24), 64, (10, 100, 1000))
    for n in numbers:
        options = {"adapters": n, "dimension": shape[0], "modules": shape[1], "k": k, "rank": 2 if quick else 16}
        yield Case("bytes", f"bytes: N={n}", "pack_bytes", "peft", options)


def _errors(quick: bool, adapters: Path) -> Iterator[Case]:
    k = (4, 32) if quick else (4, 8, 16, 32, 48, 64, 96)
    for what, method, options in (
        ("collection", "delta", {}),
        ("equal_k", "lorashare", {"components": k}),
        ("equal_bytes", "vlora", {"limit": 2 if quick else None}),
        ("scaling", "vlora", {}),
    ):
        key = f"errors: {what.replace('_', ' ')}"
        yield Case("errors", key, what, method, options, inputs={"adapters": str(adapters)})


def _large(folder: Path) -> Iterator[Case]:
    """The whole collection by both engines and without sweeps, a half and a quarter of it, and exact spectra."""
    shared = {"inputs": {"folder": str(folder)}}
    for engine, sweeps, n in (
        ("serial", 2, None),
        ("processes", 2, None),
        ("serial", 0, None),
        ("serial", 2, 250),
        ("serial", 2, 125),
    ):
        options = {"k": LARGE_K, "engine": engine, "sweeps": sweeps, "adapters": n}
        key = f"large: {n or 'all'} adapters, {engine}, {sweeps} sweeps"
        yield Case("large", key, "large", "delta", options, **shared)
    yield Case("large", "large: exact", "exact", "delta", {"k": LARGE_K}, **shared)
