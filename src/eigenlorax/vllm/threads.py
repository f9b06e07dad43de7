"""A thread whose torch operations use no other threads. Nothing here knows what it does."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def single(name: str) -> ThreadPoolExecutor:
    """An executor of one thread, in which torch computes with that thread alone.

    The products of an expansion are small. Two threads on two busy cores took 9 to 15 s for those of one adapter of a
    7B model, where one took 0.2 to 0.4 s: they wait for each other by spinning. The count of a thread is its own, and is
    set to one here; by the same call torch notes it as the count of threads that are yet to come, which is put back at
    once. No other thread's changes, so results elsewhere stay what they were.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_compute_alone)


def _compute_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # from another thread, whose own count it is too: there is no other way to set one without the other
    other = threading.Thread(target=torch.set_num_threads, args=(before,))
    other.start()
    other.join()
