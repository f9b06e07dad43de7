"""How many threads torch computes with, where it is not what the process has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**21
"""Numbers of a tensor below which a second thread costs more than it computes."""


@contextmanager
def suited_to(numbers: int) -> Iterator[None]:
    """Within this context, compute with one thread if the largest tensors have fewer than `SMALL` numbers.

    The codec makes thousands of operations on small tensors. OpenMP's threads spin while they wait for the next one:
    on three adapters of 1.5 MB they used 7 times the processor time of one thread on two cores, and more on more
    cores, without being faster. The thread's former count is set again on leaving.
    """
    before = torch.get_num_threads()
    if numbers >= SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
