"""Dtypes of components, coefficients and factors, and their names."""

import torch

from ..errors import OptionError
from .options import suggestion

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def name(dtype: torch.dtype) -> str:
    """Return `float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def by_name(dtype_name: str) -> torch.dtype:
    """Return `torch.float16` for `float16`; raise `OptionError` for anything that is not in `STORED`."""
    dtypes = {name(dtype): dtype for dtype in STORED}
    if dtype_name not in dtypes:
        hint = suggestion(dtype_name, dtypes)
        raise OptionError(f"dtype must be one of {', '.join(dtypes)}, got {dtype_name}.{hint}")
    return dtypes[dtype_name]


def parse(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype for its name, for the dtype itself, or None for None; raise `OptionError` for anything else."""
    if dtype is None:
        return None
    return by_name(dtype if isinstance(dtype, str) else name(dtype))
