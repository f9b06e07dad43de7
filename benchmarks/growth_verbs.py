"""How processor time and memory of fits, reports and opening grow with a collection.

    nice python benchmarks/growth_verbs.py           # about ten minutes on one thread; continues a stopped run
    nice python benchmarks/growth_verbs.py --quick   # half a minute: small sizes, to see that it works

Each measurement is a process of its own, forked from one that has imported everything. It runs its verb on a small
collection first, and counts memory beyond what it had then. Every round measures all collections once.
growth_tables.py fits exponents to all rounds.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from collection import Shape, make_up
from run import measured_now

import eigenlorax as ex
from eigenlorax.cli.env import collect

RESULTS = Path(__file__).with_name("results") / "growth.json"
SEED = 20261201
MAX_ERROR = 0.1
ROUNDS = 2
OPENED = 20
"""Times that a pack is opened in one measurement, whose processor time is divided by it."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Collection:
    """Sizes of a made-up collection, and the number of components of its fit."""

    adapters: int = 24
    dimension: int = 384
    rank: int = 8
    k: int = 16
    modules: int = 4

    @property
    def key(self) -> str:
        return f"N={self.adapters} d={self.dimension} r={self.rank} k={self.k} M={self.modules}"


AXES = ("adapters", "dimension", "rank", "k", "modules")
FACTORS = (0.25, 0.5, 1, 2, 4)
QUICK = Collection(adapters=8, dimension=64, rank=4, k=4, modules=2)


def collections(base: Collection, axes: Sequence[str], factors: Sequence[float]) -> Iterator[Collection]:
    """Yield the collections in which one size is the base's times a factor, each once."""
    sizes = (replace(base, **{axis: int(getattr(base, axis) * factor)}) for axis in axes for factor in factors)
    yield from dict.fromkeys(sizes)


def fit_components(folder: Path, k: int) -> None:
    ex.fit(folder / "adapters", n_components=k, warn_above=1)


def fit_error_bound(folder: Path, k: int) -> None:
    ex.fit(folder / "adapters", max_error=MAX_ERROR, warn_above=1)


def report(folder: Path, k: int) -> None:
    made = ex.report(folder / "pack", folder / "adapters")
    for name in ("report.html", "report.json"):
        made.save(folder / name)


def open_pack(folder: Path, k: int) -> None:
    for _ in range(OPENED):
        pack = ex.Pack.open(folder / "pack")
        pack.adapter(next(iter(pack.records)))


VERBS: dict[str, Callable[[Path, int], None]] = {
    "fit_components": fit_components,
    "fit_error_bound": fit_error_bound,
    "report": report,
    "open": open_pack,
}
WITHOUT_K = ("fit_error_bound",)
"""Verbs that do not depend on the number of components."""


def prepare(folder: Path, size: Collection) -> None:
    """Write the adapters and the pack of a collection."""
    make_up(Shape(size.adapters, size.rank, size.dimension, size.modules), SEED, folder / "adapters")
    ex.fit(folder / "adapters", n_components=size.k, warn_above=1).save(folder / "pack")


def measure(verb: str, folder: Path, size: Collection, warm_up: Path) -> Json:
    """Run a verb, and return its processor seconds and the memory beyond what this process had before.

    warm_up: a small collection. A first call maps pages of libraries, and makes what is kept for later calls.
    """
    VERBS[verb](warm_up, QUICK.k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    VERBS[verb](folder, size.k)
    seconds = time.process_time() - started
    # Linux counts KiB
    peak_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"seconds": seconds / OPENED if verb == "open" else seconds, "peak_bytes": peak_bytes}


def in_a_fork(call: Callable[[], Json | None]) -> Json:
    """Return the result of a call in a forked process, whose peak of memory is its own."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(call(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        content = pipe.read()
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"a measurement ended with status {status}")
    outcome: Json = json.loads(content) or {}
    return outcome


def measure_all(results: Json, sizes: list[Collection], verbs: Sequence[str], rounds: int, output: Path) -> None:
    """Measure what the results lack, and write them after each collection."""
    with tempfile.TemporaryDirectory() as warm_up:
        # in this process, so that no fork has to import modules
        prepare(Path(warm_up), QUICK)
        for turn in range(rounds):
            for number, size in enumerate(sizes, start=1):
                case = results["collections"].setdefault(size.key, {"sizes": asdict(size), "verbs": {}})
                with_k = size.k != results["base"]["k"]
                missing = [
                    verb
                    for verb in verbs
                    if len(case["verbs"].get(verb, [])) <= turn and not (with_k and verb in WITHOUT_K)
                ]
                if missing:
                    measure_collection(case["verbs"], size, missing, Path(warm_up))
                    write(results, output)
                print(f"round {turn + 1}, {number} of {len(sizes)}: {size.key}", file=sys.stderr)


def measure_collection(case: Json, size: Collection, verbs: Sequence[str], warm_up: Path) -> None:
    """Measure verbs on a collection once, and append what was measured to the lists of `case`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_a_fork(partial(prepare, folder, size))
        for verb in verbs:
            figures = in_a_fork(partial(measure, verb, folder, size, warm_up))
            case.setdefault(verb, []).append({**figures, "load": round(os.getloadavg()[0], 1)})


def read(output: Path, base: Collection) -> Json:
    """Return the results so far, or empty ones."""
    if not output.is_file():
        command = f"python benchmarks/growth_verbs.py{' --quick' if base == QUICK else ''}"
        started = {"command": command, "environment": collect(), **measured_now()}
        return {**started, "base": asdict(base), "collections": {}}
    results: Json = json.loads(output.read_text("utf-8"))
    if results["base"] != asdict(base):
        raise SystemExit(f"{output} was measured from another collection, {results['base']}. Pass another --output.")
    return results


def write(results: Json, output: Path) -> None:
    """Write the results in one step, so that an interruption leaves the earlier ones."""
    unfinished = output.with_suffix(".partial")
    unfinished.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small collections")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds in all (default: %(default)s)")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="sizes that grow (default: all)")
    parser.add_argument(
        "--verbs", nargs="+", choices=VERBS, default=tuple(VERBS), help="what is measured (default: all)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file, which is continued")
    options = parser.parse_args()
    base, factors = (QUICK, (0.5, 1, 2)) if options.quick else (Collection(), FACTORS)
    torch.set_num_threads(1)
    results = read(options.output, base)
    sizes = list(collections(base, options.axes, factors))
    measure_all(results, sizes, options.verbs, options.rounds, options.output)


if __name__ == "__main__":
    main()
