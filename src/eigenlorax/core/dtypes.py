"""The dtypes that components, coefficients and factors may have, by the names users write."""

import torch

from ..errors import OptionError
from .options import suggestion

STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def name(dtype: torch.dtype) -> str:
    """`torch.float16` → `float16`."""
    return str(dtype).removeprefix("torch.")


def by_name(name_: str) -> torch.dtype:
    """`float16` → `torch.float16`; an `OptionError` for what is not stored."""
    for known in STORED:
        if name(known) == name_:
            return known
    known_names = [name(known) for known in STORED]
    raise OptionError(f"dtype must be one of {', '.join(known_names)}, got {name_}.{suggestion(name_, known_names)}")


def parse(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`float16`, or the dtype itself, as a dtype; None stays None. Anything else is an `OptionError`."""
    if dtype is None:
        return None
    return by_name(dtype if isinstance(dtype, str) else name(dtype))
