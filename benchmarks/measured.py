"""The result of `run.py` as Markdown: the whole; seconds, memory and growth of fits; and what is claimed.

A section that was not measured has no table. Other sections have files of their own, `*_tables.py`.
"""

import statistics
from collections.abc import Mapping, Sequence

import error_tables
import growth
import large_tables
import serving_tables
from markdown_table import table
from recorded import MIB, NAMES, Json, by_method, exponent_of, median_seconds, section, words_of

GROWN = {"adapters": "N", "dimension": "d", "rank": "r", "k": "k", "modules": "modules"}
LORASHARE_TARGET, AUTHORS_TARGET = 40.0, 100.0
WIDTH = 4096
# twice as many adapters may take 7 % more than twice the time
LINEAR = 1.1
FLAT = 0.1
UNMEASURED = "Not measured yet: `python benchmarks/run.py`."


def markdown(result: Json) -> str:
    """Everything, section by section."""
    parts = [
        environment(result),
        fit_table(result),
        growth_tables(result),
        serving_tables.use_table(result),
        serving_tables.serving_tables(result),
        serving_tables.activations_table(result),
        serving_tables.bytes_table(result),
        large_tables.tables(result),
        *error_tables.tables(result),
        claims_table(result),
    ]
    return "\n\n".join(part for part in parts if part) or UNMEASURED


def environment(result: Json) -> str:
    """Where, when and with what: runs that were added to one result share all but the day and the commit."""
    if not result["runs"]:
        return ""
    first = result["runs"][0]
    where = first["comparable"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(where["versions"].items()))
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(run["command"] for run in result["runs"]))
    quick = "**A smoke run at small sizes: its figures say nothing.** " if where["quick"] else ""
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    load = max(run["load_at_start"] for run in result["runs"])
    minutes = sum(case["process_seconds"] for case in result["cases"].values()) / 60
    return (
        f"{quick}{commands} {when(result)}: {where['cpu']}, "
        f"{where['cores']} cores, load at the start {load:.1f}, {threads} a process, page cache warm, seed "
        f"{first['seed']}, {minutes:.1f} minutes; {packages}."
    )


def when(result: Json) -> str:
    """The days and commits of all runs."""
    days, commits = (sorted({run[field] for run in result["runs"]}) for field in ("date", "commit"))
    return f"on {' and '.join(days)}, commit {', '.join(commits)}"


def beside(cases: Mapping[str, Sequence[Json]], other: str, ours: str) -> str:
    """How many times as long another method takes."""
    if other == ours or ours not in cases:
        return "–"
    return f"{median_seconds(cases[other]) / median_seconds(cases[ours]):.3g}"


def fit_table(result: Json) -> str:
    """One wide module: seconds, memory and errors of every method."""
    cases = by_method(section(result, "fit"))
    if not cases:
        return ""
    rows = []
    for method, each in cases.items():
        seconds = [one for case in each for one in case["all_seconds"]]
        lost = next((case["delta_error"] for case in each if "delta_error" in case), None)
        rows.append(
            [
                NAMES[method],
                str(each[0]["options"]["k"]),
                f"{median_seconds(each):.2f} ({min(seconds):.2f}–{max(seconds):.2f}, {len(seconds)})",
                *(beside(cases, method, ours) for ours in ("delta", "factors")),
                *(f"{median_seconds(each, part):.3f}" for part in ("read", "fit", "rest")),
                f"{statistics.median(case['peak_bytes'] - case['baseline_bytes'] for case in each) / MIB:.0f}",
                f"{lost['mean']:.4f} / {lost['mean_square']:.4f} / {lost['worst']:.4f}" if lost else "–",
            ]
        )
    header = ("", "k", "seconds (least–most, runs)", "÷ ours", "÷ ours, factors", "reading", "finding the bases")
    header = (*header, "all else", "memory, MiB", "delta_error, mean / mean square / worst")
    sizes = words_of(next(iter(cases.values()))[0]["shape"])
    return f"**Fit: PEFT folders to bases and coefficients**, {sizes}.\n\n{table(header, rows)}"


Curve = list[tuple[int, Json]]


def curves(result: Json) -> dict[str, dict[str, Curve]]:
    """Of each axis and method, its cases by size: those that have the most common value of every other size."""
    cases = section(result, "growth")
    sizes = [({**case["shape"], "k": case["options"]["k"]}, case) for case in cases]
    found: dict[str, dict[str, Curve]] = {}
    for axis in GROWN:
        for method in NAMES:
            own = [(size, case) for size, case in sizes if case["options"]["method"] == method]
            base = {name: statistics.mode(size[name] for size, _ in own) for name in GROWN} if own else {}
            line = [
                (size[axis], case)
                for size, case in own
                if all(size[name] == base[name] for name in GROWN if name != axis)
            ]
            if len(line) > 1:
                found.setdefault(axis, {})[method] = sorted(line, key=lambda point: point[0])
    return found


def seconds_of(curve: Curve) -> list[tuple[float, float]]:
    return [(size, case["seconds"]["total"]) for size, case in curve]


def memory_of(curve: Curve) -> list[tuple[float, float]]:
    """MiB of the process at its peak beyond what it had before."""
    return [(size, (case["peak_bytes"] - case["baseline_bytes"]) / MIB) for size, case in curve]


def growth_tables(result: Json) -> str:
    """Seconds and memory as one size grows, with the fitted exponents."""
    found = curves(result)
    if not found:
        return ""
    rows = []
    for axis, methods in found.items():
        for method, curve in methods.items():
            rows.append([GROWN[axis], NAMES[method], ", ".join(str(size) for size, _ in curve)])
            for points, digits in ((seconds_of(curve), 3), (memory_of(curve), 0)):
                fitted = growth.fitted(points)
                rows[-1].append(", ".join(f"{value:.{digits}f}" for _, value in points))
                rows[-1].append(exponent_of(fitted))
    header = ("grows", "", "sizes", "seconds", "exponent", "memory, MiB", "exponent")
    return (
        f"**Growth**: one size at a time, the others as in {base_words(section(result, 'growth'))}. In brackets: the "
        f"sizes an exponent is fitted on.\n\n{table(header, rows)}"
    )


def base_words(cases: Sequence[Json]) -> str:
    """The collection and k around which sizes grow: of every size the most common one."""
    shape = {name: statistics.mode(case["shape"][name] for case in cases) for name in GROWN if name != "k"}
    ks = {method: statistics.mode(case["options"]["k"] for case in each) for method, each in by_method(cases).items()}
    usual = statistics.mode(ks.values())
    others = [f"{NAMES[method]} {k}" for method, k in ks.items() if k != usual]
    return ", ".join([words_of(shape), f"k = {usual}", *others])


def claims(result: Json) -> list[tuple[str, bool | None, str]]:
    """What the project says of its speed, whether it holds in this result (None: not measured), and the figure."""
    found: list[tuple[str, bool | None, str]] = []
    cases = {
        method: [case for case in each if case["shape"]["dimension"] == WIDTH]
        for method, each in by_method(section(result, "fit")).items()
    }
    cases = {method: each for method, each in cases.items() if each}
    for other, target in (("lorashare", LORASHARE_TARGET), ("authors", AUTHORS_TARGET)):
        for ours in ("delta", "factors"):
            words = f"{WIDTH} wide: {NAMES[ours]} at least {target:g} times as fast as {NAMES[other]}"
            if {other, ours} <= cases.keys():
                ratio = median_seconds(cases[other]) / median_seconds(cases[ours])
                found.append((words, ratio >= target, f"{ratio:.1f} times"))
            else:
                found.append((words, None, ""))
        words = f"{WIDTH} wide: mean square of delta_error of ours no higher than that of {NAMES[other]}"
        lost = {
            m: next((c["delta_error"] for c in cases.get(m, ()) if "delta_error" in c), None) for m in ("delta", other)
        }
        ours_lost, theirs = lost["delta"], lost[other]
        if ours_lost and theirs:
            figures = f"{ours_lost['mean_square']:.4f}, {theirs['mean_square']:.4f}"
            found.append((words, ours_lost["mean_square"] <= theirs["mean_square"], figures))
        else:
            found.append((words, None, ""))
    curve = curves(result).get("adapters", {}).get("delta")
    fitted = growth.fitted(seconds_of(curve)) if curve else None
    exponents = {"one module: seconds against N": (fitted, LINEAR)}
    for what, limit in (("seconds", LINEAR), ("memory beyond the pack", FLAT)):
        exponents[f"a large collection: {what} against N"] = (
            growth.fitted(large_tables.large_growth(result)[what]),
            limit,
        )
    for what, (grown, limit) in exponents.items():
        words = f"{what}: the exponent is at most {limit:g}"
        found.append((words, grown.exponent <= limit, f"{grown.exponent:.2f}") if grown else (words, None, ""))
    return found


def claims_table(result: Json) -> str:
    rows = [
        [words, "holds" if holds else "**fails**", figure]
        for words, holds, figure in claims(result)
        if holds is not None
    ]
    rows += error_tables.claims(result)
    return f"**Claims**\n\n{table(('claim', 'in this result', ''), rows)}" if rows else ""


def page(result: Json) -> str:
    """The block of docs/benchmarks.md: the picture, and the exponents by themselves."""
    found = curves(result)
    if not found:
        return UNMEASURED
    rows = [
        [
            GROWN[axis],
            NAMES[method],
            exponent_of(growth.fitted(seconds_of(curve))),
            exponent_of(growth.fitted(memory_of(curve))),
        ]
        for axis, methods in found.items()
        for method, curve in methods.items()
    ]
    version = result["runs"][0]["comparable"]["versions"]["eigenlorax"]
    return (
        "![Seconds and memory of a fit as one size grows, by method](benchmarks-growth.svg)\n\n"
        f"{table(('grows', 'method', 'exponent of seconds', 'exponent of memory'), rows)}\n\n"
        f"`python benchmarks/run.py` {when(result)}, eigenlorax {version}."
    )
