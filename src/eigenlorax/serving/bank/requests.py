"""Requests of a bank: the plan and the context of a request.

A plan is created when a request begins and is immutable. All layers see the same adapters, whatever is added, removed
or replaced meanwhile. It keeps the tensors of its adapters alive.
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

from ...core.layer_update import LayerCoefficients, LayerResidual, without_autograd
from ...core.row_groups import RowGroups, group_rows
from ...core.token_mixture import LayerMixture
from ...errors import ShapeError
from .bank_adapter import BankAdapter, Layout

_RUNNING: ContextVar[Mapping[Any, tuple["RequestPlan", ...]]] = ContextVar(
    "eigenlorax_bank_plans", default=MappingProxyType({})
)
"""The plans that the current thread or task runs, by bank; the innermost is last."""


def current_plan(bank: Any) -> "RequestPlan | None":
    """Return the plan that the current thread or task runs for a bank."""
    plans = _RUNNING.get().get(bank)
    return plans[-1] if plans else None


class RunningPlan:
    """Context manager that runs a plan for a bank in the current thread or task.

    It can be entered several times, and by several threads at once.
    """

    def __init__(self, bank: Any, plan: "RequestPlan") -> None:
        self._bank, self._plan = bank, plan

    def __enter__(self) -> None:
        plans = _RUNNING.get()
        _RUNNING.set({**plans, self._bank: (*plans.get(self._bank, ()), self._plan)})

    def __exit__(self, *error: object) -> None:
        plans = dict(_RUNNING.get())
        outer = plans.pop(self._bank)[:-1]
        _RUNNING.set({**plans, self._bank: outer} if outer else plans)


Request = Callable[[], AbstractContextManager[None]]
_REQUESTS, _ORIGINAL = "bank_requests", "bank_original_forward"
_versions = itertools.count()


def wrap_calls(model: nn.Module, request: Request) -> Callable[[], None]:
    """Run each call of a model inside `request()`, and return a function that undoes this.

    `forward` is replaced, because a forward hook would not run at the end of a call that raises an error. Several banks
    share one replacement, so that they can be unloaded in any order.
    """
    requests = _replacement_attributes(model).get(_REQUESTS)
    if requests is None:
        requests = []
        _replace_forward(model, requests, vars(model).get("forward"))
    requests.append(request)

    def undo() -> None:
        requests.remove(request)
        attributes = _replacement_attributes(model)
        if requests or attributes.get(_REQUESTS) is not requests:
            return
        if attributes[_ORIGINAL] is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = attributes[_ORIGINAL]

    return undo


def force_recompilation(model: nn.Module) -> None:
    """Make a compiled model compile again at its next call, since torch.compile does not notice new hooks."""
    attributes = _replacement_attributes(model)
    if _REQUESTS in attributes:
        _replace_forward(model, attributes[_REQUESTS], attributes[_ORIGINAL])


def _replacement_attributes(model: nn.Module) -> dict[str, Any]:
    """Return the attributes of the function that replaces the model's `forward`; empty if it is not replaced."""
    forward = vars(model).get("forward")
    return getattr(getattr(forward, "__func__", forward), "__dict__", {})


def _replace_forward(model: nn.Module, requests: list[Request], original: Any) -> None:
    version = str(next(_versions))

    def run(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A compiled graph looks up the request in each layer. Reading `version` while tracing makes torch.compile guard
        # on it, so that a new replacement is traced again.
        if torch.compiler.is_compiling() and version:
            return call(*args, **kwargs)
        with ExitStack() as stack:
            for request in tuple(requests):
                stack.enter_context(request())
            return call(*args, **kwargs)

    if original is None:
        class_forward = type(model).forward

        @wraps(class_forward)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run(class_forward, (self, *args), kwargs)

        replacement: Any = method
        # a bound method, so that a copy of the model runs its own
        vars(model)["forward"] = MethodType(method, model)
    else:

        @wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return run(original, args, kwargs)

        replacement = vars(model)["forward"] = function
    vars(replacement).update({_REQUESTS: requests, _ORIGINAL: original})


@dataclass(frozen=True, slots=True, eq=False)
class RequestPlan:
    """The adapters of a request, arranged for the rows of its batch.

    Attributes:
        coefficients: Coefficients by module name in the subspace, one per group if there are groups.
        heads: Batch rows of each head, by module name in the model; one head without rows serves all rows.
        groups: Groups of rows with the same adapter; None if all rows have the same one.
        rows: Number of batch rows; None for any number.
        repeats: How often each row may occur, for beam search.
        mixtures: Mixtures of adapters by module name in the subspace, of a request in which each token mixes them.
    """

    coefficients: Mapping[str, LayerCoefficients] = field(default_factory=dict)
    heads: Mapping[str, Mapping[nn.Module, list[int]]] = field(default_factory=dict)
    groups: RowGroups | None = None
    rows: int | None = None
    repeats: tuple[int, ...] = (1,)
    mixtures: Mapping[str, LayerMixture] = field(default_factory=dict)

    def check_rows(self, x: Tensor, module: str) -> None:
        """Raise `ShapeError` if the input of a module does not have one row for each adapter that was named."""
        if self.rows is None or len(x) in {self.rows * repeat for repeat in self.repeats}:
            return
        raise ShapeError(
            f"module {module} got {len(x)} rows, but {self.rows} adapter names, one per row. Pass one name per row; "
            "for beams call bank.generate(…, adapter_names=…). A module that gets rows in another order than the batch "
            "(experts, flattened tokens) needs one adapter for all rows."
        )


def plan_single(
    adapter: BankAdapter | None, dtype: torch.dtype, rows: int | None = None, repeats: tuple[int, ...] = (1,)
) -> RequestPlan:
    """Return the plan of a request with one adapter for all rows, or None for the base model."""
    if adapter is None:
        return RequestPlan(rows=rows, repeats=repeats)
    heads: dict[str, dict[nn.Module, list[int]]] = {name: {head: []} for name, head in adapter.heads.modules.items()}
    with without_autograd(adapter.flat.device):
        return RequestPlan(adapter.coefficients(dtype), heads, None, rows, repeats)


def plan_mixed(
    adapters: Sequence[BankAdapter | None], dtype: torch.dtype, repeats: tuple[int, ...] = (1,)
) -> RequestPlan:
    """Return the plan of a request with one adapter per row; None is the base model."""
    if len(set(adapters)) == 1:
        return plan_single(adapters[0], dtype, len(adapters), repeats)
    numbered = {adapter: number for number, adapter in enumerate(dict.fromkeys(adapters))}
    distinct = list(numbered)
    owners, groups = group_rows([numbered[adapter] for adapter in adapters])
    heads: dict[str, dict[nn.Module, list[int]]] = {}
    for row, adapter in enumerate(adapters):
        for name, head in adapter.heads.modules.items() if adapter is not None else ():
            heads.setdefault(name, {}).setdefault(head, []).append(row)
    device = next(adapter.flat.device for adapter in distinct if adapter is not None)
    with without_autograd(device):
        coefficients = _stack_coefficients([distinct[owner] for owner in owners], dtype)
        for module, residuals in _residuals_by_module(adapters, dtype, device).items():
            coefficients[module] = replace(coefficients[module], residuals=residuals)
    return RequestPlan(coefficients, heads, groups.to(device), len(adapters), repeats)


def _stack_coefficients(groups: Sequence[BankAdapter | None], dtype: torch.dtype) -> dict[str, LayerCoefficients]:
    """Stack the coefficients of all groups by module, padded with zeros to the largest rank.

    The base model, and modules that an adapter lacks, get zeros. Adapters of one layout are copied together: one copy
    for each layout instead of one per module and adapter.
    """
    layouts = dict.fromkeys(adapter.layout for adapter in groups if adapter is not None)
    batches = [_LayoutBatch.stack(layout, groups, dtype) for layout in layouts]
    if len(batches) == 1:
        return batches[0].coefficients()
    ranks: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for batch in batches:
        for module_slice in batch.layout.slices:
            ranks[module_slice.module] = max(module_slice.rank, ranks.get(module_slice.module, 0))
            sizes[module_slice.module] = module_slice.k_down, module_slice.k_up
    device = batches[0].flat.device
    stacked = {}
    for module, rank in ranks.items():
        k_down, k_up = sizes[module]
        downs = torch.zeros(len(groups), rank, k_down, dtype=dtype, device=device)
        ups = torch.zeros(len(groups), k_up, rank, dtype=dtype, device=device)
        stacked[module] = downs, ups
    for batch in batches:
        for module_slice in batch.layout.slices:
            (downs, ups), (down, up) = stacked[module_slice.module], module_slice.factors(batch.flat)
            downs[batch.members, : module_slice.rank] = down
            ups[batch.members, :, : module_slice.rank] = up
    return {module: LayerCoefficients(downs, ups, 1.0) for module, (downs, ups) in stacked.items()}


def _residuals_by_module(
    adapters: Sequence[BankAdapter | None], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[LayerResidual, ...]]:
    """Return the residuals of all adapters by module, each with its batch rows."""
    adapter_rows: dict[BankAdapter, list[int]] = {}
    for row, adapter in enumerate(adapters):
        if adapter is not None and adapter.residuals:
            adapter_rows.setdefault(adapter, []).append(row)
    by_module: dict[str, tuple[LayerResidual, ...]] = {}
    for adapter, rows in adapter_rows.items():
        is_span = rows == list(range(rows[0], rows[-1] + 1))
        indices = slice(rows[0], rows[-1] + 1) if is_span else torch.tensor(rows, device=device)
        for module_slice, scaling in zip(adapter.layout.slices, adapter.scalings, strict=True):
            if (residual := adapter.residuals.get(module_slice.module)) is not None:
                in_batch = residual.to(dtype=dtype)._replace(rows=indices, scaling=scaling)
                by_module[module_slice.module] = (*by_module.get(module_slice.module, ()), in_batch)
    return by_module


@dataclass(frozen=True, slots=True)
class _LayoutBatch:
    """The groups of one layout.

    Attributes:
        layout: The layout.
        members: Indices of the groups with this layout.
        flat: Coefficients of these groups, (members, n), with the scalings multiplied into the up factors.
        n_groups: Number of groups of all layouts.
    """

    layout: Layout
    members: list[int]
    flat: Tensor
    n_groups: int

    @classmethod
    def stack(cls, layout: Layout, groups: Sequence[BankAdapter | None], dtype: torch.dtype) -> "_LayoutBatch":
        """Stack the coefficients of the groups whose adapter has the layout."""
        by_group = {
            group: adapter for group, adapter in enumerate(groups) if adapter is not None and adapter.layout is layout
        }
        flat = torch.stack([adapter.flat for adapter in by_group.values()]).to(dtype)
        scalings = [adapter.scalings for adapter in by_group.values()]
        if any(scaling != 1 for row in scalings for scaling in row):
            factors = torch.tensor(scalings, dtype=dtype, device=flat.device)
            for index, module_slice in enumerate(layout.slices):
                flat[:, module_slice.middle : module_slice.end] *= factors[:, index, None]
        return cls(layout, list(by_group), flat, len(groups))

    def coefficients(self) -> dict[str, LayerCoefficients]:
        """Return the coefficients of all groups, if there is no other layout."""
        flat = self.flat
        if len(self.members) < self.n_groups:
            flat = flat.new_zeros(self.n_groups, flat.shape[1])
            flat[self.members] = self.flat
        return {
            module_slice.module: LayerCoefficients(*module_slice.factors(flat), 1.0)
            for module_slice in self.layout.slices
        }
