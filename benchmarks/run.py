"""The benchmark: eigenlorax beside lorashare, vlora-dev, PEFT's LoRA and the authors' algorithm.

    python benchmarks/run.py                 # a quarter of an hour; goes on where an earlier run was interrupted
    python benchmarks/run.py --quick         # a minute: small sizes, to see that it works

Every measurement is made in a process of its own, one after the other, and is added to the result as it comes.
README.md beside this file says what is measured; table.py and plot.py make tables and the picture out of the result.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cases import SECTIONS, Case, plan
from collection import Shape, make_up
from methods import METHODS, is_here, versions

from eigenlorax.cli import env
from eigenlorax.train import demo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = HERE / "results" / "run.json"
SEED = 20261124
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Json = dict[str, Any]


def main() -> int:
    given = arguments()
    cases = [
        case
        for case in plan(given.quick, given.large, given.adapters)
        if case.section in given.only and case.method in given.methods
    ]
    if "large" in given.only and given.large is None:
        say("large: skipped, no collection was given (--large FOLDER; python benchmarks/large.py FOLDER makes one)")
    output = given.output or (None if given.quick else RESULT)
    result = opened(output if not given.fresh else None, this_run(given))
    with tempfile.TemporaryDirectory() as scratch:
        failed = measure_all(cases, result, output, Path(scratch), given.threads)
    if output is None:
        sys.stdout.write(text_of(result))
    else:
        say(f"wrote {output}")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; the result goes to standard output")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections (default: all)")
    parser.add_argument(
        "--methods", nargs="+", choices=(*METHODS, "peft"), default=(*METHODS, "peft"), help="these (default: all)"
    )
    parser.add_argument("--output", type=Path, help="the result's file, read first (default: results/run.json)")
    parser.add_argument("--fresh", action="store_true", help="begin a new result in place of the one that is there")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    parser.add_argument("--large", type=Path, help="a collection that large.py wrote, for the section `large`")
    parser.add_argument(
        "--adapters",
        type=Path,
        default=demo.data() / "adapters",
        help="real ones, for the section `errors` (default: the demo's)",
    )
    return parser.parse_args()


def this_run(given: argparse.Namespace) -> Json:
    """What has to be known of a run to read its figures."""
    return {
        "command": command(),
        **measured_now(),
        "load_at_start": os.getloadavg()[0],
        "page_cache": "warm: every file is read once before it is measured",
        "seed": SEED,
        "comparable": {
            "quick": given.quick,
            "threads": given.threads,
            "adapters": shown(given.adapters),
            "cpu": env.collect()["processor"],
            "cores": os.cpu_count(),
            "system": platform.system(),
            "versions": {"python": platform.python_version(), **versions()},
        },
    }


def command() -> str:
    """The command that was given, folders by their last name: their place on this machine says nothing elsewhere."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return " ".join(["python", "benchmarks/run.py", *words])


def shown(path: Path) -> str:
    """The path from the repository's root, if it is in there; else as it was given."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else whole.name


def measured_now() -> Json:
    """The day and the commit of a measurement."""
    return {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}


def commit() -> str:
    """The commit of the source, marked where files differ from it; "unknown" outside of a repository."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def opened(output: Path | None, run: Json) -> Json:
    """The result so far with this run added to it; it goes on only where its figures and new ones may be compared."""
    if output is None or not output.is_file():
        return {"runs": [run], "cases": {}}
    result: Json = json.loads(output.read_text("utf-8"))
    before, now = result["runs"][-1]["comparable"], run["comparable"]
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise SystemExit(
            f"{output} was measured with other {', '.join(differing)}: {[before.get(name) for name in differing]}, now "
            f"{[now[name] for name in differing]}. --fresh begins anew in its place, --output writes elsewhere."
        )
    result["runs"].append(run)
    return result


def measure_all(cases: Sequence[Case], result: Json, output: Path | None, scratch: Path, threads: int) -> list[str]:
    """Measure what is not in the result yet; the keys of the cases that failed."""
    todo = [case for case in cases if case.key not in result["cases"]]
    absent = sorted({case.method for case in todo if not is_here(case.method)})
    for method in absent:
        say(f"{method}: skipped, it is not installed (pip install -e '.[benchmarks]')")
    todo = [case for case in todo if case.method not in absent]
    say(f"{len(todo)} to measure, {len(cases) - len(todo)} there or skipped")
    numbers = largest([case.shape for case in todo if case.shape is not None])
    failed = []
    for number, case in enumerate(todo, start=1):
        started = time.perf_counter()
        options = {**case.options, **case.inputs}
        if case.section == "large":
            read_once(Path(case.inputs["folder"]), case.options.get("adapters"))
        if case.shape is not None:
            options |= {"folder": str(collection(case.shape, numbers, scratch)), "adapters": case.shape.adapters}
        found = in_a_process(case, options, threads)
        seconds = time.perf_counter() - started
        if found is None:
            failed.append(case.key)
            continue
        told = {"section": case.section, "run": len(result["runs"]) - 1, "options": dict(case.options)}
        told |= {"shape": shape_of(case.shape)} if case.shape is not None else {}
        result["cases"][case.key] = {**told, "process_seconds": seconds, **found}
        if output is not None:
            write(output, result)
        say(f"{number} of {len(todo)}: {case.key}: {summary(found)} ({seconds:.1f} s in all)")
    return failed


def largest(shapes: Sequence[Shape]) -> dict[Shape, int]:
    """Of collections that differ in their number of adapters only, the largest number: smaller ones are its first."""
    found: dict[Shape, int] = {}
    for shape in shapes:
        kind = replace(shape, adapters=0)
        found[kind] = max(found.get(kind, 0), shape.adapters)
    return found


def collection(shape: Shape, numbers: Mapping[Shape, int], scratch: Path) -> Path:
    """The folder of a collection, made when it is first asked for; its files have been read just now."""
    kind = replace(shape, adapters=0)
    folder = scratch / f"r{shape.rank}-d{shape.dimension}-m{shape.modules}"
    if not folder.exists():
        make_up(replace(shape, adapters=numbers[kind]), SEED, folder)
    read_once(folder, shape.adapters)
    return folder


def read_once(folder: Path, adapters: int | None) -> None:
    """Bring the files of the first adapters into the page cache."""
    for path in sorted(folder.glob("*/*.safetensors"))[:adapters]:
        path.read_bytes()


def in_a_process(case: Case, options: Json, threads: int) -> Json | None:
    """What the case found; None, and its last words, where its process failed."""
    ran = subprocess.run(
        [sys.executable, str(HERE / "child.py"), json.dumps({"measure": case.measure, "options": options})],
        env={**os.environ, **{name: str(threads) for name in THREADS}},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        say(f"{case.key}: failed\n{ran.stderr[-2000:]}")
        return None
    found: Json = json.loads(ran.stdout)
    return found


def shape_of(shape: Shape) -> Json:
    return {name: getattr(shape, name) for name in ("adapters", "rank", "dimension", "modules")}


def summary(found: Json) -> str:
    """A few words for the line of progress."""
    words = [f"{found['seconds']['total']:.3f} s"] if "seconds" in found else []
    return ", ".join([*words, f"{(found['peak_bytes'] - found['baseline_bytes']) / 2**20:.0f} MiB"])


def text_of(result: Json) -> str:
    return json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write(output: Path, result: Json) -> None:
    """In one step: an interruption leaves what was there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(text_of(result), encoding="utf-8")
    partial.replace(output)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
