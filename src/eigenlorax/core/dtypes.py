"""Dtypes of components, coefficients and factors, by the names that users write."""

import torch

from ..errors import OptionError
from .options import suggestion

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def name(dtype: torch.dtype) -> str:
    """Return `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def by_name(name_: str) -> torch.dtype:
    """Return `torch.float16` for `float16`; raise `OptionError` for anything that is not in `STORED`."""
    for known in STORED:
        if name(known) == name_:
            return known
    known_names = [name(known) for known in STORED]
    raise OptionError(f"dtype must be one of {', '.join(known_names)}, got {name_}.{suggestion(name_, known_names)}")


def parse(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype for its name, for the dtype itself, or None for None; raise `OptionError` for anything else."""
    if dtype is None:
        return None
    return by_name(dtype if isinstance(dtype, str) else name(dtype))
