"""Who makes the calls of a piece of work: this process, several of this machine, or a Ray cluster.

Calls are functions without arguments that depend on nothing but what they hold, so that any process may make them, and
make them again where one was killed. Nothing here knows what they do.
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
"""How often a pool of processes is made anew after one of them was killed, for one run."""

_received: dict[str, Any] = {}
"""Values that were shared with this process, by their keys."""


class SharedValue(Generic[T]):
    """A value that many calls need: each process that makes some is sent it once."""

    __slots__ = ("_fetch", "key")

    def __init__(self, key: str, fetch: Call[T]) -> None:
        self.key = key
        self._fetch = fetch

    def get(self) -> T:
        """The value."""
        if self.key not in _received:
            _received[self.key] = self._fetch()
        found: T = _received[self.key]
        return found


@runtime_checkable
class Engine(Protocol):
    """Makes calls. workers: how many at a time."""

    workers: int

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        """The results, in the order of the calls, of which no more are taken than are needed to keep workers busy."""
        ...

    def share(self, value: T) -> SharedValue[T]:
        """The value, for calls to hold."""
        ...


def run_serially(calls: Iterable[Call[T]]) -> Iterator[T]:
    """Calls made one after the other, in this process."""
    return (call() for call in calls)


class _Sharing:
    """Knows what it has shared, so that this process lets go of that in the end."""

    def __init__(self) -> None:
        self._keys: list[str] = []

    def _known(self, shared: SharedValue[T]) -> SharedValue[T]:
        self._keys.append(shared.key)
        return shared

    def forget(self) -> None:
        """Let go of what this process has received of it."""
        for key in self._keys:
            _received.pop(key, None)


class _Serial(_Sharing):
    """Calls one after the other, here."""

    workers = 1

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        return run_serially(calls)

    def share(self, value: T) -> SharedValue[T]:
        return self._known(SharedValue(secrets.token_hex(8), lambda: value))


_Submitted = tuple[bytes, "Future[bytes]", ProcessPoolExecutor]
"""A pickled call, what will come of it, and the pool that has it."""


class _Processes(_Sharing):
    """Calls in processes of this machine, each with one thread."""

    def __init__(self, workers: int, folder: Path) -> None:
        super().__init__()
        self.workers = workers
        self._folder = folder
        self._pool = self._made()

    def _made(self) -> ProcessPoolExecutor:
        # spawned: a fork of a process with threads may hang
        return ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=_begun)

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        return _in_order(calls, self._submit, self._result, 2 * self.workers)

    def _submit(self, call: Call[T]) -> _Submitted:
        # pickled here: multiprocessing would pass each tensor as an open file, of which there are only so many
        return self._sent(pickle.dumps(call))

    def _sent(self, data: bytes) -> _Submitted:
        try:
            return data, self._pool.submit(_call, data), self._pool
        except BrokenProcessPool:
            self._pool = self._made()
            return data, self._pool.submit(_call, data), self._pool

    def _result(self, submitted: _Submitted) -> Any:
        for _ in range(ATTEMPTS):
            data, future, pool = submitted
            try:
                return _outcome(future.result())
            except BrokenProcessPool:
                # one of its processes was killed, which ends all of them
                if pool is self._pool:
                    self._pool = self._made()
                submitted = self._sent(data)
        raise EngineError(
            f"worker processes ended {ATTEMPTS} times in a row. If memory was short, take fewer: "
            f"workers={max(self.workers // 2, 1)} (--workers), or engine='serial'. In a script, the call has to be "
            "under `if __name__ == '__main__':`, since each worker imports the script."
        )

    def share(self, value: T) -> SharedValue[T]:
        path = self._folder / secrets.token_hex(8)
        path.write_bytes(pickle.dumps(value))
        return self._known(SharedValue(path.name, partial(_unpickled, path)))

    def close(self) -> None:
        """End the processes, without waiting for calls whose results nobody wants."""
        self._pool.shutdown(cancel_futures=True)


def _begun() -> None:
    """What a process does first: it takes one thread, and leaves a Ctrl-C, which all processes of a terminal get, to
    the one that started it."""
    # before torch, whose import takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)


def _call(data: bytes) -> bytes:
    """Make a pickled call; what comes out, or the error of ours that did, pickled."""
    try:
        return pickle.dumps(pickle.loads(data)())  # noqa: S301 (the process that started this one wrote it)
    except (EigenloraxError, OSError) as error:
        return pickle.dumps(_Raised(error))


@dataclass(frozen=True, slots=True)
class _Raised:
    """An error that is to be raised where the result is wanted, without the traces of other processes."""

    error: EigenloraxError | OSError


def _outcome(data: bytes) -> Any:
    found = pickle.loads(data)  # noqa: S301 (a worker of ours wrote it)
    if isinstance(found, _Raised):
        raise found.error
    return found


def _unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301 (as above)


class _Ray(_Sharing):
    """Calls as tasks of a Ray cluster. A task whose worker or node is lost is made again by Ray."""

    def __init__(self, ray: Any) -> None:
        super().__init__()
        self._ray = ray
        self.workers = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._task = ray.remote(num_cpus=1, max_retries=10)(_call)

    def run(self, calls: Iterable[Call[T]]) -> Iterator[T]:
        return _in_order(calls, self._submit, self._result, 2 * self.workers)

    def _submit(self, call: Call[T]) -> Any:
        return self._task.remote(self._ray.cloudpickle.dumps(call))

    def _result(self, submitted: Any) -> Any:
        try:
            return _outcome(self._ray.get(submitted))
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"a worker of the Ray cluster could not do its part: {reason(error)}") from error

    def share(self, value: T) -> SharedValue[T]:
        return self._known(SharedValue(secrets.token_hex(8), partial(_from_store, [self._ray.put(value)])))


def _from_store(references: list[Any]) -> Any:
    import ray

    return ray.get(references[0])


def _in_order(
    calls: Iterable[Call[T]], submit: Callable[[Call[T]], Any], result: Callable[[Any], T], most: int
) -> Iterator[T]:
    """Results in order, with at most so many calls under way: those that wait hold memory."""
    waiting: deque[Any] = deque()
    for call in calls:
        waiting.append(submit(call))
        if len(waiting) >= most:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


def check_engine(name: str, workers: int | None) -> None:
    """`OptionError` unless there is such an engine, with so many workers."""
    check_choice("engine", name, ENGINES)
    if workers is None:
        return
    if name != "processes":
        raise OptionError(f"workers={workers} goes with engine='processes' (--engine processes), not with {name!r}.")
    if to_int("workers", workers) < 1:
        raise OptionError(f"workers must be at least 1, got {workers}.")


def open_engine(name: str, workers: int | None = None) -> AbstractContextManager[Engine]:
    """An engine for the length of a block.

    workers: processes of this machine, by default as many as it has cores for us. A Ray cluster has its own number.
    """
    check_engine(name, workers)
    if name == "serial":
        return _serial()
    return _processes(workers or _cores()) if name == "processes" else _cluster()


def _cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _serial() -> Iterator[Engine]:
    engine = _Serial()
    try:
        yield engine
    finally:
        engine.forget()


@contextmanager
def _processes(workers: int) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory() as folder:
        engine = _Processes(workers, Path(folder))
        try:
            yield engine
        finally:
            engine.forget()
            engine.close()


@contextmanager
def _cluster() -> Iterator[Engine]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("engine='ray' needs Ray: pip install 'eigenlorax[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        try:
            # RAY_ADDRESS, or a cluster of this machine where there is none
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineError(f"no Ray cluster could be reached or started: {reason(error)}") from error
    engine = _Ray(ray)
    try:
        yield engine
    finally:
        engine.forget()
        if started:
            ray.shutdown()
