"""One measurement of `histories.py` in a process of its own: a job as JSON in, its figures as JSON on stdout.

Memory is the peak resident memory beyond what it was after all imports and a small history. Seconds are those of the
processor: with one thread, that is what a call takes on a machine that does nothing else.
"""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from history_baselines import folder_bytes

import eigenlorax as ex

READS = 4

Json = dict[str, Any]


def main() -> None:
    job: Json = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folders, scratch = [Path(folder) for folder in job["folders"]], Path(job["scratch"])
    options = {"lossless": True} if job["max_error"] is None else {"max_error": job["max_error"]}
    warm_up(scratch / "first", options)
    before = peak_bytes()
    write = write_together if job["together"] else write_one_by_one
    target = scratch / "history"
    started = time.process_time()
    append_seconds = write(target, folders, options)
    total_seconds = time.process_time() - started
    peak_of_append = peak_bytes()
    read_seconds = read(target)
    peak = peak_bytes()
    pack = ex.Pack.open(target)
    records = pack.histories["run"].versions
    figures = {
        "append_seconds": append_seconds,
        "seconds": total_seconds,
        "read_seconds": read_seconds,
        "append_peak_bytes": peak_of_append - before,
        "peak_bytes": peak - before,
        "baseline_bytes": before,
        "lora": sum(record.lora_bytes for record in records),
        "tensors": sum(record.tensor_bytes for record in records),
        "files": folder_bytes(target),
        "versions": [[record.lora_bytes, record.tensor_bytes, record.reference is not None] for record in records],
        "recorded_errors": [record.delta_error for record in records],
        "head_error": records[0].head_error,
        "exported": [str(path) for path in export(pack, version_names(pack), scratch / "exported")],
    }
    print(json.dumps(figures))


def peak_bytes() -> int:
    """Return the largest resident memory of this program so far."""
    # not ru_maxrss, in which Linux counts the memory that the parent process had when it started this one
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def warm_up(target: Path, options: Json) -> None:
    """Write and read a tiny history, so that nothing is imported or compiled later."""
    factors = {"lora_A": torch.randn(2, 24), "lora_B": torch.randn(16, 2)}
    tensors = {f"base_model.model.a.{part}.weight": factor for part, factor in factors.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}
    pack = ex.Pack.empty()
    for scale in (1.0, 1.1):
        pack.append(({key: tensor * scale for key, tensor in tensors.items()}, config), name="run", **options)
    pack.save(target)
    assert ex.Pack.open(target).adapter("run@latest").modules


def write_together(target: Path, folders: Sequence[Path], options: Json) -> list[float]:
    """Append all versions to one pack in memory, save it, and return the seconds of each append."""
    pack, seconds = ex.Pack.empty(), []
    for folder in folders:
        started = time.process_time()
        pack.append(folder, name="run", version=folder.name.removeprefix("checkpoint-"), **options)
        seconds.append(time.process_time() - started)
    pack.save(target)
    return seconds


def write_one_by_one(target: Path, folders: Sequence[Path], options: Json) -> list[float]:
    """Append versions as a training run does, and return the seconds of each: open the pack, append, save."""
    ex.Pack.empty().save(target)
    seconds = []
    for folder in folders:
        started = time.process_time()
        pack = ex.Pack.open(target)
        pack.append(folder, name="run", version=folder.name.removeprefix("checkpoint-"), **options)
        pack.save(target)
        seconds.append(time.process_time() - started)
    return seconds


def read(target: Path) -> list[float]:
    """Return the seconds that some versions take to be read from the files alone: the first, the last, and between."""
    names = version_names(ex.Pack.open(target))
    seconds = []
    for name in sorted({names[len(names) * step // READS] for step in range(READS)} | {names[-1]}, key=names.index):
        started = time.process_time()
        adapter = ex.Pack.open(target).adapter(name)
        for module in adapter.modules.values():
            assert module.down is not None
        seconds.append(time.process_time() - started)
    return seconds


def version_names(pack: ex.Pack) -> list[str]:
    return [f"run@{label}" for label in pack.histories["run"].labels]


def export(pack: ex.Pack, names: Sequence[str], target: Path) -> list[Path]:
    pack.export(target, list(names))
    return [target / name.replace("@", "-") for name in names]


if __name__ == "__main__":
    main()
