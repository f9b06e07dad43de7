"""The result of `run.py`, read: seconds, memory, growth, serving and bytes as tables in Markdown, and what is claimed.

A section that was not measured has no table. Errors of real adapters have tables of their own, in `error_tables.py`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import error_tables
import growth
from markdown_table import table

Json = dict[str, Any]

NAMES = {
    "delta": "ours",
    "factors": "ours, factors",
    "lorashare": "lorashare",
    "vlora": "vlora-dev",
    "authors": "authors' algorithm",
}
GROWN = {"adapters": "N", "dimension": "d", "rank": "r", "k": "k", "modules": "modules"}
LORASHARE_TARGET, AUTHORS_TARGET = 40.0, 100.0
WIDTH = 4096
# twice as many adapters may take 7 % more than twice the time
LINEAR = 1.1
FLAT = 0.1
SWEEPS = 2
MIB, GIB = 2**20, 2**30
UNMEASURED = "Not measured yet: `python benchmarks/run.py`."


def markdown(result: Json) -> str:
    """Everything, section by section."""
    parts = [
        environment(result),
        fit_table(result),
        growth_tables(result),
        use_table(result),
        serving_tables(result),
        activations_table(result),
        bytes_table(result),
        large_tables(result),
        *error_tables.tables(result),
        claims_table(result),
    ]
    return "\n\n".join(part for part in parts if part) or UNMEASURED


def section(result: Json, name: str) -> list[Json]:
    """The cases of a section, in the order of their keys."""
    return [case for _, case in sorted(result["cases"].items()) if case["section"] == name]


def environment(result: Json) -> str:
    """Where, when and with what: runs that were added to one result share all but the day and the commit."""
    if not result["runs"]:
        return ""
    first = result["runs"][0]
    where = first["comparable"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(where["versions"].items()))
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(run["command"] for run in result["runs"]))
    days = sorted({run["date"] for run in result["runs"]})
    commits = sorted({run["commit"] for run in result["runs"]})
    quick = "**A smoke run at small sizes: its figures say nothing.** " if where["quick"] else ""
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    load = max(run["load_at_start"] for run in result["runs"])
    minutes = sum(case["process_seconds"] for case in result["cases"].values()) / 60
    return (
        f"{quick}{commands} on {' and '.join(days)}, commit {', '.join(commits)}: {where['cpu']}, "
        f"{where['cores']} cores, load at the start {load:.1f}, {threads} a process, page cache warm, seed "
        f"{first['seed']}, {minutes:.1f} minutes; {packages}."
    )


def by_method(cases: Sequence[Json]) -> dict[str, list[Json]]:
    """Cases by their method, in the order of `NAMES`."""
    found = {method: [case for case in cases if case["options"]["method"] == method] for method in NAMES}
    return {method: each for method, each in found.items() if each}


def median_seconds(cases: Sequence[Json], part: str = "total") -> float:
    return statistics.median(case["seconds"][part] for case in cases)


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


def words_of(shape: Json) -> str:
    plural = "" if shape["modules"] == 1 else "s"
    return f"{shape['adapters']} × r={shape['rank']}, d={shape['dimension']}, {shape['modules']} module{plural}"


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


def exponent_of(fitted: growth.Growth | None) -> str:
    if fitted is None:
        return "–"
    return f"{fitted.exponent:.2f} ({', '.join(f'{size:g}' for size in fitted.sizes)})"


def use_table(result: Json) -> str:
    """One adapter projected, and one written."""
    cases = by_method(section(result, "use"))
    if not cases:
        return ""
    rows = [
        [NAMES[method], *(f"{1e3 * case[f'{what}_seconds']:.1f}" for what in ("project", "export"))]
        for method, (case, *_) in cases.items()
    ]
    sizes = words_of(next(iter(cases.values()))[0]["shape"])
    return (
        f"**One adapter projected on bases that are there, and one written as a PEFT LoRA**, {sizes}: milliseconds.\n\n"
        f"{table(('', 'project', 'export'), rows)}"
    )


def serving_tables(result: Json) -> str:
    """Loading, switching and mixing beside PEFT's LoRA."""
    cases = {case["options"]["part"]: case for case in section(result, "serving") if "part" in case["options"]}
    blocks = [loading_table(cases["loading"])] if "loading" in cases else []
    for part, title in (
        ("decode", "A decoding step of 64 rows"),
        ("encoder", "An encoder on 64 rows of 32 tokens"),
    ):
        if part in cases:
            blocks.append(mixing_table(title, cases[part]["found"]))
    if "prefill" in cases:
        rows = [
            [size, *(f"{one[name]['to_base']:.2f}" for name in ("bank", "peft"))]
            for size, one in cases["prefill"]["found"].items()
        ]
        header = ("rows × tokens", "bank", "PEFT LoRA")
        blocks.append(f"**One adapter on whole prompts**: seconds ÷ the base model's.\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def loading_table(case: Json) -> str:
    one = case["found"]
    rows = [
        ["load one adapter, the first ones", f"{one['milliseconds_of_the_first_tenth']:.2f}"],
        [f"load one adapter, the last ones of {one['adapters']:,}", f"{one['milliseconds_of_the_last_tenth']:.2f}"],
        ["switch to one adapter", f"{one['set_adapter_milliseconds']:.3f}"],
        ["lay out a batch of 64 adapters", f"{one['using_64_milliseconds']:.2f}"],
    ]
    theirs = [
        f"{one['peft_milliseconds_of_the_first_five']:.1f}",
        f"{one['peft_milliseconds_of_the_last_five']:.1f} (of {one['peft_adapters']})",
        "–",
        "–",
    ]
    header = ("milliseconds", "bank", "PEFT LoRA")
    cells = [[*row, other] for row, other in zip(rows, theirs, strict=True)]
    return (
        f"**Loading and switching on the shapes of BERT-base**: a pack of {one['adapters']:,} adapters in "
        f"{one['seconds']:.1f} s; the bank holds {one['bank_bytes'] / MIB:.0f} MiB, {one['bank_bytes_ratio']:.2f} of "
        f"the pack's tensors.\n\n{table(header, cells)}"
    )


def mixing_table(title: str, found: Json) -> str:
    numbers = sorted(int(name.split()[1]) for name in found if name.startswith("bank"))
    rows = [[str(n), *(f"{found[f'{who} {n}']['to_base']:.2f}" for who in ("bank", "peft"))] for n in numbers]
    header = ("adapters in the batch", "bank", "PEFT LoRA")
    return f"**{title}**: seconds ÷ the base model's.\n\n{table(header, rows)}"


def activations_table(result: Json) -> str:
    """What a layer keeps for backward."""
    for case in section(result, "serving"):
        if "width" in case:
            rows = [
                [name, f"{one['trained_numbers']:,}", f"{one['activation_bytes'] / MIB:.2f}"]
                for name, one in sorted(case["found"].items())
            ]
            return (
                f"**Kept for backward** by one layer {case['width']} wide beyond its own input, {case['rows']} rows, "
                f"k = {case['k']}, float32.\n\n{table(('', 'trained numbers', 'MiB'), rows)}"
            )
    return ""


def bytes_table(result: Json) -> str:
    """A pack's bytes by its formula and in its files."""
    cases = sorted(section(result, "bytes"), key=lambda case: case["options"]["adapters"])
    if not cases:
        return ""
    rows = [
        [
            f"{case['options']['adapters']:,}",
            *(f"{case[name]:,}" for name in ("lora_bytes", "formula_bytes", "tensor_file_bytes", "file_bytes")),
            f"{case['lora_bytes'] / case['file_bytes']:.2f}",
        ]
        for case in cases
    ]
    one = cases[0]["options"]
    header = ("N", "LoRAs' tensors", "pack, by formula", "its safetensors files", "all its files", "LoRAs ÷ files")
    return (
        f"**Bytes of a pack**, float32, {one['modules']} modules of {one['dimension']} × {one['dimension']}, r = "
        f"{one['rank']}, k = {one['k']}; formula: of each side k·(d + 1), and N·k·r.\n\n{table(header, rows)}"
    )


def large_tables(result: Json) -> str:
    """A collection too large for whole spectra: seconds by stage, memory, and what the search leaves out."""
    cases = [case for case in section(result, "large") if "seconds" in case]
    if not cases:
        return ""
    stages = ("scanning", "reading", "solving", "projecting", "total")
    rows = [
        [
            str(case["adapters"]),
            "1 process" if case["workers"] == 1 else f"{case['workers']} processes",
            str(case["threads"]),
            str(case["options"]["sweeps"]),
            *(f"{case['seconds'].get(stage, 0):.1f}" for stage in stages),
            f"{(case['peak_bytes'] - case['baseline_bytes']) / GIB:.2f}",
            f"{case['worker_peak_bytes'] / GIB:.2f}" if case["workers"] > 1 else "–",
            f"{kept_bytes(case) / GIB:.2f}",
            f"{case['worst_shortfall']:.1e}",
            f"{case['delta_error_mean']:.4f}",
        ]
        for case in sorted(cases, key=lambda case: (case["adapters"], case["workers"], case["options"]["sweeps"]))
    ]
    header = ("adapters", "by", "threads", "sweeps", *stages, "memory, GiB", "largest worker, GiB", "pack, GiB")
    header = (*header, "worst shortfall, estimated", "delta_error, mean")
    whole = max(cases, key=lambda case: case["adapters"])
    text = (
        f"**A large collection**: {whole['modules']} modules, k = {whole['options']['k']}, "
        f"{whole['input_bytes'] / GIB:.1f} GiB of files. Reading goes on while another module is solved; seconds of "
        f"processes are added up.\n\n{table(header, rows)}"
    )
    text += f"\n\nExponents in N, one process, {SWEEPS} sweeps: " + "; ".join(
        f"{words} {exponent_of(growth.fitted(points))}" for words, points in large_growth(result).items()
    )
    exact = next((case for case in section(result, "large") if "shares" in case), None)
    if exact is None:
        return text
    sides = [
        [side, f"{share:.6f}", f"{one['share']:.6f}", f"{share - one['share']:.1e}", f"{one['shortfall']:.1e}"]
        for side, share in sorted(exact["shares"].items())
        for one in [whole["checked"][side]]
    ]
    header = ("side, first layer", "best k keep", "ours keep", "shortfall", "as estimated")
    return f"{text}\n\n**Shortfall beside whole spectra** of the first fit, in float64.\n\n{table(header, sides)}"


def kept_bytes(case: Json) -> int:
    """What of a process's memory is the pack that it makes."""
    return case["basis_bytes"] + case["coefficient_bytes"]


def large_growth(result: Json) -> dict[str, list[tuple[float, float]]]:
    """By N, of the large collection and its parts: seconds, memory, and memory beyond the pack's own bytes."""
    cases = [
        case
        for case in section(result, "large")
        if "seconds" in case and case["workers"] == 1 and case["options"]["sweeps"] == SWEEPS
    ]
    memory = [(case["adapters"], case["peak_bytes"] - case["baseline_bytes"], kept_bytes(case)) for case in cases]
    return {
        "seconds": [(case["adapters"], case["seconds"]["total"]) for case in cases],
        "memory": [(n, taken) for n, taken, _ in memory],
        "memory beyond the pack": [(n, taken - kept) for n, taken, kept in memory],
    }


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
        exponents[f"a large collection: {what} against N"] = growth.fitted(large_growth(result)[what]), limit
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
    return (
        "![Seconds and memory of a fit as one size grows, by method](benchmarks-growth.svg)\n\n"
        f"{table(('grows', '', 'exponent of seconds', 'exponent of memory'), rows)}"
    )
