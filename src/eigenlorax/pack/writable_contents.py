"""Contents of a pack that can be written: files of adapters and bases that are not on disk, and the manifest."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..core import atomic_files, keys
from ..core.adapter import LazyMapping
from . import adapter_files, source_configs, subspace_file, writer
from .contents import PackContents
from .copies import share_codes
from .manifest import Entry, Manifest


class WritableContents(PackContents):
    """Contents of a pack that can be written to a folder."""

    def _write(self, target: Path, previous: Manifest | None, in_place: bool) -> None:
        """Write the pack, whose lock is held.

        Args:
            target: Folder of the pack.
            previous: Manifest in this folder; None if there is none that can be read.
            in_place: True if the folder contains an earlier state of this pack.
        """
        loaded = {
            name: self.packed(name)
            for name, adapter in self._adapters.items()
            if not (in_place and isinstance(adapter, Entry))
        }
        if not in_place:
            # of adapters that were selected from another pack, parents may be missing
            loaded = share_codes(loaded)
        # files that stay on disk differ from the fields that are in the manifest already
        if not self._source_fields and len(loaded) == len(self):
            self._source_fields = source_configs.shared_fields(
                (packed.source_config for packed in loaded.values()), self.info.modules
            )
        context = adapter_files.WritingContext(
            self.info.fingerprint, self._coefficient_storage, self.info.modules, self._source_fields
        )
        # files are made one adapter at a time, because all together would double the memory
        files = LazyMapping(dict(sorted(loaded.items())), lambda name: adapter_files.to_files(loaded[name], context))
        entries = {name: adapter for name, adapter in self._adapters.items() if isinstance(adapter, Entry)}
        entries |= {name: Entry.of(loaded[name], content) for name, content in files.items()}
        new, bases = self._list(entries, previous if in_place else None)
        new = replace(new, source_fields=self._source_fields, histories=dict(self.history_store.histories))
        versions = self.history_store.files(in_place=in_place)
        named_by_content = LazyMapping(
            dict.fromkeys([*bases, *versions]), lambda file: bases[file] if file in bases else versions[file]
        )
        self._folder = writer.write(target, previous, new, named_by_content, files)
        self._adapters = dict(new.adapters)
        self.history_store.saved(self._folder.read_version)
        if self.basis is not None:
            self.basis._folder = self._folder.basis

    def _list(self, entries: Mapping[str, Entry], previous: Manifest | None) -> tuple[Manifest, dict[str, bytes]]:
        """Return the manifest of the pack, and by name the files of bases that are not on disk.

        Args:
            entries: Entries of the adapters, by name.
            previous: Manifest of an earlier state of this pack in the same folder; None if there is none.
        """
        basis: Manifest | None = None
        bases: dict[str, bytes] = {}
        if self.basis is not None:
            basis, bases = self.basis._list({}, previous.basis if previous is not None else None)
        has_bases = previous is not None and previous.format_version >= keys.BASES_VERSION
        if previous is not None and has_bases and previous.subspace == self.info:
            file, sha256 = previous.subspace_file, previous.subspace_sha256
        else:
            # bases that were read from another format have other tensors there
            stored_bytes = self.subspace.stored_bytes + len(self.reference_tensors.data)
            self.info = replace(self.info, stored_bytes=stored_bytes)
            content = subspace_file.to_bytes(self.subspace, self._storage, self.reference_tensors)
            sha256 = atomic_files.digest(content)
            file = keys.subspace_file(sha256)
            bases[file] = content
        listed = Manifest(
            format_version=keys.FORMAT_VERSION,
            base_model=self.base_model,
            revision=self.revision,
            fit=self.fit_info,
            subspace=self.info,
            subspace_file=file,
            subspace_sha256=sha256,
            coefficient_dtype=self.coefficient_storage,
            adapters=dict(sorted(entries.items())),
            basis=basis,
        )
        return listed, bases
