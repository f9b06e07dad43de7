"""Where the time of each verb goes, next to what the disk and the processor would need for the same bytes and products.

    python benchmarks/profile_verbs.py             # about a quarter of an hour on one thread
    python benchmarks/profile_verbs.py --only demo # a minute

Three collections: the demo's adapters; 100 made-up adapters of rank 8 in 24 modules 768 wide; and 8 of rank 16 in the
shapes of Llama-3-8B's linear layers. Each verb runs twice, each time in a process of its own on one thread: once with
samples of its stack, which split its processor time into reading, mathematics, coding, writing and all else, and once
with a count of its floating-point operations. The limit of the disk is the bytes of all files that a verb reads and
writes, divided by bandwidths that are measured first; the limit of the processor is the operations divided by the rates
of square products of torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import large
import report as report_benchmark
import torch
from profile_parts import OperationCount, PartTimes
from run import measured_now
from safetensors.torch import load_file, save_file

import eigenlorax as ex
from eigenlorax.cli.env import collect
from eigenlorax.train import demo_files

RESULTS = Path(__file__).with_name("results") / "profile.json"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
WEIGHTS = "adapter_model.safetensors"
PROBE_BYTES = 1 << 28
PROBE_SIZE = 1536
ENOUGH = 1.0
"""Seconds after which a verb is not repeated once more; its figures are means."""
VERSIONS = 4
CHANGE = 0.05
"""Relative change from one version to the next."""
LLAMA = (
    ("q_proj", 4096, 4096),
    ("k_proj", 1024, 4096),
    ("v_proj", 1024, 4096),
    ("o_proj", 4096, 4096),
    ("gate_proj", 14336, 4096),
    ("up_proj", 14336, 4096),
    ("down_proj", 4096, 14336),
)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb to profile.

    Attributes:
        run: Function that runs it in the folder of a collection.
        reads: Folders in it whose files are read.
        writes: Files and folders in it that are written.
    """

    run: Callable[[Path], object]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()


def fit_components(folder: Path) -> None:
    ex.fit(folder / "adapters", n_components=32, warn_above=1).save(folder / "components")


def fit_coded(folder: Path) -> None:
    ex.fit(folder / "adapters", warn_above=1).save(folder / "coded")


def refit(folder: Path) -> None:
    ex.refit(folder / "components", n_components=16, warn_above=1).pack.save(folder / "refitted")


def append(folder: Path) -> None:
    pack = ex.Pack.empty()
    for version in sorted((folder / "versions").iterdir()):
        pack.append(version, name="run")
    pack.save(folder / "history")


def export(folder: Path) -> None:
    ex.Pack.open(folder / "coded").export(folder / "loras")


def inspect(folder: Path) -> None:
    pack = ex.Pack.open(folder / "coded")
    pack.verify()
    assert pack.summary.files is not None


def report(folder: Path) -> None:
    made = ex.report(folder / "components", folder / "adapters")
    for name in ("report.html", "report.json"):
        made.save(folder / name)


VERBS = {
    "fit -k 32": Verb(fit_components, ("adapters",), ("components",)),
    "fit": Verb(fit_coded, ("adapters",), ("coded",)),
    "refit -k 16": Verb(refit, ("components",), ("refitted",)),
    "append": Verb(append, ("versions",), ("history",)),
    "export": Verb(export, ("coded",), ("loras",)),
    "inspect": Verb(inspect, ("coded",)),
    "report": Verb(report, ("components", "adapters"), ("report.html", "report.json")),
}


def make_demo(folder: Path) -> None:
    shutil.copytree(demo_files.write(folder / "demo").adapters, folder / "adapters")


def make_planted(folder: Path) -> None:
    planted, _ = report_benchmark.COLLECTIONS["100"]
    report_benchmark.make(folder / "adapters", planted)


def make_llama(folder: Path, layers: int) -> None:
    large.write(large.Plan(adapters=8, layers=layers, rank=16, shapes=LLAMA, directions=64), folder / "adapters")


def make_versions(folder: Path) -> None:
    """Copies of the first adapter, each of which differs from the one before by a random change."""
    source = min((folder / "adapters").iterdir())
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / WEIGHTS)
    for number in range(VERSIONS):
        target = folder / "versions" / f"{number}"
        shutil.copytree(source, target)
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        tensors = {key: tensor + CHANGE * noise_like(tensor, generator) for key, tensor in tensors.items()}


def noise_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers with the root mean square of a tensor, in its dtype."""
    scale = tensor.float().square().mean().sqrt()
    return (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("demo", "planted", "llama"), default=("demo", "planted", "llama"))
    parser.add_argument(
        "--layers", type=int, default=1, help="of the Llama collection, of 32 in the model (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where the collections are made (default: a temporary folder)")
    parser.add_argument("--run", choices=VERBS, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(run_verb(VERBS[arguments.run], arguments.folder, arguments.count)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        measure(arguments.only, arguments.layers, Path(scratch))


def measure(names: Sequence[str], layers: int, scratch: Path) -> None:
    """Measure the collections, and write each figure to the result as it comes."""
    makers = {
        "demo": ("the demo's 16 adapters", make_demo, tuple(VERBS)),
        "planted": ("100 adapters of rank 8, 24 modules 768 wide", make_planted, tuple(VERBS)),
        "llama": (
            f"8 adapters of rank 16, {7 * layers} of the 224 modules of Llama-3-8B",
            lambda folder: make_llama(folder, layers),
            # minutes to hours, of which reports/analysis takes nearly all
            tuple(verb for verb in VERBS if verb != "report"),
        ),
    }
    result = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"collections": {}}
    result |= {"command": "python benchmarks/profile_verbs.py", "environment": collect(), **measured_now()}
    # figures of one table have the same limits
    if set(names) >= result["collections"].keys() or "machine" not in result:
        result["machine"] = machine_rates(scratch)
    for name in names:
        label, make, verbs = makers[name]
        folder = scratch / name
        folder.mkdir()
        make(folder)
        make_versions(folder)
        runs: dict[str, Json] = {}
        result["collections"][name] = {"label": label, "bytes": size_of(folder / "adapters"), "verbs": runs}
        for verb in verbs:
            runs[verb] = measure_verb(verb, folder)
            print(name, verb, runs[verb], file=sys.stderr)
            RESULTS.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.rmtree(folder)


def measure_verb(verb: str, folder: Path) -> Json:
    """Return the figures of a verb: seconds of its parts, bytes, and floating-point operations."""
    load = os.getloadavg()[0]
    counted = run_child(verb, folder, "--count")
    figures = run_child(verb, folder)
    return {
        **figures,
        "operations": counted["operations"],
        "load": round(load, 1),
        "read_bytes": sum(size_of(folder / name) for name in VERBS[verb].reads),
        "written_bytes": sum(size_of(folder / name) for name in VERBS[verb].writes),
    }


def run_child(verb: str, folder: Path, *options: str) -> Json:
    """Run a verb in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", verb, "--folder", folder, *options],
        env={**os.environ, **THREADS},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    figures: Json = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_verb(verb: Verb, folder: Path, count: bool) -> Json:
    """Run a verb in this process, and return its seconds, or its number of floating-point operations."""
    if count:
        remove_output(verb, folder)
        with OperationCount() as counted:
            verb.run(folder)
        return {"operations": dict(counted.operations)}
    times, runs, wall = PartTimes(), 0, 0.0
    while wall < ENOUGH:
        remove_output(verb, folder)
        started = time.perf_counter()
        with times:
            verb.run(folder)
        wall += time.perf_counter() - started
        runs += 1
    return {
        "runs": runs,
        "wall_seconds": wall / runs,
        "processor_seconds": sum(times.seconds.values()) / runs,
        "parts": {part: seconds / runs for part, seconds in times.seconds.items()},
    }


def remove_output(verb: Verb, folder: Path) -> None:
    """Remove what an earlier run of a verb wrote."""
    for name in verb.writes:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def machine_rates(scratch: Path) -> Json:
    """Measure bytes per second of the disk and operations per second of square products, on one thread."""
    probe = scratch / "probe"
    content = os.urandom(PROBE_BYTES)
    started = time.perf_counter()
    with probe.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - started
    with probe.open("rb") as file:
        # so that it is read from the disk, and not from memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.read()
    read = time.perf_counter() - started
    probe.unlink()
    torch.set_num_threads(1)
    rates = {str(dtype).removeprefix("torch."): product_rate(dtype) for dtype in (torch.float32, torch.float64)}
    return {"read": PROBE_BYTES / read, "write": PROBE_BYTES / written, "operations": rates}


def product_rate(dtype: torch.dtype) -> float:
    matrix = torch.randn(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        matrix @ matrix
        seconds.append(time.process_time() - started)
    return 2 * PROBE_SIZE**3 / min(seconds)


if __name__ == "__main__":
    main()
