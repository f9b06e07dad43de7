"""Gradient components as part of an adapter's bases: the rows that are reserved for them, and their tensors in files.

An adapter with gradient components has bases of its own: the components of the subspace come first, then its gradient
components. Only the latter are saved with the adapter, as 8-bit integers with a scale per row.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core import keys
from ..core.basis import Basis
from ..core.int8_rows import quantise_rows
from ..core.subspace import ModuleBases
from ..errors import FormatError, OptionError
from ..formats import gradient_rows
from .layer import EigenLoraxLayer


def reserve_rows(bases: ModuleBases, n_gradient: int) -> tuple[ModuleBases, tuple[int, int]]:
    """Append rows of zeros to a module's bases, at most as many as the orthogonal complement has dimensions.

    Returns:
        The bases, and the numbers of appended rows (down, up).
    """
    down, up = (min(n_gradient, basis.dimension - basis.k) for basis in (bases.down, bases.up))
    return ModuleBases(_append_zeros(bases.down, down), _append_zeros(bases.up, up)), (down, up)


def _append_zeros(basis: Basis, n: int) -> Basis:
    zeros = basis.components.new_zeros(n, basis.dimension)
    return replace(basis, components=torch.cat([basis.components, zeros]))


def pad_core(core: Tensor | None, n_rows: tuple[int, int]) -> Tensor | None:
    """Append zeros for gradient components (down, up) to a core (k_up, k_down)."""
    down, up = n_rows
    return core if core is None else torch.nn.functional.pad(core, (0, down, 0, up))


def saved_tensors(layer: EigenLoraxLayer, adapter_name: str) -> dict[str, Tensor]:
    """Return the gradient components of an adapter by the last part of their keys in its file.

    Raises:
        OptionError: The adapter was loaded with its whole bases, so that its gradient components are not known.
    """
    if adapter_name not in layer.n_gradient:
        raise OptionError(
            f"adapter {adapter_name!r} was loaded with embedded bases, of which its gradient components are a part. "
            "Save it with embed_subspace=True in its config."
        )
    tensors = {}
    sides = zip(keys.SIDES, layer.bases_of(adapter_name), layer.n_gradient[adapter_name], strict=True)
    for side, basis, n_rows in sides:
        rows = quantise_rows(basis[len(basis) - n_rows :])
        tensors[keys.GRADIENT[side]], tensors[keys.GRADIENT_SCALES[side]] = rows.codes, rows.scales
    return tensors


def decode_tensors(
    layers: Mapping[str, EigenLoraxLayer], adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Replace the gradient components in an adapter's tensors by the adapter's whole bases.

    Args:
        layers: The layers that have the adapter, by module name.
        adapter_name: Name of the adapter in the model.
        state_dict: Tensors of the adapter's file, by the module names of the model.

    Raises:
        FormatError: The file lacks gradient components that the config announces, or the reverse.
        ShapeError: They do not fit the layer.
    """
    suffixes = {*keys.GRADIENT.values(), *keys.GRADIENT_SCALES.values()}
    tensors = {key: tensor for key, tensor in state_dict.items() if key.rpartition(".")[2] not in suffixes}
    with_gradients = {name: layer for name, layer in layers.items() if adapter_name in layer.n_gradient}
    if len(tensors) < len(state_dict) and not with_gradients:
        raise FormatError(
            "the adapter's file has gradient components, but its config has n_gradient=0: they do not belong together. "
            "Load the adapter with the config that it was saved with."
        )
    for name, layer in with_gradients.items():
        sides = zip(keys.SIDES, layer.bases_of(adapter_name), layer.n_gradient[adapter_name], strict=True)
        for side, basis, n_rows in sides:
            prefix = f"{keys.MODEL_PREFIX}{name}."
            codes, scales = (state_dict.get(prefix + names[side]) for names in (keys.GRADIENT, keys.GRADIENT_SCALES))
            rows = gradient_rows.decode(codes, scales, (n_rows, basis.shape[1]), f"module {name}, {side} side")
            subspace_rows = basis[: len(basis) - n_rows]
            tensors[prefix + keys.EMBEDDED[side]] = torch.cat([subspace_rows, rows.to(basis.device, basis.dtype)])
    return tensors
