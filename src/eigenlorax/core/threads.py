"""Number of threads that torch computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**21
"""Size of a tensor below which a second thread costs more than it gains."""


@contextmanager
def suited_to(numbers: int) -> Iterator[None]:
    """Use one thread within this context if the largest tensors have fewer than `SMALL` entries.

    The codec makes thousands of operations on small tensors. OpenMP's threads spin while they wait for the next one:
    on three adapters of 1.5 MB they used 7 times the processor time of one thread on two cores, and more on more
    cores, without being faster. The former number of threads is restored at the end.

    Args:
        numbers: Number of entries of the largest tensor.
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
