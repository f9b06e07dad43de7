"""Heads of adapters: copies of the model's modules with an adapter's own parameters (task heads, trained biases).

A copy shares everything with the model's module except those parameters. Replacing the parameters in the module itself
would affect the requests of other threads.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...core import keys, module_names
from ...errors import ModuleNameError, ShapeError

# torch's attributes for hooks of a module. A copy must not run the bank's hooks again.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@dataclass(frozen=True, slots=True)
class Heads:
    """Modules with an adapter's own parameters.

    Attributes:
        modules: The modules by name in the model.
        tensors: The adapter's own parameters in them.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()


def tensor_names(model: nn.Module) -> frozenset[str]:
    """Return the names of all parameters and buffers, including tied ones."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return frozenset(name for name, _ in (*parameters, *buffers))


def make_heads(name: str, tensors: Mapping[str, Tensor], model: nn.Module, names: frozenset[str]) -> Heads:
    """Return the heads of an adapter for a model.

    Args:
        name: Name of the adapter.
        tensors: Its heads and trained biases, by key.
        model: The model.
        names: The names of the model's tensors.

    Raises:
        ModuleNameError: The model lacks one of the tensors.
        ShapeError: A tensor has another shape in the model.
    """
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        # PEFT saves the trained bias of an adapted layer under the name of its base layer
        model_key = key.removeprefix(keys.MODEL_PREFIX).replace(".base_layer.", ".")
        model_name = module_names.resolve(model_key, names)
        if model_name is None:
            raise ModuleNameError(
                f"adapter {name!r} has a head of its own, {key!r}, that the model lacks. Load the model that it "
                "was trained on, such as AutoModelForSequenceClassification, or pass heads=False."
            )
        module, _, parameter = model_name.rpartition(".")
        tensors_by_module.setdefault(module, {})[parameter] = tensor
    modules = {
        module: _copy_with(model.get_submodule(module), parameters, name)
        for module, parameters in tensors_by_module.items()
    }
    copied = tuple(
        getattr(modules[module], parameter)
        for module, parameters in tensors_by_module.items()
        for parameter in parameters
    )
    return Heads(modules, copied)


def _copy_with(module: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> nn.Module:
    """Copy a module with `tensors` in place of its own, in their dtype and on their device."""
    head = copy.copy(module)
    head._parameters = dict(module._parameters)
    head._buffers = dict(module._buffers)
    for hooks in _HOOKS:
        setattr(head, hooks, OrderedDict())
    # a replaced `forward`, such as accelerate's, is bound to the original module
    head.__dict__.pop("forward", None)
    for name, tensor in tensors.items():
        original = getattr(module, name)
        # the first dimension of a linear head is the number of labels, which may differ
        first = 1 if isinstance(module, nn.Linear) else 0
        if tensor.shape[first:] != original.shape[first:] or tensor.dim() != original.dim():
            raise _shape_error(adapter, name, tensor, original)
        converted = tensor.to(original.device, original.dtype).clone()
        if name in head._parameters:
            head._parameters[name] = nn.Parameter(converted, requires_grad=False)
        else:
            head._buffers[name] = converted
    if isinstance(head, nn.Linear):
        if head.bias is not None and len(head.bias) != len(head.weight):
            raise _shape_error(adapter, "bias", head.bias, head.weight[:, 0])
        head.out_features = len(head.weight)
    return head


def _shape_error(adapter: str, name: str, actual: Tensor, expected: Tensor) -> ShapeError:
    return ShapeError(
        f"adapter {adapter!r}: `{name}` of its head has shape {tuple(actual.shape)}, in the model "
        f"{tuple(expected.shape)}. Load the model that it was trained on, or pass heads=False."
    )


def apply_heads(head_rows: Mapping[nn.Module, list[int]], n_rows: int, x: Tensor, output: Tensor) -> Tensor:
    """Return the output of a module with the rows of each head computed by that head.

    If heads have different numbers of labels, the output is as wide as the widest, and padded with −∞.

    Args:
        head_rows: Batch rows of each head.
        n_rows: Number of batch rows. Each may occur several times in `x`, equally often.
        x: Input, (n, …).
        output: Output of the model's own module, (n, …).
    """
    x_by_row = _by_row(x, n_rows)
    outputs = {head: head(x_by_row[rows].flatten(0, 1)) for head, rows in head_rows.items()}
    width = max(output.shape[-1], *(head_output.shape[-1] for head_output in outputs.values()))
    mixed = torch.full((*output.shape[:-1], width), -torch.inf, dtype=output.dtype, device=output.device)
    mixed[..., : output.shape[-1]] = output
    by_row = _by_row(mixed, n_rows)
    for head, rows in head_rows.items():
        labels = outputs[head].shape[-1]
        by_row[rows, ..., labels:] = -torch.inf
        by_row[rows, ..., :labels] = _by_row(outputs[head], len(rows)).to(mixed.dtype)
    return mixed


def _by_row(tensor: Tensor, n_rows: int) -> Tensor:
    """Reshape (n_rows · m, …) to (n_rows, m, …)."""
    return tensor.reshape(n_rows, -1, *tensor.shape[1:])
