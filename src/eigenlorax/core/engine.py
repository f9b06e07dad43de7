"""Engines that run independent calls: in this process, in worker processes of this machine, or on a Ray cluster.

Calls are functions without arguments that depend on nothing but the values they contain. So any process may run them,
and run them again after another process was killed.
"""

import os
import pickle
import secrets
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from ..errors import EigenloraxError, EngineError, MissingExtraError, OptionError, reason
from .options import check_choice, to_int

T = TypeVar("T")
Call = Callable[[], T]

ENGINES = ("serial", "processes", "ray")
ATTEMPTS = 3
"""Number of times that a call is tried while worker processes are killed."""

# Shared values that this process has fetched, by key
_received: dict[str, Any] = {}


class SharedValue(Generic[T]):
    """A value that many calls need. Each process that runs some of them fetches it once.

    Args:
        key: Identifies the value across processes.
        fetch: Returns the value, in any process.
    """

    __slots__ = ("_fetch", "key")

    def __init__(self, key: str, fetch: Call[T]) -> None:
        self.key = key
        self._fetch = fetch

    def get(self) -> T:
        """Return the value, fetching it at the first call in this process."""
        if self.key not in _received:
            _received[self.key] = self._fetch()
        value: T = _received[self.key]
        return value


@runtime_checkable
class Engine(Protocol):
    """Executor of independent calls.

    Attributes:
        workers: Number of calls that run at the same time.
    """

    workers: int

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        """Yield the results in the order of the calls. No more calls are taken than keep the workers busy."""
        ...

    def share(self, value: T) -> SharedValue[T]:
        """Return a handle of the value, which calls may contain."""
        ...


def run_serially(calls: Iterable[Call[T]]) -> Iterator[T]:
    """Yield the results of calls that are run one after the other in this process."""
    return (call() for call in calls)


class _SharingEngine:
    """Base class of the engines. It tracks shared values, so that this process's copies are freed at the end."""

    def __init__(self) -> None:
        self._keys: list[str] = []

    def _track(self, shared: SharedValue[T]) -> SharedValue[T]:
        self._keys.append(shared.key)
        return shared

    def forget(self) -> None:
        """Free the shared values that this process has fetched."""
        for key in self._keys:
            _received.pop(key, None)


class _SerialEngine(_SharingEngine):
    """Engine that runs calls one after the other in this process."""

    workers = 1

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        return run_serially(calls)

    def share(self, value: T) -> SharedValue[T]:
        return self._track(SharedValue(secrets.token_hex(8), lambda: value))


# A pickled call, the future of its result, and the pool that runs it
_Submitted = tuple[bytes, "Future[bytes]", ProcessPoolExecutor]


class _ProcessEngine(_SharingEngine):
    """Engine that runs calls in worker processes of this machine, each with one thread."""

    def __init__(self, workers: int, folder: Path) -> None:
        super().__init__()
        self.workers = workers
        self._folder = folder
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        # spawned, because a fork of a process with threads may deadlock
        return ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=_initialise_worker)

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        return _run_in_order(calls, self._submit, self._wait_for, 2 * self.workers)

    def _submit(self, call: Call[T]) -> _Submitted:
        # pickled here: multiprocessing would send each tensor as a file descriptor, and the OS limits their number
        return self._submit_pickled(pickle.dumps(call))

    def _submit_pickled(self, pickled: bytes) -> _Submitted:
        try:
            return pickled, self._pool.submit(_run_pickled, pickled), self._pool
        except BrokenProcessPool:
            self._pool = self._new_pool()
            return pickled, self._pool.submit(_run_pickled, pickled), self._pool

    def _wait_for(self, submitted: _Submitted) -> Any:
        for _ in range(ATTEMPTS):
            pickled, future, pool = submitted
            try:
                return _unpickle_result(future.result())
            except BrokenProcessPool:
                # one killed worker breaks the whole pool, so all of its calls are submitted again; the first of them
                # replaces the pool
                if pool is self._pool:
                    self._pool = self._new_pool()
                submitted = self._submit_pickled(pickled)
        raise EngineError(
            f"worker processes were killed {ATTEMPTS} times in a row. If memory was short, use fewer: "
            f"workers={max(self.workers // 2, 1)} (--workers), or engine='serial'. In a script, the call has to be "
            "under `if __name__ == '__main__':`, since each worker imports the script."
        )

    def share(self, value: T) -> SharedValue[T]:
        path = self._folder / secrets.token_hex(8)
        path.write_bytes(pickle.dumps(value))
        return self._track(SharedValue(path.name, partial(_unpickle_file, path)))

    def close(self) -> None:
        """Cancel the calls that have not started, and end the workers."""
        self._pool.shutdown(cancel_futures=True)


def _initialise_worker() -> None:
    """Prepare a worker process: one thread, and Ctrl-C left to the process that started it."""
    # before torch, whose import takes seconds: a Ctrl-C reaches all processes of a terminal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)


def _run_pickled(pickled: bytes) -> bytes:
    """Run a pickled call, and return its result, or the error that it raised, pickled."""
    try:
        return pickle.dumps(pickle.loads(pickled)())  # noqa: S301 (written by the process that started this one)
    except (EigenloraxError, OSError) as error:
        return pickle.dumps(_RaisedError(error))


@dataclass(frozen=True, slots=True)
class _RaisedError:
    """An error of a call, raised in the process that waits for the result, without the other process's traceback."""

    error: EigenloraxError | OSError


def _unpickle_result(pickled: bytes) -> Any:
    outcome = pickle.loads(pickled)  # noqa: S301 (written by a worker of this process)
    if isinstance(outcome, _RaisedError):
        raise outcome.error
    return outcome


def _unpickle_file(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301 (written by the process that started this one)


class _RayEngine(_SharingEngine):
    """Engine that runs calls as tasks of a Ray cluster. Ray runs a task again if its worker or node fails."""

    def __init__(self, ray: Any) -> None:
        super().__init__()
        self._ray = ray
        # CPUs of the whole cluster; at least 1, also where a cluster reports no CPU
        self.workers = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._task = ray.remote(num_cpus=1, max_retries=10)(_run_pickled)

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        return _run_in_order(calls, self._submit, self._wait_for, 2 * self.workers)

    def _submit(self, call: Call[T]) -> Any:
        return self._task.remote(self._ray.cloudpickle.dumps(call))

    def _wait_for(self, submitted: Any) -> Any:
        try:
            return _unpickle_result(self._ray.get(submitted))
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"a task of the Ray cluster failed: {reason(error)}") from error

    def share(self, value: T) -> SharedValue[T]:
        # in a list: Ray would replace a bare reference among a task's arguments by the value itself
        return self._track(SharedValue(secrets.token_hex(8), partial(_get_from_store, [self._ray.put(value)])))


def _get_from_store(references: list[Any]) -> Any:
    import ray

    return ray.get(references[0])


def _run_in_order(
    calls: Iterable[Call[T]], submit: Callable[[Call[T]], Any], wait_for: Callable[[Any], T], max_pending: int
) -> Iterator[T]:
    """Yield results in the order of the calls, with at most `max_pending` calls submitted, since each holds memory."""
    pending: deque[Any] = deque()
    for call in calls:
        pending.append(submit(call))
        if len(pending) >= max_pending:
            yield wait_for(pending.popleft())
    while pending:
        yield wait_for(pending.popleft())


def check_engine(name: str, workers: int | None) -> None:
    """Raise `OptionError` if the engine is unknown, or does not accept this number of workers."""
    check_choice("engine", name, ENGINES)
    if workers is None:
        return
    if name != "processes":
        raise OptionError(f"workers={workers} requires engine='processes' (--engine processes), got engine={name!r}.")
    if to_int("workers", workers) < 1:
        raise OptionError(f"workers must be at least 1, got {workers}.")


def open_engine(name: str, workers: int | None = None) -> AbstractContextManager[Engine]:
    """Open an engine as a context manager.

    Args:
        name: One of `ENGINES`.
        workers: Number of processes, for "processes". Default: the number of cores that this process may use.

    Raises:
        OptionError: The engine is unknown, or does not accept this number of workers.
        MissingExtraError: Ray is not installed.
        EngineError: No Ray cluster could be reached or started.
    """
    check_engine(name, workers)
    if name == "serial":
        return _open_serial()
    return _open_processes(workers or _available_cores()) if name == "processes" else _open_ray()


def _available_cores() -> int:
    """Return the number of cores that this process may use, or of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _open_serial() -> Iterator[Engine]:
    engine = _SerialEngine()
    try:
        yield engine
    finally:
        engine.forget()


@contextmanager
def _open_processes(workers: int) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as folder:
        engine = _ProcessEngine(workers, Path(folder))
        try:
            yield engine
        finally:
            engine.forget()
            engine.close()


@contextmanager
def _open_ray() -> Iterator[Engine]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("engine='ray' needs Ray: pip install 'eigenlorax[ray]'.") from error
    is_started_here = not ray.is_initialized()
    if is_started_here:
        try:
            # the cluster of RAY_ADDRESS, or a local one where that is not set
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineError(f"no Ray cluster could be reached or started: {reason(error)}") from error
    engine = _RayEngine(ray)
    try:
        yield engine
    finally:
        engine.forget()
        if is_started_here:
            ray.shutdown()
