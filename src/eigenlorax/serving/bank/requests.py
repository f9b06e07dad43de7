"""What one request runs with: the coefficients of its adapters, laid out for the rows of its batch.

A plan is made once, when a request begins, and is never changed: whatever is added, removed or replaced meanwhile,
every layer sees the same adapters. It keeps alive what it needs of them, and what was removed goes with it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import wraps
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...core.layer_update import LayerCoefficients, LayerResidual, RowGroups, group_rows, without_autograd
from ...errors import ShapeError
from .held import Held, Layout

_CURRENT: ContextVar[Mapping[Any, tuple["Plan", ...]]] = ContextVar(
    "eigenlorax_bank_plans", default=MappingProxyType({})
)
"""Of this thread or task: the plans of each bank whose blocks it is in, the innermost last."""


def current(bank: Any) -> "Plan | None":
    """The plan that this thread or task runs for a bank."""
    plans = _CURRENT.get().get(bank)
    return plans[-1] if plans else None


class Running:
    """A plan for a bank, for the length of a block and in this thread or task alone. It can be entered again, and by
    several at once."""

    def __init__(self, bank: Any, plan: "Plan") -> None:
        self._bank, self._plan = bank, plan

    def __enter__(self) -> None:
        plans = _CURRENT.get()
        _CURRENT.set({**plans, self._bank: (*plans.get(self._bank, ()), self._plan)})

    def __exit__(self, *error: object) -> None:
        plans = dict(_CURRENT.get())
        outer = plans.pop(self._bank)[:-1]
        _CURRENT.set({**plans, self._bank: outer} if outer else plans)


Request = Callable[[], AbstractContextManager[None]]
_REQUESTS, _BEFORE = "bank_requests", "bank_before"
_versions = itertools.count()


def begin(model: nn.Module, request: Request) -> Callable[[], None]:
    """Let each call of the model be a `request` too; what is returned takes that back.

    Its `forward` is replaced, and no hook put on it: a call that is interrupted has to end its request. Several banks
    share one replacement, so that they may go in any order.
    """
    requests = _replacement(model).get(_REQUESTS)
    if requests is None:
        requests = []
        _replace_forward(model, requests, vars(model).get("forward"))
    requests.append(request)

    def end() -> None:
        requests.remove(request)
        replacement = _replacement(model)
        if requests or replacement.get(_REQUESTS) is not requests:
            return
        if replacement[_BEFORE] is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = replacement[_BEFORE]

    return end


def renew(model: nn.Module) -> None:
    """Let a model that is compiled as a whole be compiled again at its next call: hooks alone would go unseen."""
    replacement = _replacement(model)
    if _REQUESTS in replacement:
        _replace_forward(model, replacement[_REQUESTS], replacement[_BEFORE])


def _replacement(model: nn.Module) -> dict[str, Any]:
    """The attributes of what stands for the model's `forward`, if it is one of ours."""
    forward = vars(model).get("forward")
    return getattr(getattr(forward, "__func__", forward), "__dict__", {})


def _replace_forward(model: nn.Module, requests: list[Request], before: Any) -> None:
    version = str(next(_versions))

    def run(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # a compiled graph asks for the request at each layer; and what its tracing has looked at, as this version, it
        # looks at in each call, to be traced again for another one
        if torch.compiler.is_compiling() and version:
            return call(*args, **kwargs)
        with ExitStack() as stack:
            for request in tuple(requests):
                stack.enter_context(request())
            return call(*args, **kwargs)

    if before is None:
        original = type(model).forward

        @wraps(original)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run(original.__get__(self), args, kwargs)

        replacement: Any = method
        # bound, so that a copy of the model runs its own
        vars(model)["forward"] = MethodType(method, model)
    else:

        @wraps(before)
        def function(*args: Any, **kwargs: Any) -> Any:
            return run(before, args, kwargs)

        replacement = vars(model)["forward"] = function
    vars(replacement).update({_REQUESTS: requests, _BEFORE: before})


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What each module multiplies with.

    parts: by module of the subspace; with a dimension of groups in front where there is an order.
    heads: by module of the model, whose rows each head is for; one head for all rows has none.
    rows: how many a batch must have, and `repeats` how often each may stand there (beams); None for any number.
    """

    parts: Mapping[str, LayerCoefficients] = field(default_factory=dict)
    heads: Mapping[str, Mapping[nn.Module, list[int]]] = field(default_factory=dict)
    order: RowGroups | None = None
    rows: int | None = None
    repeats: tuple[int, ...] = (1,)

    def check_rows(self, x: Tensor, module: str) -> None:
        """`ShapeError` if x, the input of a module, does not have the rows that adapters were named for."""
        if self.rows is None or len(x) in {self.rows * repeat for repeat in self.repeats}:
            return
        raise ShapeError(
            f"module {module} got {len(x)} rows, and {self.rows} adapters were named, one a row. Name one for each "
            "row; for beams call bank.generate(…, adapter_names=…), which knows of them. A module that sees rows in "
            "another order than the batch (experts, flattened tokens) takes one adapter for all rows."
        )


def alone(held: Held | None, dtype: torch.dtype, rows: int | None = None, repeats: tuple[int, ...] = (1,)) -> Plan:
    """One adapter for all rows; None for the base model."""
    if held is None:
        return Plan(rows=rows, repeats=repeats)
    heads: dict[str, dict[nn.Module, list[int]]] = {name: {module: []} for name, module in held.heads.modules.items()}
    with without_autograd(held.numbers.device):
        return Plan(held.parts(dtype), heads, None, rows, repeats)


def mixed(adapters: Sequence[Held | None], dtype: torch.dtype, repeats: tuple[int, ...] = (1,)) -> Plan:
    """An adapter for each row; None is the base model."""
    if len(set(adapters)) == 1:
        return alone(adapters[0], dtype, len(adapters), repeats)
    numbered = {held: number for number, held in enumerate(dict.fromkeys(adapters))}
    distinct = list(numbered)
    groups, order = group_rows([numbered[held] for held in adapters])
    heads: dict[str, dict[nn.Module, list[int]]] = {}
    for row, held in enumerate(adapters):
        for name, module in held.heads.modules.items() if held is not None else ():
            heads.setdefault(name, {}).setdefault(module, []).append(row)
    device = next(held.numbers.device for held in distinct if held is not None)
    with without_autograd(device):
        parts = _parts([distinct[group] for group in groups], dtype)
        for place, rests in _residuals(adapters, dtype, device).items():
            parts[place] = replace(parts[place], residuals=rests)
    return Plan(parts, heads, order.to(device), len(adapters), repeats)


def _parts(groups: Sequence[Held | None], dtype: torch.dtype) -> dict[str, LayerCoefficients]:
    """The coefficients of all groups, zero for the base model and for modules that an adapter lacks. Adapters of one
    layout are copied together; lower ranks are filled up with zeros."""
    batches = [_Batch.of(layout, groups, dtype) for layout in dict.fromkeys(one.layout for one in groups if one)]
    if len(batches) == 1:
        return batches[0].parts()
    ranks: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for batch in batches:
        for place in batch.layout.places:
            ranks[place.module] = max(place.rank, ranks.get(place.module, 0))
            sizes[place.module] = place.k_down, place.k_up
    device = batches[0].numbers.device
    found = {}
    for module, rank in ranks.items():
        k_down, k_up = sizes[module]
        down = torch.zeros(len(groups), rank, k_down, dtype=dtype, device=device)
        up = torch.zeros(len(groups), k_up, rank, dtype=dtype, device=device)
        found[module] = down, up
    for batch in batches:
        for place in batch.layout.places:
            (all_down, all_up), (down, up) = found[place.module], place.of(batch.numbers)
            all_down[batch.members, : place.rank] = down
            all_up[batch.members, :, : place.rank] = up
    return {module: LayerCoefficients(down, up, 1.0) for module, (down, up) in found.items()}


def _residuals(
    adapters: Sequence[Held | None], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[LayerResidual, ...]]:
    """What adapters have beside the bases, by module, each with its rows of the batch."""
    rows: dict[Held, list[int]] = {}
    for row, held in enumerate(adapters):
        if held is not None and held.rests:
            rows.setdefault(held, []).append(row)
    found: dict[str, tuple[LayerResidual, ...]] = {}
    for held, own in rows.items():
        places = torch.tensor(own, device=device)
        for place, scaling in zip(held.layout.places, held.scalings, strict=True):
            if (rest := held.rests.get(place.module)) is not None:
                one = replace(rest.to(dtype=dtype), rows=places, scaling=scaling)
                found[place.module] = (*found.get(place.module, ()), one)
    return found


@dataclass(frozen=True, slots=True)
class _Batch:
    """The groups of one layout, their numbers (members, n) with the scalings multiplied in."""

    layout: Layout
    members: list[int]
    numbers: Tensor
    groups: int

    @classmethod
    def of(cls, layout: Layout, groups: Sequence[Held | None], dtype: torch.dtype) -> "_Batch":
        members = [number for number, held in enumerate(groups) if held is not None and held.layout is layout]
        chosen = [held for held in groups if held is not None and held.layout is layout]
        numbers = torch.stack([held.numbers for held in chosen]).to(dtype)
        if any(scaling != 1 for held in chosen for scaling in held.scalings):
            scalings = torch.tensor([held.scalings for held in chosen], dtype=dtype, device=numbers.device)
            for number, place in enumerate(layout.places):
                numbers[:, place.middle : place.end] *= scalings[:, number, None]
        return cls(layout, members, numbers, len(groups))

    def parts(self) -> dict[str, LayerCoefficients]:
        """Those of all groups, if this is the only layout."""
        numbers = self.numbers
        if len(self.members) < self.groups:
            numbers = numbers.new_zeros(self.groups, numbers.shape[1])
            numbers[self.members] = self.numbers
        return {place.module: LayerCoefficients(*place.of(numbers), 1.0) for place in self.layout.places}
