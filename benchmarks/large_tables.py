"""Tables of a collection too large for whole spectra: seconds by stage, memory, and what the search leaves out."""

import growth
from markdown_table import table
from recorded import GIB, Json, exponent_of, section

SWEEPS = 2


def tables(result: Json) -> str:
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
