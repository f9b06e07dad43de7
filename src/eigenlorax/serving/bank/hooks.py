"""Forward hooks of the bank, which change outputs of modules and leave modules, their names and weights as they are.

In a compiled graph a hook becomes one opaque operator, which looks up the current request when it runs. No adapter and
no choice of adapters is part of a graph.
"""

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ...core import convolution, int8_rows
from ...core.int8_rows import BasisRows
from ...core.layer_update import LayerBases, add_grouped_update, add_update
from ...core.token_mixture import add_mixture
from ...errors import OptionError, ShapeError
from .heads import apply_heads
from .requests import RequestPlan

_numbers = itertools.count()
# A compiled graph holds the number of a hook only, so that it does not keep an unloaded bank alive.
_hooks: "WeakValueDictionary[int, ModuleHook]" = WeakValueDictionary()

Hook = Callable[[nn.Module, Any, Any, Tensor], Tensor]


class ModuleHook:
    """Base class of the bank's hooks on one module.

    Args:
        module: The module.
        name: Name of the module in the model.
        plan: Function that returns the plan of the current request.
    """

    def __init__(self, module: nn.Module, name: str, plan: Callable[[], RequestPlan]) -> None:
        self.module, self.name, self.plan = module, name, plan
        self.number = next(_numbers)
        _hooks[self.number] = self

    def transform(self, output: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """Return the output of the module for the input `x` under the current request."""
        raise NotImplementedError

    def forward_hook(self) -> Hook:
        """Return the function for `register_forward_hook`, with keyword arguments."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            if torch.compiler.is_compiling():
                compiled: Tensor = _changed(output, x, self.number)
                return compiled
            # autograd, other hooks and modules of other types may still need the output
            in_place = (
                type(module) is nn.Linear
                and len(module._forward_hooks) == 1
                and not output.requires_grad
                and output.is_contiguous()
                and not torch.is_autocast_enabled(output.device.type)
            )
            return self.transform(output, x, in_place=in_place)

        return hook


class UpdateHook(ModuleHook):
    """Hook that adds the updates of adapters to the output of a linear module or a convolution.

    Args:
        module: The module.
        name: Name of the module in the model.
        plan: Function that returns the plan of the current request.
        subspace_name: Name of the module in the subspace.
        bases: Rows of the bases of the module, (k_down, in) and (k_up, out).
        dtype: Dtype of the bases; torch.int8 stores 8 bits per entry and a scale per row.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        plan: Callable[[], RequestPlan],
        *,
        subspace_name: str,
        bases: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, name, plan)
        self.subspace_name = subspace_name
        device = device_of(module)
        down, up = (_to_rows(components, dtype, device) for components in bases)
        self.bases = LayerBases(down, up, module if isinstance(module, convolution.CONVOLUTIONS) else None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the bases (k_down, in) and (k_up, out)."""
        return *int8_rows.stored_tensors(self.bases.down), *int8_rows.stored_tensors(self.bases.up)

    def transform(self, output: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        plan = self.plan()
        plan.check_rows(x, self.name)
        coefficients = plan.coefficients.get(self.subspace_name)
        mixture = plan.mixtures.get(self.subspace_name)
        if coefficients is None and mixture is None:
            return output
        if self.bases.down.device != x.device:
            # the model was moved after the bank was made
            self.bases = self.bases.to(x.device)
        layer = self.bases.convolution
        if layer is not None and x.dim() != 2 + len(layer.kernel_size):
            raise ShapeError(
                f"module {self.name} got an input of shape {tuple(x.shape)}: the bank serves batches. Pass x[None]."
            )
        if mixture is not None:
            return add_mixture(output, x, self.bases, mixture.to(x.device))
        assert coefficients is not None
        groups = plan.groups
        if coefficients.down.device != x.device:
            # the model was moved after the request began
            coefficients = coefficients.to(x.device)
            groups = groups.to(x.device) if groups is not None else None
        if groups is None:
            return add_update(output, x, self.bases, coefficients, in_place=in_place)
        return add_grouped_update(output, x, self.bases, coefficients, groups, in_place=in_place)


class HeadHook(ModuleHook):
    """Hook that replaces the output of a module by the output of the adapters' own heads."""

    def transform(self, output: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        plan = self.plan()
        plan.check_rows(x, self.name)
        head_rows = plan.heads.get(self.name)
        if head_rows is None:
            return output
        parameter = next(self.module.parameters(), None)
        if parameter is not None:
            for head in head_rows:
                # the model may have been moved, or converted to another dtype, since the head was made
                head.to(parameter.device, parameter.dtype)
        if plan.groups is None:
            (head,) = head_rows
            head_output: Tensor = head(x)
            return head_output
        assert plan.rows is not None
        return apply_heads(head_rows, plan.rows, x, output)


@torch.library.custom_op("eigenlorax::changed", mutates_args=())
def _changed(output: Tensor, x: Tensor, number: int) -> Tensor:
    hook = _hooks.get(number)
    changed = hook.transform(output, x, in_place=False) if hook is not None else output
    if changed.shape != output.shape:
        assert hook is not None
        raise ShapeError(
            f"module {hook.name}: the output of a head of this request has shape {tuple(changed.shape)}, "
            f"but the model was compiled for {tuple(output.shape)}. Load the model with as many labels as its "
            "adapters have, or do not compile it."
        )
    # an operator must not return its input
    return changed.clone() if changed is output else changed.contiguous()


@_changed.register_fake
def _(output: Tensor, x: Tensor, number: int) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


@torch.library.custom_op("eigenlorax::changed_backward", mutates_args=())
def _changed_backward(x: Tensor) -> Tensor:
    raise OptionError(
        "a compiled model that serves a bank has no gradients: the request of the forward pass has ended. Call it "
        "without torch.compile, or train with EigenLoraxConfig."
    )


@_changed_backward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _inputs(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return gradient, _changed_backward(ctx.saved_tensors[0]), None


# a model with parameters that require gradients is traced together with its backward pass, even if none ever runs
_changed.register_autograd(_backward, setup_context=_inputs)


def _to_rows(components: Tensor, dtype: torch.dtype, device: torch.device) -> BasisRows:
    return int8_rows.quantise_rows(components).to(device) if dtype == torch.int8 else components.to(device, dtype)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module; the CPU for one on the meta device."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
