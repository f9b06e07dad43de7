"""Cases run in forked processes under limits of time and memory; what is neither done nor refused is a failure.

A case is a target, a seed and a number: the same three give the same input. Or it is a line of a file of cases, which
says what is changed and depends on nothing that is drawn.
"""

import gc
import json
import mmap
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from eigenlorax.errors import MAX_MESSAGE, EigenloraxError

from . import changes
from .changes import Change, Tree
from .targets import TARGETS, Target, WrongError

PATIENCE = 5
"""The process of a case is killed after so many times the processor time that it may take."""
WAIT_SECONDS = 20
"""Time on the clock after which it is killed too: it may wait for what never comes."""
BYTES_PER_BYTE, ADAPTERS, ALLOWANCE = 10, 3, 200 << 20
"""Memory that a case may take: so many times its files, and the largest exported adapter, and so many bytes."""
PROGRESS_SECONDS = 60
MOST_KEPT = 200
"""Inputs of failures that are left in a folder."""
ADDRESS_SPACE = 24 << 30
"""A process may have so much more address space: what asks for more ends in a MemoryError, and no machine in swap."""


@dataclass(frozen=True)
class Case:
    """One input: a target's start with changes. number: where it was drawn, -1 for one that was not."""

    target: Target
    start: str
    changes: list[Change]
    seed: int = 0
    number: int = -1

    @property
    def tree(self) -> Tree:
        return self.target.made(self.target.starts()[self.start], self.changes)

    @property
    def line(self) -> str:
        """The case as a line of a file of cases."""
        plain = [change.to_plain() for change in self.changes]
        return json.dumps({"target": self.target.name, "start": self.start, "changes": plain})

    def __str__(self) -> str:
        return f"--target {self.target.name} --seed {self.seed} --case {self.number}" if self.number >= 0 else self.line


def drawn(target: Target, seed: int, number: int) -> Case:
    """The case of a target, a seed and a number."""
    random = Random(f"{target.name} {seed} {number}")
    start = random.choice(sorted(target.starts()))
    return Case(target, start, target.draw(random, target.starts()[start]), seed, number)


def parsed(line: str) -> Case:
    """The case of a line of a file of cases. `ValueError` where a change of it changes nothing."""
    body = json.loads(line)
    target = TARGETS[body["target"]]
    tree = target.starts()[body["start"]]
    case = Case(target, body["start"], [Change.from_plain(change) for change in body["changes"]])
    for change in case.changes:
        if changes.apply(tree, change) == tree:
            raise ValueError(f"{change} changes nothing of {target.name}, {case.start}: {line:.200}")
    return case


Plan = Callable[[], Case]
"""What makes a case when its turn comes: of all cases of a long run at once, there would be gigabytes."""


def scheduled(cases: int, seed: int, targets: Sequence[Target]) -> Iterator[Plan]:
    """So many cases, shared among targets by their weights."""
    turns = [target for target in targets for _ in range(target.weight)]
    Random(0).shuffle(turns)
    for target in targets:
        # in the forks they would be made anew each time
        target.starts()
    for number in range(cases):
        yield partial(drawn, turns[number % len(turns)], seed, number)


def unchanged(targets: Sequence[Target]) -> Iterator[Plan]:
    """What cases are made of, as it is."""
    for target in targets:
        for start in target.starts():
            yield partial(Case, target, start, [])


def replayed(lines: Iterable[str]) -> Iterator[Plan]:
    """The cases of a file."""
    for line in lines:
        if line.strip():
            TARGETS[json.loads(line)["target"]].starts()
            yield partial(parsed, line)


@dataclass(frozen=True)
class Failure:
    """A case that is neither done nor refused. cause: by which failures are counted as one."""

    cause: str
    detail: str
    case: str
    line: str
    changes: int


@dataclass
class Outcomes:
    """What has become of cases, by target: how many were done and refused, by class; and failures."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    def add(self, other: "Outcomes") -> None:
        self.counts.update(other.counts)
        self.failures += other.failures
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)

    def __str__(self) -> str:
        names = sorted({target for target, _ in self.counts})
        width = max(map(len, names), default=0)
        rows = []
        for name in names:
            kinds = {kind: n for (target, kind), n in sorted(self.counts.items()) if target == name}
            failed = kinds.pop("failed", 0)
            classes = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))
            rows.append(f"{name:{width}}  {failed} failed; {classes}")
        rows.append(f"slowest {self.slowest:.2f} s, largest {self.largest / 1e6:.0f} MB above the start of its case")
        causes: dict[str, list[Failure]] = {}
        for failure in self.failures:
            causes.setdefault(failure.cause, []).append(failure)
        for cause, found in sorted(causes.items(), key=lambda item: -len(item[1])):
            least = min(found, key=lambda one: (one.changes, len(one.line)))
            rows += [
                "",
                f"{len(found)} × {cause}",
                f"    {least.detail}",
                f"    {least.case}",
                f"    {least.line[:1500]}",
            ]
        return "\n".join(rows)


def run(
    plans: Iterable[Plan],
    jobs: int = 1,
    *,
    kept: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Outcomes:
    """Run cases in forks of this process, `jobs` at a time. kept: a folder for the inputs of failures."""
    plans = list(plans)
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        workers = [_Worker(plans[first::jobs], Path(folder) / str(first)) for first in range(jobs)]
        try:
            for worker in workers:
                worker.start()
            while busy := {os.pidfd_open(worker.child): worker for worker in workers if worker.child}:
                ended, _, _ = select.select(list(busy), [], [], PROGRESS_SECONDS)
                progress(sum(worker.done for worker in workers), len(plans))
                for descriptor, worker in busy.items():
                    os.close(descriptor)
                    if descriptor in ended:
                        worker.end()
        finally:
            for worker in workers:
                worker.stop()
                outcomes.add(worker.outcomes)
    if kept is not None:
        _keep(outcomes.failures, kept)
    return outcomes


def _scratch() -> str | None:
    """A folder in memory, where there is one: cases write many small files, and wait for each of them to be on disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _keep(failures: Sequence[Failure], kept: Path) -> None:
    """Leave the inputs of failures in a folder, each with what it is beside it."""
    kept.mkdir(parents=True, exist_ok=True)
    for number, failure in enumerate(failures[:MOST_KEPT]):
        place = kept / f"{number:04d}"
        place.with_suffix(".txt").write_text(f"{failure.cause}\n{failure.detail}\n{failure.case}\n{failure.line}\n")
        changes.write(parsed(failure.line).tree, place)


class _Worker:
    """Cases that are run one after the other, by as many forks as it takes: one that is killed is followed by another,
    which goes on behind the case that killed it."""

    def __init__(self, plans: Sequence[Plan], folder: Path) -> None:
        self._plans, self._folder = plans, folder
        self._at = mmap.mmap(-1, 8)
        self._results = folder.with_suffix(".jsonl")
        self._first = 0
        self.child = 0
        self.outcomes = Outcomes()

    @property
    def done(self) -> int:
        """How many cases have been run."""
        return int(struct.unpack("<q", self._at[:])[0])

    def start(self, first: int = 0) -> None:
        """Run the cases from this one on in a fork, if there are any."""
        self._at[:] = struct.pack("<q", first)
        if first >= len(self._plans):
            self.child = 0
            return
        # what a killed fork has left
        shutil.rmtree(self._folder, ignore_errors=True)
        gc.collect()
        parent = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            code = 1
            try:
                self._work(first, parent)
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def end(self) -> None:
        """Note why the fork has ended, and start another one if cases are left."""
        _, status = os.waitpid(self.child, 0)
        if status == 0:
            self.start(len(self._plans))
            return
        at = self.done
        code = os.waitstatus_to_exitcode(status)
        case = self._plans[at]()
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process left with {code}"
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            seconds = PATIENCE * case.target.seconds
            cause = f"took more than {seconds:g} s" if code == -signal.SIGPROF else f"waited for {WAIT_SECONDS} s"
        self.outcomes.counts[case.target.name, "failed"] += 1
        self.outcomes.failures.append(_failure(case, cause, ""))
        self.start(at + 1)

    def stop(self) -> None:
        """Kill the fork, if there is one, and collect what all of them have written down."""
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self.child = 0
        lines = self._results.read_text("utf-8").splitlines() if self._results.exists() else []
        for line in lines:
            target, kind, seconds, grown, failure = json.loads(line)
            self.outcomes.counts[target, kind] += 1
            self.outcomes.slowest = max(self.outcomes.slowest, seconds)
            self.outcomes.largest = max(self.outcomes.largest, grown)
            if failure is not None:
                self.outcomes.failures.append(Failure(**failure))

    def _work(self, first: int, parent: int) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        _limit_address_space()
        with open(self._results, "a", buffering=1) as results:
            for number in range(first, len(self._plans)):
                if os.getppid() != parent:
                    # nobody is left who would read what comes out
                    return
                self._at[:] = struct.pack("<q", number)
                results.write(json.dumps(_measured(self._plans[number], self._folder)) + "\n")
            self._at[:] = struct.pack("<q", len(self._plans))


def _limit_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # a core of every crash would fill the disk
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _measured(plan: Plan, folder: Path) -> list[Any]:
    """Run one case: its target, what became of it, processor seconds, bytes of memory, and the failure if it is one."""
    case = plan()
    signal.setitimer(signal.ITIMER_PROF, PATIENCE * case.target.seconds)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    tree = case.tree
    changes.write(tree, folder)
    before = _reset_peak()
    start, exported, cause, detail = time.process_time(), 0, "", ""
    try:
        exported = case.target.attempt(folder)
        kind = "done"
    except EigenloraxError as error:
        kind = type(error).__name__
        if len(str(error)) > MAX_MESSAGE:
            cause, detail = f"{kind} with a message that is too long", f"{len(str(error)):,} characters: {error!s:.200}"
    except WrongError as error:
        cause, detail = f"{str(error).partition(':')[0][:100]}", str(error)[:2000]
    except BaseException as error:  # noqa: BLE001
        cause, detail = f"{type(error).__name__} at {_place(error)}", f"{error!s:.300}"
    seconds = time.process_time() - start
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    grown = _peak() - before
    allowed = BYTES_PER_BYTE * changes.size(tree) + ADAPTERS * exported + ALLOWANCE
    if not cause and grown > allowed:
        cause, detail = "more memory than it may take", f"{grown:,} bytes, where {allowed:,} are allowed"
    if not cause and seconds > case.target.seconds:
        cause, detail = "more time than it may take", f"{seconds:.1f} s"
    shutil.rmtree(folder, ignore_errors=True)
    failure = None
    if cause:
        kind = "failed"
        failure = asdict(_failure(case, cause, detail))
    return [case.target.name, kind, seconds, grown, failure]


def _failure(case: Case, cause: str, detail: str) -> Failure:
    return Failure(f"{case.target.name}: {cause}", detail, str(case), case.line, len(case.changes))


def _place(error: BaseException) -> str:
    """The last function of ours that an error has come through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}eigenlorax{os.sep}" in frame.filename] or frames
    last = own[-1]
    return f"{Path(last.filename).name}:{last.name}"


def _reset_peak() -> int:
    """Start to measure the largest resident size anew; what it is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _of_status("VmRSS")


def _peak() -> int:
    return _of_status("VmHWM")


def _of_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {name} in /proc/self/status")
