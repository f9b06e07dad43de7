"""The pack: one subspace, and any number of adapters in its terms."""

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
from ..core import atomic_files, dtypes, keys, metrics, narrowing, projection, registry, staging
from ..core import subspace as spaces
from ..core.adapter import Adapter, LazyMapping, LoRAFactors
from ..core.extension import Progress
from ..core.options import name_list as listed
from ..core.options import to_float
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
from ..formats import hub, sources
from . import add as joining
from . import folder, manifest
from . import hub as remote
from . import packed_adapter as packed
from .add import Host
from .manifest import Entry, FitInfo, Manifest, SubspaceInfo
from .packed_adapter import PackedAdapter, Record, References
from .summary import Summary, losses, lossy, summarize

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Pack:
    """One subspace and the adapters that are kept in its terms.

    `add`, `add_all` and `remove` change this object alone; `save` writes it. An opened pack reads its tensors from disk
    when they are asked for, and checks their bytes against the manifest.

    notes: what the fit has to say of its choices, in sentences. seconds: what it spent them on. frontier: where bytes
    were chosen, about how many other errors take. None of them is saved.
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
        found = parse_storage(coefficient_dtype)
        assert found is not None
        self._storage, self._coefficients = storage_by_name(info.dtype), found
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.frontier: list[RatePoint] = []
        self.path: Path | None = None
        self._opened: folder.Opened | None = None
        self._partial = False
        self._subspace = subspace
        self._adapters = dict(adapters)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Pack":
        """The pack in the folder `path`."""
        path = Path(path)
        opened = folder.open_manifest(path)
        found = opened.manifest
        pack = cls(
            partial(folder.read_subspace, path, found),
            found.subspace,
            found.adapters,
            found.fit,
            base_model=found.base_model,
            revision=found.revision,
            coefficient_dtype=found.coefficient_dtype,
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
        """The pack in a local folder, or in a repository on the Hub (`org/name`, `org/name@revision`).

        adapters: the only ones to have in it, or to fetch; none of them for the subspace alone. All by default.
        """
        source = os.fspath(source)
        adapters = listed(adapters) if adapters is not None else None
        place = remote.fetch(
            source, adapters, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        pack = cls.open(place)
        if adapters is not None:
            assert pack._opened is not None
            found = remote.chosen(pack._opened.manifest, adapters)
            pack._opened, pack._adapters = folder.Opened(found, pack._opened.digest), dict(found.adapters)
            pack._partial = True
        return pack

    def remember(self) -> None:
        """Let the tuner find this subspace by its fingerprint, and by those it had before it grew, for as long as the
        process lasts."""
        holder = partial(Pack.open, self.path.absolute()) if self.path is not None else lambda: self
        for fingerprint in self.info.lineage:
            if fingerprint is not None:
                registry.register(fingerprint, holder)

    @classmethod
    @contextmanager
    def edit(cls, path: str | os.PathLike[str]) -> Iterator["Pack"]:
        """The pack in `path` for changes: saved at the end of the block, with no other writer in between.

        An error in the block leaves the pack on disk as it was.
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
        """The dtype of the components in memory: the one they are stored in, or float32 of integers."""
        return self._storage.dtype

    @property
    def coefficient_dtype(self) -> torch.dtype:
        """The same of the coefficients."""
        return self._coefficients.dtype

    @property
    def storage(self) -> str:
        """What the components are stored in, as `fit` takes it: `float16`, `int8`."""
        return self._storage.name

    @property
    def coefficient_storage(self) -> str:
        """The same of the coefficients."""
        return self._coefficients.name

    @property
    def is_coded(self) -> bool:
        """Whether its bytes were chosen for an error or a size."""
        return self._coefficients.is_coded

    @property
    def cores(self) -> str | None:
        """The kind of cores in place of coefficients, "full" or "diagonal"; None for coefficients."""
        return self._coefficients.core_kind

    @property
    def aim(self) -> float:
        """The delta error that no adapter of the fit exceeds: the one that was asked for, or the worst there is, of
        those that were added since where no other is left; 0 if there is none."""
        if self.fit_info.max_error is not None:
            return self.fit_info.max_error
        records = self.records.values()
        fitted = [record.delta_error for record in records if record.in_fit]
        return max(fitted or [record.delta_error for record in records], default=0.0)

    @property
    def records(self) -> dict[str, Record]:
        """The figures of every adapter, by name."""
        return {name: self._adapters[name].record for name in self.names}

    @property
    def summary(self) -> Summary:
        """What the pack holds, costs and lost."""
        return summarize(
            self.records,
            self.info,
            self.fit_info,
            self.coefficient_storage,
            base_model=self.base_model,
            revision=self.revision,
        )

    def packed(self, name: str) -> PackedAdapter:
        """One adapter as coefficients."""
        self._check_has(name)
        found = self._adapters[name]
        if isinstance(found, Entry):
            assert self.path is not None
            references = References(self.info.lineage, self.info.sizes, self._subspace_at)
            found = folder.read_adapter(self.path, name, found, self._coefficients, references)
        return found

    def _subspace_at(self, fingerprint: str) -> Subspace:
        """The subspace when it had a fingerprint of its lineage, which was compared with its rows when it was read."""
        return self.subspace.before(self.info.lineage.index(fingerprint))

    def adapter_folder(self, name: str) -> Path:
        """Where an adapter of a pack on disk is now, for PEFT to load. `packed` checks its bytes."""
        self._check_has(name)
        found = self._adapters[name]
        if self.path is None or not isinstance(found, Entry):
            raise OptionError(f"adapter {name!r} is not on disk yet: save the pack first.")
        return folder.place(self.path, name, found)

    def digest(self, name: str) -> str:
        """sha256 over all that decides what an adapter of a pack on disk is; nothing is read for it.

        The same adapter in a subspace that has grown since has another one.
        """
        self._check_has(name)
        found = self._adapters[name]
        if self._opened is None or not isinstance(found, Entry):
            raise OptionError(f"adapter {name!r} is not on disk yet: save the pack first.")
        listed = self._opened.manifest
        content = [listed.subspace_sha256, self.info.fingerprint, listed.coefficient_dtype, sorted(found.files.items())]
        return atomic_files.digest(json.dumps(content).encode())

    def adapter(self, name: str, dtype: torch.dtype | None = None) -> Adapter:
        """An ordinary LoRA again. Its factors are in `dtype`, by default float32 or the pack's own if that is wider, so
        that nothing is rounded a second time."""
        return packed.unpacked(self.packed(name), self.subspace, dtype or self._widest)

    @property
    def _widest(self) -> torch.dtype:
        return torch.promote_types(torch.promote_types(self.dtype, self.coefficient_dtype), torch.float32)

    def export(
        self,
        directory: str | os.PathLike[str],
        names: str | Sequence[str] | None = None,
        *,
        format: str | None = None,
        dtype: str | torch.dtype | None = None,
        overwrite: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Path]:
        """Write adapters as ordinary LoRAs; where each is, by name. All of them by default.

        One that came as a PEFT folder becomes the folder `directory`/NAME, one that came as a single file becomes
        `directory`/NAME.safetensors, in the dialect it had. format: the one for all of them, whatever they came in.
        Names, what is there, what the format has names for, what the dtype has room for, and the pack's bytes are
        checked before the first one is written.
        """
        wanted = list(dict.fromkeys(listed(names))) if names is not None else self.names
        parsed = dtypes.parse(dtype)
        if format is not None:
            formats.writable(format)
        for name in wanted:
            self._check_has(name)
        chosen = {name: format or self._format(name) for name in wanted}
        targets = {name: Path(directory) / (name + formats.writable(chosen[name]).suffix) for name in wanted}
        for name, target in targets.items():
            folder.check_outside(target)
            atomic_files.recover(target)
            if formats.writable(chosen[name]).suffix:
                atomic_files.check_file_free(target, overwrite)
            else:
                atomic_files.check_replaceable(target, (keys.ADAPTER_CONFIG, keys.ADAPTER_WEIGHTS), overwrite)
        checked: PackedAdapter | None = None
        for name in wanted:
            checked = self._check_writable(name, chosen[name], parsed)
        if Path(directory).is_dir():
            staging.remove_abandoned(Path(directory))
        with atomic_files.defer_folder_syncs():
            for done, (name, target) in enumerate(targets.items()):
                if progress is not None:
                    progress("exporting adapters", done, len(targets))
                # a single adapter is decoded once; of several, only one at a time is in memory
                stored = checked if checked is not None and len(wanted) == 1 else self.packed(name)
                adapter = packed.unpacked(stored, self.subspace, parsed or self._widest)
                formats.write_adapter(adapter, target, format=chosen[name], overwrite=overwrite)
        return targets

    def _format(self, name: str) -> str:
        """The format an adapter came in; most packs say it by the names of their files."""
        found = self._adapters[name]
        if isinstance(found, Entry) and keys.SOURCE_FILE not in found.files:
            return formats.PEFT
        return formats.format_of(self.packed(name).origin)

    def export_rounding(self, name: str, dtype: str | torch.dtype | None = None) -> float:
        """What rounding the factors to `dtype` on export changes of an adapter's update, relative to its norm.

        It comes on top of the `delta_error` of the adapter's record, which is that of the pack.
        """
        narrow, found = dtypes.parse(dtype) or self._widest, self.packed(name)
        exact, kept = (packed.unpacked(found, self.subspace, one).modules for one in (torch.float64, narrow))
        # a difference is exact between factors of one gauge alone

        def of_same_gauge(module: str) -> LoRAFactors:
            return narrowing.balance(exact[module], narrow) if module in found.places else exact[module]

        return metrics.rounding_error(LazyMapping(exact, of_same_gauge), kept)

    def _check_writable(self, name: str, format: str, dtype: torch.dtype | None) -> PackedAdapter:
        """Return the stored adapter, if a format has names for all it has, and if its factors fit in a dtype that was
        asked for: the one that they have otherwise is as wide as what is stored."""
        found = self.packed(name)
        if dtype is not None:
            exact = packed.unpacked(found, self.subspace, torch.float64).modules
            for _ in narrowing.narrow_adapter(name, LazyMapping(found.places, exact.__getitem__), dtype):
                pass
        formats.check_writable(packed.unpacked(found, self.subspace, dtype or self._widest), format)
        return found

    def verify(self) -> None:
        """Read every byte of an opened pack; `PackDamagedError` names the first file that is not what was written."""
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
        """Project one more adapter on the subspace; the record says how much of it was lost.

        extend: let the subspace grow by at most so many directions on each side of each module, those that it misses
            most of the adapter. What is in the pack stays as it is.
        carry_missing: keep modules that the subspace lacks as they are, rather than refuse the adapter.
        warn_above: the delta error above which is warned of it; 1 for never.
        options: those of `read_adapter`.
        """
        one = sources.AdapterSource(name, source)
        (record,) = self._add([one], extend, carry_missing, same_base, warn_above, options).values()
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
        """Project several adapters, as `fit` takes them, or none of them if one is refused; their records by name.

        extend: as in `add`, by what the subspace misses of all of them together. progress(stage, done, total) is called
        as work goes on.
        """
        found = sources.find_adapters(adapters, **options)
        return self._add(found, extend, carry_missing, same_base, warn_above, options, progress)

    def _add(
        self,
        found: Sequence[sources.AdapterSource],
        extend: int | None,
        carry_missing: bool,
        same_base: bool,
        warn_above: float,
        options: dict[str, Any],
        progress: Progress | None = None,
    ) -> dict[str, Record]:
        report, warn_above = progress or (lambda stage, done, total: None), check_warn_above(warn_above)
        extend = joining.check_extend(extend, self.info, self._coefficients) if extend is not None else None
        host = Host(self.info, self.names, self.base_model, self.revision)
        new = joining.read(found, host, carry_missing=carry_missing, same_base=same_base, options=options)
        subspace = self.subspace
        if extend is not None:
            subspace = joining.extended(subspace, self._storage, new, extend, report)
        if self.is_coded and not self.aim:
            raise OptionError(
                "this pack was fitted for a size, and none of its adapters is left to say with which error. Fit a pack "
                "again (max_error, max_bytes or ratio), with the new adapters among the sources."
            )
        added = {}
        whole = joining.rounded_bases(subspace) if self.is_coded else {}
        for done, one in enumerate(new):
            report("projecting adapters", done, len(new))
            if self.is_coded:
                joining.code(one, subspace, whole, self.aim)
            for module, place in one.places.items() if not self.is_coded else ():
                bases, factors = subspace.modules[place], one.adapter.modules[module]
                one.packing.project(
                    module, place, factors, bases, self._coefficients, projection.dual_components(bases)
                )
            added[one.adapter.name] = one.packing.packed(in_fit=False)
        report("projecting adapters", len(new), len(new))
        records = {name: one.record for name, one in added.items()}
        untrained = [name for name, record in records.items() if record.untrained]
        if untrained:
            warnings.warn(
                f"untrained (every update is zero): {', '.join(untrained)}. "
                f"{'They are' if len(untrained) > 1 else 'It is'} kept in the pack.",
                UntrainedAdapterWarning,
                stacklevel=3,
            )
        warn_of_losses(records, warn_above, stacklevel=4)
        if subspace is not self.subspace:
            # what is in memory alone refers to the subspace as it was until now
            self._adapters = {
                name: kept if isinstance(kept, Entry) else self._of_now(name) for name, kept in self._adapters.items()
            }
            self._subspace, self.info = subspace, manifest.describe(subspace, self._storage)
        self._adapters |= added
        for one in new:
            self.base_model = self.base_model or one.adapter.base_model
            self.revision = self.revision or one.adapter.revision
        return records

    def remove(self, *names: str) -> None:
        """Forget adapters, all of them or, if one is not there, none. The subspace stays as it was fitted."""
        for name in names:
            self._check_has(name)
        for name in dict.fromkeys(names):
            del self._adapters[name]

    def _check_has(self, name: str) -> None:
        keys.check_known(name, self._adapters)

    def augment(self, n_extra: int, seed: int) -> "Pack":
        """A pack with `n_extra` more directions from `seed` on every side; every adapter's update stays what it was."""
        subspace = spaces.augment(self.subspace, n_extra, seed)
        return Pack(
            subspace,
            manifest.describe(subspace, self._storage),
            {name: self._of_now(name) for name in self.names},
            self.fit_info,
            base_model=self.base_model,
            revision=self.revision,
            coefficient_dtype=self.coefficient_storage,
        )

    def _of_now(self, name: str) -> PackedAdapter:
        """An adapter that stays what it is where the subspace grows: it refers to the one of now."""
        found = self.packed(name)
        return replace(found, subspace=found.subspace or self.info.fingerprint)

    def save(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Path:
        """Write the pack to the folder `path` (by default the one it was opened from), whole or not at all.

        Another pack there is refused unless it may be overwritten; so is this pack's own folder if another process has
        changed it since it was opened.
        """
        target = Path(path) if path is not None else self.path
        if target is None:
            raise OptionError("this pack is not on disk yet: save it with a path, pack.save('pack/').")
        _check_no_cache(target)
        if self._partial and self._is_at(target):
            raise OptionError(
                f"this is a part of the pack in {target}, which would lose its other adapters: save it with another "
                "path, or open all of it."
            )
        folder.check_free(target, overwrite or self._is_at(target))
        with folder.created(target), folder.locked(target):
            before = self._before(target, overwrite)
            self._write(target, before.manifest if before else None)
        return target

    def _before(self, target: Path, overwrite: bool) -> folder.Opened | None:
        """What is in `target` and may be changed; None where nothing is there, or nothing that can be read."""
        if not (target / keys.MANIFEST).exists():
            return None
        if self._is_at(target):
            before = folder.open_manifest(target)
            if before != self._opened:
                raise PackBusyError(
                    f"{target} was changed by another process since it was opened. Open it again and repeat."
                )
            return before
        folder.check_free(target, overwrite)
        try:
            return folder.read_manifest(target)
        except (PackDamagedError, PackVersionError):
            return None

    def _is_at(self, target: Path) -> bool:
        return self.path is not None and self.path.exists() and self.path.resolve() == target.resolve()

    def _write(self, target: Path, before: Manifest | None) -> None:
        here = self._is_at(target)
        loaded = {
            name: found if isinstance(found, PackedAdapter) else self.packed(name)
            for name, found in self._adapters.items()
            if not (here and isinstance(found, Entry))
        }
        # made when they are asked for: all at once, they would be the pack in memory once more
        files = LazyMapping(
            dict(sorted(loaded.items())),
            lambda name: packed.to_files(loaded[name], self.info.fingerprint, self._coefficients),
        )
        entries = {name: found for name, found in self._adapters.items() if isinstance(found, Entry)}
        entries |= folder.entries(loaded, files)
        if here and before is not None and before.subspace == self.info:
            data, file, sha256 = None, before.subspace_file, before.subspace_sha256
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
        digest = folder.write(target, before, new, data, files)
        self.path, self._opened, self._partial = target, folder.Opened(new, digest), False
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
        """Make the pack of a repository on the Hub this one, in one commit, and return that.

        Changes that were not saved are pushed too. A pack that is there is replaced: adapters that this one lacks are
        deleted, and the model card is written anew. Files of other kinds stay.
        adapters: the only ones to push with the subspace; all by default.
        private: whether a repository that is made for it is private. One that is there and public is refused then.
        revision: a branch, which is made if it is not there. create_pr: as a pull request, to the main branch.
        """
        names = self.names if adapters is None else sorted(set(listed(adapters)))
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
            return remote.push(
                pushed.save(Path(temporary) / "pack"),
                repo_id,
                private=private,
                revision=revision,
                message=commit_message,
                token=token,
                create_pr=create_pr,
            )


def check_warn_above(value: float) -> float:
    """`value` as a number from 0 to 1."""
    found = to_float("warn_above", value)
    if not 0 <= found <= 1:
        raise OptionError(f"warn_above is a relative error, 0 to 1 (1: never warn), got {value}.")
    return found


def warn_of_losses(
    records: Mapping[str, Record],
    above: float,
    remedy: str = "Fit the pack again with such adapters among the sources, or keep the LoRAs themselves.",
    stacklevel: int = 3,
) -> None:
    """`LossWarning` of the trained adapters whose delta error is above that; 1 for never."""
    if lossy(records, above):
        warnings.warn(f"{losses(records, above)} {remedy}", LossWarning, stacklevel=stacklevel)


def _check_no_cache(target: Path) -> None:
    """The Hub's cache is for reading: what is changed in it is taken for what the Hub has."""
    repo_id = hub.cached_repo(target)
    if repo_id is not None:
        raise OptionError(
            f"{target} is the copy of {repo_id} in the Hub's cache, and is not changed. Save the pack with another "
            f"path, pack.save('pack/'), or get it by `eigenlorax pull {repo_id} -o pack/`."
        )
