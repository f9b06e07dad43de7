"""The memory that vLLM needs for a pack's adapters, expanded or with a shared basis: arithmetic on shapes, without I/O.

The counts follow vLLM 0.32. A *slot* is memory for one adapter of rank `--max-lora-rank` in every layer that can have a
LoRA, used or not; there are `--max-loras` slots on each GPU. `--max-cpu-loras` adapters, at their own size, stay
in the CPU memory of each worker.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ...errors import OptionError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""
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
"""Projections that vLLM fuses into one layer: a slot includes all of them if one of them has a LoRA."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a base model.

    Attributes:
        out: Rows of the weight.
        input: Columns of the weight.
        kind: LINEAR, HEAD (output layer with one row per token of the vocabulary) or EMBEDDING.
        split: The dimension that tensor parallelism divides among GPUs: COLUMN is `out`, ROW is `input`. None if each
            GPU has the whole layer.
        parts: Maximum number of parts; further GPUs repeat the same heads of keys and values.
    """

    out: int
    input: int
    kind: str = LINEAR
    split: str | None = None
    parts: int | None = None

    def share(self, gpus: int) -> tuple[int, int]:
        """Return (out, input) of the layer's part on one GPU. `check_gpus` ensures that the division is exact."""
        n = min(gpus, self.parts or gpus)
        return self.out // (n if self.split == COLUMN else 1), self.input // (n if self.split == ROW else 1)


@dataclass(frozen=True, slots=True)
class Shapes:
    """The layers of a base model.

    Attributes:
        model: Name of the model.
        dtype: Dtype that vLLM chooses for it.
        layers: The layers by name.
        heads: Number of attention heads, which tensor parallelism divides; None if unknown.
        whole: Whether the division of the layers is unknown, so that each counts as whole on each GPU.
        experts: Names of the modules with a mixture's experts.
        architecture: Class of the model; None if unknown.
    """

    model: str
    dtype: str
    layers: Mapping[str, Layer]
    heads: int | None = None
    whole: bool = False
    experts: tuple[str, ...] = ()
    architecture: str | None = None


@dataclass(frozen=True, slots=True)
class CoreSize:
    """Number of components that the subspace has for a layer."""

    k_down: int
    k_up: int


@dataclass(frozen=True, slots=True)
class ServedAdapters:
    """The adapters that are served in one mode, expanded or with a shared basis.

    Attributes:
        adapters: Number of adapters.
        rank: Largest rank.
        numbers: Number of entries of all adapters together in a worker's memory.
        file_itemsize: Bytes per entry in the files that vLLM reads.
    """

    adapters: int
    rank: int
    numbers: int
    file_itemsize: int = 4


@dataclass(frozen=True, slots=True)
class Choices:
    """The flags of a server.

    Attributes:
        max_loras: vLLM's `--max-loras`.
        max_cpu_loras: vLLM's `--max-cpu-loras`.
        many: Number of adapters that memory is extrapolated to.
        itemsize: Bytes per entry on the GPU.
        gpus: vLLM's `--tensor-parallel-size`.
    """

    max_loras: int
    max_cpu_loras: int
    many: int
    itemsize: int
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of one serving mode, on each GPU and in the CPU memory of each worker. JSON has these field names.

    Attributes:
        adapters: Number of adapters.
        max_lora_rank: vLLM's `--max-lora-rank`.
        slot_numbers: Entries of one slot.
        slot_bytes: Bytes of one slot.
        slots_bytes: Bytes of `max_loras` slots.
        basis_bytes: Bytes of the bases; 0 for expanded adapters.
        gpu_bytes: Bytes of the slots and the bases.
        many_slots_bytes: Bytes of `many` slots and the bases.
        adapter_bytes: Mean bytes of an adapter in a worker's memory.
        host_bytes: Bytes of `max_cpu_loras` adapters in a worker's memory.
        many_host_bytes: Bytes of `many` adapters in a worker's memory.
        many_cached_bytes: Bytes of `many` adapters in the files that vLLM reads.
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
    """The memory of both serving modes.

    Attributes:
        choices: The flags of the server.
        expanded: Memory of expanded adapters; None if none is served.
        shared: Memory with a shared basis; None if no adapter is served.
        from_slots: Number of slots from which a shared basis needs less GPU memory; None if it never does or one mode
            is missing.
        unrestricted_slot_bytes: Bytes of a slot of expanded adapters without `--lora-target-modules`. vLLM may add
            embeddings and heads of the model.
    """

    choices: Choices
    expanded: MemoryUse | None
    shared: MemoryUse | None
    from_slots: int | None
    unrestricted_slot_bytes: int | None


def max_lora_rank(rank: int) -> int:
    """Return the smallest `--max-lora-rank` that allows a rank; raise `OptionError` if there is none."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise OptionError(f"vLLM serves LoRAs up to rank {RANKS[-1]}, not {rank}.")


def check_gpus(shapes: Shapes, gpus: int) -> None:
    """Raise `OptionError` unless vLLM can divide the model among this number of GPUs."""
    if shapes.heads is not None and shapes.heads % gpus:
        raise OptionError(
            f"{shapes.model} has {shapes.heads} attention heads, which cannot be divided among {gpus} GPUs. "
            f"gpus= (--tensor-parallel-size) must divide {shapes.heads}."
        )
    for name, layer in shapes.layers.items():
        n = min(gpus, layer.parts or gpus)
        size = layer.input if layer.split == ROW else layer.out
        if layer.split is not None and size % n:
            raise OptionError(
                f"{name} of {shapes.model} has a dimension of {size}, which cannot be divided among {n} GPUs. "
                f"gpus= (--tensor-parallel-size) must divide {size}."
            )


def target_modules(modules: Iterable[str]) -> tuple[str, ...]:
    """Return `--lora-target-modules` for LoRAs of modules: the last parts of their names, `experts` for experts."""
    return tuple(sorted({"experts" if in_experts(name) else name.rpartition(".")[2] for name in modules}))


def in_experts(name: str) -> bool:
    """Return whether a module belongs to the experts of a mixture, which are one layer of another kind in vLLM."""
    return "experts" in name.split(".")


def layers_in_slot(layers: Mapping[str, Layer], target_modules: Collection[str]) -> dict[str, Layer]:
    """Return the layers that a slot includes, given the value of `--lora-target-modules`."""
    targets = set(target_modules)
    for group in FUSED:
        if targets.intersection(group):
            targets.update(group)
    return {
        name: layer
        for name, layer in layers.items()
        if ("experts" if in_experts(name) else name.rpartition(".")[2]) in targets
    }


def expanded_slot(layers: Mapping[str, Layer], rank: int, gpus: int) -> int:
    """Return the entries of a slot with A (rank, input) and B (out, rank) of each layer, on each GPU."""
    # output layers and embeddings are not divided
    return sum(rank * sum(layer.share(gpus if layer.kind == LINEAR else 1)) for layer in layers.values())


def shared_slot(cores: Iterable[CoreSize], rank: int) -> int:
    """Return the entries of a slot with A (rank, k_down) and B (k_up, rank) of each core. Cores are not divided."""
    return sum(rank * (core.k_down + core.k_up) for core in cores)


def basis(layers: Mapping[str, Layer], cores: Mapping[str, CoreSize], gpus: int) -> int:
    """Return the entries of the bases (k_down, input) and (out, k_up) of all layers with a core, on each GPU."""
    entries = 0
    for name, core in cores.items():
        out, n_in = layers[name].share(gpus)
        entries += core.k_down * n_in + out * core.k_up
    return entries


def plan(
    layers: Mapping[str, Layer],
    cores: Mapping[str, CoreSize],
    target_modules: Collection[str],
    choices: Choices,
    *,
    expanded: ServedAdapters,
    shared: ServedAdapters,
) -> Plan:
    """Return the memory of both serving modes.

    Args:
        layers: All layers of the model.
        cores: The size of the core of each layer that the subspace has, by the same names.
        target_modules: The value of `--lora-target-modules`.
        choices: The flags of the server.
        expanded: The adapters that are served expanded.
        shared: The adapters that are served with a shared basis.
    """
    expanded_use = shared_use = unrestricted = None
    if expanded.adapters:
        in_slot, rank = layers_in_slot(layers, target_modules), max_lora_rank(expanded.rank)
        expanded_use = _memory_use(expanded, rank, expanded_slot(in_slot, rank, choices.gpus), 0, choices)
        linear = {name: layer for name, layer in layers.items() if layer.kind == LINEAR or name in in_slot}
        unrestricted = expanded_slot(linear, rank, choices.gpus) * choices.itemsize
    if shared.adapters:
        rank = max_lora_rank(shared.rank)
        slot = shared_slot(cores.values(), rank)
        shared_use = _memory_use(shared, rank, slot, basis(layers, cores, choices.gpus), choices)
    return Plan(choices, expanded_use, shared_use, _break_even_slots(expanded_use, shared_use), unrestricted)


def _memory_use(served: ServedAdapters, rank: int, slot: int, basis_numbers: int, choices: Choices) -> MemoryUse:
    itemsize = choices.itemsize
    basis_bytes = basis_numbers * itemsize
    adapter_numbers = round(served.numbers / served.adapters)
    adapter_bytes = adapter_numbers * itemsize
    return MemoryUse(
        adapters=served.adapters,
        max_lora_rank=rank,
        slot_numbers=slot,
        slot_bytes=slot * itemsize,
        slots_bytes=slot * itemsize * choices.max_loras,
        basis_bytes=basis_bytes,
        gpu_bytes=slot * itemsize * choices.max_loras + basis_bytes,
        many_slots_bytes=slot * itemsize * choices.many + basis_bytes,
        adapter_bytes=adapter_bytes,
        host_bytes=adapter_bytes * choices.max_cpu_loras,
        many_host_bytes=adapter_bytes * choices.many,
        many_cached_bytes=adapter_numbers * served.file_itemsize * choices.many,
    )


def _break_even_slots(expanded: MemoryUse | None, shared: MemoryUse | None) -> int | None:
    """Return the smallest number of slots with which a shared basis needs less memory than expanded adapters."""
    if expanded is None or shared is None or shared.slot_bytes >= expanded.slot_bytes:
        return None
    return shared.basis_bytes // (expanded.slot_bytes - shared.slot_bytes) + 1
