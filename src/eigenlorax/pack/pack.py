"""`Pack`: a subspace, and any number of adapters as coefficients in it. Opened, changed, exported, saved and shared."""

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import formats
from ..core import atomic_files, dtypes, keys, registry
from ..core import subspace as spaces
from ..core.adapter import LazyMapping
from ..core.options import name_list
from ..core.progress import Progress
from ..errors import WARN_ABOVE, OptionError, UntrainedAdapterWarning
from ..formats import sources
from . import adapter_files, add, export, folder, hub, manifest, peft_models, subspace_file, writer
from .add import AddOptions
from .contents import PackContents
from .copies import share_codes, warn_of_copies
from .export import ExportErrors, ExportPlan
from .folder import PackFolder
from .loss_warnings import check_warn_above, warn_of_losses
from .manifest import Entry, Manifest
from .packed_adapter import Record

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Pack(PackContents):
    """A subspace, and adapters as coefficients in it.

    `add`, `add_all` and `remove` change only this object; `save` writes it. A pack that was opened reads its tensors
    from disk when they are used, and checks their bytes against the manifest.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Pack":
        """Open the pack in the folder `path`. Only its manifest is read.

        `PackMissingError` where there is no pack, `PackDamagedError` or `PackVersionError` where it cannot be read.
        """
        return cls._from_folder(folder.open_pack(Path(path)))

    @classmethod
    def _from_folder(cls, opened: PackFolder) -> "Pack":
        listed = opened.manifest
        pack = cls(
            opened.read_subspace,
            listed.subspace,
            listed.adapters,
            listed.fit,
            base_model=listed.base_model,
            revision=listed.revision,
            coefficient_dtype=listed.coefficient_dtype,
        )
        pack._folder = opened
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
        opened = folder.open_pack(path)
        return cls._from_folder(opened if adapters is None else opened.select(adapters))

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
        folder.open_pack(Path(path))
        writer.check_no_cache(Path(path))
        with folder.locked(Path(path)):
            pack = cls.open(path)
            yield pack
            pack.save()

    def __repr__(self) -> str:
        where = f" in {str(self.path)!r}" if self.path is not None else ""
        base = self.base_model or "an unknown base model"
        return f"<Pack of {len(self)} adapters of {base}, {len(self.info.modules)} modules{where}>"

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
        the factors; by default that of each adapter's source, the widest one if its factors had several, or as in
        `adapter` for adapters of older packs, which do not say it. overwrite: replace what is there.
        progress(stage, done, total): called before each adapter.

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

        It adds to the `delta_error` of the adapter's record, which is the error of the pack. dtype: as in `export`.
        """
        return self.export_errors(name, dtype).rounding

    def export_errors(self, name: str, dtype: str | torch.dtype | None = None) -> ExportErrors:
        """Return the dtype and the errors of an exported adapter: of the pack, of rounding, and a bound of both.

        dtype: as in `export`.
        """
        return export.export_errors(self, name, dtypes.parse(dtype))

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
            [sources.single(name, source)],
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
        addition = add.add_adapters(adapter_sources, self, options, progress)
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
        warn_of_copies(addition.copies, as_references=self.is_coded)
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
        removed = set(names)
        orphans = {
            name: self.packed(name)
            for name, adapter in self._adapters.items()
            if adapter.parent in removed and name not in removed
        }
        self._adapters = {name: adapter for name, adapter in self._adapters.items() if name not in removed}
        # the codes that they had in common go to one of them
        self._adapters |= share_codes(orphans)

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

    def save(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Path:
        """Write the pack to the folder `path`, completely or not at all, and return the folder.

        path: by default the folder that it was opened from. overwrite: replace another pack that is there, instead of
        raising `PackExistsError`. `PackBusyError` if another process changed this pack since it was opened.
        """
        target = Path(path) if path is not None else self.path
        if target is None:
            raise OptionError("This pack is not on disk yet: pass a path, pack.save('pack/').")
        writer.check_no_cache(target)
        opened = self._folder if self._folder is not None and self._folder.is_at(target) else None
        if opened is not None and opened.is_partial:
            raise OptionError(
                f"This is a part of the pack in {target}, which would lose its other adapters. Save it to another "
                "path, or open the whole pack."
            )
        writer.check_free(target, overwrite or opened is not None)
        with writer.created(target), folder.locked(target):
            previous = writer.replaced_manifest(target, opened, overwrite)
            self._write(target, previous, in_place=opened is not None)
        return target

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_options: Any,
    ) -> Path:
        """Write the pack to a folder, as in transformers: a pack that is there is replaced. Returns the folder.

        Args:
            save_directory: The folder.
            push_to_hub: Also upload the pack.
            repo_id: Repository to upload to; by default the name of the folder.
            hub_options: Other arguments of `push_to_hub`.

        Raises:
            PackExistsError: The folder holds something else than a pack.
            PackBusyError: Another process changed this pack since it was opened.
        """
        if not push_to_hub and (repo_id is not None or hub_options):
            unused = ["repo_id"] if repo_id is not None else sorted(hub_options)
            raise OptionError(f"{unused[0]} has no effect without push_to_hub=True.")
        path = self.save(save_directory, overwrite=True)
        if push_to_hub:
            self.push_to_hub(repo_id or path.absolute().name, **hub_options)
        return path

    def load_into(self, model: Any, names: str | Sequence[str] | None = None) -> None:
        """Load adapters into a `PeftModel`, under the names that they have in the pack.

        They become ordinary LoRAs, or coefficients over one basis if the model's adapters were made with an
        `EigenLoraxConfig`. `model.set_adapter` activates one. For pipelines of diffusers: `eigenlorax.load_into`.

        Args:
            model: A `PeftModel` of the pack's base model.
            names: Adapters to load; all by default.

        Raises:
            OptionError: The object is not a `PeftModel`, or has adapters of other types.
            AdapterNameError: A name is unknown, or the model already has an adapter of that name.
            ModuleNameError: The model lacks a module of an adapter.
        """
        wanted = list(dict.fromkeys(name_list(names))) if names is not None else self.names
        for name in wanted:
            self._check_has(name)
        peft_models.load_into(self, model, wanted)

    def _write(self, target: Path, previous: Manifest | None, in_place: bool) -> None:
        """Write the pack. previous: the manifest in `target`. in_place: whether it is an earlier state of this pack."""
        loaded = {
            name: self.packed(name)
            for name, adapter in self._adapters.items()
            if not (in_place and isinstance(adapter, Entry))
        }
        if not in_place:
            # of adapters that were selected from another pack, parents may be missing
            loaded = share_codes(loaded)
        # made one at a time: all files together would double the memory
        files = LazyMapping(
            dict(sorted(loaded.items())),
            lambda name: adapter_files.to_files(loaded[name], self.info.fingerprint, self._coefficient_storage),
        )
        entries = {name: adapter for name, adapter in self._adapters.items() if isinstance(adapter, Entry)}
        entries |= {name: Entry.of(loaded[name], content) for name, content in files.items()}
        version = manifest.written_format(self.coefficient_storage)
        if in_place and previous is not None and (previous.subspace, previous.format_version) == (self.info, version):
            subspace, file, sha256 = None, previous.subspace_file, previous.subspace_sha256
        else:
            # bases that were read from another format have other tensors there
            self.info = replace(self.info, stored_bytes=self.subspace.stored_bytes)
            subspace = subspace_file.to_bytes(self.subspace, self._storage)
            sha256 = atomic_files.digest(subspace)
            file = keys.subspace_file(sha256)
        new = Manifest(
            format_version=version,
            base_model=self.base_model,
            revision=self.revision,
            fit=self.fit_info,
            subspace=self.info,
            subspace_file=file,
            subspace_sha256=sha256,
            coefficient_dtype=self.coefficient_storage,
            adapters=dict(sorted(entries.items())),
        )
        self._folder = writer.write(target, previous, new, subspace, files)
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
            share_codes({name: self.packed(name) for name in names}),
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
