"""`Pack`: a subspace and adapters as coefficients in it, with methods to open, change, export, save and share it."""

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import formats
from ..codec.storage.table import CODED, storage_by_name
from ..core import dtypes, keys, registry
from ..core import subspace as spaces
from ..core.options import name_list
from ..core.progress import Progress
from ..core.subspace import Subspace
from ..errors import WARN_ABOVE, OptionError, UntrainedAdapterWarning
from ..formats import sources
from ..formats.gguf.writer import Q8_0
from ..formats.table import BaseConfig
from ..merging.merge import MergedAdapter
from ..merging.merge import merge as merge_adapters
from . import (
    add,
    basis_adapters,
    export,
    folder,
    folder_tensors,
    hub,
    manifest,
    peft_models,
    writer,
)
from .add import AddOptions
from .append import DEFAULT_MAX_ERROR
from .copies import share_codes, warn_of_copies
from .export import ExportErrors, ExportPlan
from .folder import PackFolder
from .history_store import HistoryStore
from .loss_warnings import RESIDUAL_REMEDY, check_warn_above, warn_of_losses
from .manifest import Entry, FitInfo
from .packed_adapter import PackedAdapter
from .prune import remove_named
from .purposes import STORAGE_ERROR
from .record import Record
from .versioned_contents import VersionedContents

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Pack(VersionedContents):
    """A subspace, and adapters as coefficients in it.

    `add`, `add_all` and `remove` change only this object; `save` writes it. A pack from disk reads its tensors when
    they are used, and checks their bytes against the manifest.

    Example:
        >>> pack = eigenlorax.fit("adapters/", max_error=0.1)
        >>> list(pack), pack["a"].ranks
        (['a', 'b', 'c'], (3,))
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Pack":
        """Open the pack in a folder. Only its manifest is read.

        Args:
            path: Folder of the pack.

        Raises:
            PackMissingError: The folder contains no pack.
            PackDamagedError, PackVersionError: The manifest cannot be read.

        Example:
            >>> path = pack.save("pack/")
            >>> eigenlorax.Pack.open("pack/").names
            ['a', 'b', 'c']
        """
        return cls.from_folder(folder.open_pack(Path(path)))

    @classmethod
    def empty(cls, base_model: str | None = None, *, revision: str | None = None) -> "Pack":
        """Return a pack in memory without bases and adapters, for histories (`append`).

        Args:
            base_model: Name or path of the base model. Default: that of the first version.
            revision: Revision of the base model.

        Example:
            >>> runs = eigenlorax.Pack.empty("org/base")
            >>> len(runs), dict(runs.histories)
            (0, {})
        """
        # an entropy-coded pack, because only such packs need no bases
        subspace = Subspace({})
        fit_info = FitInfo(None, None, DEFAULT_MAX_ERROR, None, None, auto=False, weighting="delta", sweeps=0)
        info = manifest.describe(subspace, CODED)
        return cls(subspace, info, {}, fit_info, base_model=base_model, revision=revision, coefficient_dtype=CODED.name)

    @classmethod
    def from_folder(cls, opened: PackFolder) -> "Pack":
        """Return the pack in a folder whose manifest was read, as `open` does."""
        listed = opened.manifest
        pack = cls(
            partial(folder_tensors.read_subspace, opened),
            listed.subspace,
            listed.adapters,
            listed.fit,
            base_model=listed.base_model,
            revision=listed.revision,
            coefficient_dtype=listed.coefficient_dtype,
            basis=cls.from_folder(opened.basis) if opened.basis is not None else None,
            histories=HistoryStore(listed.histories, opened.read_version),
        )
        pack._folder, pack._source_fields = opened, listed.source_fields
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
        """Open the pack in a local folder, or in a repository on the Hub.

        Args:
            source: Folder, or repository as `org/name` or `org/name@revision`.
            adapters: Names of the adapters and histories to download and open; `[]` for the subspace only. A version
                such as "run@1000" selects its history. Default: all.
            revision, token, cache_dir, local_files_only: Options of `huggingface_hub.snapshot_download`.

        Raises:
            PackMissingError: There is no pack.
            PackDamagedError, PackVersionError: The pack cannot be read.
            AdapterNameError: The pack has no adapter of a name in `adapters`.

        Example:
            >>> path = pack.save_pretrained("pack/")
            >>> eigenlorax.Pack.from_pretrained("pack/", adapters=["a"]).names
            ['a']
        """
        return cls.from_folder(
            hub.open_folder(
                os.fspath(source),
                name_list(adapters) if adapters is not None else None,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    def remember(self) -> None:
        """Register the subspace for the tuner, which finds it by fingerprint, until the process ends.

        Fingerprints that the subspace had before it was augmented or extended are registered as well, and so are those
        of `basis`.

        Example:
            >>> pack.remember()
            >>> config = eigenlorax.EigenLoraxConfig(subspace_fingerprint=pack.info.fingerprint)
        """
        for fingerprint in self.info.lineage:
            if fingerprint is not None:
                reopen = partial(_reopen, self.path.absolute(), fingerprint) if self.path is not None else lambda: self
                registry.register(fingerprint, reopen)
        if self.basis is not None:
            self.basis.remember()

    @property
    def training_pack(self) -> "Pack":
        """The pack in whose bases new adapters are trained: `basis` if there is one, else the pack itself."""
        return self.basis if self.basis is not None else self

    def with_subspace(self, fingerprint: str) -> "Pack | None":
        """Return the pack or its basis, the one that has or had the subspace of this fingerprint; None if neither.

        Example:
            >>> pack.with_subspace(pack.info.fingerprint) is pack
            True
        """
        if fingerprint in self.info.lineage:
            return self
        return self.basis.with_subspace(fingerprint) if self.basis is not None else None

    def on_basis(self, within: float | None = None) -> "Pack":
        """Return the adapters that the basis represents well, as coefficients in it, for serving from one basis.

        Args:
            within: Upper bound of the error against the original, up to which an adapter is included: the error in the
                pack, and that of the projection of the pack's update on the basis. Default: 0.1, or twice the error
                bound of the pack if that is more.

        Returns:
            A pack in memory, without the other adapters. The errors in its records are upper bounds.

        Raises:
            OptionError: The pack has no basis, or no adapter is included.

        Example:
            >>> import eigenlorax
            >>> pack = eigenlorax.fit("adapters/", max_error=0.05, basis=4)
            >>> pack.on_basis(0.1).names
            ['a', 'b', 'c']
        """
        basis = basis_adapters.check_has_basis(self)
        within = basis_adapters.check_within(within, self, "within")
        projected = {name: basis_adapters.project(self, name) for name in self.names}
        return Pack(
            basis.subspace,
            basis.info,
            basis_adapters.select_within(projected, within),
            basis.fit_info,
            base_model=self.base_model,
            revision=self.revision,
            coefficient_dtype=basis_adapters.COEFFICIENT_DTYPE,
        )

    @classmethod
    @contextmanager
    def edit(cls, path: str | os.PathLike[str]) -> Iterator["Pack"]:
        """Open a pack for changes, hold its lock, and save it at the end of the block.

        An error in the block leaves the pack on disk unchanged.

        Args:
            path: Folder of the pack.

        Raises:
            PackMissingError: The folder contains no pack.
            PackBusyError: Another process is writing to the pack.
            OptionError: The folder is a cache of the Hub.

        Example:
            >>> path = pack.save("pack/")
            >>> with eigenlorax.Pack.edit("pack/") as edited:
            ...     edited.remove("a")
            >>> eigenlorax.Pack.open("pack/").names
            ['b', 'c']
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
        n_histories = len(self.histories)
        histories = f", {n_histories} {'history' if n_histories == 1 else 'histories'}" if n_histories else ""
        return f"<Pack of {len(self)} adapters of {base}, {len(self.info.modules)} modules{histories}{where}>"

    def export(
        self,
        directory: str | os.PathLike[str],
        names: str | Sequence[str] | None = None,
        *,
        format: str | None = None,
        dtype: str | torch.dtype | None = None,
        overwrite: bool = False,
        base_config: BaseConfig | None = None,
        modelfile: str | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Path]:
        """Write adapters as ordinary LoRAs, and return the path of each by name.

        An adapter whose source was a PEFT folder becomes the folder `directory`/NAME. An adapter whose source was a
        single file becomes `directory`/NAME.safetensors in the same format. A version "run@1000" becomes `run-1000`.
        All adapters are checked before anything is written.

        Args:
            directory: Folder of the exported adapters.
            names: Adapters to export, and versions such as "run@1000" or "run@latest". Default: all adapters.
            format: "peft", "gguf", "kohya" or "diffusers", for all adapters. Default: the format of each adapter's
                source.
            dtype: Dtype of the factors. Default: the widest dtype of each adapter's source; for adapters of older
                packs, which do not record it, the default of `adapter`. "q8_0" for "gguf" only.
            overwrite: Replace existing files and folders.
            base_config: For "gguf", the folder with the base model's `config.json`, that file, or its fields.
            modelfile: For "gguf", a model of Ollama: NAME.Modelfile beside NAME.gguf starts from it.
            progress: Callback with the arguments (stage, done, total), called before each adapter.

        Returns:
            The path of each exported adapter, by name.

        Raises:
            AdapterNameError: The pack has no adapter of a name.
            ModuleNameError: The format cannot name a module.
            NonFiniteError: Numbers are outside the range of the dtype.
            PackExistsError, FileExistsError: A path exists, and `overwrite` is not set.

        Example:
            >>> paths = pack.export("loras/", ["a", "b"], dtype="float16")
            >>> paths["a"].name
            'a'
        """
        wanted = list(dict.fromkeys(name_list(names))) if names is not None else self.names
        is_gguf = format == formats.GGUF
        is_quantised = is_gguf and dtype == Q8_0
        parsed = torch.float32 if is_quantised else dtypes.parse(dtype)
        if format is not None:
            formats.writable(format)
        if not is_gguf and (base_config is not None or modelfile is not None):
            raise OptionError("base_config and modelfile (--base-config, --modelfile) need format='gguf'.")
        gguf = export.gguf_plan(base_config, is_quantised, modelfile) if is_gguf else None
        for name in wanted:
            if name not in self.history_store:
                self._check_has(name)
        targets = {name: format or self._format(name) for name in wanted}
        plan = ExportPlan(Path(directory), targets, parsed, overwrite, gguf)
        return export.export_adapters(self, plan, progress)

    def _format(self, name: str) -> str:
        """Return the format of an adapter's source, from the manifest alone if possible."""
        if name in self.history_store:
            return formats.format_of(self.history_store.find(name)[1].origin)
        adapter = self._adapters[name]
        if isinstance(adapter, Entry) and keys.SOURCE_FILE not in adapter.files:
            return formats.PEFT
        return formats.format_of(self.packed(name).origin)

    def export_rounding(self, name: str, dtype: str | torch.dtype | None = None) -> float:
        """Return the relative error that rounding to `dtype` on export adds to an adapter's update.

        The error of the pack itself is `delta_error` in the adapter's record.

        Args:
            name: Name of the adapter.
            dtype: Dtype of the factors, as in `export`.

        Raises:
            AdapterNameError: The pack has no adapter of this name.
            OptionError: The dtype is not a float dtype.

        Example:
            >>> pack.export_rounding("a", "float16") < 0.001
            True
        """
        return self.export_errors(name, dtype).rounding

    def export_errors(self, name: str, dtype: str | torch.dtype | None = None) -> ExportErrors:
        """Return the dtype of an exported adapter, its errors from the pack and from rounding, and a bound of both.

        Args:
            name: Name of the adapter.
            dtype: Dtype of the factors, as in `export`.

        Raises:
            AdapterNameError: The pack has no adapter of this name.
            OptionError: The dtype is not a float dtype.

        Example:
            >>> errors = pack.export_errors("a", "bfloat16")
            >>> errors.dtype, errors.bound < 0.01
            ('bfloat16', True)
        """
        return export.export_errors(self, name, Q8_0 if dtype == Q8_0 else dtypes.parse(dtype))

    def merge(self, names: Sequence[str], method: str = "mean", **options: Any) -> MergedAdapter:
        """Merge adapters of the pack into one LoRA. The pack does not change: `add` puts the result into it.

        Args:
            names: Names of two or more adapters, or of versions.
            method: "mean", "task-arithmetic", "ties", "dare", "knots", "tsv" or "iso-c".
            options: Further arguments of `eigenlorax.merge`: weights, rank, density, seed, head, name, progress.

        Raises:
            AdapterNameError: A name is unknown, or listed twice.
            FormatError, OptionError: As `eigenlorax.merge`.

        Example:
            >>> merged = pack.merge(["a", "b"], "task-arithmetic", weights=[0.7, 0.3], rank=4)
            >>> [source.name for source in merged.comparison.sources if source.kept > 0.5]
            ['a']
        """
        listed = name_list(names)
        adapters = [self.adapter(name) for name in listed]
        stored = {name: self.records[name] for name in listed if name in self.records}
        warn_of_losses(stored, STORAGE_ERROR, "Merge their originals, to merge all of them.")
        if options.get("head") in listed:
            # a version may be named as run@latest
            options["head"] = adapters[listed.index(options["head"])].name
        return merge_adapters(adapters, method, **options)

    def add(
        self,
        source: sources.Source,
        *,
        name: str | None = None,
        extend: int | None = None,
        carry_missing: bool = False,
        residual: bool = False,
        same_base: bool = False,
        warn_above: float = WARN_ABOVE,
        **options: Any,
    ) -> Record:
        """Project one adapter on the subspace, add it, and return its record with its error.

        Args:
            source: Folder, file, URL, Hub id or `Adapter`.
            name: Name of the adapter in the pack. Default: its own.
            extend: Maximum number of components to append to each side of each module. The components that reduce the
                error most are appended. Adapters in the pack do not change. Default: none.
            carry_missing: Store modules that the subspace lacks unchanged, instead of raising `ModuleNameError`.
            residual: Store what the bases do not represent of the adapter as well, so that only rounding is lost. It
                takes about as many bytes as the LoRA.
            same_base: Accept an adapter that names another base model.
            warn_above: Delta error, 0 to 1, above which a `LossWarning` is issued; 1 disables it.
            options: Options of `read_adapter`.

        Raises:
            AdapterNameError: The pack already has an adapter of this name.
            BaseModelError, ModuleNameError, ShapeError: The adapter does not belong to the pack.
            OptionError: An option is invalid.

        Example:
            >>> pack.remove("a")
            >>> pack.add("adapters/a", name="again").delta_error < 0.01
            True
        """
        (record,) = self._add(
            [sources.single(name, source)],
            AddOptions(extend, carry_missing, residual, same_base, options),
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
        residual: bool = False,
        same_base: bool = False,
        warn_above: float = WARN_ABOVE,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, Record]:
        """Add several adapters, and return their records by name. If one of them fails, none is added.

        Args:
            adapters: Adapters in any form that `fit` takes.
            extend: Maximum number of components to append per side, for all adapters together. Default: none.
            carry_missing, residual, same_base, warn_above, options: Arguments of `add`.
            progress: Callback with the arguments (stage, done, total).

        Raises:
            AdapterNameError, BaseModelError, ModuleNameError, ShapeError, OptionError: As `add`.

        Example:
            >>> pack.remove("a", "b")
            >>> records = pack.add_all(["adapters/a", "adapters/b"])
            >>> sorted(records)
            ['a', 'b']
        """
        adapter_sources = sources.find_adapters(adapters, **options)
        report = progress or (lambda stage, done, total: None)
        return self._add(
            adapter_sources,
            AddOptions(extend, carry_missing, residual, same_base, options),
            check_warn_above(warn_above),
            report,
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
        if storage_by_name(self.coefficient_storage).keeps_factors and not self.is_coded:
            warn_of_losses(records, warn_above, RESIDUAL_REMEDY, stacklevel=4)
        else:
            warn_of_losses(records, warn_above, stacklevel=4)
        warn_of_copies(addition.copies, self.records | records, as_references=self.is_coded)
        if addition.subspace is not self.subspace:
            # adapters in memory were encoded in the subspace before the extension
            self._adapters = {
                name: adapter if isinstance(adapter, Entry) else self._with_fingerprint(name)
                for name, adapter in self._adapters.items()
            }
            self._subspace = addition.subspace
            self.info = manifest.describe(addition.subspace, self._storage, self.reference_tensors)
        self._adapters |= addition.adapters
        self.base_model = self.base_model or addition.base_model
        self.revision = self.revision or addition.revision
        return records

    def remove(self, *names: str) -> None:
        """Remove adapters, but no components, and histories or versions of them.

        Args:
            names: Names of adapters, histories and versions ("run@1000"). A history without versions is removed. All
                other versions decode to the same numbers as before.

        Raises:
            AdapterNameError: A name is unknown. Nothing is removed then.

        Example:
            >>> pack.remove("a")
            >>> pack.names
            ['b', 'c']
        """
        store = self.history_store
        removed = {name for name in names if name not in store.histories and name not in store}
        for name in removed:
            self._check_has(name)
        remove_named(store, [name for name in names if name not in removed])
        orphans = {
            name: self.packed(name)
            for name, adapter in self._adapters.items()
            if adapter.parent in removed and name not in removed
        }
        self._adapters = {name: adapter for name, adapter in self._adapters.items() if name not in removed}
        # the codes that they had in common go to one of them
        self._adapters |= share_codes(orphans)

    def augment(self, n_extra: int, seed: int) -> "Pack":
        """Return a pack whose bases have additional random components, for training new tasks.

        The components are orthonormal to the others. Updates of the adapters do not change. If the pack has a `basis`,
        only that is augmented. An entropy-coded pack without one gets a note (`Pack.notes`), because it has few other
        components to train.

        Args:
            n_extra: Number of random components per side.
            seed: Seed of the components.

        Raises:
            OptionError: The seed was used before, or the pack has no bases.
            ShapeError: A basis would have more components than dimensions.

        Example:
            >>> wider = pack.augment(2, seed=7)
            >>> wider.info.n_extra
            2
        """
        if not self.info.modules:
            raise OptionError("The pack has no bases to augment, but histories only. Fit a pack of adapters.")
        adapters = {name: self._with_fingerprint(name) for name in self.names}
        if self.basis is not None:
            return self._copy(adapters, basis=self.basis.augment(n_extra, seed))
        augmented = self._copy(adapters, subspace=spaces.augment(self.subspace, n_extra, seed))
        if self.is_coded:
            augmented.notes.append(basis_adapters.RANDOM_COMPONENTS_NOTE)
        return augmented

    def _copy(
        self,
        adapters: Mapping[str, PackedAdapter],
        *,
        subspace: Subspace | None = None,
        basis: "Pack | None" = None,
    ) -> "Pack":
        """Return a pack in memory with these adapters, and another subspace or basis if one is passed."""
        if basis is None and self.basis is not None:
            # saving the copy gives its basis another folder
            basis = self.basis._copy({})
        copied = Pack(
            self.subspace if subspace is None else subspace,
            self.info if subspace is None else manifest.describe(subspace, self._storage, self.reference_tensors),
            adapters,
            self.fit_info,
            base_model=self.base_model,
            revision=self.revision,
            coefficient_dtype=self.coefficient_storage,
            basis=basis,
            reference_tensors=self.reference_tensors,
            histories=self.history_store.copied(),
        )
        copied._source_fields = self._source_fields
        return copied

    def save(self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Path:
        """Write the pack to a folder, completely or not at all, and return the folder.

        Args:
            path: Folder of the pack. Default: the folder from which it was opened.
            overwrite: Replace another pack in this folder.

        Raises:
            PackExistsError: The folder contains another pack and `overwrite` is not set, or it contains other files.
            PackBusyError: Another process changed this pack since it was opened.
            OptionError: The path is missing, or cannot be used for this pack.

        Example:
            >>> path = pack.save("pack/")
            >>> sorted(pack.names) == sorted(child.name for child in (path / "adapters").iterdir())
            True
        """
        target = Path(path) if path is not None else self.path
        if target is None:
            raise OptionError("This pack is not on disk yet: pass a path, pack.save('pack/').")
        writer.check_no_cache(target)
        opened = self._folder if self._folder is not None and self._folder.is_at(target) else None
        if opened is not None and opened.is_partial:
            raise OptionError(
                f"Only a part of the pack in {target} was opened, so saving it there would remove its other adapters. "
                "Save it to another path, or open the whole pack."
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
        """Write the pack to a folder, and return the folder. As in transformers, an existing pack is replaced.

        Args:
            save_directory: The folder.
            push_to_hub: Also upload the pack.
            repo_id: Repository to upload to. Default: the name of the folder.
            hub_options: Other arguments of `push_to_hub`.

        Raises:
            PackExistsError: The folder contains other files than those of a pack.
            PackBusyError: Another process changed this pack since it was opened.

        Example:
            >>> path = pack.save_pretrained("pack/")
            >>> len(eigenlorax.Pack.from_pretrained("pack/"))
            3
        """
        if not push_to_hub and (repo_id is not None or hub_options):
            unused = ["repo_id"] if repo_id is not None else sorted(hub_options)
            raise OptionError(f"{unused[0]} has no effect without push_to_hub=True.")
        path = self.save(save_directory, overwrite=True)
        if push_to_hub:
            self.push_to_hub(repo_id or path.absolute().name, **hub_options)
        return path

    def load_into(self, model: Any, names: str | Sequence[str] | None = None) -> None:
        """Load adapters into a `PeftModel`, under their names in the pack.

        They become ordinary LoRAs, or coefficients over one basis if the model's adapters were made with an
        `EigenLoraxConfig`; versions ("run@1000") become ordinary LoRAs only. `model.set_adapter` activates one of them.
        For diffusers pipelines, use `eigenlorax.load_into`.

        Args:
            model: A `PeftModel` of the pack's base model.
            names: Adapters and versions to load. Default: all adapters.

        Raises:
            OptionError: The object is not a `PeftModel`, or has adapters of other types.
            AdapterNameError: A name is unknown, or the model already has an adapter of that name.
            ModuleNameError: The model lacks a module of an adapter.

        Example:
            >>> import peft
            >>> peft_model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
            >>> eigenlorax.Pack.open("lm-pack/").load_into(peft_model, "a0")
            >>> peft_model.set_adapter("a0")
        """
        wanted = list(dict.fromkeys(name_list(names))) if names is not None else self.names
        for name in wanted:
            if name not in self.history_store:
                self._check_has(name)
        peft_models.load_into(self, model, wanted)

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
        license: str | None = None,
    ) -> "CommitInfo":
        """Upload the pack to a repository on the Hub in one commit, and return the commit.

        An existing pack is replaced: adapters that this pack lacks are deleted, and the model card is written again.
        Other files do not change. Unsaved changes of this pack are uploaded too.

        Args:
            repo_id: Repository as `org/name`, which is created if it does not exist.
            adapters: Names of the adapters and histories to upload. Default: all.
            private: True to create a private repository; an existing public one raises an error. Default: the default
                of the account.
            revision: Branch, which is created if it does not exist. Default: the main branch.
            commit_message: Message of the commit. Default: a message with the number of adapters.
            token: Access token, True for the stored one, False for none. Default: the stored one, if any.
            create_pr: Open a pull request to the main branch, instead of committing to it.
            license: Identifier of the licence that the model card states, such as "apache-2.0". Default: that of all
                adapters, if their sources state the same one.

        Raises:
            AdapterNameError: The pack has no adapter of a name in `adapters`.
            OptionError: The licence is no identifier.

        Example:
            >>> path = pack.save("pack/")
            >>> commit = pack.push_to_hub("org/my-pack", private=True)  # doctest: +SKIP
        """
        histories = list(self.histories)
        selected = [*self.names, *histories] if adapters is None else sorted(set(name_list(adapters)))
        names = [name for name in selected if name not in histories]
        pushed = self._copy(share_codes({name: self.packed(name) for name in names}))
        pushed.history_store = self.history_store.copied(selected)
        with tempfile.TemporaryDirectory() as temporary:
            return hub.push(
                pushed.save(Path(temporary) / "pack"),
                repo_id,
                private=private,
                revision=revision,
                message=commit_message,
                token=token,
                create_pr=create_pr,
                license=license,
            )


def _reopen(path: Path, fingerprint: str) -> Pack | None:
    """Open the pack in a folder, and return it or its basis, the one with this subspace; None if it was replaced."""
    return Pack.open(path).with_subspace(fingerprint)
