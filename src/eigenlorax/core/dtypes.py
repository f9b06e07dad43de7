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
    dtypes = {name(dtype): dtype for dtype in STORED}
    if name_ not in dtypes:
        raise OptionError(f"dtype must be one of {', '.join(dtypes)}, got {name_}.{suggestion(name_, dtypes)}")
    return dtypes[name_]


def parse(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype for its name, for the dtype itself, or None for None; raise `OptionError` for anything else."""
    if dtype is None:
        return None
    return by_name(dtype if isinstance(dtype, str) else name(dtype))
