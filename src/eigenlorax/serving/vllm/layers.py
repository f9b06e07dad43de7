"""Linear layers of a vLLM model that add a subspace's part to what they compute: `up @ core(down @ x)`.

The bases are buffers, one copy for all adapters. The core between them is a linear layer whose weight is zero, so that
the model computes what it computed before; what vLLM's own LoRA adds to a core is an adapter. It all happens where a
layer multiplies with its weight, quantised or not. The gathers and sums of tensor parallelism come after that and are
linear, so each rank needs its slices of the bases and nothing else.
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
    """What one module of the subspace adds to a layer: to all of its output, or to one of the projections fused in it.

    owner: the module that has the core, by this name, and the up basis, rows × k_up.
    columns: its share of the products with the layer's down bases. rows: its share of the layer's output.
    """

    owner: nn.Module
    core: str
    columns: slice
    rows: slice


def attach(layer: LinearBase, parts: Sequence[Part], down: Tensor, ups: Sequence[Tensor]) -> None:
    """Make a layer add these parts. down: (Σ k_down, input), this rank's. ups: (rows, k_up) of each part."""
    layer.register_buffer(_DOWN, down, persistent=False)
    for part, up in zip(parts, ups, strict=True):
        part.owner.register_buffer(_UP, up, persistent=False)
        k_down = part.columns.stop - part.columns.start
        part.owner.add_module(part.core, _core(k_down, up.shape[1], up))
    layer.quant_method = SharedBasisMethod(layer.quant_method, tuple(parts))
    # the bases multiply the input as it is, whatever the layer's own kernel would take
    layer.requires_unquantized_input = True


def _core(k_down: int, k_up: int, like: Tensor) -> ReplicatedLinear:
    """A linear layer whose weight is zero: it computes zeros, without a weight."""
    core = ReplicatedLinear(k_down, k_up, bias=False, params_dtype=like.dtype, disable_tp=True, return_bias=False)
    core.quant_method = ZeroMethod()
    del core.weight
    # by which vLLM finds the device
    core.register_buffer("weight", like.new_empty(0), persistent=False)
    return core


class ZeroMethod(LinearMethodBase):
    """How a core multiplies."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """There are none."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert isinstance(layer, ReplicatedLinear)
        return x.new_zeros((*x.shape[:-1], layer.output_size))


class SharedBasisMethod(LinearMethodBase):
    """How a layer multiplies: as it did, and with its parts of the subspace."""

    def __init__(self, base: Any, parts: tuple[Part, ...]) -> None:
        self.base = base
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        # vLLM asks methods for what only some of them have
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
