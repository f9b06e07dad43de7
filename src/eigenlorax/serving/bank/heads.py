"""Heads of adapters: modules of the model with an adapter's own parameters in them (task heads, trained biases).

Each is a copy of the model's module that shares all with it but those parameters. Swapping parameters in the module
itself would be seen by every other thread.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...core import keys, module_names
from ...errors import ModuleNameError, ShapeError
from ...pack.packed_adapter import PackedAdapter


@dataclass(frozen=True, slots=True)
class Heads:
    """Modules with an adapter's own parameters, by the model's name of the module; `tensors` are those parameters."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()


def tensor_names(model: nn.Module) -> frozenset[str]:
    """The names of all parameters and buffers, those that are tied too."""
    parameters, buffers = (found(remove_duplicate=False) for found in (model.named_parameters, model.named_buffers))
    return frozenset(name for name, _ in (*parameters, *buffers))


def heads(packed: PackedAdapter, model: nn.Module, names: frozenset[str]) -> Heads:
    """The adapter's heads as modules of a model with tensors of these names; an error names the adapter where the model
    has no such place."""
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in packed.heads.items():
        # PEFT saves the trained bias of an adapted layer as it is called within its own
        plain = key.removeprefix(keys.MODEL_PREFIX).replace(".base_layer.", ".")
        name = module_names.resolve(plain, names)
        if name is None:
            raise ModuleNameError(
                f"adapter {packed.name!r} has a head of its own, {key!r}, that the model lacks. Load the model that it "
                "was trained on, such as AutoModelForSequenceClassification, or pass heads=False."
            )
        module, _, parameter = name.rpartition(".")
        own.setdefault(module, {})[parameter] = tensor
    modules = {module: _copy(model.get_submodule(module), tensors, packed.name) for module, tensors in own.items()}
    owned = tuple(getattr(modules[module], name) for module, tensors in own.items() for name in tensors)
    return Heads(modules, owned)


def _copy(module: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> nn.Module:
    """The module with `tensors` in the place of its own, in their dtype and on their device."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._buffers = dict(module._buffers)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(made, hooks, OrderedDict())
    # what has replaced it, such as accelerate, is bound to the module itself
    made.__dict__.pop("forward", None)
    for name, tensor in tensors.items():
        there = getattr(module, name)
        # a linear head may be for another number of labels
        width = 1 if isinstance(module, nn.Linear) else 0
        if tensor.shape[width:] != there.shape[width:] or tensor.dim() != there.dim():
            raise _unfit(adapter, name, tensor, there)
        value = tensor.to(there.device, there.dtype).clone()
        if name in made._parameters:
            made._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            made._buffers[name] = value
    if isinstance(made, nn.Linear):
        if made.bias is not None and len(made.bias) != len(made.weight):
            raise _unfit(adapter, "bias", made.bias, made.weight[:, 0])
        made.out_features = len(made.weight)
    return made


def _unfit(adapter: str, name: str, got: Tensor, wanted: Tensor) -> ShapeError:
    return ShapeError(
        f"adapter {adapter!r}: `{name}` of its head is {tuple(got.shape)}, that of the model {tuple(wanted.shape)}. "
        "Load the model that it was trained on, or pass heads=False."
    )


def mix(own: Mapping[nn.Module, list[int]], rows: int, x: Tensor, output: Tensor) -> Tensor:
    """`output`, that of the model's own module for x (n, …), with the rows of each head as that head has them.

    own: the rows of each, out of `rows`, which n is a multiple of: each row stands there equally often. Of heads for
    several numbers of labels the widest says how wide all are, and what a row has no label for is −∞.
    """
    spread = _by_row(x, rows)
    found = {head: head(spread[places].flatten(0, 1)) for head, places in own.items()}
    width = max(output.shape[-1], *(one.shape[-1] for one in found.values()))
    result = torch.full((*output.shape[:-1], width), -torch.inf, dtype=output.dtype, device=output.device)
    result[..., : output.shape[-1]] = output
    by_row = _by_row(result, rows)
    for head, places in own.items():
        one = found[head]
        by_row[places, ..., one.shape[-1] :] = -torch.inf
        by_row[places, ..., : one.shape[-1]] = _by_row(one, len(places)).to(result.dtype)
    return result


def _by_row(tensor: Tensor, rows: int) -> Tensor:
    """(rows · m, …) → (rows, m, …)."""
    return tensor.reshape(rows, -1, *tensor.shape[1:])
