"""SOAP, an optimizer for coefficients: they are small enough for Adam in the eigenbasis of their gradients."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..core.options import to_float, to_int
from ..errors import OptionError
from .layer import EigenLoraxLayer

MAX_SIDE = 512
"""Longest side of a matrix that is preconditioned, which takes 1 MiB per side in float32."""
_SIDES = ("left", "right")
WIDE = 32
"""Length of the shorter side of a matrix above which steps are shortened."""
BETAS, EPSILON = (0.9, 0.95), 1e-8
LEARNING_RATE, HEAD_LEARNING_RATE = 2e-2, 2e-2
"""Learning rates of coefficients, at the default scaling of 2, and of a head (docs/results.md)."""
LORA_LEARNING_RATE = 1e-2
"""Learning rate of a LoRA's factors with SOAP, at the same scaling (docs/results.md)."""


class SOAP(Optimizer):
    """
    SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioners.

    A matrix G of gradients has a second moment on either side, G Gᵀ and Gᵀ G. In their eigenbases its entries are
    nearly uncorrelated, as Adam assumes. The decompositions would be expensive for the factors of a LoRA, which are
    thousands long, but coefficients are small on both sides. A side longer than `max_side` is not decomposed, as in the
    paper (§4.1). Parameters that are not matrices, or longer on both sides, get AdamW.

    As in the authors' code, the first step of a matrix only initialises the second moments. In addition, the steps of
    matrices whose sides are both longer than 32 (cores) are multiplied by √(32 / the shorter side): the norm of a step
    grows with both sides, and with this factor one learning rate is suitable for all sizes.

    Args:
        params (iterable):
            Parameters or parameter groups, as for any optimizer of torch. `coefficient_groups` and `lora_groups` return
            the groups of a model.
        lr (`float`):
            The learning rate: the distance by which Adam moves each entry in the eigenbasis.
        betas (`tuple`):
            Decay rates of the mean of gradients and of all second moments.
        eps (`float`), weight_decay (`float`):
            As in AdamW; the weight decay is decoupled from the gradients.
        precondition_frequency (`int`):
            Number of steps between two eigendecompositions.
        max_side (`int`):
            The longest side that is decomposed; 0 for AdamW.

    The state of a matrix (m, n) has 2·m·n + 2·(m² + n²) entries, without the square of a side that is not decomposed.
    Parameters must be float32, as coefficients are.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = LEARNING_RATE,
        betas: tuple[float, float] = BETAS,
        eps: float = EPSILON,
        weight_decay: float = 0.0,
        precondition_frequency: int = 5,
        max_side: int = MAX_SIDE,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= to_float(name, value) < math.inf:
                raise OptionError(f"{name} must be a number of at least 0, got {value!r}.")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise OptionError(f"betas must be two numbers from 0 to below 1, got {betas!r}.")
        for name, value, smallest in (
            ("precondition_frequency", precondition_frequency, 1),
            ("max_side", max_side, 0),
        ):
            if to_int(name, value) < smallest:
                raise OptionError(f"{name} must be at least {smallest}, got {value!r}.")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "precondition_frequency": precondition_frequency,
                "max_side": max_side,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform a single optimization step.

        Args:
            closure (`Callable`, *optional*):
                A closure that reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            to_decompose = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("SOAP does not support sparse gradients.")
                state = self.state[parameter]
                if not state:
                    _init_state(state, parameter, group["max_side"])
                state["step"] += 1
                if _is_preconditioned(state):
                    _update_moments(state, parameter.grad, group["betas"][1])
                    if state["step"] == 1 or state["step"] % group["precondition_frequency"] == 0:
                        to_decompose.append(state)
            _update_eigenbases(to_decompose)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _apply_step(parameter, self.state[parameter], group)
        return loss


def coefficient_groups(
    model: nn.Module, *, lr: float = LEARNING_RATE, head_lr: float = HEAD_LEARNING_RATE
) -> list[dict[str, Any]]:
    """
    Return parameter groups of a model for [`SOAP`]: its coefficients, and all other trained parameters.

    The other parameters, such as a task head or biases, are updated by AdamW.

    Args:
        model (`nn.Module`):
            The result of `get_peft_model` for an `EigenLoraxConfig`.
        lr (`float`):
            Learning rate of the coefficients.
        head_lr (`float`):
            Learning rate of the other parameters.

    Returns:
        `list`: The groups, without empty ones.

    Raises:
        OptionError: The model trains no coefficients, or also trains weights of another kind of adapter, for which
            neither learning rate is suitable.
    """
    return _adapter_groups(model, _COEFFICIENTS, lr, head_lr)


def lora_groups(
    model: nn.Module, *, lr: float = LORA_LEARNING_RATE, head_lr: float = HEAD_LEARNING_RATE
) -> list[dict[str, Any]]:
    """
    Return parameter groups of a model with a LoRA of PEFT, for [`SOAP`] or AdamW: its factors, and all others.

    A LoRA with the optimizer of the coefficients is the baseline that coefficients are compared with. Of factors of
    layers that are wider than its `max_side`, `SOAP` preconditions the side of the rank alone. The other parameters,
    such as a task head, are updated by AdamW.

    Args:
        model (`nn.Module`):
            The result of `get_peft_model` for a `LoraConfig`.
        lr (`float`):
            Learning rate of the factors. In the experiments, the best rates were 0.008 to 0.012 with `SOAP`, and 0.002
            to 0.012 with AdamW (docs/tuner.md).
        head_lr (`float`):
            Learning rate of the other parameters.

    Returns:
        `list`: The groups, without empty ones.

    Raises:
        OptionError: The model trains no LoRA, or also trains weights of another kind of adapter, for which neither
            learning rate is suitable.
    """
    return _adapter_groups(model, _LORA, lr, head_lr)


@dataclass(frozen=True, slots=True)
class _AdapterKind:
    """Kind of adapter that a function makes parameter groups for.

    Attributes:
        layer: Class of its layers.
        function: Name of the function, for messages.
        weights: What its weights are called in messages.
        remedy: What to do for a model without such layers.
        other: What to do for a model with the other kind of adapter.
    """

    layer: type[BaseTunerLayer]
    function: str
    weights: str
    remedy: str
    other: str


_COEFFICIENTS = _AdapterKind(
    EigenLoraxLayer,
    "coefficient_groups",
    "coefficients",
    "get_peft_model(model, EigenLoraxConfig(subspace=...)) makes them; for a LoRA, call lora_groups.",
    "For a LoRA, call lora_groups.",
)
_LORA = _AdapterKind(
    LoraLayer,
    "lora_groups",
    "LoRA factors",
    "get_peft_model(model, LoraConfig(...)) makes them.",
    "For coefficients, call coefficient_groups.",
)


def _adapter_groups(model: nn.Module, kind: _AdapterKind, lr: float, head_lr: float) -> list[dict[str, Any]]:
    """Return the groups of the adapters of one kind and of all other trained parameters; errors as `lora_groups`."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers_by_weight = {id(weight): layer for layer in layers for weight in _adapter_weights(layer)}
    all_of_kind = {key for key, layer in layers_by_weight.items() if isinstance(layer, kind.layer)}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    other_weights = layers_by_weight.keys() - all_of_kind
    foreign = [name for name, parameter in trained.items() if id(parameter) in other_weights]
    if foreign:
        other_kind = type(layers_by_weight[id(trained[foreign[0]])]).__module__.split(".")[-2]
        raise OptionError(
            f"the model trains {len(foreign)} weights of another kind of adapter ({other_kind}), such as {foreign[0]}. "
            f"{kind.function} has learning rates for {kind.weights} and heads only. {kind.other} Or freeze these "
            "weights (requires_grad_(False)), or pass your own groups of parameters to SOAP."
        )
    adapter_weights = [parameter for parameter in trained.values() if id(parameter) in all_of_kind]
    if not adapter_weights:
        if all_of_kind:
            why, remedy = (
                f"its {kind.weights} are frozen",
                "Load the adapter with is_trainable=True, or make it active.",
            )
        else:
            why, remedy = "no layer has any", kind.remedy
        raise OptionError(f"the {type(model).__name__} trains no {kind.weights}: {why}. {remedy}")
    heads = [parameter for parameter in trained.values() if id(parameter) not in all_of_kind]
    # max_side=0 makes SOAP update heads as AdamW does; AdamW ignores the key
    groups = [{"params": adapter_weights, "lr": lr}, {"params": heads, "lr": head_lr, "max_side": 0}]
    return [group for group in groups if group["params"]]


def _adapter_weights(layer: BaseTunerLayer) -> Iterator[nn.Parameter]:
    """Yield the weights of a layer's adapters, without the weights of its base layer."""
    for name in layer.adapter_layer_names:
        container = getattr(layer, name, None)
        if isinstance(container, nn.Module):
            yield from container.parameters()


def _init_state(state: dict[str, Any], parameter: nn.Parameter, max_side: int) -> None:
    state["step"] = 0
    state["mean"] = torch.zeros_like(parameter)
    state["square"] = torch.zeros_like(parameter)
    if parameter.ndim == 2:
        for side, size in zip(_SIDES, parameter.shape, strict=True):
            if size <= max_side:
                state[side] = parameter.new_zeros(size, size)


def _update_moments(state: dict[str, Any], gradient: Tensor, decay: float) -> None:
    """Add a gradient to the running second moments of the sides that have some."""
    if "left" in state:
        state["left"].lerp_(gradient @ gradient.mT, 1 - decay)
    if "right" in state:
        state["right"].lerp_(gradient.mT @ gradient, 1 - decay)


def _update_eigenbases(states: list[dict[str, Any]]) -> None:
    """Decompose the second moments, in one batch per size."""
    sizes: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for state in states:
        for side in (side for side in _SIDES if side in state):
            sizes.setdefault(len(state[side]), []).append((state, side))
    for entries in sizes.values():
        moments = torch.stack([state[side] for state, side in entries])
        # scaled, because squares of small gradients underflow. Moments that are not finite get the identity, since eigh
        # would raise an error: the loss shows the problem in any case
        scale = moments.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(moments.dtype).tiny)[:, None, None]
        finite = moments.isfinite().all(-1).all(-1)[:, None, None]
        identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
        bases = torch.linalg.eigh(torch.where(finite, moments / scale, identity)).eigenvectors
        for (state, side), basis in zip(entries, bases, strict=True):
            state[f"{side}_basis"] = basis.clone()


def _apply_step(parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Update a parameter by a step of Adam, in the eigenbases if it has them."""
    step, (mean_decay, square_decay), lr = state["step"], group["betas"], group["lr"]
    rotated = _is_preconditioned(state)
    assert parameter.grad is not None
    state["mean"].lerp_(parameter.grad, 1 - mean_decay)
    gradient, mean = _rotate(parameter.grad, state), _rotate(state["mean"], state)
    state["square"].mul_(square_decay).addcmul_(gradient, gradient, value=1 - square_decay)
    if rotated and step == 1:
        return
    root = (state["square"] / (1 - square_decay**step)).sqrt_().add_(group["eps"])
    change = _rotate_back(mean / (1 - mean_decay**step) / root, state)
    if rotated:
        lr *= min(1.0, math.sqrt(WIDE / max(min(parameter.shape), 1)))
    if group["weight_decay"]:
        parameter.mul_(1 - lr * group["weight_decay"])
    parameter.add_(change, alpha=-lr)


def _is_preconditioned(state: dict[str, Any]) -> bool:
    return any(side in state for side in _SIDES)


def _rotate(matrix: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a matrix in the eigenbases of the sides that have one."""
    if "left" in state:
        matrix = state["left_basis"].mT @ matrix
    return matrix @ state["right_basis"] if "right" in state else matrix


def _rotate_back(matrix: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a matrix that `_rotate` returned in its own coordinates."""
    if "left" in state:
        matrix = state["left_basis"] @ matrix
    return matrix @ state["right_basis"].mT if "right" in state else matrix
