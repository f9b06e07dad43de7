"""Defaults of `fit` by purpose: the target and the storage of a pack, where the caller passes none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..codec.storage.base import Storage
from ..codec.storage.table import parse_storage
from ..core.fit_options import PURPOSES
from ..core.options import check_choice, format_value
from ..errors import OptionError

Dtype = str | torch.dtype | None

DEFAULT_PURPOSE = "storage"
DEFAULT_SIZES: Mapping[str, Mapping[str, Any]] = {
    "storage": {"max_error": 0.1},
    "training": {"n_components": 32},
    "serving": {"max_error": 0.1},
}
"""Size option of each purpose, if the caller passes none."""
FLOAT_STORAGE = "float16"
"""Storage of packs for training and serving. Its rounding errors are below 1e-3, and it takes half of float32."""
CODED_SIZES = ("max_bytes", "ratio")
"""Size options that can only be reached by entropy coding."""


@dataclass(frozen=True, slots=True)
class PurposeOptions:
    """Options of a fit, completed by the defaults of its purpose.

    Attributes:
        purpose: One of `PURPOSES`; None if the caller passed a size and no purpose.
        sizes: Values of n_components, energy, max_error, max_bytes and ratio, by name.
        dtype: Storage of the components; None for the default of the target.
        by_default: True if the caller passed neither a purpose nor a size.
    """

    purpose: str | None
    sizes: Mapping[str, Any]
    dtype: Dtype
    by_default: bool = False


def complete(purpose: str | None, sizes: Mapping[str, Any], dtype: Dtype, coefficient_dtype: Dtype) -> PurposeOptions:
    """Return the options of a fit for a purpose. Sizes and storages that the caller passed are kept.

    Args:
        purpose: One of `PURPOSES`; None for the default, "storage", if no size is passed either.
        sizes: Values of n_components, energy, max_error, max_bytes and ratio, by name.
        dtype: Storage of the components; None for the default.
        coefficient_dtype: Storage of the coefficients; None for the default.

    Raises:
        OptionError: The purpose is unknown, or the options contradict it.
    """
    if purpose is not None:
        check_choice("purpose", purpose, PURPOSES)
    passed = {name: size for name, size in sizes.items() if size is not None}
    if passed and purpose is None:
        return PurposeOptions(None, sizes, dtype)
    options = PurposeOptions(purpose or DEFAULT_PURPOSE, sizes, dtype, by_default=purpose is None)
    storages = [storage for storage in (parse_storage(dtype), parse_storage(coefficient_dtype)) if storage is not None]
    if not passed:
        _check_default_storages(options, storages)
        options = replace(options, sizes={**sizes, **DEFAULT_SIZES[str(options.purpose)]})
    if options.purpose == "storage":
        return options
    coded = [f"{name}={format_value(passed[name])}" for name in CODED_SIZES if name in passed]
    coded += [f"dtype {storage.name}" for storage in storages if storage.is_coded]
    if coded:
        raise OptionError(
            f"{coded[0]} means entropy coding, which gives no basis for {options.purpose}. Pass n_components (-k), "
            "energy or max_error, and a float dtype or none; or purpose='storage' (--for storage), with basis=32 "
            "(--basis 32) for a basis beside the coded adapters."
        )
    return options if dtype is not None else replace(options, dtype=FLOAT_STORAGE)


def _check_default_storages(options: PurposeOptions, storages: Sequence[Storage]) -> None:
    """Raise `OptionError` for a storage in integers whose number of components nothing determines."""
    bound = DEFAULT_SIZES[str(options.purpose)].get("max_error")
    integers = [storage.name for storage in storages if not (storage.is_float or storage.is_coded)]
    if bound is not None and integers:
        raise OptionError(
            f"dtype {integers[0]} needs a number of components: pass n_components=32 (-k 32) or energy=0.95 with it. "
            f"Without one, fit keeps every adapter within a delta error of {bound:g}, entropy-coded or in floats."
        )
