"""How components and coefficients lie in a pack's files: one table of storages by name.

Whatever the storage, numbers in memory are ordinary floats. Where rounding to it is not what a cast does, what lies in
the file travels along with them as a *payload*, so that a pack that was read is written again to the byte.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import basis as one
from ..core import chunks, dtypes, keys, linalg
from ..core import subspace as spaces
from ..core.adapter import Lazy
from ..core.basis import Basis
from ..core.boundary import PARSE_FAILURES, as_specified, check_coded
from ..core.chunks import Chunk, CoefficientChunk
from ..core.options import suggestion
from ..core.subspace import Coefficients, Duals, ModuleBases, Subspace
from ..errors import FormatError, OptionError, reason
from . import bitstream, group_integers, joint, singular_codes
from .group_integers import Payload

CODED = "coded"
Rows = tuple[Tensor, Payload | None]
"""Components in memory, and what lies in the file where that is not the same."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of components (k_down, k_up) and widths (n_in, n_out) of a module, as its bases have them."""

    k: tuple[int, int]
    widths: tuple[int, int]

    @classmethod
    def of(cls, bases: ModuleBases) -> "Sizes":
        """Return those of bases in memory."""
        return cls((bases.down.k, bases.up.k), (bases.down.dimension, bases.up.dimension))


@dataclass(frozen=True, slots=True)
class Slot:
    """What is known of one module of an adapter beside its coefficients. place: the module's name in the subspace.

    sizes: what tensors of coefficients must fit; None where that is left to who uses them.
    """

    place: str
    rank: int
    scaling: float
    kernel: tuple[int, ...]
    sizes: Sizes | None = None

    def check(self, module: str, found: Coefficients) -> Coefficients:
        """Return the coefficients of a module; `ValueError` where they are not of its rank, sizes or dtypes."""
        for side, tensor, axis in (("down", found.down, 0), ("up", found.up, 1)):
            if tensor.dtype not in dtypes.STORED or tensor.dim() != 2 or tensor.shape[axis] != self.rank:
                raise ValueError(
                    f"the {side} coefficients of module {module} are {_described(tensor)} and not those of rank "
                    f"{self.rank}"
                )
        if self.sizes is None:
            return found
        if (found.down.shape[1], found.up.shape[0]) != self.sizes.k:
            raise ValueError(f"the coefficients of module {module} do not fit the subspace")
        n_in, n_out = self.sizes.widths
        for side, shape in (("down", (self.rank, n_in)), ("up", (n_out, self.rank))):
            rest = found.rest(side)
            if rest is not None and (tuple(rest.shape) != shape or rest.dtype not in dtypes.STORED):
                raise ValueError(f"the {side} rest of module {module} is {_described(rest)} and not {shape}")
        return found


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype},"


@dataclass(frozen=True, slots=True)
class Storage(ABC):
    """One way to store. dtype: of the numbers in memory."""

    name: str
    dtype: torch.dtype

    @property
    @abstractmethod
    def number_bytes(self) -> float:
        """What a number takes, in a long row."""

    @property
    @abstractmethod
    def lora_itemsize(self) -> int:
        """Bytes of a number of the LoRAs that a pack stored so is compared with."""

    @property
    @abstractmethod
    def keeps_factors(self) -> bool:
        """Whether coefficients are of an adapter's own factors; else of any with the same product."""

    @property
    def pads_rank(self) -> bool:
        """Whether an adapter may have a higher rank than its file has numbers for; rows of zeros fill it up."""
        return False

    @abstractmethod
    def rounded(self, bases: ModuleBases) -> ModuleBases:
        """Bases as they will be read again. What has grown must not be rounded with them: those of a fit have not."""

    @abstractmethod
    def extended(self, basis: Basis, rows: Tensor) -> Basis:
        """A basis of this storage with further rows, orthonormal and orthogonal to what is there, rounded to it."""

    @abstractmethod
    def of_basis(self, basis: Basis, key: str) -> dict[str, Tensor]:
        """The tensors of a basis's stored rows by their names in the subspace's file. key: what floats are called."""

    def opened(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, Tensor]:
        """The tensors of a subspace's file, ready for `rows`. shapes: (k, d) of fitted rows, by their keys."""
        return tensors

    @abstractmethod
    def rows(
        self, tensors: Mapping[str, Tensor], key: str, fitted: int, steps: Mapping[int, int], dimension: int
    ) -> list[Rows]:
        """The inverse of `of_basis`: the fitted rows, and then those of each step of growth that has stored some.

        steps: how many each of those has stored, by its place in the growth. `KeyError` or `ValueError` where the
        tensors are not those.
        """

    @abstractmethod
    def ready(self, one_chunk: Chunk, products: torch.dtype = torch.float64) -> Chunk:
        """The same updates in factors whose coefficients lose little by rounding. products: as for
        `subspace.balanced`."""

    @abstractmethod
    def project(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> CoefficientChunk:
        """The coefficients of adapters that `ready` gave, as they will be read again."""

    def unrounded(self, wide: Chunk, bases: ModuleBases) -> CoefficientChunk | None:
        """The coefficients that `project` rounds, float64; None where these are projections on the two bases."""
        return None

    @abstractmethod
    def of_adapter(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        """An adapter's coefficients, of which there is no payload, as tensors by their names in its file."""

    @abstractmethod
    def adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, Slot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        """The inverse of `of_adapter`, and the payload; both are taken out of the file's `tensors`.

        subspace: what the pack's was when the adapter was written; called where it is needed. `KeyError` or
        `ValueError` where the tensors are not those.
        """


@dataclass(frozen=True, slots=True)
class Floats(Storage):
    """Numbers as they are in memory."""

    @property
    def number_bytes(self) -> float:
        return float(self.dtype.itemsize)

    @property
    def lora_itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def keeps_factors(self) -> bool:
        return True

    def rounded(self, bases: ModuleBases) -> ModuleBases:
        return spaces.rounded(bases, self.dtype)

    def extended(self, basis: Basis, rows: Tensor) -> Basis:
        return one.extend(basis, rows)

    def of_basis(self, basis: Basis, key: str) -> dict[str, Tensor]:
        return {key: basis.stored.clone()}

    def rows(
        self, tensors: Mapping[str, Tensor], key: str, fitted: int, steps: Mapping[int, int], dimension: int
    ) -> list[Rows]:
        numbers, found = [fitted, *steps.values()], tensors[key]
        _check(key, found, (sum(numbers), dimension), self.dtype)
        return [(part, None) for part in torch.split(found, numbers)]

    def ready(self, one_chunk: Chunk, products: torch.dtype = torch.float64) -> Chunk:
        return spaces.balanced(one_chunk, self.dtype, products)

    def project(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> CoefficientChunk:
        return spaces.project_chunk(wide, bases, self.dtype, dual)

    def of_adapter(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        tensors = {}
        for module, c in coefficients.items():
            for side, tensor in (("down", c.down), ("up", c.up)):
                tensors[keys.coefficients_key(module, side)] = tensor
        return tensors | _rests(coefficients)

    def adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, Slot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        found = {}
        for module, slot in slots.items():
            down, up = (tensors.pop(keys.coefficients_key(module, side)) for side in keys.SIDES)
            down_rest, up_rest = (tensors.pop(keys.rest_key(module, side), None) for side in keys.SIDES)
            _check_dtypes(module, (down, up), self.dtype)
            found[module] = slot.check(module, Coefficients(down, up, slot.scaling, slot.kernel, down_rest, up_rest))
        _check_finite(found)
        return found, None


@dataclass(frozen=True, slots=True)
class Integers(Storage):
    """Integers with a scale for each group of a row (`quantised`): a row is a component, or what one term of an update,
    up[:, i] · down[i], has on a side's components."""

    bits: int

    @property
    def number_bytes(self) -> float:
        return self.bits / 8 + torch.float16.itemsize / group_integers.GROUP

    @property
    def lora_itemsize(self) -> int:
        # LoRAs are not kept in integers: a ratio must not gain from floats wider than those that are in use
        return torch.float16.itemsize

    @property
    def keeps_factors(self) -> bool:
        return False

    def rounded(self, bases: ModuleBases) -> ModuleBases:
        return ModuleBases(down=self._rounded(bases.down), up=self._rounded(bases.up))

    def _rounded(self, basis: Basis) -> Basis:
        assert not basis.growth
        rows, payload = self._stored(basis.components)
        # the whole of a spectrum, in float32, would weigh as much as the codes
        first = basis.singular_values[: basis.k].clone()
        short = replace(basis, components=rows, payload=payload, singular_values=first, tail=0.0)
        return replace(short, tail=max(basis.square - short.square, 0.0))

    def extended(self, basis: Basis, rows: Tensor) -> Basis:
        return one.extend(basis, *self._stored(rows))

    def _stored(self, rows: Tensor) -> tuple[Tensor, Payload]:
        payload = group_integers.kept(group_integers.encode(rows.cpu(), self.bits))
        # where there is no row, none says whether the width is odd
        return group_integers.decode(payload) if len(rows) else rows.to(self.dtype), payload

    def of_basis(self, basis: Basis, key: str) -> dict[str, Tensor]:
        steps = [(f"{key}.{step}", one.payload) for step, one in enumerate(basis.growth) if one.seed is None and one.n]
        parts = [(key, basis.payload), *steps]
        return {f"{name}.{part}": tensor for name, payload in parts for part, tensor in (payload or {}).items()}

    def rows(
        self, tensors: Mapping[str, Tensor], key: str, fitted: int, steps: Mapping[int, int], dimension: int
    ) -> list[Rows]:
        parts = [(key, fitted), *((f"{key}.{step}", n) for step, n in steps.items() if n)]
        found = iter([self._read(tensors, name, n, dimension) for name, n in parts])
        none = torch.zeros(0, dimension, dtype=self.dtype), None
        return [next(found), *(next(found) if n else none for n in steps.values())]

    def _read(self, tensors: Mapping[str, Tensor], name: str, n: int, dimension: int) -> Rows:
        payload = _part(tensors, name)
        rows = self._decoded(payload, name)
        # where there is no row, none says whether the width is odd
        rows = rows if n else rows[:, :dimension]
        _check(name, rows, (n, dimension), self.dtype)
        return rows, payload

    def _decoded(self, payload: Payload, name: str) -> Tensor:
        wanted = torch.int8 if self.bits == 8 else torch.uint8
        if payload[group_integers.CODES].dtype != wanted:
            raise ValueError(
                f"{name}.{group_integers.CODES} is {payload[group_integers.CODES].dtype}, and should be {wanted}"
            )
        try:
            return group_integers.decode(payload)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def ready(self, one_chunk: Chunk, products: torch.dtype = torch.float64) -> Chunk:
        return chunks.even(spaces.balanced(one_chunk, self.dtype, torch.float64))

    def project(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> CoefficientChunk:
        exact = spaces.project_chunk(wide, bases, torch.float64, dual)
        rows = dict(zip(keys.SIDES, _mixed(exact.down.cpu(), exact.up.mT.cpu()), strict=True))
        payload = {side: group_integers.encode(rows[side], self.bits) for side in keys.SIDES}
        down, up = (group_integers.decode(payload[side]).to(exact.down.device) for side in keys.SIDES)
        found = CoefficientChunk(
            down,
            up.mT.contiguous(),
            exact.scaling,
            {f"{s}.{name}": t for s in payload for name, t in payload[s].items()},
        )
        spaces.check_rounded(exact, found)
        return found

    def of_adapter(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module, c in coefficients.items():
            for side, rows in zip(keys.SIDES, (c.down, c.up.mT), strict=True):
                key = keys.coefficients_key(module, side)
                payload = group_integers.kept(group_integers.encode(rows, self.bits))
                tensors |= {f"{key}.{name}": tensor for name, tensor in payload.items()}
        return tensors | _rests(coefficients)

    def adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, Slot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        found: dict[str, Coefficients] = {}
        payload: dict[str, Tensor] = {}
        for module, slot in slots.items():
            sides = []
            for side in keys.SIDES:
                key = keys.coefficients_key(module, side)
                part = _part(tensors, key)
                sides.append(self._decoded(part, key))
                payload |= {f"{key}.{name}": tensors.pop(f"{key}.{name}") for name in part}
            down, up = sides
            rests = {key: tensors.pop(key) for s in keys.SIDES if (key := keys.rest_key(module, s)) in tensors}
            payload |= rests
            down_rest, up_rest = (rests.get(keys.rest_key(module, side)) for side in keys.SIDES)
            found[module] = slot.check(
                module, Coefficients(down, up.mT.contiguous(), slot.scaling, slot.kernel, down_rest, up_rest)
            )
        _check_finite(found)
        return found, payload


@dataclass(frozen=True, slots=True)
class Coded(Storage):
    """Whole numbers in as few bytes as they can have (`coded`): a side of a module is one run of bytes, and all of an
    adapter is another. Made by fits that are given an error or a size, and by what is added to their packs."""

    @property
    def number_bytes(self) -> float:
        return 1.0

    @property
    def lora_itemsize(self) -> int:
        return torch.float16.itemsize

    @property
    def keeps_factors(self) -> bool:
        return False

    @property
    def pads_rank(self) -> bool:
        return True

    def rounded(self, bases: ModuleBases) -> ModuleBases:
        raise OptionError(f"{ONLY_CODED} Leave dtype away, or give a float dtype, int8 or int4.")

    def extended(self, basis: Basis, rows: Tensor) -> Basis:
        raise OptionError(NOT_EXTENDED)

    def of_basis(self, basis: Basis, key: str) -> dict[str, Tensor]:
        return {f"{key}.{name}": tensor for name, tensor in (basis.payload or {}).items()}

    def opened(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        # many of them at once: one by one would take many times as long
        blobs = {key: f"{key}.{bitstream.CODED}" for key in shapes if f"{key}.{bitstream.CODED}" in tensors}
        sides = [(_bytes(tensors, blob), shapes[key]) for key, blob in blobs.items()]
        numbers = sum(k * dimension for _, (k, dimension) in sides)
        check_coded(numbers, sum(len(data) for data, _ in sides), "the rows of the bases")
        return {**tensors, **dict(zip(blobs, (one.rows for one in bitstream.bases(sides)), strict=True))}

    def rows(
        self, tensors: Mapping[str, Tensor], key: str, fitted: int, steps: Mapping[int, int], dimension: int
    ) -> list[Rows]:
        if any(steps.values()):
            raise ValueError(f"{key} has stored rows of a later time, which no coded basis has")
        if not fitted:
            return [(torch.zeros(0, dimension), {}), *((torch.zeros(0, dimension), None) for _ in steps)]
        blob = f"{key}.{bitstream.CODED}"
        _check(key, tensors[key], (fitted, dimension), self.dtype)
        none = torch.zeros(0, dimension), None
        return [(tensors[key], {bitstream.CODED: tensors[blob]}), *(none for _ in steps)]

    def ready(self, one_chunk: Chunk, products: torch.dtype = torch.float64) -> Chunk:
        raise OptionError(ONLY_CODED)

    def project(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> CoefficientChunk:
        raise OptionError(ONLY_CODED)

    def of_adapter(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        raise OptionError(CHANGED_BY_HAND)

    def adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, Slot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        payload = {keys.CODED: tensors.pop(keys.CODED)}
        data, now = _bytes(payload, keys.CODED), subspace()
        modules = {slot.place: now.modules[slot.place] for slot in slots.values()}
        places = adapter_places(data, modules)
        codes = bitstream.adapter(data, places, {slot.place: slot.rank for slot in slots.values()})
        return CodedCoefficients(codes, places, slots), payload


@dataclass(frozen=True, slots=True)
class Cores(Storage):
    """Coefficients alone: of each module of an adapter what lies between the rows of its two bases, as floats.

    kind: of `keys.CORES`. stored: the dtype in the file; in memory an adapter has factors with the same product.
    """

    kind: str
    stored: torch.dtype

    @property
    def number_bytes(self) -> float:
        return float(self.stored.itemsize)

    @property
    def lora_itemsize(self) -> int:
        return self.stored.itemsize

    @property
    def keeps_factors(self) -> bool:
        return False

    def rounded(self, bases: ModuleBases) -> ModuleBases:
        raise OptionError(self._not_of_bases)

    def extended(self, basis: Basis, rows: Tensor) -> Basis:
        raise OptionError(self._not_of_bases)

    def of_basis(self, basis: Basis, key: str) -> dict[str, Tensor]:
        raise OptionError(self._not_of_bases)

    def rows(
        self, tensors: Mapping[str, Tensor], key: str, fitted: int, steps: Mapping[int, int], dimension: int
    ) -> list[Rows]:
        raise OptionError(self._not_of_bases)

    @property
    def _not_of_bases(self) -> str:
        return f"{self.name} is how coefficients are stored: say cores={self.kind!r}, dtype={dtypes.name(self.stored)}."

    def ready(self, one_chunk: Chunk, products: torch.dtype = torch.float64) -> Chunk:
        # as near to the factors of a core as there are any, lest errors be differences of large numbers
        return chunks.even(spaces.balanced(one_chunk, self.dtype))

    def project(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> CoefficientChunk:
        exact = self._between(wide, bases, dual)
        kept = exact.to(self.stored)
        spaces.check_kept(exact.flatten(1)[:, None], kept.flatten(1)[:, None])
        down, up = self._factors(kept.cpu(), wide.down.shape[1])
        device = exact.device
        return CoefficientChunk(
            down.to(device, self.dtype), up.to(device, self.dtype), wide.scaling, {keys.CORES[self.kind]: kept.cpu()}
        )

    def of_adapter(self, coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
        if coefficients:
            raise OptionError(CHANGED_BY_HAND)
        return {}

    def adapter(
        self, tensors: MutableMapping[str, Tensor], slots: Mapping[str, Slot], subspace: Callable[[], Subspace]
    ) -> tuple[Mapping[str, Coefficients], Payload | None]:
        payload = {key: tensors.pop(key) for key in (keys.core_key(module, self.kind) for module in slots)}
        found = {}
        for (key, core), (module, slot) in zip(payload.items(), slots.items(), strict=True):
            sizes = slot.sizes or Sizes.of(subspace().modules[slot.place])
            if core.dtype != self.stored or tuple(core.shape) != self._shape(sizes.k):
                raise ValueError(f"{key} is {_described(core)} and should be {self._shape(sizes.k)}, {self.stored}")
            # no decomposition is made of what is not finite
            if not bool(core.isfinite().all()):
                raise ValueError(f"{key} is not finite")
            bitstream.check_rank(slot.rank, (sizes.widths[1], sizes.widths[0]))
            down, up = (factor[0].to(self.dtype).contiguous() for factor in self._factors(core[None], slot.rank))
            found[module] = slot.check(module, Coefficients(down, up, slot.scaling, slot.kernel))
        return found, payload

    @abstractmethod
    def _shape(self, k: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the core of one module, between k_down and k_up components."""

    @abstractmethod
    def _between(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> Tensor:
        """The cores that lose least, float64, those of one adapter after the other."""

    @abstractmethod
    def _factors(self, cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factors (n, r, k_down) and (n, k_up, r) of cores, float64. rank: that of the adapters' own factors."""


@dataclass(frozen=True, slots=True)
class FullCores(Cores):
    """A number for each pair of rows, (k_up, k_down), between bases as any fit finds them. Factors have the adapter's
    own rank, beyond which a core has rounding alone."""

    @property
    def pads_rank(self) -> bool:
        return True

    def _shape(self, k: tuple[int, int]) -> tuple[int, ...]:
        return k[1], k[0]

    def _between(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> Tensor:
        exact = spaces.project_chunk(wide, bases, torch.float64, dual)
        return exact.up @ exact.down

    def _factors(self, cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        n = len(cores)
        up, down = singular_codes.core_factors(cores, torch.ones(n, dtype=torch.float64), torch.full((n,), rank))
        more = rank - down.shape[1]
        return torch.nn.functional.pad(down, (0, 0, 0, more)), torch.nn.functional.pad(up, (0, more))


@dataclass(frozen=True, slots=True)
class DiagonalCores(Cores):
    """A number for each row, (k,), between bases that `joint.paired` has found: row j of one goes with row j of the
    other alone. Factors have the rank k, or 1 where that is 0."""

    @property
    def ridge(self) -> float:
        """As `joint.RIDGE`: what it costs of an update is less than rounding does."""
        return max(joint.RIDGE, torch.finfo(self.stored).eps / 16)

    def _shape(self, k: tuple[int, int]) -> tuple[int, ...]:
        return (k[0],)

    def _between(self, wide: Chunk, bases: ModuleBases, dual: Duals | None = None) -> Tensor:
        rows = [bases.side(side).components.to(torch.float64) for side in keys.SIDES]
        down, up = wide.down.to(torch.float64), wide.up.to(torch.float64)
        return joint.best_diagonal(down, up, (rows[0], rows[1]), self.ridge)

    def _factors(self, cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        exact = cores.to(torch.float64)
        more = max(1 - exact.shape[1], 0)
        down, up = torch.diag_embed(exact.abs().sqrt()), torch.diag_embed(exact.sign() * exact.abs().sqrt())
        return torch.nn.functional.pad(down, (0, 0, 0, more)), torch.nn.functional.pad(up, (0, more))

    def unrounded(self, wide: Chunk, bases: ModuleBases) -> CoefficientChunk | None:
        down, up = self._factors(self._between(wide, bases), wide.down.shape[1])
        return CoefficientChunk(down, up, wide.scaling)


CHANGED_BY_HAND = "the coefficients of an adapter of this pack were changed by hand: add the adapter instead."
NOT_PAIRED = (
    "the subspace of this pack is not extended: its cores are diagonal, and the rows of its sides go in pairs. Add the "
    "adapter without extend, or fit the pack again with it."
)
NOT_EXTENDED = (
    "the subspace of this pack is not extended: what it misses of an adapter is kept beside its coefficients. "
    "Add the adapter without extend."
)
ONLY_CODED = "dtype 'coded' goes with max_error, max_bytes or ratio, which say how exact its numbers are."


def adapter_places(data: bytes, modules: Mapping[str, ModuleBases]) -> dict[str, bitstream.Place]:
    """Where the modules of a coded adapter are, by their names in the subspace, from its bytes and the bases."""
    number = bitstream.cluster(data)
    found = {}
    for name, bases in modules.items():
        sides = [(basis_bytes(basis), basis.dimension) for basis in (bases.down, bases.up)]
        found[name] = among_all(bitstream.place_of(sides, number), bases)
    return found


def among_all(place: bitstream.Place, bases: ModuleBases) -> bitstream.Place:
    """The same place where directions were added to the bases since they were coded: nothing is on these."""
    return replace(place, widths=(bases.down.k, bases.up.k))


def basis_bytes(basis: Basis) -> bytes:
    """Those of a coded basis."""
    stored = (basis.payload or {}).get(bitstream.CODED)
    return bitstream.EMPTY if stored is None else stored.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a module's coefficients without their numbers. rests: the sides that have one."""

    rank: int
    scaling: float
    kernel: tuple[int, ...]
    rests: tuple[str, ...]


class CodedCoefficients(Lazy[Coefficients]):
    """An adapter's coefficients by its own names of modules, made of its codes when they are asked for: they are many
    times larger. places: by their names in the subspace, as the codes are."""

    __slots__ = ("_codes", "_slots")

    def __init__(
        self, codes: bitstream.AdapterCodes, places: Mapping[str, bitstream.Place], slots: Mapping[str, Slot]
    ) -> None:
        self._codes, self._slots = codes, slots

        def read(name: str) -> Coefficients:
            slot = slots[name]
            with as_specified(f"module {name} of a coded adapter"):
                found = bitstream.coefficients(
                    codes.modules[slot.place],
                    codes.step,
                    places[slot.place],
                    rank=slot.rank,
                    scaling=slot.scaling,
                    kernel=slot.kernel,
                )
                _check_finite({name: slot.check(name, found)})
                return found

        super().__init__(dict(sorted(slots.items())), read)

    @property
    def outlines(self) -> dict[str, Outline]:
        """What `outlines` asks for."""
        found = {}
        for name in self:
            one, slot = self._codes.modules[self._slots[name].place], self._slots[name]
            rests = [side for side, rows in (("down", one.down), ("up", one.up)) if (rows.rest_levels > 0).any()]
            found[name] = Outline(slot.rank, slot.scaling, slot.kernel, tuple(rests))
        return found


def outlines(coefficients: Mapping[str, Coefficients]) -> dict[str, Outline]:
    """Of all modules of an adapter; no number of a coded one is needed for it."""
    if isinstance(coefficients, CodedCoefficients):
        return coefficients.outlines
    return {
        name: Outline(one.rank, one.scaling, one.kernel, tuple(s for s in keys.SIDES if one.rest(s) is not None))
        for name, one in coefficients.items()
    }


def blob(data: bytes) -> Tensor:
    """Bytes as a tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensors: Mapping[str, Tensor], name: str) -> bytes:
    found = tensors[name]
    if found.dtype != torch.uint8 or found.dim() != 1:
        raise ValueError(f"{name} is {tuple(found.shape)}, {found.dtype}, and should be bytes")
    return found.numpy().tobytes()


def _rests(coefficients: Mapping[str, Coefficients]) -> dict[str, Tensor]:
    """What is beside them, by the names in an adapter's file: as it is in memory."""
    found = {keys.rest_key(module, side): c.rest(side) for module, c in coefficients.items() for side in keys.SIDES}
    return {key: rest for key, rest in found.items() if rest is not None}


def _mixed(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of coefficients, (…, r, k_down) and (…, r, k_up), of the same updates, in the factors that lose least if
    what rounding takes from a row is in proportion to its norm (docs/method.md): all rows of one norm, and none along
    a few components alone, as singular vectors are."""
    turn = linalg.mixing(down.shape[-2])
    even = linalg.even_rows(down, up)
    return turn @ even[0], turn @ even[1]


def of_row(found: CoefficientChunk, row: int, module: str) -> dict[str, Tensor]:
    """The payload of one adapter of a chunk, by the names in the adapter's file; empty where there is none."""
    payload = {}
    for name, tensor in (found.payload or {}).items():
        side, _, part = name.partition(".")
        if name in keys.CORES.values():
            payload[f"{keys.MODEL_PREFIX}{module}.{name}"] = tensor[row]
        elif part != group_integers.EXPONENT or int(tensor[row]):
            payload[f"{keys.coefficients_key(module, side)}.{part}"] = tensor[row]
    return payload


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The payload of one matrix among the tensors of a file."""
    return {
        part: tensors[f"{name}.{part}"]
        for part in group_integers.PARTS
        if part != group_integers.EXPONENT or f"{name}.{part}" in tensors
    }


def _check_finite(found: Mapping[str, Coefficients]) -> None:
    """`ValueError` for the first module that has NaN or Inf among its coefficients or rests."""
    numbers = {
        name: torch.cat([t.flatten() for t in (one.down, one.up, one.down_rest, one.up_rest) if t is not None])
        for name, one in found.items()
    }
    # one pass over all of them: most adapters have many modules of few numbers
    if numbers and not bool(torch.cat(list(numbers.values())).isfinite().all()):
        name = next(name for name, each in numbers.items() if not bool(each.isfinite().all()))
        raise ValueError(f"the coefficients of module {name} are not finite")


def _check_dtypes(module: str, found: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for side, tensor in zip(keys.SIDES, found, strict=True):
        if tensor.dtype != dtype:
            raise ValueError(f"the {side} coefficients of module {module} are {tensor.dtype}, and should be {dtype}")


def _check(name: str, found: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(found.shape) != shape or found.dtype != dtype:
        raise ValueError(f"{name} is {tuple(found.shape)}, {found.dtype}, and should be {shape}, {dtype}")


FLOATS: dict[str, Storage] = {dtypes.name(dtype): Floats(dtypes.name(dtype), dtype) for dtype in dtypes.STORED}
STORAGES: dict[str, Storage] = {
    **FLOATS,
    "int8": Integers("int8", torch.float32, 8),
    "int4": Integers("int4", torch.float32, 4),
    CODED: Coded(CODED, torch.float32),
    **{
        f"{kind}-{dtypes.name(dtype)}": made(
            f"{kind}-{dtypes.name(dtype)}", torch.promote_types(dtype, torch.float32), kind, dtype
        )
        for kind, made in (("full", FullCores), ("diagonal", DiagonalCores))
        for dtype in dtypes.STORED
    },
}
"""By the names that users and manifests write."""


def by_name(name: str) -> Storage:
    """The storage; an `OptionError` for what is none."""
    if name not in STORAGES:
        known = [name for name, storage in STORAGES.items() if not isinstance(storage, Cores)]
        raise OptionError(f"dtype must be one of {', '.join(known)}, got {name}.{suggestion(name, known)}")
    return STORAGES[name]


def parse(dtype: str | torch.dtype | None) -> Storage | None:
    """The storage of this name or dtype; None stays None. Anything else is an `OptionError`."""
    if dtype is None:
        return None
    return by_name(dtype if isinstance(dtype, str) else dtypes.name(dtype))


def for_coefficients(basis: Storage) -> Storage:
    """The storage of coefficients beside a basis stored so, where none is asked for: the same, or 8 bits beside any
    integers, since they are a small part of most packs, and no adapter shares its own."""
    return STORAGES["int8"] if isinstance(basis, Integers) else basis


def with_cores(kind: str, floats: Storage) -> Storage:
    """The storage of cores of a kind, of these floats."""
    return STORAGES[f"{kind}-{floats.name}"]


def floats_of(storage: Storage) -> Storage:
    """The floats that cores are stored in; any other storage is itself."""
    return by_name(dtypes.name(storage.stored)) if isinstance(storage, Cores) else storage


def plain(
    tensors: Mapping[str, Tensor], slots: Callable[[], Mapping[str, Slot]], subspace: Callable[[], Subspace]
) -> dict[str, Tensor]:
    """The tensors of an adapter's file as a float storage has them. `FormatError` where they cannot be read.

    slots: of its modules; subspace: its own. Both are called where they are needed.
    """
    found = dict(tensors)
    coded_already = keys.CODED in tensors
    integers = any(key.endswith(f".{group_integers.CODES}") for key in tensors)
    kind = next((kind for kind, own in keys.CORES.items() if any(key.endswith(f".{own}") for key in tensors)), None)
    if not (coded_already or integers or kind):
        return found
    try:
        if kind is not None:
            own = slots()
            stored = {tensors[key].dtype for key in (keys.core_key(module, kind) for module in own)}
            coefficients, _ = with_cores(kind, by_name(dtypes.name(stored.pop()))).adapter(found, own, subspace)
            return found | Floats("float32", torch.float32).of_adapter(coefficients)
        if coded_already:
            coefficients, _ = STORAGES[CODED].adapter(found, slots(), subspace)
            return found | Floats("float32", torch.float32).of_adapter(coefficients)
        for name, side, payload in list(_integers(tensors)):
            rows = group_integers.decode(payload)
            for each in payload:
                del found[f"{name}.{each}"]
            found[name] = rows if side == "down" else rows.mT.contiguous()
    except PARSE_FAILURES as error:
        raise FormatError(f"the adapter's coefficients cannot be read: {reason(error)}.") from error
    return found


def _integers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Every matrix of coefficients in integers: its name, its side and its payload."""
    for key in tensors:
        name, _, part = key.rpartition(".")
        side = next((side for side, own in keys.COEFFICIENTS.items() if name.endswith(f".{own}")), None)
        if part == group_integers.CODES and side is not None:
            yield name, side, _part(tensors, name)
