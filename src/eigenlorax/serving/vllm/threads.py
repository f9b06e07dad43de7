"""An executor whose torch operations run in one thread.

`core.threads` lowers the number of threads for a block of code in the calling thread. A server needs
another mechanism: a separate thread with that setting, which does not affect vLLM's threads, and which works after vLLM
has replaced `torch.set_num_threads`, which `core.threads` calls.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

# imported by name, because on CPUs vLLM replaces torch.set_num_threads by a function that does nothing
from torch import get_num_threads, set_num_threads


def single_threaded_executor(name: str) -> ThreadPoolExecutor:
    """Return an executor of one thread, in which torch uses no other threads.

    The products of an export are small. Two threads on two busy cores took 9 to 15 s for one adapter of a 7B model, and
    one thread 0.2 to 0.4 s: OpenMP's threads spin while they wait for each other. The number of threads of other Python
    threads does not change.

    Args:
        name: Prefix of the thread's name.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_use_one_thread)


def _use_one_thread() -> None:
    default = get_num_threads()
    set_num_threads(1)
    # set_num_threads sets the number of this thread and the default of later ones. Only a call in another thread resets
    # the default without changing this thread's number
    restore = threading.Thread(target=set_num_threads, args=(default,))
    restore.start()
    restore.join()
