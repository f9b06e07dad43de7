"""Options of a fit, validated and grouped: `ReadOptions`, `Target` (size, error and storage) and `Execution`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..codec.storage.base import Storage
from ..codec.storage.coded import NEEDS_TARGET
from ..codec.storage.table import parse_storage
from ..core import engine as engines
from ..core.fit_options import BYTE_TARGETS, SWEEPS, FitOptions
from ..core.options import check_choice, format_value, to_float
from ..core.progress import Progress
from ..errors import OptionError, reason
from ..pack.outside_tensors import MAX_HEAD_ERROR, MIN_HEAD_ERROR
from . import purpose_defaults
from .purpose_defaults import Dtype

AUTO = "auto"
"""Value of `n_components` for which the number is chosen by leaving adapters out."""
SOLVERS = ("auto", "exact")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options of reading the adapters of a fit.

    Attributes:
        exclude_adapters: Names of adapters to leave out.
        exclude_modules: Patterns of modules to keep out of the subspace.
        same_base: True to accept adapters that name different base models.
        skip_bad: True to leave out adapters that cannot be read, instead of raising.
        reading: Options of `read_adapter`.
    """

    exclude_adapters: Sequence[str]
    exclude_modules: Sequence[str]
    same_base: bool
    skip_bad: bool
    reading: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """Size or error bound of a pack, and its storage.

    Attributes:
        options: Options of the fit, which the pack records.
        is_auto: True if the number of components is chosen by leaving adapters out; `options` has 1 until then.
        n_components: Number of components that the caller passed, or None.
        storage: Storage of the components; None for the default.
        coefficient_storage: Storage of the coefficients; None for the default.
        is_coded: True if the pack is entropy-coded for an error bound or a size; False if it is fitted by components.
        purpose: Purpose that the pack records; None if a size was passed without a purpose.
        by_default: True if neither a size nor a purpose was passed.
        head_error: Error bound of heads; 0 to store them exactly, None to choose it together with the bytes.
    """

    options: FitOptions
    is_auto: bool
    n_components: int | None
    storage: Storage | None
    coefficient_storage: Storage | None
    is_coded: bool
    head_error: float | None = None
    purpose: str | None = None
    by_default: bool = False

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, Any],
        weighting: str,
        sweeps: int | None,
        dtypes: tuple[Dtype, Dtype],
        purpose: str | None,
        head_error: float | None,
    ) -> "Target":
        """Build the target from options of `fit`.

        Args:
            sizes: Values of n_components, energy, max_error, max_bytes and ratio, by name.
            weighting: "delta" or "factors".
            sweeps: Number of alternating refinements; None for the default.
            dtypes: Storages of the components and of the coefficients; None for the default.
            purpose: Purpose of the pack, which sets the size and the storage that are not passed.
            head_error: Error bound of heads; 0 to store them exactly, None for the default.

        Raises:
            OptionError: An option is invalid, or options contradict each other.
        """
        dtype, coefficient_dtype = dtypes
        coefficient_storage = parse_storage(coefficient_dtype)
        _refuse_cores(dtype=parse_storage(dtype), coefficient_dtype=coefficient_storage)
        completed = purpose_defaults.complete(purpose, sizes, dtype, coefficient_dtype)
        # a default may exceed the dimensions of small modules, a number that the caller passed may not
        is_passed = sizes["n_components"] is not None
        sizes, dtype = completed.sizes, completed.dtype
        is_auto = sizes["n_components"] == AUTO
        n_components = _component_number(sizes)
        fit_options = FitOptions(
            **{**sizes, "n_components": n_components}, weighting=weighting, sweeps=SWEEPS if sweeps is None else sweeps
        )
        bounds = {name: sizes[name] for name in BYTE_TARGETS}
        is_coded = is_entropy_coded(bounds, weighting, dtype, coefficient_dtype)
        return cls(
            options=fit_options,
            is_auto=is_auto,
            n_components=n_components if is_passed and not is_auto else None,
            storage=parse_storage(dtype),
            coefficient_storage=coefficient_storage,
            purpose=completed.purpose,
            by_default=completed.by_default,
            is_coded=is_coded,
            head_error=_head_error(head_error, sizes["max_error"], is_coded=is_coded),
        )

    def refuse_unused(self, **options: Any) -> None:
        """Raise `OptionError` for the first option that is not None, if the fit is entropy-coded and ignores it."""
        if not self.is_coded:
            return
        bound = _first_option({name: getattr(self.options, name) for name in BYTE_TARGETS})
        alternative = " Or pass a float dtype: then only numbers of components are chosen, and it is used."
        if self.by_default:
            bound = f"the default target, {bound}"
            alternative = " Or pass n_components (-k), energy, or a float dtype: then it is used."
        for name, value in options.items():
            if value is not None:
                text = value if isinstance(value, int) else repr(str(value))
                raise OptionError(
                    f"{name}={text} has no effect with {bound}, which chooses bytes without sweeps or solvers. "
                    f"Remove it.{alternative if self.options.max_error is not None else ''}"
                )

    def check_dimensions(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `OptionError` if no module is left to fit, or none is as wide as `n_components`.

        Args:
            shapes: (out, in) of each module of the subspace, by name.
        """
        if not shapes:
            raise OptionError(
                "No module is left to fit: every LoRA module is excluded (exclude_modules, --exclude-module), or of a "
                "kind that is stored outside the subspace."
            )
        largest = max(max(shape) for shape in shapes.values())
        if self.n_components is not None and self.n_components > largest:
            raise OptionError(
                f"n_components={self.n_components} exceeds every dimension of every module. Pass {largest}, the "
                "largest dimension, or less."
            )


@dataclass(frozen=True, slots=True)
class Execution:
    """Device, solver and engine of a fit.

    Attributes:
        device: Device on which bases are fitted and adapters projected.
        solver: "auto" or "exact".
        engine: "serial", "processes" or "ray".
        workers: Number of processes; None for all cores.
        checkpoint: Folder for the results of finished modules; None to store none.
        progress: Callback with the arguments (stage, done, total).
    """

    device: torch.device
    solver: str
    engine: str
    workers: int | None
    checkpoint: Path | None
    progress: Progress

    @classmethod
    def of(
        cls,
        device: str | torch.device,
        solver: str,
        engine: str,
        workers: int | None,
        checkpoint: str | Path | None,
        progress: Progress | None,
    ) -> "Execution":
        """Check the options of `fit`; arguments as there. `OptionError` if one is invalid."""
        engines.check_engine(engine, workers)
        check_choice("solver", solver, SOLVERS)
        return cls(
            _check_device(device),
            solver,
            engine,
            workers,
            Path(checkpoint) if checkpoint is not None else None,
            progress or (lambda stage, done, total: None),
        )


def is_entropy_coded(
    bounds: Mapping[str, float | None], weighting: str, dtype: Dtype, coefficient_dtype: Dtype
) -> bool:
    """Return whether a fit with these options is entropy-coded.

    Args:
        bounds: Values of max_error, max_bytes and ratio, of which at most one is not None.
        weighting: "delta" or "factors".
        dtype: Storage of the components; None for the default.
        coefficient_dtype: Storage of the coefficients; None for the default.

    Raises:
        OptionError: The options contradict each other.
    """
    storages = [storage for storage in (parse_storage(dtype), parse_storage(coefficient_dtype)) if storage is not None]
    bound = _first_option(bounds)
    if bound is None:
        if any(storage.is_coded for storage in storages):
            raise OptionError(NEEDS_TARGET)
        return False
    allows_floats = bounds["max_error"] is not None
    if weighting == "delta" and all(storage.is_coded for storage in storages):
        return True
    if allows_floats and all(storage.is_float for storage in storages):
        return False
    if storages:
        conflicting = next((storage for storage in storages if not storage.is_float), storages[0])
        raise OptionError(
            f"{bound} chooses by itself how numbers are stored, but dtype {conflicting.name} was passed. Remove it"
            + (", or pass a float dtype." if allows_floats else ".")
        )
    raise OptionError(f"{bound} needs weighting='delta', got {weighting!r}. Remove weighting, or pass n_components.")


def _head_error(head_error: float | None, max_error: float | None, *, is_coded: bool) -> float | None:
    """Return the error bound of heads, 0 to store them exactly, None to choose it together with the bytes."""
    if head_error is None:
        if not is_coded:
            return 0.0
        # heads need not be closer to their originals than the updates
        return min(max(max_error, MIN_HEAD_ERROR), MAX_HEAD_ERROR) if max_error is not None else None
    head_error = to_float("head_error", head_error)
    if not 0 <= head_error < 1:
        raise OptionError(f"head_error is a relative error, at least 0 and below 1, got {head_error}.")
    if head_error and not is_coded:
        raise OptionError(
            f"head_error={head_error:g} has no effect in a pack of numbers of components, which stores heads exactly. "
            "Remove it, or pass max_error, max_bytes or ratio."
        )
    return head_error


def _first_option(options: Mapping[str, Any]) -> str | None:
    """Return the first option that is not None, as "name=value"."""
    return next((f"{name}={format_value(value)}" for name, value in options.items() if value is not None), None)


def _refuse_cores(**storages: Storage | None) -> None:
    """Raise `OptionError` for a storage of cores: such packs can be read, but not written."""
    for option, storage in storages.items():
        if storage is not None and storage.core_kind is not None:
            raise OptionError(
                f"{option} {storage.name} is the storage of an older pack with cores, which fit does not write. "
                f"Pass {option}={storage.basis_storage.name!r}."
            )


def _component_number(sizes: Mapping[str, Any]) -> int | None:
    """Return the number for `FitOptions`, which is 1 until "auto" has chosen one."""
    n_components: int | str | None = sizes["n_components"]
    other_sizes = {name: value for name, value in sizes.items() if name != "n_components"}
    if n_components == AUTO:
        conflicts = [f"{name}={format_value(value)}" for name, value in other_sizes.items() if value is not None]
        if conflicts:
            raise OptionError(
                f"n_components='auto' chooses a number by itself, and so does {' and '.join(conflicts)}. "
                "Pass one of them."
            )
        return 1
    if isinstance(n_components, str):
        raise OptionError(f"n_components must be an integer, or 'auto', got {n_components!r}.")
    return n_components


def _check_device(device: str | torch.device) -> torch.device:
    """Return the device; `OptionError` unless it exists and computes in float64."""
    try:
        checked = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=checked).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OptionError(f"device {str(device)!r} cannot be used to fit in float64 here: {reason(error)}") from error
    return checked
