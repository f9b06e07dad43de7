"""How long a fit for an error takes beside a fit by components of the same files, in one process and in two.

    python benchmarks/coded_fit.py                   # about half an hour on two cores, most of it for Llama's shapes
    python benchmarks/coded_fit.py --only planted    # some minutes

The collections are those of `profile_verbs.py`: 100 adapters of rank 8 in 24 modules 768 wide, and 8 of rank 16 in all
224 linear layers of Llama-3-8B. In each round, every case runs once, in a process of its own with one thread. Seconds
of processor time are of all processes; memory is the peak of the largest one.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import profile_verbs
from child import peak_bytes
from run import measured_now

import eigenlorax as ex
from eigenlorax.cli.env import collect

RESULTS = Path(__file__).with_name("results") / "coded_fit.json"
ERROR, COMPONENTS, LLAMA_LAYERS = 0.1, 32, 32
CASES: dict[str, dict[str, Any]] = {
    "components": {"n_components": COMPONENTS},
    "error bound": {"max_error": ERROR},
    "error bound, two processes": {"max_error": ERROR, "engine": "processes", "workers": 2},
}
ROUNDS = {"planted": 3, "llama": 1}

Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROUNDS, default=tuple(ROUNDS))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the collections are made (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure_case(arguments.folder, CASES[arguments.case])))
        return
    result = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"collections": {}}
    result |= {"command": "python benchmarks/coded_fit.py", "environment": collect(), **measured_now(), "error": ERROR}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for name in arguments.only:
            folder = Path(scratch) / name
            folder.mkdir()
            if name == "planted":
                profile_verbs.make_planted(folder)
            else:
                profile_verbs.make_llama(folder, LLAMA_LAYERS)
            result["collections"][name] = measure_collection(folder, ROUNDS[name])
            RESULTS.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def measure_collection(folder: Path, rounds: int) -> Json:
    """Return the figures of each case: medians, and all seconds."""
    figures: dict[str, list[Json]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, runs in figures.items():
            load = os.getloadavg()[0]
            done = subprocess.run(
                [sys.executable, __file__, "--case", case, "--folder", folder],
                env={**os.environ, **profile_verbs.THREADS},
                stdout=subprocess.PIPE,
                encoding="utf-8",
                check=True,
            )
            runs.append({**json.loads(done.stdout.splitlines()[-1]), "load": round(load, 1)})
            print(folder.name, case, runs[-1], file=sys.stderr)
    return {
        "input_bytes": profile_verbs.size_of(folder / "adapters"),
        "cases": {
            case: {
                **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
                "all_processor_seconds": [run["processor_seconds"] for run in runs],
            }
            for case, runs in figures.items()
        },
    }


def measure_case(folder: Path, options: Json) -> Json:
    """Fit and save a pack in this process, and return seconds, memory, bytes and the worst error."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        started, used = time.perf_counter(), processor_seconds()
        pack = ex.fit(folder / "adapters", **options)
        pack.save(Path(scratch) / "pack")
        return {
            "wall_seconds": time.perf_counter() - started,
            "processor_seconds": processor_seconds() - used,
            "peak_bytes": max(peak_bytes(), peak_bytes(resource.RUSAGE_CHILDREN)),
            "file_bytes": profile_verbs.size_of(Path(scratch) / "pack"),
            "worst_error": max(record.delta_error for record in pack.records.values()),
        }


def processor_seconds() -> float:
    """Processor time of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
