"""The manifest of a pack: its subspace without tensors, options of the fit, and figures of the adapters."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..codec.storage.sizes import ModuleSizes
from ..core import atomic_files, keys
from ..core.atomic_files import Files
from ..core.json_dataclasses import JsonTypeError
from ..core.license import License
from ..errors import AdapterNameError
from .history import History
from .record import Record

if TYPE_CHECKING:
    from ..codec.storage.base import Storage
    from ..codec.tensor_codes import References
    from ..core.basis import Basis
    from ..core.subspace import Subspace
    from .packed_adapter import PackedAdapter

SOLVERS = ("exact", "iterative")
"""Methods that compute bases: full decompositions, and subspace iteration (docs/method.md)."""


@dataclass(frozen=True, slots=True)
class FitInfo:
    """Options of the fit, and adapters that were skipped.

    Exactly one of n_components, energy, max_error, max_bytes and ratio is not None.

    Attributes:
        n_components: Maximum number of components per side and module.
        energy: Fraction of the squared norm to keep per side.
        max_error: Error bound of every adapter.
        max_bytes: Maximum size, in bytes.
        ratio: Minimum compression ratio.
        auto: True if n_components was chosen by leaving adapters out.
        weighting: "delta" or "factors".
        sweeps: Number of alternating refinements.
        excluded_modules: Modules outside the subspace.
        skipped: Adapters that could not be read, with the reason.
        solver: One of `SOLVERS`.
        purpose: Purpose that the caller passed or that is the default; None in packs of formats before 7.
        head_error: Relative error bound of task heads and other tensors outside the subspace; None if they are stored
            exactly.
    """

    n_components: int | None
    energy: float | None
    max_error: float | None
    max_bytes: int | None
    ratio: float | None
    auto: bool
    weighting: str
    sweeps: int
    excluded_modules: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    solver: str = SOLVERS[0]
    purpose: str | None = None
    head_error: float | None = None

    @property
    def size(self) -> str:
        """Description of the target of the fit."""
        if self.max_error is not None:
            return f"every adapter's delta error at most {self.max_error:g}"
        if self.max_bytes is not None:
            return f"at most {self.max_bytes:,} bytes"
        if self.ratio is not None:
            return f"at least {self.ratio:g} times smaller than the LoRAs in 16 bits"
        if self.energy is not None:
            return f"energy {self.energy:g}"
        return f"at most {self.n_components} components" + (" (auto)" if self.auto else "")


@dataclass(frozen=True, slots=True)
class SideInfo:
    """One side of one module.

    Attributes:
        dimension: Length of the components.
        k: Number of components, including those appended after the fit.
        energy: Fraction of the squared norm that the fitted components keep.
        square: Squared norm of the fitted stack, which is the weight of `energy` in averages.
        shortfall: Estimated fraction of `square` that subspace iteration missed, before sweeps; 0 for exact bases.
        grown: Number of components that each step of growth appended.
    """

    dimension: int
    k: int
    energy: float
    square: float
    shortfall: float
    grown: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a subspace's growth: an augmentation by random components, or an extension for new adapters.

    Attributes:
        fingerprint: Fingerprint of the subspace before the step; None in packs of formats that did not store it.
        seed: Seed of an augmentation, which appends equally many components to every side; None for an extension.
    """

    fingerprint: str | None
    seed: int | None


@dataclass(frozen=True, slots=True)
class SubspaceInfo:
    """Subspace without its tensors.

    Attributes:
        dtype: Name of the components' storage (`codec.storage`).
        fingerprint: Fingerprint of the subspace.
        growth: Steps by which it grew after the fit.
        stored_bytes: Tensor bytes of its file.
        reference_bytes: Those of them that are reference tensors of coded heads.
        modules: Sides "down" and "up" of each module, by name.
    """

    dtype: str
    fingerprint: str
    growth: tuple[Step, ...]
    stored_bytes: int
    reference_bytes: int
    modules: dict[str, dict[str, SideInfo]]

    @property
    def lineage(self) -> tuple[str | None, ...]:
        """Fingerprints since the fit, to which adapters may refer; the last one is the current one."""
        return (*(step.fingerprint for step in self.growth), self.fingerprint)

    @property
    def largest_dimension(self) -> int:
        """Largest dimension of a side of a module; 0 without modules."""
        return max((side.dimension for pair in self.modules.values() for side in pair.values()), default=0)

    @property
    def n_extra(self) -> int:
        """Number of random components per side, over all augmentations."""
        side = next((sides["down"] for sides in self.modules.values()), None)
        return self._sum(side, lambda step: step.seed is not None) if side is not None else 0

    @property
    def n_extended(self) -> int:
        """Number of components that extensions appended, over all sides of all modules."""
        return sum(
            self._sum(side, lambda step: step.seed is None) for pair in self.modules.values() for side in pair.values()
        )

    def _sum(self, side: SideInfo, includes: Callable[[Step], bool]) -> int:
        return sum(n for n, step in zip(side.grown, self.growth, strict=True) if includes(step))

    def sizes(self, fingerprint: str, module: str) -> ModuleSizes:
        """Return the sizes of a module's bases in the earlier subspace with this fingerprint of the lineage."""
        if module not in self.modules:
            raise JsonTypeError(f"module {module!r} is not in the subspace.")
        step = self.lineage.index(fingerprint)
        sides = [self.modules[module][side] for side in keys.SIDES]
        down, up = (side.k - sum(side.grown[step:]) for side in sides)
        return ModuleSizes((down, up), (sides[0].dimension, sides[1].dimension))


def describe(
    subspace: "Subspace", storage: "Storage | None" = None, references: "References | None" = None
) -> SubspaceInfo:
    """Return the description of a subspace in memory.

    Args:
        subspace: The subspace.
        storage: Storage of its components. Default: floats of their dtype.
        references: Reference tensors of coded heads. Default: none.
    """
    modules = {
        name: {side: _side_info(bases.side(side)) for side in keys.SIDES}
        for name, bases in sorted(subspace.modules.items())
    }
    *earlier, fingerprint = subspace.lineage
    growth = tuple(Step(previous, seed) for previous, seed in zip(earlier, subspace.seeds, strict=True))
    dtype = storage.name if storage is not None else subspace.dtype_name
    reference_bytes = len(references.data) if references is not None else 0
    stored_bytes = subspace.stored_bytes + reference_bytes
    return SubspaceInfo(dtype, fingerprint, growth, stored_bytes, reference_bytes, modules)


def _side_info(basis: "Basis") -> SideInfo:
    grown = tuple(step.n for step in basis.growth)
    return SideInfo(basis.dimension, basis.k, basis.energy, basis.square, basis.shortfall, grown)


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter in the manifest.

    Attributes:
        record: Bytes and errors of the adapter.
        files: sha256 of each of its files, by name.
        parent: Adapter whose codes this adapter has; None if it has its own codes.
        license: Licence that its source states, if any.
    """

    record: Record
    files: dict[str, str]
    parent: str | None = None
    license: License | None = None

    @classmethod
    def of(cls, packed: "PackedAdapter", files: Files) -> "Entry":
        """Return the entry of an adapter with these files."""
        digests = {file: atomic_files.digest(data) for file, data in sorted(files.items())}
        return cls(packed.record, digests, packed.parent, packed.license)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Pack without its tensors.

    Attributes:
        format_version: Version of the pack format of its files.
        base_model: Base model of the adapters; None if unknown.
        revision: Revision of the base model; None if unknown.
        fit: Options of the fit.
        subspace: The subspace.
        subspace_file: Name of the subspace's file.
        subspace_sha256: Hash of that file.
        coefficient_dtype: Name of the coefficients' storage.
        adapters: Entries of the adapters, by name.
        basis: Pack without adapters in the same folder, with the basis for training; None if there is none.
        source_fields: Fields that the configs of most sources share, from which the files of the others differ.
        unlisted: Entries of adapters that were not selected, and whose codes selected adapters have.
        histories: Histories, by name.
    """

    format_version: int
    base_model: str | None
    revision: str | None
    fit: FitInfo
    subspace: SubspaceInfo
    subspace_file: str
    subspace_sha256: str
    coefficient_dtype: str
    adapters: dict[str, Entry]
    basis: "Manifest | None" = None
    source_fields: dict[str, Any] = field(default_factory=dict)
    unlisted: dict[str, Entry] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)

    @property
    def subspace_files(self) -> dict[str, str]:
        """sha256 of each file of bases, by name: the subspace's, and that of the basis for training."""
        training = self.basis.subspace_files if self.basis is not None else {}
        return {self.subspace_file: self.subspace_sha256, **training}

    @property
    def version_files(self) -> set[str]:
        """Paths of the files of all versions."""
        return {record.file for history in self.histories.values() for record in history.versions}

    @property
    def records(self) -> dict[str, Record]:
        """Figures of every adapter, sorted by name."""
        return {name: self.adapters[name].record for name in sorted(self.adapters)}

    @property
    def licenses(self) -> dict[str, License | None]:
        """Licence that the source of each adapter states, by name; None if it states none."""
        return {name: self.adapters[name].license for name in sorted(self.adapters)}

    @property
    def references(self) -> dict[str, str]:
        """For each adapter that is stored as a reference to another one, the name of that."""
        parents = {name: self.adapters[name].parent for name in sorted(self.adapters)}
        return {name: parent for name, parent in parents.items() if parent in self.adapters}

    @property
    def needed(self) -> dict[str, Entry]:
        """Entries of all adapters whose files are read: `adapters`, and parents that were not selected."""
        # copied only where it must be: it is looked up for each adapter that is read
        return self.adapters | self.unlisted if self.unlisted else self.adapters

    def select(self, names: Collection[str]) -> "Manifest":
        """Return the manifest with only these adapters and histories; `AdapterNameError` for an unknown name.

        The name of a version selects its history. An adapter whose parent is not among them has its codes counted as
        its own.
        """
        owners = {name: (keys.split_version(name) or (name, ""))[0] for name in names}
        for name in owners.values():
            check_listed(name, self.adapters, self.histories)
        names = set(owners.values())
        selected, parents = {}, {}
        for name, entry in self.adapters.items():
            if name not in names:
                continue
            if entry.parent is not None and entry.parent not in names:
                parents[entry.parent] = self.needed[entry.parent]
                size = parents[entry.parent].record.coefficient_bytes
                entry = replace(entry, record=replace(entry.record, coefficient_bytes=size))
            selected[name] = entry
        histories = {name: history for name, history in self.histories.items() if name in names}
        return replace(self, adapters=selected, unlisted=parents, histories=histories)

    def files(self, name: str) -> list[dict[str, str]]:
        """Return the digests of the files that an adapter is read from: its own, and its parent's; none if unknown."""
        entry = self.needed.get(name)
        if entry is None:
            return []
        return [entry.files, *(self.files(entry.parent) if entry.parent is not None else [])]


def check_listed(name: str, adapters: Collection[str], histories: Mapping[str, History]) -> None:
    """Raise `AdapterNameError` unless a pack has an adapter or a history of this name.

    Args:
        name: The name. If it is the label of a version, such as "latest", the message has the full name.
        adapters: Names of the pack's adapters.
        histories: Its histories, by name.
    """
    if name in adapters or name in histories:
        return
    kinds = {"adapter": adapters, "history": histories}
    kind = " or ".join(kind for kind, known in kinds.items() if known) or "adapter"
    versions = [history + keys.VERSION_MARK + name for history in histories if name in histories[history]]
    if versions:
        shown = " or ".join(map(repr, versions[:3]))
        raise AdapterNameError(
            f"no {kind} named {name!r} in the pack. To name a version, pass its history too: {shown}."
        )
    keys.check_known(name, [*adapters, *histories], kind=kind)
