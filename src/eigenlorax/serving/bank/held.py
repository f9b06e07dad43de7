"""One adapter as the bank holds it: all coefficients one after the other in one tensor, and its heads. Nothing here
knows of requests or layers."""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import keys
from ...core.layer_update import LayerCoefficients, LayerResidual
from ...errors import ModuleNameError, OptionError, ShapeError
from ...pack.manifest import SubspaceInfo
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from .heads import Heads

CARRIED = "(DoRA magnitudes, embeddings, modules that the subspace lacks)"
LISTED = 8
"""Adapters up to which a message names all."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one module's coefficients are among an adapter's numbers: down (rank, k_down), then up (k_up, rank)."""

    module: str
    start: int
    rank: int
    k_down: int
    k_up: int

    @property
    def middle(self) -> int:
        return self.start + self.rank * self.k_down

    @property
    def end(self) -> int:
        return self.middle + self.rank * self.k_up

    def of(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """down and up of numbers (…, n), as views."""
        down, up = numbers[..., self.start : self.middle], numbers[..., self.middle : self.end]
        leading = numbers.shape[:-1]
        return down.view(*leading, self.rank, self.k_down), up.view(*leading, self.k_up, self.rank)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Layout:
    """The places of an adapter's modules, by module name. One object for all adapters of the same ranks and modules."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An adapter of the bank, which never changes: what replaces it is another one.

    scalings: in the order of the layout. rests: what it has beside the bases, by module of the subspace.
    """

    name: str
    layout: Layout
    numbers: Tensor
    scalings: tuple[float, ...]
    heads: Heads
    rests: Mapping[str, LayerResidual]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.numbers, *self.heads.tensors, *(one for rest in self.rests.values() for one in rest.tensors)]

    def parts(self, dtype: torch.dtype) -> dict[str, LayerCoefficients]:
        """What each module multiplies with, in `dtype`."""
        numbers = self.numbers.to(dtype)
        return {
            place.module: LayerCoefficients(*place.of(numbers), scaling, self._rest(place.module, dtype))
            for place, scaling in zip(self.layout.places, self.scalings, strict=True)
        }

    def _rest(self, module: str, dtype: torch.dtype) -> tuple[LayerResidual, ...]:
        return (self.rests[module].to(dtype=dtype),) if module in self.rests else ()


def hold(
    packed: PackedAdapter,
    info: SubspaceInfo,
    places: Iterable[str],
    heads: Heads,
    layouts: MutableMapping[tuple[Place, ...], Layout],
    dtype: torch.dtype,
    device: torch.device,
) -> Held:
    """The adapter in `dtype` on `device`; an error that names it where the bank cannot serve it as it is.

    places: the modules of the subspace that the model has. layouts: those that there are, where a new one is noted.
    """
    check_whole(packed)
    known = frozenset(places)
    by_place = {packed.places[module]: coefficients for module, coefficients in packed.coefficients.items()}
    lacking = sorted(by_place.keys() - known)
    if lacking:
        raise ModuleNameError(
            f"adapter {packed.name!r} has {len(lacking)} of {len(by_place)} modules that the model lacks, such as "
            f"{lacking[0]!r}. It belongs to another base model, or to more of it."
        )
    found, flat, start = [], [], 0
    rests = {}
    for module, coefficients in sorted(by_place.items()):
        wanted = info.modules[module]["down"].k, info.modules[module]["up"].k
        got = coefficients.down.shape[1], coefficients.up.shape[0]
        if got != wanted:
            raise ShapeError(
                f"adapter {packed.name!r}, module {module}: its coefficients are for (k_down, k_up) = {got}, the "
                f"bank's subspace has {wanted}. Take it from the bank's own pack."
            )
        place = Place(module, start, coefficients.rank, *got)
        found.append(place)
        flat += [coefficients.down.reshape(-1), coefficients.up.reshape(-1)]
        start = place.end
        if coefficients.has_residual:
            down, up = (coefficients.residual(side) for side in keys.SIDES)
            rests[module] = LayerResidual(
                None if down is None else _stored(down, packed.name, dtype, device),
                None if up is None else _stored(up, packed.name, dtype, device),
            )
    stored = _stored(torch.cat(flat) if flat else torch.empty(0, dtype=dtype), packed.name, dtype, device)
    scalings = tuple(coefficients.scaling for _, coefficients in sorted(by_place.items()))
    layout = layouts.setdefault(tuple(found), Layout(tuple(found)))
    return Held(packed.name, layout, stored, scalings, heads, rests)


def _stored(numbers: Tensor, adapter: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers in the bank's dtype, which must hold them."""
    stored = numbers.to(device, dtype)
    if stored.dtype != numbers.dtype and not torch.equal(stored.to(numbers), numbers):
        raise OptionError(
            f"adapter {adapter!r} is {numbers.dtype}, which the bank's {dtype} would round. Make the pack with "
            f"dtype={str(numbers.dtype).removeprefix('torch.')!r}."
        )
    return stored


def check_whole(packed: PackedAdapter) -> None:
    """Refuse an adapter that is more than coefficients, what is beside them, and heads."""
    if packed.carried:
        raise OptionError(
            f"adapter {packed.name!r} has tensors that coefficients cannot express, such as {min(packed.carried)!r} "
            f"{CARRIED}. `eigenlorax export` gives all of it as an ordinary LoRA."
        )


def check_all_whole(pack: Pack) -> None:
    """Refuse a pack with such adapters, all of which are named, and say how to serve the others."""
    carrying = [name for name, record in pack.records.items() if record.carried_bytes]
    if not carrying:
        return
    named, others = ", ".join(map(repr, carrying)), [name for name in pack.names if name not in carrying]
    if not others:
        way = "`eigenlorax export` gives each as an ordinary LoRA"
    elif len(others) <= LISTED:
        way = f"AdapterBank(model, pack, adapters={others!r}) serves the others"
    else:
        way = (
            f"AdapterBank(model, pack, adapters=[name for name in pack.names if name not in {{{named}}}]) serves the "
            "others, with pack a `Pack`"
        )
    raise OptionError(f"coefficients cannot express all tensors of {named} {CARRIED}. {way}.")
