"""Contents of a pack in memory or on disk: a subspace, adapters as coefficients in it, and figures of both."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codec.encoder import RatePoint
from ..codec.storage.table import parse_storage, storage_by_name
from ..codec.tensor_codes import References
from ..core import atomic_files, keys
from ..core.adapter import Adapter
from ..core.license import License
from ..core.subspace import Subspace
from ..errors import AdapterNameError, OptionError
from . import folder_tensors, version_adapters
from .adapter_files import ReadingContext
from .folder import AdapterFolder, PackFolder
from .history import History
from .history_store import HistoryStore
from .manifest import Entry, FitInfo, SubspaceInfo, check_listed
from .packed_adapter import PackedAdapter, unpack
from .record import Record
from .subspace_file import StoredSubspace
from .summary import Summary, summarize

if TYPE_CHECKING:
    from .pack import Pack


class PackContents(Mapping[str, Adapter]):
    """A subspace, and adapters as coefficients in it.

    It is a read-only mapping from names to adapters, sorted by name. `pack["a"]` is `pack.adapter("a")`, and is read at
    each access. `pack["run@1000"]` is a version of a history, and `pack["run@latest"]` its last one; versions are not
    among the names. Tensors of a pack on disk are read when they are used, and their bytes are checked against the
    manifest.

    Attributes:
        info: The subspace without its tensors.
        fit_info: Options of the fit.
        base_model: Base model of the adapters; None if unknown.
        revision: Revision of the base model; None if unknown.
        basis: Pack without adapters, in whose bases adapters are trained and served; None if there is none. Only
            entropy-coded packs have one.
        history_store: The histories, with what reading and appending versions needs.
        notes: Sentences about choices of the fit. Not saved.
        seconds: Seconds of the fit, by stage. Not saved.
        frontier: Estimated bytes at other errors, after a fit to an error bound or a size. Not saved.
    """

    def __init__(
        self,
        subspace: Subspace | Callable[[], StoredSubspace],
        info: SubspaceInfo,
        adapters: Mapping[str, PackedAdapter | Entry],
        fit_info: FitInfo,
        *,
        base_model: str | None,
        revision: str | None,
        coefficient_dtype: str | torch.dtype,
        basis: "Pack | None" = None,
        reference_tensors: References | None = None,
        histories: HistoryStore | None = None,
    ) -> None:
        self.info = info
        self.basis = basis
        self.fit_info = fit_info
        self.base_model = base_model
        self.revision = revision
        coefficient_storage = parse_storage(coefficient_dtype)
        assert coefficient_storage is not None
        self._storage, self._coefficient_storage = storage_by_name(info.dtype), coefficient_storage
        self.history_store = histories or HistoryStore()
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.frontier: list[RatePoint] = []
        self._folder: PackFolder | None = None
        self._subspace = subspace
        self._reference_tensors = reference_tensors or References()
        self._adapters = dict(adapters)
        # empty until the pack is saved
        self._source_fields: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters or name in self.history_store

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> Adapter:
        return self.adapter(name)

    # identity, because a comparison of all tensors would read both packs from disk
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def path(self) -> Path | None:
        """Folder from which the pack was opened, or to which it was last saved; None if it is only in memory."""
        return self._folder.path if self._folder is not None else None

    @property
    def names(self) -> list[str]:
        """Names of the adapters, sorted."""
        return sorted(self._adapters)

    @property
    def histories(self) -> Mapping[str, History]:
        """Histories by name, sorted."""
        return MappingProxyType(dict(sorted(self.history_store.histories.items())))

    @property
    def subspace(self) -> Subspace:
        """The bases of every module."""
        self._read_subspace()
        assert isinstance(self._subspace, Subspace)
        return self._subspace

    @property
    def reference_tensors(self) -> References:
        """Tensors that coded heads of several adapters refer to."""
        self._read_subspace()
        return self._reference_tensors

    def _read_subspace(self) -> None:
        """Read the file of the bases, unless it was read before."""
        if not isinstance(self._subspace, Subspace):
            stored = self._subspace()
            self._subspace, self._reference_tensors = stored.subspace, stored.references

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the components in memory: their storage dtype, or float32 for integers."""
        return self._storage.dtype

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """Dtype of the coefficients in memory."""
        return self._coefficient_storage.dtype

    @property
    def storage(self) -> str:
        """Name of the components' storage, as in `fit`: "float16", "int8", "coded"."""
        return self._storage.name

    @property
    def coefficient_storage(self) -> str:
        """Name of the coefficients' storage."""
        return self._coefficient_storage.name

    @property
    def is_coded(self) -> bool:
        """True if the pack was fitted for an error bound or a size, and is entropy-coded."""
        return self._coefficient_storage.is_coded

    @property
    def cores(self) -> str | None:
        """Kind of cores that the pack stores, "full" or "diagonal"; None if it stores coefficients."""
        return self._coefficient_storage.core_kind

    @property
    def aim(self) -> float:
        """Error bound of the pack: `max_error` of the fit, else the largest delta error of a fitted adapter.

        If no fitted adapter is left, it is the largest delta error of an added one. It is 0.0 without adapters.
        """
        if self.fit_info.max_error is not None:
            return self.fit_info.max_error
        records = self.records.values()
        fitted = [record.delta_error for record in records if record.in_fit]
        return max(fitted or [record.delta_error for record in records], default=0.0)

    @property
    def records(self) -> dict[str, Record]:
        """Figures of every adapter, by name."""
        return {name: self._adapters[name].record for name in self.names}

    @property
    def source_hashes(self) -> dict[str, str]:
        """Hash of the content of each adapter's source, by name."""
        return {name: record.source_sha256 for name, record in self.records.items()}

    @property
    def licenses(self) -> dict[str, License | None]:
        """Licence that the source of each adapter states, by name; None if it states none."""
        return {name: self._adapters[name].license for name in self.names}

    @property
    def references(self) -> dict[str, str]:
        """For each adapter that is stored as a reference to another one, the name of that."""
        parents = {name: self._adapters[name].parent for name in self.names}
        return {name: parent for name, parent in parents.items() if parent in self._adapters}

    @property
    def summary(self) -> Summary:
        """Figures of the whole pack: contents, bytes and errors."""
        return summarize(
            self.records,
            self.info,
            self.fit_info,
            self.coefficient_storage,
            base_model=self.base_model,
            revision=self.revision,
            basis=self.basis.info if self.basis is not None else None,
            histories=self.history_store.histories.values(),
            pack_files=self._file_sizes(),
        )

    def _file_sizes(self) -> tuple[int, int] | None:
        """Return the bytes of the pack's files and of its reports; None unless the pack is saved."""
        folder = self._folder
        if folder is None or folder.is_partial:
            return None
        if folder.manifest.adapters != self._adapters or folder.manifest.subspace != self.info:
            return None
        if folder.manifest.histories != self.history_store.histories:
            return None
        saved_basis = folder.manifest.basis.subspace if folder.manifest.basis is not None else None
        if saved_basis != (self.basis.info if self.basis is not None else None):
            return None
        return folder.file_sizes()

    def packed(self, name: str) -> PackedAdapter:
        """Return one adapter as coefficients, read from disk if it is saved.

        Raises:
            AdapterNameError: The name is unknown.
            PackDamagedError: A file of the adapter was changed.

        Example:
            >>> pack.packed("a").record.delta_error < 0.01
            True
        """
        self._check_has(name)
        adapter = self._adapters[name]
        if isinstance(adapter, Entry):
            assert self._folder is not None
            context = ReadingContext(
                lineage=self.info.lineage,
                sizes=self.info.sizes,
                at=self._subspace_at,
                references=lambda: self.reference_tensors,
                modules=self.info.modules,
                source_fields=self._source_fields,
            )
            adapter = folder_tensors.read_adapter(self._folder, name, context)
        return adapter

    def codes(self, name: str) -> Tensor:
        """Return the codes of an adapter of an entropy-coded pack, which may be in the file of its parent."""
        self._check_has(name)
        adapter = self._adapters[name]
        if isinstance(adapter, Entry):
            assert self._folder is not None
            return folder_tensors.read_codes(self._folder, adapter.parent or name)
        if adapter.payload is None or keys.CODED not in adapter.payload:
            raise OptionError(f"Adapter {name!r} has no codes: its pack is not entropy-coded.")
        return adapter.payload[keys.CODED]

    def _subspace_at(self, fingerprint: str) -> Subspace:
        """Return the earlier subspace with this fingerprint of the lineage."""
        return self.subspace.before(self.info.lineage.index(fingerprint))

    def adapter(self, name: str, dtype: torch.dtype | None = None) -> Adapter:
        """Return an adapter as an ordinary LoRA.

        Args:
            name: Name of the adapter, or of a version: "run@1000", or "run@latest" for the last one.
            dtype: Dtype of the factors. Default: `lossless_dtype`; for a version, the dtype of its source.

        Raises:
            AdapterNameError: The name is unknown.
            PackDamagedError: A file of the adapter was changed.

        Example:
            >>> adapter = pack.adapter("a")
            >>> adapter.ranks
            (3,)
        """
        if keys.split_version(name) is not None:
            history, record = self.history_store.find(name)
            return version_adapters.to_adapter(history, record, self.history_store.decode(history, record), dtype)
        return unpack(self.packed(name), self.subspace, dtype or self.lossless_dtype)

    @property
    def lossless_dtype(self) -> torch.dtype:
        """Dtype in which factors are not rounded again: the pack's dtype, or float32 if that is wider."""
        return torch.promote_types(torch.promote_types(self.dtype, self.coefficient_dtype), torch.float32)

    def adapter_folder(self, name: str) -> Path:
        """Return the folder of an adapter on disk, for PEFT to load. Its bytes are not checked, unlike in `packed`."""
        return self._saved(name)[1].current

    def digest(self, name: str) -> str:
        """Return a sha256 of everything that an adapter or version depends on, from the manifest alone.

        That of an adapter changes when the subspace is augmented or extended. That of a version covers the files of all
        versions that it refers to, directly or not.

        Args:
            name: Name of an adapter on disk, or of a version such as "run@1000" or "run@latest".

        Raises:
            AdapterNameError: The name is unknown.
            OptionError: The adapter is not on disk yet.
        """
        if keys.split_version(name) is not None:
            history, record = self.history_store.find(name)
            return history.digest(record)
        folder, _ = self._saved(name)
        content = [
            folder.manifest.subspace_sha256,
            self.info.fingerprint,
            folder.manifest.coefficient_dtype,
            folder.manifest.source_fields,
            *(sorted(files.items()) for files in folder.manifest.files(name)),
        ]
        return atomic_files.digest(json.dumps(content).encode())

    def _saved(self, name: str) -> tuple[PackFolder, AdapterFolder]:
        """Return the pack on disk and the folder of an adapter; `OptionError` if the adapter was not saved yet."""
        self._check_has(name)
        if self._folder is None or not isinstance(self._adapters[name], Entry):
            raise OptionError(f"Adapter {name!r} is not on disk yet: save the pack first.")
        return self._folder, self._folder.adapter(name)

    def verify(self) -> None:
        """Read every byte of a pack on disk, and compare it with the manifest.

        Raises:
            PackDamagedError: A file was changed; the message names the first one.

        Example:
            >>> path = pack.save("pack/")
            >>> pack.verify()
        """
        if self._folder is not None:
            self._folder.verify()

    def _with_fingerprint(self, name: str) -> PackedAdapter:
        """Return an adapter that refers to its subspace by fingerprint, so that an extension does not affect it."""
        packed = self.packed(name)
        return replace(packed, subspace=packed.subspace or self.info.fingerprint)

    def _check_has(self, name: str) -> None:
        """Raise `AdapterNameError` unless the pack has an adapter of this name."""
        if keys.split_version(name) is not None:
            # raises the error about an unknown version first
            self.history_store.find(name)
            raise AdapterNameError(
                f"{name!r} is a version of a history, and not an adapter over the pack's bases. Export it, and pass "
                "the folder."
            )
        if name in self.history_store.histories:
            raise AdapterNameError(
                f"{name!r} is a history. Choose one of its versions, such as "
                f"{name + keys.VERSION_MARK + keys.LATEST!r}."
            )
        check_listed(name, self._adapters, self.history_store.histories)
