"""What a server will make of a pack: which adapters it serves in which way, with which flags, and what that takes.

Nothing here imports vLLM: a server is planned where there is none.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median_low

import torch

from ...core import keys, module_names
from ...core.options import check_choice, to_int
from ...errors import ModuleNameError, OptionError, ShapeError
from ...formats import checks
from ...pack.manifest import SubspaceInfo
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from . import plan as plans
from . import servable
from .commands import Start
from .plan import Choices, Core, Layer, Plan, Served, Shapes

DTYPES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4}
"""What vLLM may run a model in, and the bytes of a number; `auto` is half precision."""
MOST_IN_MEMORY = 100
"""Adapters in a worker's memory, where no number is asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of a server that a user chooses. max_cpu_loras: None for as many as the pack has, up to a hundred.

    adapters: how many there may be one day, for the figures that depend on it.
    """

    max_loras: int = 8
    max_cpu_loras: int | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    adapters: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_loras", "tensor_parallel_size", "adapters"):
            if to_int(name, getattr(self, name)) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_cpu_loras is not None and to_int("max_cpu_loras", self.max_cpu_loras) < self.max_loras:
            raise OptionError(
                f"max_cpu_loras must be at least max_loras, {self.max_loras}, got {self.max_cpu_loras}: vLLM keeps "
                "what is in a slot in memory too."
            )
        check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve: how many adapters; why not the others, a reason each by name; the command that starts it.

    command: None where nothing is served.
    """

    served: int
    refused: dict[str, str]
    command: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """What a server will make of a pack.

    not_held: modules of the subspace that a model cannot have bases for; where there are any, nothing is served with a
    shared basis. target_modules: what `--lora-target-modules` names for expanded adapters. notes: what else there is to
    know, in sentences.
    """

    pack: str
    model: str
    dtype: str
    adapters: int
    expanded: Way
    shared: Way
    not_held: list[str]
    target_modules: list[str]
    plan: Plan
    notes: list[str]


def check(
    pack: Pack,
    source: str,
    shapes: Shapes,
    asked: Asked | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Check:
    """Compare a pack, which a server will find at `source`, with a model's shapes, and plan its serving.

    Every byte that a server reads is read. revision: of the model. `PackDamagedError` where the pack is,
    `ModuleNameError` and `ShapeError` where it is not for this model.
    """
    asked = asked or Asked()
    plans.check_gpus(shapes, asked.tensor_parallel_size)
    checks.warn_of_other_model(pack.base_model, shapes.model)
    match = _matched(pack, shapes)
    read = _read(pack, match, progress or (lambda stage, done, total: None))
    targets = plans.targets([*match.cores, *read.carried] if read.expanded.ranks else [])
    plan = plans.plan(
        match.layers,
        match.cores,
        targets,
        _choices(asked, len(pack)),
        expanded=read.expanded.served,
        shared=read.shared.served,
    )
    start = Start(source, shapes.model, revision, asked.dtype, plan.choices)
    return Check(
        pack=source,
        model=shapes.model,
        dtype=shapes.dtype if asked.dtype == "auto" else asked.dtype,
        adapters=len(pack),
        expanded=read.expanded.way(start.expanded(plan.expanded, targets)),
        shared=read.shared.way(start.shared(plan.shared)),
        not_held=match.not_held,
        target_modules=list(targets),
        plan=plan,
        notes=[*_note_of_names(pack, shapes, match), *_notes(shapes, match, read, asked)],
    )


@dataclass(frozen=True, slots=True)
class _Match:
    """A pack's modules in a model. layers: the model's, and experts as the pack has them. cores: by the model's names.

    not_held: modules of the pack that only expanded adapters can serve.
    """

    layers: dict[str, Layer]
    cores: dict[str, Core]
    not_held: list[str]


def _matched(pack: Pack, shapes: Shapes) -> _Match:
    layers, cores, not_held = dict(shapes.layers), {}, []
    # the manifest says the sizes too; but the server reads the bases, and refuses to start where they are damaged
    modules = pack.subspace.modules
    names = module_names.resolve_all(modules, shapes.layers)
    missing = [name for name, found in names.items() if found is None and not _of_experts(name, shapes)]
    remedy = "Name the base model that the pack's adapters are for: model= (--model)" + (
        f"; the pack says {pack.base_model!r}." if pack.base_model else "."
    )
    if missing:
        raise ModuleNameError(
            f"{shapes.model} lacks {len(missing)} of the {len(names)} modules of the pack, as {missing[0]!r}. {remedy}"
        )
    for name, place in names.items():
        bases = modules[name]
        if place is None:
            place = name
            layers[name] = Layer(*bases.shape)
        layer = layers[place]
        if (layer.out, layer.input) != bases.shape:
            raise ShapeError(
                f"module {name} of the pack has a weight of {bases.shape[0]} × {bases.shape[1]}, that of "
                f"{shapes.model} is {layer.out} × {layer.input}. {remedy}"
            )
        if layer.kind != plans.LINEAR or plans.in_experts(place):
            not_held.append(name)
        cores[place] = Core(bases.down.k, bases.up.k)
    return _Match(layers, cores, not_held)


def _of_experts(name: str, shapes: Shapes) -> bool:
    """Whether a module can be one of experts, whose weights transformers has in one tensor."""
    return bool(shapes.experts) and plans.in_experts(name)


@dataclass(slots=True)
class _Served:
    """Adapters served in one way, as they are read: their ranks, and what all of them hold."""

    file_itemsize: int
    ranks: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    numbers: int = 0

    @property
    def served(self) -> Served:
        return Served(len(self.ranks), max(self.ranks.values(), default=0), self.numbers, self.file_itemsize)

    def way(self, command: str | None) -> Way:
        return Way(len(self.ranks), self.refused, command)


@dataclass(slots=True)
class _Read:
    """Both ways. carried: modules of the model for which adapters have LoRAs outside the subspace."""

    expanded: _Served
    shared: _Served
    carried: set[str] = field(default_factory=set)


def _read(pack: Pack, match: _Match, progress: Callable[[str, int, int], None]) -> _Read:
    # as `Pack.adapter` and `on_cores` have them
    widest = torch.promote_types(torch.promote_types(pack.dtype, pack.coefficient_dtype), torch.float32)
    read = _Read(_Served(widest.itemsize), _Served(torch.float32.itemsize))
    for done, name in enumerate(pack.names):
        progress("reading adapters", done, len(pack))
        found = pack.packed(name)
        carried = module_names.resolve_all(
            sorted({keys.parse_peft_key(key).module for key in found.carried}), match.layers
        )
        _read_expanded(read, found, carried)
        _read_shared(read.shared, found, pack.info, match)
    return read


def _read_expanded(read: _Read, found: PackedAdapter, carried: Mapping[str, str | None]) -> None:
    why = servable.reason_against(found, shared=False)
    lacking = [module for module, place in carried.items() if place is None]
    if why is None and lacking:
        why = f"the model lacks its module {lacking[0]!r}"
    if why is not None:
        read.expanded.refused[found.name] = why
        return
    read.expanded.ranks[found.name] = servable.expanded_rank(found)
    read.expanded.numbers += found.record.lora_numbers + sum(tensor.numel() for tensor in found.carried.values())
    read.carried.update(place for place in carried.values() if place is not None)


def _read_shared(served: _Served, found: PackedAdapter, info: SubspaceInfo, match: _Match) -> None:
    # its own reason first: fitting again does not help then
    why = servable.reason_against(found, shared=True) or _without_place(match)
    if why is not None:
        served.refused[found.name] = why
        return
    served.ranks[found.name] = servable.shared_rank(found)
    for module, coefficients in found.coefficients.items():
        k_down, k_up = (info.modules[found.places[module]][side].k for side in keys.SIDES)
        served.numbers += min(coefficients.rank, k_down, k_up) * (k_down + k_up)


def _without_place(match: _Match) -> str | None:
    """Why a server with a shared basis would not start, whatever the adapter, and what to do."""
    if not match.not_held:
        return None
    # of a mixture there are thousands
    patterns = sorted({"*experts.*" if plans.in_experts(name) else name for name in match.not_held})
    options = shlex.join(word for pattern in patterns for word in ("--exclude-module", pattern))
    return (
        f"the model has no linear layer, which bases could be put into, for {len(match.not_held)} of the "
        f"{len(match.cores)} modules of the subspace, as {match.not_held[0]!r}; leave them out when fitting "
        f"(eigenlorax fit … {options}), and adapters that have no LoRA there will be served"
    )


def _choices(asked: Asked, adapters: int) -> Choices:
    return Choices(
        max_loras=asked.max_loras,
        max_cpu_loras=asked.max_cpu_loras or max(asked.max_loras, min(adapters, MOST_IN_MEMORY)),
        many=asked.adapters,
        itemsize=DTYPES[asked.dtype],
        gpus=asked.tensor_parallel_size,
    )


def _note_of_names(pack: Pack, shapes: Shapes, match: _Match) -> list[str]:
    """Names are matched here as everywhere, by their ends; vLLM wants them whole."""
    other = [name for name in pack.info.modules if name not in match.cores]
    if not other:
        return []
    return [
        f"{other[0]!r} and {len(other) - 1} more modules of the pack have other names in {shapes.model}: vLLM's own "
        "tables rename those of some models; with others the server says so and does not start."
    ]


def _notes(shapes: Shapes, match: _Match, read: _Read, asked: Asked) -> list[str]:
    notes = []
    if not read.expanded.ranks and not read.shared.ranks:
        notes.append("nothing of the pack can be served.")
    if shapes.whole and asked.tensor_parallel_size > 1:
        notes.append(
            f"the config of {shapes.model} does not say how its layers are cut among GPUs: each counts as whole on "
            "each of them, which is the most that it can take."
        )
    if any(plans.in_experts(name) for name in match.cores):
        notes.append(
            "experts count as the pack has them; vLLM makes room for all experts of a layer, so that a slot can be "
            "larger."
        )
    for way, served in (("expanded", read.expanded), ("with a shared basis", read.shared)):
        note = _note_of_rank(way, served.ranks)
        notes += [note] if note else []
    return notes


def _note_of_rank(way: str, ranks: Mapping[str, int]) -> str | None:
    """One adapter of a large rank makes every slot larger."""
    if not ranks:
        return None
    usual = plans.max_lora_rank(median_low(ranks.values()))
    large = [name for name, rank in ranks.items() if plans.max_lora_rank(rank) > usual]
    if not large:
        return None
    more = f" and {len(large) - 1} more" if len(large) > 1 else ""
    return (
        f"{way}, slots are as large as {max(ranks, key=lambda name: ranks[name])!r} needs, of rank "
        f"{max(ranks.values())}; without {large[0]!r}{more}, --max-lora-rank {usual} would do."
    )
