"""Installation of a subspace in a vLLM model, with the right layer, rows and slice of a tensor-parallel rank.

One mechanism serves every model, because vLLM's own tables list fused and renamed layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

_ONE_IN_LORAS = {"Glm4ForCausalLM": ("gate_up_proj",)}
"""Layers that are one module in transformers, and therefore in LoRAs, by the class of the model in vLLM, whose table
lists their projections all the same."""


@dataclass(frozen=True)
class Projection:
    """A linear layer, or one of the projections that are fused in it.

    Attributes:
        name: Name of the projection in LoRAs.
        layer: The layer of the model.
        index: Position among the fused projections.
        fused: Whether the layer has several projections.
    """

    name: str
    layer: LinearBase
    index: int = 0
    fused: bool = False


def correct_fused_names(model: nn.Module) -> None:
    """Replace the entries of a model's table of fused layers that are wrong for LoRAs.

    With vLLM's own table, a LoRA of such a layer is rejected under the only name that adapters can have for it. The
    table of Phi-3, whose layers are alike, has entries of this kind.
    """
    layers = _ONE_IN_LORAS.get(type(model).__name__)
    if layers is not None:
        table: Any = {**get_packed_modules_mapping(model), **{layer: [layer] for layer in layers}}
        model.packed_modules_mapping = table


def lora_names(path: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of a layer in LoRAs: its own name, or the names of the projections fused in it, in order.

    Args:
        path: Name of the layer in the model.
        fused: vLLM's table of the projections that are fused in each kind of layer.
    """
    parent, dot, last = path.rpartition(".")
    return [parent + dot + projection for projection in fused.get(last, [last])]


def projections_of(model: nn.Module) -> dict[str, Projection]:
    """Return every linear layer and fused projection of a model by name."""
    fused = get_packed_modules_mapping(model)
    projections: dict[str, Projection] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            names = lora_names(path, fused)
            for index, name in enumerate(names):
                projections[name] = Projection(name, layer, index, len(names) > 1)
    return projections


def names_in(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Return the name in the model of each module of adapters, by vLLM's own table for the tensors of LoRAs."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {module: module for module in modules}
    renames = mapper.get_rename_mapper()
    return {module: renames.apply_list([f"{module}.weight"])[0].removesuffix(".weight") for module in modules}


def install(model: nn.Module, subspace: Subspace, core: str, device: torch.device) -> None:
    """Add the bases of a subspace to a loaded model, with a core between each pair of them.

    The output of the model does not change.

    Args:
        model: The model.
        subspace: The bases by module name.
        core: The last part of the cores' names.
        device: Device of the bases.

    Raises:
        ModuleNameError: The model lacks a module. It is not changed.
        ShapeError: A module has another size. The model is not changed.
    """
    projections, names = projections_of(model), names_in(model, subspace.modules)
    missing = [module for module, name in names.items() if name not in projections]
    if missing:
        raise ModuleNameError(
            f"{type(model).__name__} has no linear layer for {len(missing)} of the {len(names)} modules of the "
            f"subspace, such as {missing[0]!r}. Serve the pack without {SHARED_BASIS}, or fit it again without them "
            "(exclude_modules=, --exclude-module)."
        )
    by_layer: dict[LinearBase, list[tuple[Projection, ModuleBases]]] = {}
    for module, bases in subspace.modules.items():
        projection = projections[names[module]]
        check_shape(module, bases.shape, projection)
        by_layer.setdefault(projection.layer, []).append((projection, bases))
    for layer, members in by_layer.items():
        _install_in(model, layer, members, core, device)


def check_shape(module: str, shape: tuple[int, int], projection: Projection) -> None:
    """Raise `ShapeError` unless the weight of a projection, on all ranks together, has the shape (out, in)."""
    n_out = sum(rank_slice.full for rank_slice in _rank_slices(projection))
    actual = (n_out, projection.layer.input_size)
    if shape != actual:
        raise ShapeError(
            f"module {module} of the pack has a weight of {shape[0]} × {shape[1]}, in the served "
            f"model it is {actual[0]} × {actual[1]}. Serve the base model of the pack's adapters."
        )


def _install_in(
    model: nn.Module, layer: LinearBase, members: list[tuple[Projection, ModuleBases]], core: str, device: torch.device
) -> None:
    """Add the bases of all projections of one layer."""
    parts: list[Part] = []
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for projection, bases in members:
        slices = _rank_slices(projection)
        begin = parts[-1].columns.stop if parts else 0
        columns = slice(begin, begin + bases.down.k)
        rows = slice(slices[0].rows.start, slices[-1].rows.stop)
        parts.append(Part(_core_owner(model, projection), core, columns, rows))
        downs.append(bases.down.components[:, _input_columns(layer)])
        up = [bases.up.components[:, rank_slice.columns] for rank_slice in slices]
        ups.append(torch.cat(up, dim=1).mT.to(device, layer.params_dtype).contiguous())
    attach(layer, parts, torch.cat(downs).to(device, layer.params_dtype), ups)


def _core_owner(model: nn.Module, projection: Projection) -> nn.Module:
    """Return the module that holds the core: the layer, or a new module at the unused name of a fused projection."""
    if not projection.fused:
        return projection.layer
    parent, _, last = projection.name.rpartition(".")
    owner = nn.Module()
    model.get_submodule(parent).add_module(last, owner)
    return owner


def _input_columns(layer: LinearBase) -> slice:
    """Return the columns of a down basis that belong to this rank's part of the input."""
    if not isinstance(layer, RowParallelLinear):
        return slice(None)
    n = layer.input_size_per_partition
    return slice(layer.tp_rank * n, (layer.tp_rank + 1) * n)


@dataclass(frozen=True)
class RankSlice:
    """The part of one projection that a rank computes.

    Attributes:
        rows: Rows of the layer's output.
        columns: The columns of the up basis that belong to these rows.
        full: Number of the projection's rows on all ranks together.
    """

    rows: slice
    columns: slice
    full: int


def _rank_slices(projection: Projection) -> list[RankSlice]:
    """Return a projection's slices on this rank: several if several fused parts are one module in LoRAs."""
    layer, slices = projection.layer, []
    row = column = 0
    for index, n in enumerate(layer.output_partition_sizes):
        split = layer.tp_size if isinstance(layer, ColumnParallelLinear) else 1
        # if there are fewer heads of keys and values than ranks, several ranks hold the same heads
        copies = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
        full = n * split // copies
        if not projection.fused or index == projection.index:
            begin = column + (layer.tp_rank // copies * n if split > 1 else 0)
            slices.append(RankSlice(slice(row, row + n), slice(begin, begin + n), full))
            column += full
        row += n
    return slices
