"""The interface of a storage, and helpers of its implementations.

Whatever the storage, numbers in memory are ordinary floats. Where the file holds something that a cast of these floats
does not give, the tensors of the file travel along as a *payload*, so that a pack that was read is written again
byte for byte.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import dtypes, keys
from ...core.basis import Basis
from ...core.batch import ModuleBatch
from ...core.coefficients import CoefficientBatch, Coefficients
from ...core.projection import DualComponents
from ...core.subspace import ModuleBases, Subspace
from ..group_integers import Payload
from .sizes import ModuleSizes
from .traits import TRAITS, StorageTraits

StoredRows = tuple[Tensor, Payload | None]
"""Components in memory, and their payload where the file holds something else."""

CHANGED_IN_MEMORY = (
    "the coefficients of an adapter of this pack were changed in memory, and its storage cannot write them without "
    "their codes: add the changed adapter to the pack instead."
)


@dataclass(frozen=True, slots=True)
class ModuleSlot:
    """Metadata of one module of an adapter, which a reader needs beside the tensors of its coefficients.

    Attributes:
        subspace_module: Name of the module in the subspace.
        rank: Rank of the adapter in this module.
        scaling: Scaling of the adapter in this module.
        kernel: (height, width) of a convolution; empty for a linear module.
        sizes: Sizes that the tensors must have; None if the caller checks them.
    """

    subspace_module: str
    rank: int
    scaling: float
    kernel: tuple[int, ...]
    sizes: ModuleSizes | None = None

    def check(self, module: str, coefficients: Coefficients) -> Coefficients:
        """Return the coefficients of a module; `ValueError` where they are not of its rank, sizes or dtypes."""
        # up is (k_up, r), as a factor of a LoRA is (out, r)
        for side, tensor, axis in (("down", coefficients.down, 0), ("up", coefficients.up, 1)):
            if tensor.dtype not in dtypes.STORED or tensor.dim() != 2 or tensor.shape[axis] != self.rank:
                raise ValueError(
                    f"the {side} coefficients of module {module} are {describe_tensor(tensor)} and not those of rank "
                    f"{self.rank}"
                )
        if self.sizes is None:
            return coefficients
        if (coefficients.down.shape[1], coefficients.up.shape[0]) != self.sizes.k:
            raise ValueError(f"the coefficients of module {module} do not fit the subspace")
        n_in, n_out = self.sizes.widths
        for side, shape in (("down", (self.rank, n_in)), ("up", (n_out, self.rank))):
            residual = coefficients.residual(side)
            if residual is not None and (tuple(residual.shape) != shape or residual.dtype not in dtypes.STORED):
                raise ValueError(
                    f"the {side} residual of module {module} is {describe_tensor(residual)} and not {shape}"
                )
        return coefficients


@dataclass(frozen=True, slots=True)
class Storage(ABC):
    """One way to store components, coefficients, or both.

    A storage that cannot hold components raises `OptionError` from the methods about bases, and one that is not made by
    projection raises it from `prepare` and `project`.

    Attributes:
        name: Name that users and manifests write.
        dtype: Dtype of the numbers in memory.
    """

    name: str
    dtype: torch.dtype

    @property
    @abstractmethod
    def number_bytes(self) -> float:
        """Bytes per number in a long row; fractional where groups share a scale."""

    @property
    def _traits(self) -> StorageTraits:
        return TRAITS[self.name]

    @property
    def lora_itemsize(self) -> int:
        """Bytes per number of the LoRAs that a pack of this storage is compared with."""
        return self._traits.lora_itemsize

    @property
    def is_float(self) -> bool:
        """True if files hold plain float tensors, which need no decoder and no mention in an adapter's config."""
        return self._traits.is_float

    @property
    def is_coded(self) -> bool:
        """True if bytes are entropy-coded for an error bound or a size, components and coefficients together."""
        return self._traits.is_coded

    @property
    def holds_components(self) -> bool:
        """True if bases can be stored in it, and not only coefficients."""
        return self._traits.holds_components

    @property
    def core_kind(self) -> str | None:
        """The kind of cores, of `keys.CORES`, that adapters are stored as; None for two matrices of coefficients."""
        return self._traits.core_kind

    @property
    def pairs_components(self) -> bool:
        """True if component j of the down side goes with component j of the up side alone."""
        return self._traits.pairs_components

    @property
    def basis_storage(self) -> "Storage":
        """The storage of the bases beside coefficients of this storage."""
        return self

    @property
    def default_coefficient_storage(self) -> "Storage":
        """The storage of coefficients beside bases of this storage, if the user names none."""
        return self

    @property
    @abstractmethod
    def keeps_factors(self) -> bool:
        """True if coefficients are of the adapter's own factors, rather than of any factors with the same product."""

    @property
    def pads_rank(self) -> bool:
        """True if an adapter's rank may exceed what its file has numbers for; rows of zeros fill it up."""
        return False

    @property
    def extension_error(self) -> str | None:
        """The reason why the subspace beside such coefficients cannot be extended; None if it can."""
        return None

    @abstractmethod
    def round_bases(self, bases: ModuleBases) -> ModuleBases:
        """Return bases of a fit, without growth, as they will be read again."""

    @abstractmethod
    def extend_basis(self, basis: Basis, rows: Tensor) -> Basis:
        """Append rows, (n, d), orthonormal and orthogonal to the basis, rounded to this storage."""

    @abstractmethod
    def subspace_tensors(self, subspace: Subspace) -> dict[str, Tensor]:
        """Return stored rows and singular values of all bases by their names in the subspace's file."""

    def decode_bases(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
    ) -> Mapping[str, Tensor]:
        """Decode a subspace's file as a whole for `read_components`, where that is cheaper than basis by basis.

        Args:
            tensors: Tensors of the file.
            shapes: Shape (k, d) of the fitted rows of each basis, by its key.
        """
        return tensors

    @abstractmethod
    def read_components(
        self, tensors: Mapping[str, Tensor], key: str, n_fitted: int, grown: Mapping[int, int], dimension: int
    ) -> list[StoredRows]:
        """Read the rows of one basis.

        Args:
            tensors: Tensors of the subspace's file, as `decode_bases` returned them.
            key: `keys.components_key` of the basis.
            n_fitted: Number of rows that the fit has found.
            grown: Number of stored rows of each extension, by its index in the growth of the subspace.
            dimension: Width of the rows.

        Returns:
            The fitted rows, then the rows of each extension.

        Raises:
            KeyError: If a tensor is missing.
            ValueError: If a tensor has another shape or dtype.
        """

    @abstractmethod
    def prepare(self, batch: ModuleBatch, products: torch.dtype = torch.float64) -> ModuleBatch:
        """Return the same updates in the factors whose coefficients lose least by rounding to this storage.

        Args:
            batch: Updates of one module.
            products: Dtype of large products, as for `projection.balance_batch`.
        """

    @abstractmethod
    def project(self, batch: ModuleBatch, bases: ModuleBases, dual: DualComponents | None = None) -> CoefficientBatch:
        """Return the coefficients of prepared adapters, rounded as they will be read again."""

    def exact_coefficients(self, batch: ModuleBatch, bases: ModuleBases) -> CoefficientBatch | None:
        """Return the float64 coefficients that `project` rounds; None where these are projections on both bases."""
        return None

    @abstractmethod
    def adapter_tensors(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        """Return an adapter's coefficients, which have no payload, as tensors by their names in its file."""

    @abstractmethod
    def read_adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, ModuleSlot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        """Read an adapter's coefficients from its tensors, and its payload if the storage has one.

        Args:
            tensors: Tensors of the adapter's file; those that are read are removed.
            slots: Metadata of the adapter's modules.
            subspace: Returns the pack's subspace at the time when the adapter was written. Called only where it is
                needed.

        Returns:
            The coefficients by the adapter's own module names, and the payload.

        Raises:
            KeyError: If a tensor is missing.
            ValueError: If a tensor does not fit `slots`.
        """


def separate_tensors(subspace: Subspace, row_tensors: Callable[[Basis, str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a subspace's file where each basis has tensors of its own.

    Args:
        subspace: The bases.
        row_tensors: Returns the tensors of a basis's stored rows, from the basis and its `keys.components_key`.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in subspace.modules.items():
        for side in keys.SIDES:
            basis = pair.side(side)
            tensors |= row_tensors(basis, keys.components_key(name, side))
            tensors[keys.singular_values_key(name, side)] = basis.singular_values
    return tensors


def residual_tensors(coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
    """Return the residuals of an adapter by their names in its file; every storage keeps them as they are."""
    residuals = {
        keys.residual_key(module, side): c.residual(side) for module, c in coefficients.items() for side in keys.SIDES
    }
    return {key: residual for key, residual in residuals.items() if residual is not None}


def pop_residuals(tensors: MutableMapping[str, Tensor], module: str) -> dict[str, Tensor | None]:
    """Take the residuals of a module out of an adapter's tensors, by side; None for a side that has none."""
    return {side: tensors.pop(keys.residual_key(module, side), None) for side in keys.SIDES}


def describe_tensor(tensor: Tensor) -> str:
    """Return a tensor's shape and dtype for an error message."""
    return f"{tuple(tensor.shape)}, {tensor.dtype},"


def check_finite(coefficients: Mapping[str, Coefficients]) -> None:
    """Raise `ValueError` for the first module that has NaN or Inf among its coefficients or residuals."""
    numbers = {
        module: torch.cat([t.flatten() for t in (c.down, c.up, c.down_residual, c.up_residual) if t is not None])
        for module, c in coefficients.items()
    }
    # one pass over all modules: most adapters have many modules of few numbers
    if numbers and not bool(torch.cat(list(numbers.values())).isfinite().all()):
        module = next(module for module, flat in numbers.items() if not bool(flat.isfinite().all()))
        raise ValueError(f"the coefficients of module {module} are not finite")


def check_rows(name: str, rows: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise `ValueError` if the tensor called `name` has another shape or dtype."""
    if tuple(rows.shape) != shape or rows.dtype != dtype:
        raise ValueError(f"{name} is {tuple(rows.shape)}, {rows.dtype}, and should be {shape}, {dtype}")
