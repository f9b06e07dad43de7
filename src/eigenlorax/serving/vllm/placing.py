"""Where the modules of a subspace are in a vLLM model: in which layer, in which rows of it, in which slice of a rank.

One mechanism for every model: vLLM's own tables say what it fused and renamed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import get_packed_modules_mapping

from ...core.subspace import ModuleBases, Subspace
from ...errors import ModuleNameError, ShapeError
from .layers import Part, attach
from .settings import SHARED_BASIS


@dataclass(frozen=True)
class Place:
    """A linear layer, or one of the projections that are fused in it (`index`), by the name that LoRAs know it by."""

    name: str
    layer: LinearBase
    index: int = 0
    fused: bool = False


def lora_names(path: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The names that LoRAs know a layer by: its own, or those of the projections that were fused in it, in order.

    fused: what each kind of layer was made of, as vLLM has it.
    """
    parent, dot, last = path.rpartition(".")
    return [parent + dot + part for part in fused.get(last, [last])]


def places(model: nn.Module) -> dict[str, Place]:
    """Every linear layer and fused projection of a model, by name."""
    fused = get_packed_modules_mapping(model)
    found: dict[str, Place] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            names = lora_names(path, fused)
            found |= {name: Place(name, layer, index, len(names) > 1) for index, name in enumerate(names)}
    return found


def names_in(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Modules of adapters → their names in the model, by the table with which vLLM renames the tensors of LoRAs."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {module: module for module in modules}
    renames = mapper.get_rename_mapper()
    return {module: renames.apply_list([f"{module}.weight"])[0].removesuffix(".weight") for module in modules}


def install(model: nn.Module, subspace: Subspace, core: str, device: torch.device) -> None:
    """Give a loaded model the bases of a subspace, and a core beside each pair of them, named `core`.

    What the model computes stays the same. `ModuleNameError` for modules that it lacks, `ShapeError` for one of another
    size; then nothing is changed.
    """
    known, names = places(model), names_in(model, subspace.modules)
    missing = [module for module, name in names.items() if name not in known]
    if missing:
        raise ModuleNameError(
            f"{type(model).__name__} has no linear layer for {len(missing)} of the {len(names)} modules of the "
            f"subspace, as {missing[0]!r}. Serve the pack without {SHARED_BASIS}, or fit it again without them "
            "(exclude_modules=, --exclude-module)."
        )
    of_layer: dict[LinearBase, list[tuple[Place, ModuleBases]]] = {}
    for module, bases in subspace.modules.items():
        place = known[names[module]]
        check_shape(module, bases.shape, place)
        of_layer.setdefault(place.layer, []).append((place, bases))
    for layer, members in of_layer.items():
        _install_in(model, layer, members, core, device)


def check_shape(module: str, shape: tuple[int, int], place: Place) -> None:
    """`ShapeError` unless the weight of a place, on all ranks together, is of this shape, (out, in)."""
    found = (sum(piece.full for piece in _pieces(place)), place.layer.input_size)
    if shape != found:
        raise ShapeError(
            f"module {module} of the subspace has a weight of {shape[0]} × {shape[1]}, that of the served "
            f"model is {found[0]} × {found[1]}. Serve the base model that the pack's adapters are for."
        )


def _install_in(
    model: nn.Module, layer: LinearBase, members: list[tuple[Place, ModuleBases]], core: str, device: torch.device
) -> None:
    """All that the subspace has for one layer."""
    parts: list[Part] = []
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for place, bases in members:
        pieces = _pieces(place)
        begin = parts[-1].columns.stop if parts else 0
        columns = slice(begin, begin + bases.down.k)
        parts.append(Part(_owner(model, place), core, columns, slice(pieces[0].rows.start, pieces[-1].rows.stop)))
        downs.append(bases.down.components[:, _inputs(layer)])
        up = [bases.up.components[:, piece.columns] for piece in pieces]
        ups.append(torch.cat(up, dim=1).mT.to(device, layer.params_dtype).contiguous())
    attach(layer, parts, torch.cat(downs).to(device, layer.params_dtype), ups)


def _owner(model: nn.Module, place: Place) -> nn.Module:
    """The module that has the core of a place: at the place's name, which a fused projection leaves free."""
    if not place.fused:
        return place.layer
    parent, _, last = place.name.rpartition(".")
    owner = nn.Module()
    model.get_submodule(parent).add_module(last, owner)
    return owner


def _inputs(layer: LinearBase) -> slice:
    """The columns of a down basis that meet this rank's input."""
    if not isinstance(layer, RowParallelLinear):
        return slice(None)
    n = layer.input_size_per_partition
    return slice(layer.tp_rank * n, (layer.tp_rank + 1) * n)


@dataclass(frozen=True)
class Piece:
    """What a rank has of one projection of a place: its rows of the layer's output, and which columns of the place's up
    basis these are. full: the projection's rows on all ranks together."""

    rows: slice
    columns: slice
    full: int


def _pieces(place: Place) -> list[Piece]:
    """What a rank has of a place: one piece, or several where vLLM has fused what is one module for LoRAs too."""
    layer, pieces = place.layer, []
    row = column = 0
    for index, n in enumerate(layer.output_partition_sizes):
        split = layer.tp_size if isinstance(layer, ColumnParallelLinear) else 1
        # several ranks hold the same heads of keys and values where there are fewer heads than ranks
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
        full = n * split // copies
        if not place.fused or index == place.index:
            begin = column + (layer.tp_rank // copies * n if split > 1 else 0)
            pieces.append(Piece(slice(row, row + n), slice(begin, begin + n), full))
            column += full
        row += n
    return pieces
