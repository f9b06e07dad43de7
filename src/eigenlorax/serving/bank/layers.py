"""What the bank puts on modules of a model: forward hooks, which leave modules, their names and weights as they are.

A compiled graph has one opaque operator in a hook's place. It looks up what the request runs with when it is run, so
that no adapter, number of adapters or choice of them is ever part of a graph.
"""

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ...core import convolution, int8_rows
from ...core.int8_rows import BasisRows
from ...core.layer_update import add_grouped_update, add_update
from ...core.subspace import ModuleBases
from ...errors import OptionError, ShapeError
from .heads import mix
from .requests import Plan

_numbers = itertools.count()
_layers: "WeakValueDictionary[int, Layer]" = WeakValueDictionary()
"""Those that a compiled graph may ask for, by their number."""

Hook = Callable[[nn.Module, Any, Any, Tensor], Tensor]


class Layer:
    """A module of the model that requests change the output of.

    name: the model's own. plan: what the current thread or task runs with.
    """

    def __init__(self, module: nn.Module, name: str, plan: Callable[[], Plan]) -> None:
        self.module, self.name, self.plan = module, name, plan
        self.number = next(_numbers)
        _layers[self.number] = self

    def changed(self, output: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """The output of the module for x as the current request has it."""
        raise NotImplementedError

    def hook(self) -> Hook:
        """A forward hook of the module."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            if torch.compiler.is_compiling():
                compiled: Tensor = _changed(output, x, self.number)
                return compiled
            # what autograd, another hook or a module of another kind may still need is not written to
            in_place = (
                type(module) is nn.Linear
                and len(module._forward_hooks) == 1
                and not output.requires_grad
                and output.is_contiguous()
                and not torch.is_autocast_enabled(output.device.type)
            )
            return self.changed(output, x, in_place=in_place)

        return hook


class Updated(Layer):
    """A linear module or a convolution whose output gets the updates of adapters, in the bases of `place` in the
    subspace.

    dtype: that of the bases; torch.int8 is a scale for each row and 8 bits for each number.
    """

    def __init__(
        self, module: nn.Module, name: str, plan: Callable[[], Plan], place: str, bases: ModuleBases, dtype: torch.dtype
    ) -> None:
        super().__init__(module, name, plan)
        self.place = place
        device = _device(module)
        self.down, self.up = (_kept(basis.components, dtype, device) for basis in (bases.down, bases.up))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the bases (k_down, in) and (k_up, out)."""
        return *int8_rows.stored_tensors(self.down), *int8_rows.stored_tensors(self.up)

    def changed(self, output: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """The output and each row's update."""
        plan = self.plan()
        plan.check_rows(x, self.name)
        part = plan.parts.get(self.place)
        if part is None:
            return output
        order = plan.order
        if part.down.device != x.device or self.down.device != x.device:
            # the model was moved since
            self.down, self.up = self.down.to(x.device), self.up.to(x.device)
            part = part.to(x.device)
            order = order.to(x.device) if order is not None else None
        if isinstance(self.module, convolution.CONVOLUTIONS):
            if x.dim() != 2 + len(self.module.kernel_size):
                raise ShapeError(
                    f"module {self.name} got an image of {tuple(x.shape)}: the bank serves batches, x[None] is one."
                )
            how: dict[str, Any] = {"convolution": self.module}
        else:
            how = {"in_place": in_place}
        if order is None:
            return add_update(output, x, self.down, self.up, part, **how)
        return add_grouped_update(output, x, self.down, self.up, part, order, **how)


class Headed(Layer):
    """A module that some adapters have parameters of their own for."""

    def changed(self, output: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """The output of each row's own head; the module's own where its adapter has none."""
        plan = self.plan()
        plan.check_rows(x, self.name)
        own = plan.heads.get(self.name)
        if own is None:
            return output
        for there in self.module.parameters():
            for head in own:
                # the model may have been moved, or have become narrower, since
                head.to(there.device, there.dtype)
            break
        if plan.order is None:
            (head,) = own
            found: Tensor = head(x)
            return found
        assert plan.rows is not None
        return mix(own, plan.rows, x, output)


@torch.library.custom_op("eigenlorax::changed", mutates_args=())
def _changed(output: Tensor, x: Tensor, number: int) -> Tensor:
    layer = _layers.get(number)
    changed = layer.changed(output, x, in_place=False) if layer is not None else output
    if changed.shape != output.shape:
        assert layer is not None
        raise _reshaped(layer.name, changed, output)
    return changed.clone() if changed is output else changed.contiguous()


@_changed.register_fake
def _(output: Tensor, x: Tensor, number: int) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


@torch.library.custom_op("eigenlorax::changed_backward", mutates_args=())
def _changed_backward(x: Tensor) -> Tensor:
    raise OptionError(
        "a compiled model that serves a bank gives no gradients: what a request ran with is gone by then. Call it "
        "without torch.compile, or train with EigenLoraxConfig."
    )


@_changed_backward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _inputs(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return gradient, _changed_backward(ctx.saved_tensors[0]), None


# a model whose parameters want gradients is traced with its backward, even where none is ever asked for
_changed.register_autograd(_backward, setup_context=_inputs)


def _reshaped(name: str, changed: Tensor, output: Tensor) -> ShapeError:
    return ShapeError(
        f"module {name}: a head of this request gives {tuple(changed.shape)}, the model's own {tuple(output.shape)}, "
        "which a compiled model has built in. Load the model with as many labels as its adapters have, or do "
        "not compile it."
    )


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The modules of a model that can be served, linear ones, quantised ones, Conv1D and convolutions of one group:
    (out, in) by name, in being channels · kernel of a convolution."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if convolution.is_supported(module):
            found[name] = convolution.row_sizes(module)[::-1]
        elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
            found[name] = (weight.shape[1], weight.shape[0])
        else:
            out_features, in_features = (getattr(module, field, None) for field in ("out_features", "in_features"))
            if isinstance(out_features, int) and isinstance(in_features, int):
                found[name] = (out_features, in_features)
    return found


def check_hooks_are_seen(model: nn.Module, name: str) -> None:
    """Refuse to put a hook on a module inside of one that is compiled by itself: its graph would go on without it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        outer = ".".join(parts[:depth])
        if model.get_submodule(outer)._compiled_call_impl is not None:
            raise OptionError(
                f"module {outer} is compiled already, and would go on without what the bank does in {name}. Make the "
                "bank, with an adapter that has such a module of its own, and then compile."
            )


def _kept(components: Tensor, dtype: torch.dtype, device: torch.device) -> BasisRows:
    return int8_rows.quantise_rows(components).to(device) if dtype == torch.int8 else components.to(device, dtype)


def _device(module: nn.Module) -> torch.device:
    """Where a module is; the CPU for one that is on no device yet."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
