"""The file of a pack's subspace: bases of every module, and reference tensors of coded heads.

Random components are rebuilt from seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..codec.storage.base import Storage
from ..codec.storage.coded import blob, tensor_bytes
from ..codec.storage.table import storage_by_name
from ..codec.tensor_codes import References
from ..core import basis as bases
from ..core import keys
from ..core.basis import Basis
from ..core.limits import REBUILDING_BYTES, check_expansion
from ..core.subspace import ModuleBases, Subspace
from ..errors import PackDamagedError
from .manifest import SOLVERS, Manifest

# random components differ in their last bits between machines; check sums add all entries of a row
_CHECK_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class StoredSubspace:
    """Contents of the file.

    Attributes:
        subspace: The subspace.
        references: Reference tensors of coded heads.
    """

    subspace: Subspace
    references: References


def to_bytes(subspace: Subspace, storage: Storage, references: References) -> bytes:
    """Return the file of a subspace: components, singular values, check sums of random components, references."""
    tensors = storage.subspace_tensors(subspace)
    if references:
        tensors[keys.REFERENCES] = blob(references.data)
    for name, pair in subspace.modules.items():
        for side in keys.SIDES:
            basis = pair.side(side)
            if basis.n_extra:
                tensors[keys.extra_check_key(name, side)] = bases.augmentation_checksums(basis)
    return to_safetensors(tensors, metadata={"format": "pt"})


def from_bytes(data: bytes, manifest: Manifest, path: Path) -> StoredSubspace:
    """Read the file, rebuild random components from their seeds, and compare the bases with the manifest.

    Errors of parsers are not translated here: call it within `limits.damaged_on_error`.
    """
    tensors: Mapping[str, Tensor] = from_safetensors(data)
    references = References()
    if keys.REFERENCES in tensors:
        references = References.from_bytes(tensor_bytes(tensors, keys.REFERENCES))
    info, storage = manifest.subspace, storage_by_name(manifest.subspace.dtype)
    size = sum(tensor.nbytes for tensor in tensors.values())
    rebuilt = [side.dimension * info.n_extra for pair in info.modules.values() for side in pair.values()]
    # the rows of all sides stay in memory, and one side after the other is rebuilt
    needed = sum(rebuilt) * storage.dtype.itemsize + max(rebuilt, default=0) * REBUILDING_BYTES
    check_expansion(needed, size, "the augmented rows of the bases")
    if (keys.CODED_COMPONENTS in tensors) != (storage.is_coded and manifest.format_version >= 6):
        raise ValueError(f"the bases are not in the form of format {manifest.format_version}")
    tensors = storage.decode_bases(
        tensors,
        {
            keys.components_key(name, s): (pair[s].k - sum(pair[s].grown), pair[s].dimension)
            for name, pair in sorted(info.modules.items())
            for s in keys.SIDES
        },
    )
    modules = {}
    for name in info.modules:
        down, up = (_basis(tensors, name, side, manifest) for side in keys.SIDES)
        modules[name] = ModuleBases(down, up)
    subspace = Subspace(modules)
    _check_lineage(subspace, manifest, path)
    if info.n_extra:
        _check_augmentation(subspace, tensors, path)
    return StoredSubspace(subspace, references)


def _basis(tensors: Mapping[str, Tensor], name: str, side: str, manifest: Manifest) -> Basis:
    """Return one basis with its rows in the order of coefficients: random components between stored ones."""
    info, storage = manifest.subspace.modules[name][side], storage_by_name(manifest.subspace.dtype)
    steps = list(zip(info.grown, manifest.subspace.growth, strict=True))
    stored = {index: n for index, (n, step) in enumerate(steps) if step.seed is None}
    fitted = info.k - sum(info.grown)
    values = torch.zeros(0) if storage.is_coded else _spectrum(tensors, keys.singular_values_key(name, side))
    (rows, payload), *more = storage.read_components(
        tensors, keys.components_key(name, side), fitted, stored, info.dimension
    )
    basis = Basis(rows, values, info.energy, shortfall=info.shortfall, payload=payload)
    if manifest.fit.solver != SOLVERS[0] or payload is not None:
        basis = replace(basis, tail=max(info.square - basis.square, 0.0))
    appended = iter(more)
    for n, step in steps:
        if step.seed is not None:
            _check_extra(tensors, keys.extra_check_key(name, side), manifest.subspace.n_extra)
            basis = bases.augment(basis, n, step.seed, f"{name}.{side}")
        else:
            basis = bases.extend(basis, *next(appended))
    if not bool(basis.components.isfinite().all()):
        raise ValueError(f"the components of {name}.{side} are not finite")
    return basis


def _spectrum(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """Return the singular values of a side; `ValueError` if the tensor has a wrong shape, dtype or value."""
    values = tensors[key]
    if values.dtype != torch.float32 or values.dim() != 1 or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"{key} is {tuple(values.shape)}, {values.dtype}, and should be finite numbers of at least 0")
    return values


def _check_extra(tensors: Mapping[str, Tensor], key: str, n_extra: int) -> None:
    """Raise `ValueError` unless there is one check sum per random component, before the components are rebuilt."""
    sums = tensors[key]
    if sums.dtype != torch.float32 or tuple(sums.shape) != (n_extra,):
        raise ValueError(f"{key} is {tuple(sums.shape)}, {sums.dtype}, and should be {(n_extra,)}, torch.float32")


def _check_augmentation(subspace: Subspace, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `PackDamagedError` unless the rebuilt random components have the stored check sums."""
    for name, pair in subspace.modules.items():
        for side in keys.SIDES:
            rebuilt, expected = bases.augmentation_checksums(pair.side(side)), tensors[keys.extra_check_key(name, side)]
            if not torch.allclose(rebuilt, expected, rtol=0, atol=_CHECK_TOLERANCE):
                raise PackDamagedError(
                    f"{path}: this machine rebuilds the random components of {name}.{side} differently from the one "
                    f"that wrote the pack (seeds {[a.seed for a in subspace.augmentations]}). Their coefficients would "
                    "mean other updates here. Please report it with the output of `eigenlorax env`."
                )


def _check_lineage(subspace: Subspace, manifest: Manifest, path: Path) -> None:
    """Raise `PackDamagedError` unless the bases have all fingerprints of the manifest's lineage."""
    for expected, actual in zip(manifest.subspace.lineage, subspace.lineage, strict=True):
        if expected not in (None, actual):
            raise PackDamagedError(
                f"{path}: its rows have the fingerprint {actual[:12]}…; by {keys.MANIFEST} it is {expected[:12]}…. "
                "Make the pack again, with another tool or release."
            )
