"""One adapter as the bank stores it: all its coefficients in one tensor, its residuals and its heads."""

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...core import keys
from ...core.coefficients import Coefficients
from ...core.layer_update import LayerCoefficients, LayerResidual
from ...errors import ModuleNameError, OptionError, ShapeError
from ...pack.pack import Pack
from .heads import Heads

CARRIED = "(DoRA magnitudes, embeddings, modules that the subspace lacks)"
LISTED = 8
"""Number of adapters up to which a message names all of them."""


@dataclass(frozen=True, slots=True)
class ModuleSlice:
    """Position of one module's coefficients in the flat tensor: down (rank, k_down), then up (k_up, rank).

    Attributes:
        module: Name of the module in the subspace.
        start: Offset of the first coefficient.
        rank: Rank of the coefficients.
        k_down: Number of components of the down side.
        k_up: Number of components of the up side.
    """

    module: str
    start: int
    rank: int
    k_down: int
    k_up: int

    @property
    def middle(self) -> int:
        """Offset of the first up coefficient."""
        return self.start + self.rank * self.k_down

    @property
    def end(self) -> int:
        """Offset after the last up coefficient."""
        return self.middle + self.rank * self.k_up

    def factors(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of down (…, rank, k_down) and up (…, k_up, rank) in flat coefficients (…, n)."""
        down, up = flat[..., self.start : self.middle], flat[..., self.middle : self.end]
        leading = flat.shape[:-1]
        return down.view(*leading, self.rank, self.k_down), up.view(*leading, self.k_up, self.rank)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Layout:
    """Slices of an adapter's modules. Adapters with the same modules and ranks share one object."""

    slices: tuple[ModuleSlice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BankAdapter:
    """An adapter of the bank. It is immutable, so that `replace` does not affect running requests.

    Attributes:
        name: Name of the adapter.
        layout: Positions of the coefficients in `flat`.
        flat: All coefficients, (n,).
        scalings: Scaling of each slice of the layout.
        heads: The adapter's own heads and trained biases.
        residuals: Residuals by module name in the subspace.
    """

    name: str
    layout: Layout
    flat: Tensor
    scalings: tuple[float, ...]
    heads: Heads
    residuals: Mapping[str, LayerResidual]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the adapter."""
        residuals = [tensor for residual in self.residuals.values() for tensor in residual.tensors]
        return [self.flat, *self.heads.tensors, *residuals]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the adapter."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def coefficients(self, dtype: torch.dtype) -> dict[str, LayerCoefficients]:
        """Return the coefficients by module name in the subspace, in `dtype`."""
        flat = self.flat.to(dtype)
        return {
            module_slice.module: LayerCoefficients(
                *module_slice.factors(flat), scaling, self._residual(module_slice.module, dtype)
            )
            for module_slice, scaling in zip(self.layout.slices, self.scalings, strict=True)
        }

    def _residual(self, module: str, dtype: torch.dtype) -> tuple[LayerResidual, ...]:
        return (self.residuals[module].to(dtype=dtype),) if module in self.residuals else ()


@dataclass(frozen=True, slots=True)
class BankStorage:
    """Conversion of adapters of a pack to adapters of a bank.

    Attributes:
        components: Number of components of the down and the up basis, by the name of each module that the bank serves.
        dtype: Dtype of all coefficients and residuals. It must represent them exactly.
        device: Device of all tensors.
        layouts: Layouts that are in use.
    """

    components: MutableMapping[str, tuple[int, int]]
    dtype: torch.dtype
    device: torch.device
    layouts: MutableMapping[tuple[ModuleSlice, ...], Layout] = field(default_factory=WeakValueDictionary)

    def store(self, name: str, by_module: Mapping[str, Coefficients], heads: Heads) -> BankAdapter:
        """Return an adapter of the bank; raise an error that names the adapter if the bank cannot serve it.

        Args:
            name: Name of the adapter.
            by_module: Coefficients by module name in the subspace.
            heads: The adapter's own heads and trained biases.
        """
        missing = sorted(by_module.keys() - self.components.keys())
        if missing:
            raise ModuleNameError(
                f"adapter {name!r} has {len(missing)} of {len(by_module)} modules that the model lacks, such as "
                f"{missing[0]!r}. It belongs to another base model, or to a larger part of it."
            )
        slices, factors, start = [], [], 0
        residuals, scalings = {}, []
        for module, coefficients in sorted(by_module.items()):
            module_slice = self._slice(name, module, start, coefficients)
            slices.append(module_slice)
            if coefficients.has_residual:
                coefficients, residuals[module] = self._separate_residual(name, coefficients)
            factors += [coefficients.down.reshape(-1), coefficients.up.reshape(-1)]
            scalings.append(coefficients.scaling)
            start = module_slice.end
        flat = self._convert(torch.cat(factors) if factors else torch.empty(0, dtype=self.dtype), name)
        layout = self.layouts.setdefault(tuple(slices), Layout(tuple(slices)))
        return BankAdapter(name, layout, flat, tuple(scalings), heads, residuals)

    def _separate_residual(self, adapter: str, coefficients: Coefficients) -> tuple[Coefficients, LayerResidual]:
        """Return coefficients and residual of a module, without rows of the residual that are zero.

        The components are sorted: those with a down residual only, with both, with an up residual only, and without. So
        each side's residual belongs to consecutive ones.
        """
        down, up = (coefficients.residual(side) for side in keys.SIDES)
        none = torch.zeros(coefficients.rank, dtype=torch.bool)
        in_down = none if down is None else down.any(1)
        in_up = none if up is None else up.any(0)
        classes = torch.where(in_down, in_up.int(), torch.where(in_up, 2, 3))
        order = classes.argsort(stable=True)
        n_down, up_start, n_up = int(in_down.sum()), int((in_down & ~in_up).sum()), int(in_up.sum())
        residual = LayerResidual(
            None if down is None or not n_down else self._convert(down[order[:n_down]], adapter),
            None if up is None or not n_up else self._convert(up[:, order[up_start : up_start + n_up]], adapter),
            up_start=up_start,
        )
        return replace(coefficients, down=coefficients.down[order], up=coefficients.up[:, order]), residual

    def _slice(self, adapter: str, module: str, start: int, coefficients: Coefficients) -> ModuleSlice:
        expected = self.components[module]
        actual = coefficients.down.shape[1], coefficients.up.shape[0]
        if actual != expected:
            raise ShapeError(
                f"adapter {adapter!r}, module {module}: its coefficients have (k_down, k_up) = {actual}, "
                f"and the bank's subspace has {expected}. Use an adapter of the bank's pack."
            )
        return ModuleSlice(module, start, coefficients.rank, *actual)

    def _convert(self, tensor: Tensor, adapter: str) -> Tensor:
        """Return a tensor in the bank's dtype; raise `OptionError` if that would round it."""
        stored = tensor.to(self.device, self.dtype)
        if stored.dtype != tensor.dtype and not torch.equal(stored.to(tensor), tensor):
            raise OptionError(
                f"adapter {adapter!r} is {tensor.dtype}, which the bank's {self.dtype} would round. Fit the pack with "
                f"dtype={str(tensor.dtype).removeprefix('torch.')!r}."
            )
        return stored


def check_not_carried(name: str, carried: Collection[str]) -> None:
    """Raise `OptionError` for an adapter with tensors that are neither coefficients, residuals nor heads.

    Args:
        name: Name of the adapter.
        carried: Keys of such tensors.
    """
    if carried:
        raise OptionError(
            f"adapter {name!r} has tensors that coefficients cannot express, such as {min(carried)!r} "
            f"{CARRIED}. Write it as an ordinary LoRA with `eigenlorax export`."
        )


def check_none_carried(pack: Pack) -> None:
    """Raise `OptionError` for a pack with adapters that `check_not_carried` rejects, and name the others."""
    carrying = [name for name, record in pack.records.items() if record.carried_bytes]
    if not carrying:
        return
    listed, servable = ", ".join(map(repr, carrying)), [name for name in pack.names if name not in carrying]
    if not servable:
        remedy = "`eigenlorax export` writes each as an ordinary LoRA"
    elif len(servable) <= LISTED:
        remedy = f"AdapterBank(model, pack, adapters={servable!r}) serves the others"
    else:
        remedy = (
            f"AdapterBank(model, pack, adapters=[name for name in pack.names if name not in {{{listed}}}]) serves the "
            "others, with pack a `Pack`"
        )
    raise OptionError(f"coefficients cannot express all tensors of {listed} {CARRIED}. {remedy}.")
