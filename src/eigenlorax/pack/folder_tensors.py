"""Tensors of a pack on disk: its bases, and adapters as coefficients in them."""

from dataclasses import replace

from torch import Tensor

from ..codec.storage.table import storage_by_name
from ..core import keys
from ..core.limits import damaged_on_error
from ..formats import safetensors_file
from . import adapter_files, subspace_file
from .adapter_files import ReadingContext
from .folder import PackFolder
from .packed_adapter import PackedAdapter
from .subspace_file import StoredSubspace


def read_subspace(folder: PackFolder) -> StoredSubspace:
    """Read the file of the bases, rebuild random components from their seeds, and compare with the manifest."""
    path = folder.path / folder.manifest.subspace_file
    content = folder.read_bases()
    with damaged_on_error(path):
        return subspace_file.from_bytes(content, folder.manifest, path)


def read_adapter(folder: PackFolder, name: str, context: ReadingContext) -> PackedAdapter:
    """Read one adapter and check every byte of it."""
    location = folder.adapter(name)
    entry = location.entry
    files = folder.read_files(name)
    codes = read_codes(folder, entry.parent) if entry.parent is not None else None
    storage = storage_by_name(folder.manifest.coefficient_dtype)
    with damaged_on_error(location.own):
        packed = adapter_files.from_files(name, files, entry, storage, context, codes)
    # a parent that was not selected is not in this pack
    return packed if entry.parent in (None, *folder.manifest.adapters) else replace(packed, parent=None)


def read_codes(folder: PackFolder, name: str) -> Tensor:
    """Read the codes of an adapter that has no parent, in an entropy-coded pack."""
    weights = folder.read_files(name, [keys.ADAPTER_WEIGHTS])[keys.ADAPTER_WEIGHTS]
    with damaged_on_error(folder.adapter(name).own):
        return safetensors_file.from_bytes(weights, keys.ADAPTER_WEIGHTS)[keys.CODED]
