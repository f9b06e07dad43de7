"""Jobs: those that are done are skipped, and each of the others runs in a process of one thread."""

import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenlorax.train import models

from . import record

Json = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run.

    name: path of its record in `results/`, without suffix. config: all that its result depends on. function: returns
    what the record says of the run. needs: other files that the run writes.
    """

    name: str
    config: Json
    function: Callable[[Json], Json]
    needs: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        return record.RESULTS / f"{self.name}.json"

    def done(self) -> bool:
        """Return whether its files exist, and its record has the same config."""
        if not self.path.is_file() or not all(file.exists() for file in self.needs):
            return False
        return record.read(self.path)["run_info"]["train_config"] == json.loads(json.dumps(self.config))


def run(jobs: Sequence[Job], command: str, *, workers: int, estimate: float) -> int:
    """Run the jobs that are not done, and return how many failed.

    estimate: CPU seconds of a job, if there is no record that says better.
    """
    todo = [job for job in jobs if not job.done()]
    seconds = expected_seconds(todo, jobs, estimate)
    print(
        f"{len(jobs)} runs, {len(jobs) - len(todo)} done; about {seconds / 3600:.2f} CPU-hours left, "
        f"{seconds / 60 / workers:.0f} minutes in {workers} processes of one thread.",
        flush=True,
    )
    failed = 0
    context = multiprocessing.get_context("forkserver")
    # imports take seconds: with these, each process has them from its start
    context.set_forkserver_preload(["harness.preload"])
    with context.Pool(workers, maxtasksperchild=1) as pool:
        calls = [(job, job.path, command) for job in todo]
        for n, (name, error, took) in enumerate(pool.imap_unordered(_run_job, calls), 1):
            failed += error is not None
            print(f"{n}/{len(todo)} {name} {took:.0f} s" + (f"\n{error}" if error else ""), flush=True)
    return failed


def expected_seconds(todo: Sequence[Job], jobs: Sequence[Job], estimate: float) -> float:
    """Return the CPU seconds of jobs, estimated by those that are done."""
    measured = [record.read(job.path)["run_info"]["total_time"] for job in jobs if job not in todo]
    return len(todo) * (statistics.mean(measured) if measured else estimate)


def _run_job(call: tuple[Job, Path, str]) -> tuple[str, str | None, float]:
    job, path, command = call
    started = time.perf_counter()
    try:
        with models.quiet():
            outcome = job.function(job.config)
        record.write(path, {**record.about(job.name, job.config, command, started), **outcome})
    except Exception:  # noqa: BLE001  one failed run is no reason to lose the others
        return job.name, traceback.format_exc(), time.perf_counter() - started
    return job.name, None, time.perf_counter() - started


ENVIRONMENT = {
    # two threads on shared cores wait for each other
    "OMP_NUM_THREADS": "1",
    # glibc would return the memory of a training step to the system, and request it again in the next one
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


def check_environment() -> None:
    """Restart with variables that must be set before anything is imported."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, *sys.argv])
