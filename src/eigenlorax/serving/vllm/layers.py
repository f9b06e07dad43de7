"""Linear layers of a vLLM model that add `up @ core(down @ x)` to their output, with the bases of a subspace.

The bases are buffers, one copy for all adapters. The core between them is a linear layer whose weight is zero, so the
output of the model does not change until vLLM's LoRA adds an adapter to the core. The product is added where a layer
multiplies by its weight, quantised or not. The gathers and sums of tensor parallelism follow later and are linear, so
each rank needs only its slices of the bases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, ReplicatedLinear

_DOWN, _UP = "eigen_down", "eigen_up"


@dataclass(frozen=True)
class Part:
    """One module of the subspace in a layer, which may have several fused projections.

    Attributes:
        owner: Module with the core and the up basis (rows, k_up).
        core: Name of the core in `owner`.
        columns: Columns of the module in the input's product with the layer's down bases.
        rows: Rows of the module in the layer's output: all rows, or the rows of one fused projection.
    """

    owner: nn.Module
    core: str
    columns: slice
    rows: slice


def attach(layer: LinearBase, parts: Sequence[Part], down: Tensor, ups: Sequence[Tensor]) -> None:
    """Make a layer add the updates of a subspace to its output.

    Args:
        layer: The layer.
        parts: Modules of the subspace in the layer.
        down: Down bases of all parts, for this rank's input, (Σ k_down, input).
        ups: Up basis of each part, (rows, k_up).
    """
    layer.register_buffer(_DOWN, down, persistent=False)
    for part, up in zip(parts, ups, strict=True):
        part.owner.register_buffer(_UP, up, persistent=False)
        k_down = part.columns.stop - part.columns.start
        part.owner.add_module(part.core, _core(k_down, up.shape[1], up))
    layer.quant_method = SharedBasisMethod(layer.quant_method, tuple(parts))
    # the bases multiply the input before the layer's own kernel quantises it
    layer.requires_unquantized_input = True


def _core(k_down: int, k_up: int, weight: Tensor) -> ReplicatedLinear:
    """Return a placeholder linear layer without weights, which computes zeros.

    Args:
        k_down: Input width.
        k_up: Output width.
        weight: Tensor with the dtype and device of the layer.
    """
    core = ReplicatedLinear(k_down, k_up, bias=False, params_dtype=weight.dtype, disable_tp=True, return_bias=False)
    core.quant_method = ZeroMethod()
    del core.weight
    # vLLM reads the device from the weight
    core.register_buffer("weight", weight.new_empty(0), persistent=False)
    return core


class ZeroMethod(LinearMethodBase):
    """Linear method of a core: zeros, without a weight."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create no weights."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert isinstance(layer, ReplicatedLinear)
        return x.new_zeros((*x.shape[:-1], layer.output_size))


class SharedBasisMethod(LinearMethodBase):
    """A layer's own linear method, followed by the products of its parts of the subspace."""

    def __init__(self, base: Any, parts: tuple[Part, ...]) -> None:
        self.base = base
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        # vLLM reads attributes that only some linear methods have
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.base.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        output = self.base.apply(layer, x, bias)
        tokens = output.view(-1, output.shape[-1])
        hidden = functional.linear(x.reshape(-1, x.shape[-1]), getattr(layer, _DOWN))
        for part in self.parts:
            core = getattr(part.owner, part.core)(hidden[:, part.columns])
            tokens[:, part.rows].addmm_(core, getattr(part.owner, _UP).mT)
        return output
