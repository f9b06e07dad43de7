"""`Pack`: a subspace, and any number of adapters as coefficients in it."""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import formats
from ..codec.encoder import RatePoint
from ..codec.storage.table import parse_storage, storage_by_name
from ..core import atomic_files, dtypes, keys, registry
from ..core import subspace as spaces
from ..core.adapter import Adapter, LazyMapping
from ..core.extension import Progress
from ..core.options import name_list, to_float
from ..core.subspace import Subspace
from ..errors import (
    WARN_ABOVE,
    LossWarning,
    OptionError,
    PackBusyError,
    PackDamagedError,
    PackVersionError,
    UntrainedAdapterWarning,
)
from ..formats import hub as hub_client
from ..formats import sources
from . import adapter_files, add, export, folder, hub, manifest
from .adapter_files import SubspaceHistory
from .add import AddOptions, PackContext
from .export import ExportPlan
from .manifest import Entry, FitInfo, Manifest, SubspaceInfo
from .packed_adapter import PackedAdapter, Record, unpack
from .summary import Summary, losses, lossy, summarize

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Pack:
    """A subspace, and adapters as coefficients in it.

    `add`, `add_all` and `remove` change only this object; `save` writes it. A pack that was opened reads its tensors
    from disk when they are used, and checks their bytes against the manifest.

    Attributes that a fit sets, and `save` does not write:

    notes: sentences about what the fit chose, and why. seconds: time by stage. frontier: for a fit to an error bound or
    a size, the estimated bytes at other errors.
    """

    def __init__(
        self,
        subspace: Subspace | Callable[[], Subspace],
        info: SubspaceInfo,
        adapters: Mapping[str, PackedAdapter | Entry],
        fit_info: FitInfo,
        *,
        base_model: str | None,
        revision: str | None,
        coefficient_dtype: str | torch.dtype,
    ) -> None:
        self.info = info
        self.fit_info = fit_info
        self.base_model = base_model
        self.revision = revision
        coefficient_storage = parse_storage(coefficient_dtype)
        assert coefficient_storage is not None
        self._storage, self._coefficient_storage = storage_by_name(info.dtype), coefficient_storage
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.frontier: list[RatePoint] = []
        self.path: Path | None = None
        self._opened: folder.OpenedManifest | None = None
        self._partial = False
        self._subspace = subspace
        self._adapters = dict(adapters)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Pack":
        """Open the pack in the folder `path`. Only its manifest is read.

        `PackMissingError` where there is no pack, `PackDamagedError` or `PackVersionError` where it cannot be read.
        """
        path = Path(path)
        opened = folder.open_manifest(path)
        listed = opened.manifest
        pack = cls(
            partial(folder.read_subspace, path, listed),
            listed.subspace,
            listed.adapters,
            listed.fit,
            base_model=listed.base_model,
            revision=listed.revision,
            coefficient_dtype=listed.coefficient_dtype,
        )
        pack.path, pack._opened = path, opened
        pack.remember()
        return pack

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        adapters: str | Sequence[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Pack":
        """Open the pack in a local folder, or in a repository on the Hub (`org/name`, `org/name@revision`).

        adapters: names of the adapters to download and open; all by default, and `[]` for the subspace only.
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.snapshot_download`.
        """
        source = os.fspath(source)
        adapters = name_list(adapters) if adapters is not None else None
        path = hub.fetch(
            source, adapters, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        pack = cls.open(path)
        if adapters is not None:
            assert pack._opened is not None
            listed = hub.select_adapters(pack._opened.manifest, adapters)
            pack._opened, pack._adapters = folder.OpenedManifest(listed, pack._opened.digest), dict(listed.adapters)
            pack._partial = True
        return pack

    def remember(self) -> None:
        """Register the subspace for the tuner, which looks it up by fingerprint, until the process ends.

        It is found by the fingerprints that it had before it grew, too.
        """
        reopen = partial(Pack.open, self.path.absolute()) if self.path is not None else lambda: self
        for fingerprint in self.info.lineage:
            if fingerprint is not None:
                registry.register(fingerprint, reopen)

    @classmethod
    @contextmanager
    def edit(cls, path: str | os.PathLike[str]) -> Iterator["Pack"]:
        """Open the pack in `path` for changes, under its lock, and save it at the end of the block.

        An error in the block leaves the pack on disk unchanged.
        """
        folder.open_manifest(Path(path))
        _check_no_cache(Path(path))
        with folder.locked(Path(path)):
            pack = cls.open(path)
            yield pack
            pack.save()

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __repr__(self) -> str:
        where = f" in {str(self.path)!r}" if self.path is not None else ""
        base = self.base_model or "an unknown base model"
        return f"<Pack of {len(self)} adapters of {base}, {len(self.info.modules)} modules{where}>"

    @property
    def names(self) -> list[str]:
        """The adapters' names, sorted."""
        return sorted(self._adapters)

    @property
    def subspace(self) -> Subspace:
        """The bases of every module."""
        if not isinstance(self._subspace, Subspace):
            self._subspace = self._subspace()
        return self._subspace

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the components in memory: their storage dtype, or float32 for integers."""
        return self._storage.dtype

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """The dtype of the coefficients in memory."""
        return self._coefficient_storage.dtype

    @property
    def storage(self) -> str:
        """The storage of the components, by the name that `fit` takes: `float16`, `int8`, `coded`."""
        return self._storage.name

    @property
    def coefficient_storage(self) -> str:
        """The storage of the coefficients, by name."""
        return self._coefficient_storage.name

    @property
    def is_coded(self) -> bool:
        """True if it was fitted to an error bound or a size, and is entropy-coded."""
        return self._coefficient_storage.is_coded

    @property
    def cores(self) -> str | None:
        """The kind of cores in place of coefficients, "full" or "diagonal"; None for coefficients."""
        return self._coefficient_storage.core_kind

    @property
    def aim(self) -> float:
        """The error bound of the pack: the one it was fitted for, else the largest delta error of a fitted adapter.

        If no fitted adapter is left, the largest of those that were added; 0.0 for a pack without adapters.
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
    def summary(self) -> Summary:
        """Figures of the whole pack: contents, bytes and errors."""
        return summarize(
            self.records,
            self.info,
            self.fit_info,
            self.coefficient_storage,
            base_model=self.base_model,
            revision=self.revision,
        )

    def packed(self, name: str) -> PackedAdapter:
        """Return one adapter as coefficients, read from disk if it is there.

        `AdapterNameError` for an unknown name, `PackDamagedError` if its files were changed.
        """
        self._check_has(name)
        adapter = self._adapters[name]
        if isinstance(adapter, Entry):
            assert self.path is not None
            history = SubspaceHistory(self.info.lineage, self.info.sizes, self._subspace_at)
            adapter = folder.read_adapter(self.path, name, adapter, self._coefficient_storage, history)
        return adapter

    def _subspace_at(self, fingerprint: str) -> Subspace:
        """Return the subspace at the time when it had a fingerprint of its lineage."""
        return self.subspace.before(self.info.lineage.index(fingerprint))

    def adapter_folder(self, name: str) -> Path:
        """Return the folder of an adapter on disk, for PEFT to load. Its bytes are not checked; `packed` does that."""
        entry = self._entry(name)
        assert self.path is not None
        return folder.adapter_folder(self.path, name, entry)

    def digest(self, name: str) -> str:
        """Return a sha256 of everything that an adapter on disk depends on, from the manifest alone.

        It changes when the subspace grows.
        """
        entry = self._entry(name)
        assert self._opened is not None
        listed = self._opened.manifest
        content = [listed.subspace_sha256, self.info.fingerprint, listed.coefficient_dtype, sorted(entry.files.items())]
        return atomic_files.digest(json.dumps(content).encode())

    def _entry(self, name: str) -> Entry:
        """Return an adapter's entry in the manifest; `OptionError` if it was not saved yet."""
        self._check_has(name)
        adapter = self._adapters[name]
        if self._opened is None or not isinstance(adapter, Entry):
            raise OptionError(f"Adapter {name!r} is not on disk yet: save the pack first.")
        return adapter

    def adapter(self, name: str, dtype: torch.dtype | None = None) -> Adapter:
        """Return an adapter as an ordinary LoRA.

        dtype: of its factors; by default float32, or the pack's own if that is wider, so that nothing is rounded again.
        """
        return unpack(self.packed(name), self.subspace, dtype or export.lossless_dtype(self))

    def export(
        self,
        directory: str | os.PathLike[str],
        names: str | Sequence[str] | None = None,
        *,
        format: str | None = None,
        dtype: str | torch.dtype | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Path]:
        """Write adapters as ordinary LoRAs, and return the path of each by name.

        An adapter that came as a PEFT folder becomes the folder `directory`/NAME; one that came as a single file
        becomes `directory`/NAME.safetensors in the same format.

        names: adapters to export; all by default. format: "peft", "kohya" or "diffusers", for all of them. dtype: of
        the factors; by default as in `adapter`. overwrite: replace what is there. progress(stage, done, total): called
        before each adapter.

        Nothing is written if one of the adapters cannot be: unknown names, paths that are taken, modules that the
        format has no names for, and numbers outside the dtype's range raise an error first.
        """
        wanted = list(dict.fromkeys(name_list(names))) if names is not None else self.names
        parsed = dtypes.parse(dtype)
        if format is not None:
            formats.writable(format)
        for name in wanted:
            self._check_has(name)
        plan = ExportPlan(Path(directory), {name: format or self._format(name) for name in wanted}, parsed, overwrite)
        return export.export_adapters(self, plan, progress)

    def _format(self, name: str) -> str:
        """Return the format that an adapter came in, from the manifest where that is enough."""
        adapter = self._adapters[name]
        if isinstance(adapter, Entry) and keys.SOURCE_FILE not in adapter.files:
            return formats.PEFT
        return formats.format_of(self.packed(name).origin)

    def export_rounding(self, name: str, dtype: str | torch.dtype | None = None) -> float:
        """Return the relative error of an adapter's update that rounding to `dtype` on export causes.

        It adds to the `delta_error` of the adapter's record, which is the error of the pack.
        """
        return export.rounding_error(self, name, dtypes.parse(dtype) or export.lossless_dtype(self))

    def verify(self) -> None:
        """Read every byte of a pack on disk; `PackDamagedError` names the first file that was changed."""
        if self.path is not None and self._opened is not None:
            folder.verify(self.path, self._opened.manifest)

    def add(
        self,
        source: sources.Source,
        *,
        name: str | None = None,
        extend: int | None = None,
        carry_missing: bool = False,
        same_base: bool = False,
        warn_above: float = WARN_ABOVE,
        **options: Any,
    ) -> Record:
        """Add one adapter, projected on the subspace, and return its record, which says how large its error is.

        source: a folder, file, URL, Hub id or `Adapter`. name: of the adapter in the pack; by default its own.
        extend: append at most this many components to each side of each module, those that the subspace lacks most for
            the adapter. Adapters in the pack do not change.
        carry_missing: store modules that the subspace lacks as they are, instead of raising `ModuleNameError`.
        same_base: accept an adapter that names another base model.
        warn_above: delta error, 0 to 1, above which a `LossWarning` is issued; 1: never.
        options: those of `read_adapter`.
        """
        (record,) = self._add(
            [sources.AdapterSource(name, source)],
            AddOptions(extend, carry_missing, same_base, options),
            check_warn_above(warn_above),
            lambda stage, done, total: None,
        ).values()
        return record

    def add_all(
        self,
        adapters: sources.Sources,
        *,
        extend: int | None = None,
        carry_missing: bool = False,
        same_base: bool = False,
        warn_above: float = WARN_ABOVE,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, Record]:
        """Add several adapters, given as for `fit`, and return their records by name. If one fails, none is added.

        extend: as in `add`, for all of them together. progress(stage, done, total): called as work goes on. Other
        arguments are those of `add`.
        """
        adapter_sources = sources.find_adapters(adapters, **options)
        report = progress or (lambda stage, done, total: None)
        return self._add(
            adapter_sources, AddOptions(extend, carry_missing, same_base, options), check_warn_above(warn_above), report
        )

    def _add(
        self,
        adapter_sources: Sequence[sources.AdapterSource],
        options: AddOptions,
        warn_above: float,
        progress: Progress,
    ) -> dict[str, Record]:
        context = PackContext(
            self.info,
            self.names,
            self.base_model,
            self.revision,
            self._storage,
            self._coefficient_storage,
            error_bound=self.aim if self.is_coded else 0.0,
        )
        if options.extend is not None:
            options = replace(options, extend=add.check_extend(options.extend, context))
        addition = add.add_adapters(adapter_sources, context, options, self.subspace, progress)
        records = {name: packed.record for name, packed in addition.adapters.items()}
        untrained = [name for name, record in records.items() if record.untrained]
        if untrained:
            warnings.warn(
                f"Untrained (every update is zero): {', '.join(untrained)}. "
                f"{'They are' if len(untrained) > 1 else 'It is'} added to the pack.",
                UntrainedAdapterWarning,
                stacklevel=3,
            )
        warn_of_losses(records, warn_above, stacklevel=4)
        if addition.subspace is not self.subspace:
            # adapters that are only in memory refer to the subspace as it was until now
            self._adapters = {
                name: adapter if isinstance(adapter, Entry) else self._with_fingerprint(name)
                for name, adapter in self._adapters.items()
            }
            self._subspace, self.info = addition.subspace, manifest.describe(addition.subspace, self._storage)
        self._adapters |= addition.adapters
        self.base_model = self.base_model or addition.base_model
        self.revision = self.revision or addition.revision
        return records

    def remove(self, *names: str) -> None:
        """Remove adapters; `AdapterNameError`, and no change, if one of them is unknown. The subspace stays."""
        for name in names:
            self._check_has(name)
        for name in dict.fromkeys(names):
            del self._adapters[name]

    def _check_has(self, name: str) -> None:
        keys.check_known(name, self._adapters)

    def augment(self, n_extra: int, seed: int) -> "Pack":
        """Return a pack whose bases have `n_extra` more random components per side, drawn from `seed`.

        The components are orthonormal to the others, for training new tasks. Updates of its adapters do not change.
        """
        subspace = spaces.augment(self.subspace, n_extra, seed)
        return Pack(
            subspace,
            manifest.describe(subspace, self._storage),
            {name: self._with_fingerprint(name) for name in self.names},
            self.fit_info,
            base_model=self.base_model,
            revision=self.revision,
            coefficient_dtype=self.coefficient_storage,
        )

    def _with_fingerprint(self, name: str) -> PackedAdapter:
        """Return an adapter that refers to its subspace by fingerprint, so that it is unchanged when that grows."""
        packed = self.packed(name)
        return replace(packed, subspace=packed.subspace or self.info.fingerprint)

    def save(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Path:
        """Write the pack to the folder `path`, completely or not at all, and return the folder.

        path: by default the folder that it was opened from. overwrite: replace another pack that is there, instead of
        raising `PackExistsError`. `PackBusyError` if another process changed this pack since it was opened.
        """
        target = Path(path) if path is not None else self.path
        if target is None:
            raise OptionError("This pack is not on disk yet: pass a path, pack.save('pack/').")
        _check_no_cache(target)
        if self._partial and self._is_at(target):
            raise OptionError(
                f"This is a part of the pack in {target}, which would lose its other adapters. Save it to another "
                "path, or open the whole pack."
            )
        folder.check_free(target, overwrite or self._is_at(target))
        with folder.created(target), folder.locked(target):
            previous = self._previous(target, overwrite)
            self._write(target, previous.manifest if previous else None)
        return target

    def _previous(self, target: Path, overwrite: bool) -> folder.OpenedManifest | None:
        """Return the manifest in `target` that will be replaced; None where there is none that can be read."""
        if not (target / keys.MANIFEST).exists():
            return None
        if self._is_at(target):
            current = folder.open_manifest(target)
            if current != self._opened:
                raise PackBusyError(
                    f"{target} was changed by another process since it was opened. Open it again and repeat."
                )
            return current
        folder.check_free(target, overwrite)
        try:
            return folder.read_manifest(target)
        except (PackDamagedError, PackVersionError):
            return None

    def _is_at(self, target: Path) -> bool:
        return self.path is not None and self.path.exists() and self.path.resolve() == target.resolve()

    def _write(self, target: Path, previous: Manifest | None) -> None:
        in_place = self._is_at(target)
        loaded = {
            name: adapter if isinstance(adapter, PackedAdapter) else self.packed(name)
            for name, adapter in self._adapters.items()
            if not (in_place and isinstance(adapter, Entry))
        }
        # made one at a time: all files together would double the memory
        files = LazyMapping(
            dict(sorted(loaded.items())),
            lambda name: adapter_files.to_files(loaded[name], self.info.fingerprint, self._coefficient_storage),
        )
        entries = {name: adapter for name, adapter in self._adapters.items() if isinstance(adapter, Entry)}
        entries |= folder.entries(loaded, files)
        if in_place and previous is not None and previous.subspace == self.info:
            data, file, sha256 = None, previous.subspace_file, previous.subspace_sha256
        else:
            data = folder.subspace_bytes(self.subspace, self._storage)
            file, sha256 = folder.subspace_name(data)
        new = Manifest(
            base_model=self.base_model,
            revision=self.revision,
            fit=self.fit_info,
            subspace=self.info,
            subspace_file=file,
            subspace_sha256=sha256,
            coefficient_dtype=self.coefficient_storage,
            adapters=dict(sorted(entries.items())),
        )
        digest = folder.write(target, previous, new, data, files)
        self.path, self._opened, self._partial = target, folder.OpenedManifest(new, digest), False
        self._adapters = dict(new.adapters)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapters: str | Sequence[str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> "CommitInfo":
        """Upload the pack to a repository on the Hub in one commit, and return the commit.

        A pack that is there is replaced: adapters that this one lacks are deleted, and the model card is written again.
        Other files stay. Changes that were not saved are uploaded too.

        repo_id: `org/name`; the repository is created if it does not exist. adapters: names to upload; all by default.
        private: create a private repository; an existing public one raises an error. revision: a branch, created if it
        does not exist. commit_message: by default the number of adapters. create_pr: open a pull request to the main
        branch instead of committing to it.
        """
        names = self.names if adapters is None else sorted(set(name_list(adapters)))
        for name in names:
            self._check_has(name)
        pushed = Pack(
            self.subspace,
            self.info,
            {name: self.packed(name) for name in names},
            self.fit_info,
            base_model=self.base_model,
            revision=self.revision,
            coefficient_dtype=self.coefficient_storage,
        )
        with tempfile.TemporaryDirectory() as temporary:
            return hub.push(
                pushed.save(Path(temporary) / "pack"),
                repo_id,
                private=private,
                revision=revision,
                message=commit_message,
                token=token,
                create_pr=create_pr,
            )


def check_warn_above(value: float) -> float:
    """Return `value` as a number from 0 to 1; `OptionError` if it is none."""
    share = to_float("warn_above", value)
    if not 0 <= share <= 1:
        raise OptionError(f"warn_above must be a relative error from 0 to 1 (1: never warn), got {value}.")
    return share


def warn_of_losses(
    records: Mapping[str, Record],
    above: float,
    remedy: str = "Fit the pack again with such adapters among the sources, or keep the LoRAs themselves.",
    stacklevel: int = 3,
) -> None:
    """Issue a `LossWarning` that names the trained adapters with a delta error above `above`; 1: never."""
    if lossy(records, above):
        warnings.warn(f"{losses(records, above)} {remedy}", LossWarning, stacklevel=stacklevel)


def _check_no_cache(target: Path) -> None:
    """Raise `OptionError` for a folder in the Hub's cache: later downloads would take a changed file for the Hub's."""
    repo_id = hub_client.cached_repo(target)
    if repo_id is not None:
        raise OptionError(
            f"{target} is the copy of {repo_id} in the Hub's cache, which must not be changed. Save the pack to "
            f"another path, pack.save('pack/'), or download it with `eigenlorax pull {repo_id} -o pack/`."
        )
