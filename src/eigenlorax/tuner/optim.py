"""The optimizer for coefficients: they are few, so that Adam can run in the eigenbasis of their gradients."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..core.options import to_float, to_int
from ..errors import OptionError
from .layer import EigenLoraxLayer

MAX_SIDE = 512
"""The longest side of a matrix that is rotated: 1 MiB a side in float32, and a decomposition of that size."""
WIDE = 32
"""Sides of a core from which on steps are shorter."""
BETAS, EPSILON = (0.9, 0.95), 1e-8
LEARNING_RATE, HEAD_LEARNING_RATE = 2e-2, 5e-3
"""Of coefficients whose update is scaled by 2, as by default, and of a head (docs/results.md)."""


class SOAP(Optimizer):
    """
    SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbasis of Shampoo's two preconditioners.

    A matrix G of gradients has a second moment on either side, G Gᵀ and Gᵀ G; in their eigenbases its entries are
    nearly uncorrelated, which is what Adam takes them to be. For a LoRA's factors, thousands long, that costs too much;
    coefficients are small on both sides. Parameters that are no matrices, or longer than `max_side` on one side, get
    AdamW. The first step of a matrix only begins the second moments, as the authors have it. What is longer than 32 on
    *both* sides, a wide core, is moved by less, √(32 / the shorter side): the norm of a step grows with both sides, and
    so one rate serves all sizes.

    Args:
        params (iterable):
            Parameters, or groups of them, as for any optimizer of torch; a group may have options of its own, such as
            `lr`. `coefficient_groups` makes those of a model.
        lr (`float`):
            The step, in units of Adam's: what each entry moves by, in the eigenbasis.
        betas (`tuple`):
            Decay of the mean of gradients, and of all second moments.
        eps (`float`), weight_decay (`float`):
            As in AdamW: the decay is apart from the gradients.
        precondition_frequency (`int`):
            Steps between two eigenbases.
        max_side (`int`):
            The longest side that is decomposed; 0 for AdamW.

    The state of a matrix (m, n) is 2·m·n + 2·(m² + n²) numbers. Parameters are to be float32, as coefficients are.
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
                raise OptionError(f"{name} must be a number from 0 on, got {value!r}.")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise OptionError(f"betas must be two numbers from 0 to below 1, got {betas!r}.")
        for name, value, least in (
            ("precondition_frequency", precondition_frequency, 1),
            ("max_side", max_side, 0),
        ):
            if to_int(name, value) < least:
                raise OptionError(f"{name} must be at least {least}, got {value!r}.")
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
        """One step; `closure` gives the loss anew, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            due = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("SOAP does not take sparse gradients.")
                state = self.state[parameter]
                if not state:
                    _begin(state, parameter, group["max_side"])
                state["step"] += 1
                if "left" in state:
                    _see(state, parameter.grad, group["betas"][1])
                    if state["step"] == 1 or state["step"] % group["precondition_frequency"] == 0:
                        due.append(state)
            _decompose(due)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _move(parameter, self.state[parameter], group)
        return loss


def coefficient_groups(
    model: nn.Module, *, lr: float = LEARNING_RATE, head_lr: float = HEAD_LEARNING_RATE
) -> list[dict[str, Any]]:
    """
    Groups of a model's trained parameters, for [`SOAP`]: coefficients, and all else that is trained, such as a task's
    head or biases, which get AdamW.

    Args:
        model (`nn.Module`):
            What `get_peft_model` gives for an `EigenLoraxConfig`.
        lr (`float`), head_lr (`float`):
            The rates of the two.

    Raises `OptionError` where the model trains no coefficients, or the weights of another kind of adapter beside them:
    a LoRA at the head's rate, without SOAP, would be trained badly and in silence.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    ours = {id(one) for layer in layers if isinstance(layer, EigenLoraxLayer) for one in _weights(layer)}
    theirs = {id(one): layer for layer in layers if not isinstance(layer, EigenLoraxLayer) for one in _weights(layer)}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    foreign = [name for name, one in trained.items() if id(one) in theirs]
    if foreign:
        kind = type(theirs[id(trained[foreign[0]])]).__module__.split(".")[-2]
        raise OptionError(
            f"the model trains {len(foreign)} weights of another kind of adapter ({kind}), such as {foreign[0]}. "
            "coefficient_groups has rates for coefficients and for heads alone. Freeze these weights "
            "(requires_grad_(False)), or make the groups yourself: SOAP takes any groups of parameters."
        )
    coefficients = [one for one in trained.values() if id(one) in ours]
    if not coefficients:
        if ours:
            why, remedy = "its coefficients are frozen", "Load the adapter with is_trainable=True, or make it active."
        else:
            why = "no layer has any"
            remedy = "get_peft_model(model, EigenLoraxConfig(subspace=...)) makes them; other adapters need no SOAP."
        raise OptionError(f"the {type(model).__name__} trains no coefficients: {why}. {remedy}")
    others = [one for one in trained.values() if id(one) not in ours]
    groups = [{"params": coefficients, "lr": lr}, {"params": others, "lr": head_lr, "max_side": 0}]
    return [group for group in groups if group["params"]]


def _weights(layer: BaseTunerLayer) -> Iterator[nn.Parameter]:
    """The weights that a layer has of its adapters, its base layer's left out."""
    for name in layer.adapter_layer_names:
        held = getattr(layer, name, None)
        if isinstance(held, nn.Module):
            yield from held.parameters()


def _begin(state: dict[str, Any], parameter: nn.Parameter, max_side: int) -> None:
    state["step"] = 0
    state["mean"] = torch.zeros_like(parameter)
    state["square"] = torch.zeros_like(parameter)
    if parameter.ndim == 2 and max(parameter.shape) <= max_side:
        rows, columns = parameter.shape
        for side, size in (("left", rows), ("right", columns)):
            state[side] = parameter.new_zeros(size, size)


def _see(state: dict[str, Any], gradient: Tensor, decay: float) -> None:
    """Take a gradient into the second moments of both sides."""
    state["left"].lerp_(gradient @ gradient.mT, 1 - decay)
    state["right"].lerp_(gradient.mT @ gradient, 1 - decay)


def _decompose(states: list[dict[str, Any]]) -> None:
    """Eigenbases of second moments: all of one size at once."""
    sizes: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for state in states:
        for side in ("left", "right"):
            sizes.setdefault(len(state[side]), []).append((state, side))
    for places in sizes.values():
        moments = torch.stack([state[side] for state, side in places])
        # scaled, since gradients may be so small that their squares are lost; what is no number is left to the loss
        scale = moments.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(moments.dtype).tiny)[:, None, None]
        finite = moments.isfinite().all(-1).all(-1)[:, None, None]
        identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
        bases = torch.linalg.eigh(torch.where(finite, moments / scale, identity)).eigenvectors
        for (state, side), basis in zip(places, bases, strict=True):
            state[f"{side}_basis"] = basis.clone()


def _move(parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Adam's step, in the eigenbases where there are some."""
    step, (first, second), rate = state["step"], group["betas"], group["lr"]
    rotated = "left" in state
    state["mean"].lerp_(parameter.grad, 1 - first)
    gradient, mean = parameter.grad, state["mean"]
    if rotated:
        left, right = state["left_basis"], state["right_basis"]
        gradient, mean = (left.mT @ one @ right for one in (gradient, mean))
    state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    if rotated and step == 1:
        return
    root = (state["square"] / (1 - second**step)).sqrt_().add_(group["eps"])
    change = mean / (1 - first**step) / root
    if rotated:
        change = left @ change @ right.mT
        rate *= min(1.0, math.sqrt(WIDE / min(parameter.shape)))
    if group["weight_decay"]:
        parameter.mul_(1 - rate * group["weight_decay"])
    parameter.add_(change, alpha=-rate)
