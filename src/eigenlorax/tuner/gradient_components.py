"""Gradient components: the leading directions of a new task's first gradients, outside of a pack's subspace.

LoRA-GA (arXiv 2407.05000) and LoRA-SB (arXiv 2411.19557) start a LoRA from singular vectors of the gradient of each
weight. Here these vectors are further components, which stay frozen.

No gradient (out × in) is formed. With a random matrix Ω (p × in) of normal entries, the gradient of B = 0 in the
additional term B·Ω·x of a layer is G·Ωᵀ, whose columns span the leading left singular vectors of the weight's gradient
G (Halko et al. 2011, arXiv 0909.4061, §4); likewise the gradient of A = 0 in Ψᵀ·A·x is Ψ·G, for the right ones.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core import linalg
from ..core.int8_rows import quantise_rows
from ..core.layer_update import in_output_shape, project
from ..core.options import to_int
from ..errors import NonFiniteError, OptionError
from .forward import AdaptedLayer

SPARE_ROWS = 8
"""Number of rows of a sketch beyond twice the number of components (Halko et al. 2011, §4.2)."""
KEPT = 2
"""Rows that are kept of the sketches of all batches so far, as a multiple of the rows of one sketch."""

Loss = Callable[[nn.Module, Any], Tensor]
"""Function (model, batch) that returns the loss of a batch, a scalar."""


def initialize_gradient_components(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> None:
    """
    Compute the gradient components of a new adapter, which its config asks for by `n_gradient`.

    On each side of each module, they are the leading singular directions of the gradients of `batches` that are
    orthogonal to the components of the subspace. Each batch costs about one step of LoRA training. The coefficients do
    not change.

    Args:
        model (`nn.Module`):
            The model with the adapter.
        batches (`Iterable`):
            A few batches of training rows, such as 8. Each is passed to the model as keyword arguments, on the model's
            device, and must contain labels.
        adapter_name (`str`):
            The name of the adapter. Defaults to `'default'`.
        loss (`Callable`, *optional*):
            Function (model, batch) that returns the loss. Default: `model(**batch).loss`.
        seed (`int`):
            Seed of the random matrices by which the gradients are compressed. Defaults to `0`.

    Raises:
        OptionError: The adapter has no gradient components to compute, or there is no batch.
        NonFiniteError: A gradient is NaN or infinite.

    Example:
        >>> config = eigenlorax.EigenLoraxConfig(subspace="lm-pack/", r=4, n_gradient=2)
        >>> peft_model = peft.get_peft_model(model, config)
        >>> eigenlorax.tuner.initialize_gradient_components(peft_model, batches)
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and adapter_name in module.gradients_ready
    }
    if not layers:
        raise OptionError(
            f"adapter {adapter_name!r} has no gradient components to compute: its config needs n_gradient above 0, and "
            "they are computed once, before training."
        )
    generator = torch.Generator().manual_seed(to_int("seed", seed))
    sketches = {name: _GradientSketch(layer, adapter_name, generator) for name, layer in layers.items()}
    with _recording(model, adapter_name, sketches):
        n_batches = 0
        for batch in batches:
            value = model(**_on_device(batch, model)).loss if loss is None else loss(model, batch)
            if value is None:
                raise OptionError(
                    f"batch {n_batches} gives no loss. Pass batches with labels, or as loss= a function of the model "
                    "and a batch."
                )
            value.backward()
            for name, sketch in sketches.items():
                sketch.collect(name)
            n_batches += 1
    if not n_batches:
        raise OptionError("batches is empty: pass at least one batch of training rows.")
    # all components are found before the first is written, so that an error leaves the adapter as it was
    components = {name: sketch.components(name) for name, sketch in sketches.items()}
    for name, sketch in sketches.items():
        sketch.write(components[name])


class _GradientSketch:
    """Sketches of the gradients of one layer's weight.

    Args:
        layer: Layer whose bases of the adapter get the components.
        adapter_name: Name of the adapter.
        generator: Source of the random matrices.
    """

    def __init__(self, layer: AdaptedLayer, adapter_name: str, generator: torch.Generator) -> None:
        self._layer, self._adapter_name = layer, adapter_name
        bases, n_gradient = layer.bases_of(adapter_name), layer.n_gradient[adapter_name]
        size = 2 * max(n_gradient) + SPARE_ROWS
        # Ω (size, in) and Ψ (size, out)
        self._random = [torch.randn(size, basis.shape[1], generator=generator).to(basis.device) for basis in bases]
        # A (size, in) and Bᵀ (size, out), both zero
        self._terms = [nn.Parameter(torch.zeros_like(matrix)) for matrix in self._random]
        # rows whose leading right singular vectors are the components of each side
        self._rows = [basis.new_zeros(0, basis.shape[1], dtype=torch.float64) for basis in bases]

    def add_terms(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add Ψᵀ·A·x and B·Ω·x, both zero, to the output of the layer. It is a forward hook."""
        convolution = self._layer.convolution
        x = (args[0] if args else kwargs["x"]).to(torch.float32)
        (omega, psi), (a, b_transposed) = self._random, self._terms
        added = linear(project(x, a, convolution), psi.mT) + linear(project(x, omega, convolution), b_transposed.mT)
        return output + in_output_shape(added, output.shape, convolution).to(output.dtype)

    def collect(self, name: str) -> None:
        """Append the gradients of one batch, Ψ·G and (G·Ωᵀ)ᵀ, to the rows, and compress these if they are many."""
        bases = self._layer.bases_of(self._adapter_name)
        for side, (term, basis) in enumerate(zip(self._terms, bases, strict=True)):
            if term.grad is None:
                # the layer was not used, or nothing before it needs gradients
                continue
            rows, components = term.grad.double(), basis.double()
            term.grad = None
            if not bool(rows.isfinite().all()):
                raise NonFiniteError(
                    f"the gradient of module {name} is NaN or infinite. Check the batches and the loss."
                )
            rows = torch.cat([self._rows[side], rows - (rows @ components.mT) @ components])
            limit = KEPT * len(term)
            if len(rows) > limit:
                _, singular_values, vectors = torch.linalg.svd(rows, full_matrices=False)
                rows = singular_values[:limit, None] * vectors[:limit]
            self._rows[side] = rows

    def components(self, name: str) -> list[Tensor]:
        """Return the components (down, up) of the layer `name`, rounded to 8 bits."""
        components = []
        n_gradient = self._layer.n_gradient[self._adapter_name]
        for basis, rows, n_rows in zip(self._layer.bases_of(self._adapter_name), self._rows, n_gradient, strict=True):
            singular_values, vectors = torch.linalg.svd(rows, full_matrices=False)[1:]
            # gradients are float32
            rank = linalg.numerical_rank(singular_values.float(), (len(rows), rows.shape[1])) if len(rows) else 0
            if rank < n_rows:
                raise OptionError(
                    f"module {name}: the gradients of these batches have {rank} directions outside the "
                    f"subspace, and n_gradient asks for {n_rows}. Pass more batches, or choose a smaller n_gradient."
                )
            inside = basis[: len(basis) - n_rows].double()
            components.append(
                quantise_rows(linalg.orthogonal_complement_rows(vectors[:n_rows], inside)).dequantise(basis.dtype)
            )
        return components

    @torch.no_grad()
    def write(self, components: Sequence[Tensor]) -> None:
        """Write components (down, up) into the adapter's bases."""
        for basis, rows in zip(self._layer.bases_of(self._adapter_name), components, strict=True):
            basis[len(basis) - len(rows) :] = rows
        self._layer.gradients_ready.pop(self._adapter_name)
        self._layer.blend()


@contextmanager
def _recording(model: nn.Module, adapter_name: str, sketches: Mapping[str, _GradientSketch]) -> Iterator[None]:
    """Record gradients of the sketches alone, in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = {name: layer for name, layer in model.named_modules() if name in sketches}
    handles = [
        layer.register_forward_hook(sketches[name].add_terms, with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for layer in layers.values():
            layer.gradients_ready[adapter_name] = True
        with torch.enable_grad():
            yield
    finally:
        for layer in layers.values():
            layer.gradients_ready[adapter_name] = False
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _on_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    """Return a batch with its tensors on the device of the model's parameters."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
