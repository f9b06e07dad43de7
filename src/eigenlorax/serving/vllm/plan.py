"""What vLLM takes for a pack's adapters, expanded or with the basis in the model: arithmetic on shapes, without I/O.

It counts what vLLM 0.32 allocates. A *slot* has room for one adapter of rank `--max-lora-rank` in every layer that may
have a LoRA, used or not; there are `--max-loras` of them on each GPU. `--max-cpu-loras` adapters, as large as they are,
stay in the memory of each worker.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ...errors import OptionError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank`."""
LINEAR, HEAD, EMBEDDING = "linear", "head", "embedding"
COLUMN, ROW = "column", "row"
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Projections that vLLM's models have as one layer: a slot has room for all of them as soon as one has a LoRA."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a base model, whose weight is out × input.

    kind: one of LINEAR, HEAD (over the vocabulary) and EMBEDDING. split: by COLUMN, which is out, or by ROW, which is
    input, among the GPUs of tensor parallelism; None where each has all of it. parts: into how many at most; there are
    no more where further GPUs hold the same heads again.
    """

    out: int
    input: int
    kind: str = LINEAR
    split: str | None = None
    parts: int | None = None

    def share(self, gpus: int) -> tuple[int, int]:
        """(out, input) of what one of so many GPUs has of the layer; whole numbers, by `check_gpus`."""
        n = min(gpus, self.parts or gpus)
        return self.out // (n if self.split == COLUMN else 1), self.input // (n if self.split == ROW else 1)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The layers of a base model by name.

    dtype: the one that vLLM runs it in by itself. heads: of attention, by which tensor parallelism cuts; None if
    unknown. whole: whether nothing is known of how the layers are cut, so that all count as whole on each GPU.
    experts: names of the modules that hold a mixture's experts.
    """

    model: str
    dtype: str
    layers: Mapping[str, Layer]
    heads: int | None = None
    whole: bool = False
    experts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Core:
    """Components that the subspace has for a layer."""

    k_down: int
    k_up: int


@dataclass(frozen=True, slots=True)
class Served:
    """The adapters that are served in one way.

    rank: the largest. numbers: of all of them together, as they are in a worker's memory. file_itemsize: bytes of a
    number in the files that vLLM reads them from.
    """

    adapters: int
    rank: int
    numbers: int
    file_itemsize: int = 4


@dataclass(frozen=True, slots=True)
class Choices:
    """What is asked of a server. many: how many adapters the figures at the end are for. itemsize: bytes a number."""

    max_loras: int
    max_cpu_loras: int
    many: int
    itemsize: int
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Tier:
    """One way to serve, in bytes: on each GPU, and in the memory of each worker.

    slot_bytes: one slot, of `slot_numbers` numbers. slots_bytes: `max_loras` of them. basis_bytes: once, whatever is
    served. gpu_bytes: slots and basis. many_slots_bytes: as many slots as `many`, and the basis. adapter_bytes: an
    adapter in a worker's memory, in the mean. host_bytes: `max_cpu_loras` of them. many_host_bytes: `many` of them.
    many_cached_bytes: `many` of them in the files that vLLM reads.
    """

    adapters: int
    max_lora_rank: int
    slot_numbers: int
    slot_bytes: int
    slots_bytes: int
    basis_bytes: int
    gpu_bytes: int
    many_slots_bytes: int
    adapter_bytes: int
    host_bytes: int
    many_host_bytes: int
    many_cached_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Both ways to serve a pack beside each other; None for the one in which nothing is served.

    from_slots: with so many slots or more, the basis in the model takes less of a GPU than expanded adapters; None
    where it never does, or where there is nothing to compare. unrestricted_slot_bytes: what a slot of expanded adapters
    takes without `--lora-target-modules`, and more where vLLM makes room for embeddings and heads of the model too.
    """

    choices: Choices
    expanded: Tier | None
    shared: Tier | None
    from_slots: int | None
    unrestricted_slot_bytes: int | None


def max_lora_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that allows a rank."""
    for found in RANKS:
        if rank <= found:
            return found
    raise OptionError(f"vLLM serves LoRAs up to rank {RANKS[-1]}, not {rank}.")


def check_gpus(shapes: Shapes, gpus: int) -> None:
    """`OptionError` unless vLLM can cut the model into so many parts."""
    if shapes.heads is not None and shapes.heads % gpus:
        raise OptionError(
            f"{shapes.model} has {shapes.heads} attention heads, which {gpus} GPUs cannot share evenly. "
            f"gpus= (--tensor-parallel-size) has to divide {shapes.heads}."
        )
    for name, layer in shapes.layers.items():
        n = min(gpus, layer.parts or gpus)
        size = layer.input if layer.split == ROW else layer.out
        if layer.split is not None and size % n:
            raise OptionError(
                f"{name} of {shapes.model} has a side of {size}, which {n} GPUs cannot share evenly. "
                f"gpus= (--tensor-parallel-size) has to divide {size}."
            )


def targets(modules: Iterable[str]) -> tuple[str, ...]:
    """What `--lora-target-modules` has to name, so that LoRAs for these modules take effect: their last parts, and
    `experts` for those of a mixture."""
    return tuple(sorted({"experts" if in_experts(name) else name.rpartition(".")[2] for name in modules}))


def in_experts(name: str) -> bool:
    """Whether a module belongs to the experts of a mixture, which vLLM has in one layer of another kind."""
    return "experts" in name.split(".")


def with_room(layers: Mapping[str, Layer], named: Collection[str]) -> dict[str, Layer]:
    """The layers for which a slot has room if `--lora-target-modules` names these."""
    wanted = set(named)
    for group in FUSED:
        if wanted.intersection(group):
            wanted.update(group)
    return {
        name: layer
        for name, layer in layers.items()
        if ("experts" if in_experts(name) else name.rpartition(".")[2]) in wanted
    }


def expanded_slot(layers: Mapping[str, Layer], rank: int, gpus: int) -> int:
    """Numbers of a slot with room for A (rank, input) and B (out, rank) of each layer, on one of so many GPUs."""
    # of vocabularies, each GPU has all
    return sum(rank * sum(layer.share(gpus if layer.kind == LINEAR else 1)) for layer in layers.values())


def shared_slot(cores: Iterable[Core], rank: int) -> int:
    """Numbers of a slot with room for A (rank, k_down) and B (k_up, rank) of each core; each GPU has all of them."""
    return sum(rank * (core.k_down + core.k_up) for core in cores)


def basis(layers: Mapping[str, Layer], cores: Mapping[str, Core], gpus: int) -> int:
    """Numbers of the bases (k_down, input) and (out, k_up) of each layer that the subspace has, on one of the GPUs."""
    found = 0
    for name, core in cores.items():
        out, n_in = layers[name].share(gpus)
        found += core.k_down * n_in + out * core.k_up
    return found


def plan(
    layers: Mapping[str, Layer],
    cores: Mapping[str, Core],
    named: Collection[str],
    choices: Choices,
    *,
    expanded: Served,
    shared: Served,
) -> Plan:
    """What serving takes in both ways.

    layers: all of the model. cores: what the subspace has for some of them, by the same names. named: what
    `--lora-target-modules` names (`targets`).
    """
    one = two = unrestricted = None
    if expanded.adapters:
        room, rank = with_room(layers, named), max_lora_rank(expanded.rank)
        one = _tier(expanded, rank, expanded_slot(room, rank, choices.gpus), 0, choices)
        linear = {name: layer for name, layer in layers.items() if layer.kind == LINEAR or name in room}
        unrestricted = expanded_slot(linear, rank, choices.gpus) * choices.itemsize
    if shared.adapters:
        rank = max_lora_rank(shared.rank)
        slot = shared_slot(cores.values(), rank)
        two = _tier(shared, rank, slot, basis(layers, cores, choices.gpus), choices)
    return Plan(choices, one, two, _from_slots(one, two), unrestricted)


def _tier(served: Served, rank: int, slot: int, basis_numbers: int, choices: Choices) -> Tier:
    size = choices.itemsize
    held = basis_numbers * size
    numbers = round(served.numbers / served.adapters)
    adapter = numbers * size
    return Tier(
        adapters=served.adapters,
        max_lora_rank=rank,
        slot_numbers=slot,
        slot_bytes=slot * size,
        slots_bytes=slot * size * choices.max_loras,
        basis_bytes=held,
        gpu_bytes=slot * size * choices.max_loras + held,
        many_slots_bytes=slot * size * choices.many + held,
        adapter_bytes=adapter,
        host_bytes=adapter * choices.max_cpu_loras,
        many_host_bytes=adapter * choices.many,
        many_cached_bytes=numbers * served.file_itemsize * choices.many,
    )


def _from_slots(expanded: Tier | None, shared: Tier | None) -> int | None:
    if expanded is None or shared is None or shared.slot_bytes >= expanded.slot_bytes:
        return None
    return shared.basis_bytes // (expanded.slot_bytes - shared.slot_bytes) + 1
