"""The subspace of a whole model: a pair of orthonormal bases for every module, and how it grows.

Each module has a down basis V, which spans rows of the LoRA factor A, and an up basis U, which spans columns of B
(docs/method.md, "Updates, bases and coefficients"). `exact_fit` and `iterative` find the bases, `projection` computes
coefficients in them.

A subspace may grow after its fit, by augmentation (random components from a seed) or extension (components of new
adapters). Growth appends rows to every basis and changes none, so that coefficients that refer to an earlier state
stay valid. Each state has a fingerprint.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from . import basis, dtypes
from .augmentation import Augmentation
from .basis import Basis
from .options import to_int


@dataclass(frozen=True, slots=True)
class ModuleBases:
    """The two bases of one module: `down` for rows of width in_features, `up` for rows of width out_features."""

    down: Basis
    up: Basis

    def side(self, side: str) -> Basis:
        """Return the basis of a side, "down" or "up"."""
        return self.down if side == "down" else self.up

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (out_features, in_features)."""
        return self.up.dimension, self.down.dimension


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Subspace:
    """The bases of every module of one model.

    Attributes:
        modules: Bases by module name, in sorted order.

    Raises:
        OptionError: The bases have not grown by the same steps.

    Example:
        >>> bases = pack.subspace.modules["encoder.layer.0.query"]
        >>> bases.shape, bases.down.k, bases.up.k
        ((17, 11), 4, 4)
    """

    modules: Mapping[str, ModuleBases]

    def __post_init__(self) -> None:
        histories = {tuple(growth.seed for growth in side.growth) for side in self._sides()}
        if len(histories) > 1:
            raise OptionError(
                f"all bases of a subspace must have grown by the same steps; here they have {len(histories)} different "
                "histories."
            )

    def _sides(self) -> Iterator[Basis]:
        return (module.side(side) for module in self.modules.values() for side in ("down", "up"))

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Seed of each growth step, in order: the seed of an augmentation, None for an extension."""
        return next((tuple(growth.seed for growth in side.growth) for side in self._sides()), ())

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """The augmentations among the growth steps, in order."""
        first = next(self._sides(), None)
        steps = first.growth if first is not None else ()
        return tuple(Augmentation(growth.n, growth.seed) for growth in steps if growth.seed is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the stored components."""
        stored = {side.components.dtype for side in self._sides()}
        widest = stored.pop()
        for dtype in stored:
            widest = torch.promote_types(widest, dtype)
        return widest

    @property
    def dtype_name(self) -> str:
        """Name of `dtype`, such as "float16"."""
        return dtypes.name(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Tensor bytes of the subspace file: stored components, spectra and the checksums of augmented rows."""
        return sum(side.row_bytes + side.singular_values.nbytes + 4 * side.n_extra for side in self._sides())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that coefficients refer to: names, shapes, dtypes, components and augmentations.

        Augmented rows enter by their seed: their last bits may differ from one machine to another.
        """
        return self.lineage[-1]

    @property
    def lineage(self) -> tuple[str, ...]:
        """The fingerprints of all states: as fitted, then after each growth step. The last one is `fingerprint`."""
        digest = sha256()
        for name, bases in sorted(self.modules.items()):
            for side in ("down", "up"):
                _hash_rows(digest, name, side, bases.side(side).fitted)
        # one running digest: each state's fingerprint covers the states before it
        fingerprints = [digest.hexdigest()]
        for step, seed in enumerate(self.seeds):
            if seed is not None:
                n_extra = next(self._sides()).growth[step].n
                digest.update(f"augmentation\0{n_extra}\0{seed}\0".encode())
            else:
                digest.update(b"extension\0")
                for name, bases in sorted(self.modules.items()):
                    for side in ("down", "up"):
                        if bases.side(side).growth[step].n:
                            _hash_rows(digest, name, side, bases.side(side).grown(step))
            fingerprints.append(digest.hexdigest())
        return tuple(fingerprints)

    def at(self, fingerprint: str) -> "Subspace | None":
        """Return the state with this fingerprint as a view of this subspace; None if there is none.

        Example:
            >>> pack.subspace.at(pack.info.fingerprint) is pack.subspace
            True
        """
        # computed once: it hashes all components
        lineage = self.lineage
        if fingerprint not in lineage:
            return None
        return self.before(lineage.index(fingerprint))

    def before(self, step: int) -> "Subspace":
        """Return the state before growth step `step` as a view; itself after the last step.

        Example:
            >>> pack.augment(2, seed=7).subspace.before(0).fingerprint == pack.subspace.fingerprint
            True
        """
        if step == len(self.seeds):
            return self
        return Subspace({name: ModuleBases(b.down.before(step), b.up.before(step)) for name, b in self.modules.items()})


def _hash_rows(digest: Any, name: str, side: str, rows: Tensor) -> None:
    digest.update(f"{name}\0{side}\0{tuple(rows.shape)}\0{rows.dtype}\0".encode())
    digest.update(tensor_bytes(rows))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor of any dtype, without a copy if it is contiguous."""
    # viewed as bytes, because NumPy has no bfloat16
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def to_device(bases: ModuleBases, device: torch.device) -> ModuleBases:
    """Return the bases with their components on `device`."""
    return ModuleBases(
        down=replace(bases.down, components=bases.down.components.to(device)),
        up=replace(bases.up, components=bases.up.components.to(device)),
    )


def round_bases(bases: ModuleBases, dtype: torch.dtype) -> ModuleBases:
    """Return the bases with their components rounded to the dtype that they are stored in."""
    return ModuleBases(
        down=replace(bases.down, components=bases.down.components.to(dtype), payload=None),
        up=replace(bases.up, components=bases.up.components.to(dtype), payload=None),
    )


def empty_bases(in_features: int, out_features: int, dtype: torch.dtype) -> ModuleBases:
    """Return bases without components, for a module that no adapter has trained."""

    def without_components(dimension: int) -> Basis:
        return Basis(torch.zeros(0, dimension, dtype=dtype), torch.zeros(0), energy=1.0)

    return ModuleBases(down=without_components(in_features), up=without_components(out_features))


def augment(subspace: Subspace, n_extra: int, seed: int) -> Subspace:
    """Append `n_extra` random orthonormal components to every basis (arXiv 2502.04700, §3.3).

    Args:
        subspace: The subspace, which stays as it is.
        n_extra: Number of components per side, at least 1.
        seed: Seed from which a reader rebuilds the components. It must differ from the seeds of earlier augmentations.

    Raises:
        OptionError: `seed` was used before.
        ShapeError: A basis would have more components than dimensions.
    """
    n_extra, seed = to_int("n_extra", n_extra), to_int("seed", seed)
    # the same seed would give the same rows again, of which orthogonalisation would leave only rounding errors
    if any(seed == earlier.seed for earlier in subspace.augmentations):
        raise OptionError(
            f"the subspace already has components from seed {seed}, which it would repeat. Choose another seed."
        )
    modules = {
        name: ModuleBases(
            down=basis.augment(bases.down, n_extra, seed, f"{name}.down"),
            up=basis.augment(bases.up, n_extra, seed, f"{name}.up"),
        )
        for name, bases in subspace.modules.items()
    }
    return Subspace(modules)


def extend(
    subspace: Subspace,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    append: Callable[[Basis, Tensor], Basis] = basis.extend,
) -> Subspace:
    """Append components of new adapters to some of the bases.

    Args:
        subspace: The subspace, which stays as it is.
        rows: New rows (down, up) by module name, orthonormal and orthogonal to the components of their basis. At least
            one row in all.
        append: Function that appends rows to a basis, rounded as they will be stored.

    Raises:
        OptionError: `rows` contains no row.
    """
    if not any(len(side) for pair in rows.values() for side in pair):
        raise OptionError("no component to append was passed: every matrix in rows is empty.")
    modules = {}
    for name, bases in subspace.modules.items():
        # every basis takes part in every growth step, with no rows if need be
        no_rows = tuple(torch.zeros(0, side.dimension) for side in (bases.down, bases.up))
        down, up = rows.get(name, no_rows)
        modules[name] = ModuleBases(append(bases.down, down), append(bases.up, up))
    return Subspace(modules)
