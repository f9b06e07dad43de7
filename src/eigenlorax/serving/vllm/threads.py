"""A thread whose torch operations use no other threads. Nothing here knows what it does."""

import threading
from concurrent.futures import ThreadPoolExecutor

# by name, now: on CPUs vLLM puts a function that does nothing in the place of this one once its own threads are bound
from torch import get_num_threads, set_num_threads


def single(name: str) -> ThreadPoolExecutor:
    """An executor of one thread, in which torch computes with that thread alone.

    The products of an expansion are small. Two threads on two busy cores took 9 to 15 s for those of one adapter of a
    7B model, where one took 0.2 to 0.4 s: they wait for each other by spinning. Each thread has a count of its own, and
    here it is set to one. The same call notes it for threads that are yet to come, which is put back at once. No other
    thread's count changes.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_compute_alone)


def _compute_alone() -> None:
    before = get_num_threads()
    set_num_threads(1)
    # from another thread, whose own count it is too: there is no other way to set one without the other
    other = threading.Thread(target=set_num_threads, args=(before,))
    other.start()
    other.join()
