"""`AdapterBank`: any number of adapters of one pack on one model."""

import copy
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...core import convolution, int8_rows, keys, module_names
from ...core.coefficients import pad_coefficients
from ...core.layer_update import without_autograd
from ...core.options import name_list as listed
from ...core.subspace import Subspace
from ...errors import WARN_ABOVE, AdapterNameError, ModuleNameError, OptionError, ShapeError
from ...formats import checks
from ...formats.sources import Source
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter, Record
from . import requests
from .heads import Heads, heads, tensor_names
from .held import Held, Layout, Place, check_all_whole, check_whole, hold
from .layers import Headed, Updated, check_hooks_are_seen, sizes
from .requests import Plan, Running, current

BASE = "__base__"
"""PEFT's word for no adapter."""


class AdapterBank:
    """Adapters of one pack on one model: one basis, and the coefficients of each.

    A request runs with one adapter for all rows or with one for each row, and sees the same ones from its begin to its
    end, whatever is added, removed or replaced meanwhile. Requests of several threads do not see each other's choice.

    model: its modules are matched to the pack's by name, as in training. They get forward hooks, and stay as they are;
        `unload` takes the hooks off again.
    pack: a pack, its folder, or a repository on the Hub.
    adapters: the only ones to load; all by default, none for an empty list.
    heads: whether an adapter's own heads and trained biases take the place of the model's where it serves. Without, the
        model's own serve all.
    basis_dtype: "int8" keeps bases as integers and a scale for each row, rounded to the nearest of 255 levels; floats
        by default. The pack's own bases do not stay in memory then, unless it is given as a `Pack`.
    """

    def __init__(
        self,
        model: nn.Module,
        pack: Pack | str | PathLike[str],
        *,
        adapters: str | Sequence[str] | None = None,
        heads: bool = True,
        basis_dtype: str | torch.dtype | None = None,
    ) -> None:
        in_bytes = int8_rows.is_int8("basis_dtype", basis_dtype)
        chosen = list(dict.fromkeys(listed(adapters))) if adapters is not None else None
        self.model = model
        self.pack = _opened(pack, chosen)
        self._forgets = in_bytes and not isinstance(pack, Pack)
        for name in chosen or ():
            keys.check_known(name, self.pack.names)
        if chosen is None:
            check_all_whole(self.pack)
        checks.warn_of_other_model(self.pack.base_model, getattr(model, "name_or_path", None))
        with without_autograd(torch.device("cpu")):
            subspace = self._subspace()
        self._tensor_names = tensor_names(model) if heads else None
        self._compute = torch.promote_types(subspace.dtype, torch.float32)
        self._places = _matched(model, self.pack)
        self._lock = threading.RLock()
        self._adapters: dict[str, Held] = {}
        self._layouts: MutableMapping[tuple[Place, ...], Layout] = WeakValueDictionary()
        self._updated: dict[str, Updated] = {}
        self._headed: dict[str, Headed] = {}
        self._handles: list[Any] = []
        self._default: str | None = None
        self._default_plan: Plan | None = Plan()
        self._unloaded = False
        for place, name in self._places.items():
            module = model.get_submodule(name)
            with without_autograd(torch.device("cpu")):
                dtype = torch.int8 if in_bytes else self._compute
                layer = Updated(module, name, self._plan, place, subspace.modules[place], dtype)
            self._updated[name] = layer
            self._handles.append(module.register_forward_hook(layer.hook(), with_kwargs=True))
        self._device = next(iter(self._updated.values())).down.device
        self._end_requests = requests.begin(model, self._request)
        try:
            for name in self.pack.names if chosen is None else chosen:
                self._put(self._hold(self.pack.packed(name)))
        except BaseException:
            self.unload()
            raise

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        return f"<AdapterBank of {len(self)} adapters on {len(self._places)} modules of a {type(self.model).__name__}>"

    @property
    def names(self) -> list[str]:
        """The adapters' names, sorted."""
        with self._lock:
            return sorted(self._adapters)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the bank holds: bases as it keeps them, coefficients and rests in the pack's dtype,
        heads; and the pack's own bases where these stay beside, in another dtype or as they lie in its file."""
        with self._lock:
            tensors = [tensor for held in self._adapters.values() for tensor in held.tensors]
        tensors += [tensor for layer in self._updated.values() for tensor in layer.tensors]
        if not self._forgets:
            bases = [pair.side(side) for pair in self.pack.subspace.modules.values() for side in keys.SIDES]
            tensors += [one.components for one in bases]
            tensors += [tensor for one in bases for tensor in (one.payload or {}).values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def active_adapter(self) -> str | None:
        """The adapter of requests that name none; None is the base model."""
        return self._default

    def set_adapter(self, name: str | None) -> None:
        """Let requests that name no adapter run with this one; None or "__base__" for the base model."""
        name = None if name == BASE else name
        with self._lock:
            plan = requests.alone(self._held(name), self._compute)
            self._default, self._default_plan = name, plan

    def using(self, adapter_names: str | Sequence[str]) -> AbstractContextManager[None]:
        """What is run in this block, in this thread or task, runs with one adapter for all rows, or with one a row.

        "__base__" is the base model. The adapters are those of the moment in which this is called.
        """
        return Running(self, self._planned(adapter_names))

    def __call__(self, *args: Any, adapter_names: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's output with these adapters, as in `using`; without them, as the current request or `set_adapter`
        says."""
        with self._request() if adapter_names is None else self.using(adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """`model.generate` with these adapters, one for each row of the input, however many beams a row has."""
        model: Any = self.model
        if adapter_names is None:
            plan = self._plan()
        else:
            given = kwargs.get("generation_config") or getattr(model, "generation_config", None)
            fields = ("num_beams", "num_return_sequences")
            sizes = [kwargs.get(field) or getattr(given, field, None) or 1 for field in fields]
            plan = self._planned(adapter_names, repeats=(1, max(sizes)))
        with Running(self, plan):
            return model.generate(*args, **kwargs)

    def add(
        self,
        name: str,
        source: "PackedAdapter | Source | None" = None,
        *,
        warn_above: float = WARN_ABOVE,
        **options: Any,
    ) -> Record:
        """Serve one more adapter under this name; the record says what of it the subspace has.

        source: an adapter of the pack or its name (by default this name); or a LoRA, its folder or repository, which is
        projected on the subspace as `Pack.add` does, with the same options.
        """
        keys.check_name(name)
        self._check_free(name)
        packed = self._packed(name, source, warn_above, options)
        held = self._hold(packed)
        with self._lock:
            self._check_free(name)
            self._put(held)
        return packed.record

    def replace(
        self,
        name: str,
        source: "PackedAdapter | Source",
        *,
        warn_above: float = WARN_ABOVE,
        **options: Any,
    ) -> Record:
        """Serve something else under a name, from the next request on. Sources are those of `add`."""
        self._held(name)
        packed = self._packed(name, source, warn_above, options)
        held = self._hold(packed)
        with self._lock:
            self._held(name)
            self._put(held)
        return packed.record

    def remove(self, *names: str) -> None:
        """Forget adapters, all of them or, if one is not there, none. Requests that run with one end with it."""
        with self._lock:
            for name in names:
                self._held(name)
            for name in dict.fromkeys(names):
                del self._adapters[name]
                if name == self._default:
                    self._default_plan = None

    def unload(self) -> nn.Module:
        """The model as it was before, which is returned. The bank is of no use afterwards."""
        with self._lock:
            self._unloaded = True
            for handle in self._handles:
                handle.remove()
            self._end_requests()
            self._updated, self._headed, self._adapters = {}, {}, {}
            self._default, self._default_plan = None, Plan()
        return self.model

    def _plan(self) -> Plan:
        """What the current thread or task runs with."""
        found = current(self)
        return self._default_or_error() if found is None else found

    def _default_or_error(self) -> Plan:
        plan = self._default_plan
        if plan is None:
            raise AdapterNameError(
                f"adapter {self._default!r}, chosen by set_adapter, was removed from the bank. Choose another one."
            )
        return plan

    def _request(self) -> AbstractContextManager[None]:
        """The current request, or a new one with the default adapter."""
        return Running(self, self._plan())

    def _planned(self, adapter_names: str | Sequence[str], repeats: tuple[int, ...] = (1,)) -> Plan:
        if isinstance(adapter_names, str):
            return requests.alone(self._held(adapter_names), self._compute)
        with self._lock:
            found = [self._held(name) for name in adapter_names]
        if not found:
            raise OptionError("adapter_names is empty: name one adapter for all rows, or one a row.")
        return requests.mixed(found, self._compute, repeats)

    def _held(self, name: str | None) -> Held | None:
        if self._unloaded:
            raise OptionError("this bank was unloaded. Make a new one: AdapterBank(model, pack).")
        if name is None or name == BASE:
            return None
        found = self._adapters.get(name)
        if found is None:
            keys.check_known(name, self.names, "the bank")
        return found

    def _check_free(self, name: str) -> None:
        if self._unloaded:
            self._held(name)
        if name in self._adapters:
            raise AdapterNameError(f"the bank already has an adapter named {name!r}: replace it, or remove it first.")

    def _packed(
        self, name: str, source: "PackedAdapter | Source | None", warn_above: float, options: dict[str, Any]
    ) -> PackedAdapter:
        if isinstance(source, PackedAdapter):
            return replace(source, name=name)
        if source is None or (isinstance(source, str) and source in self.pack):
            return replace(self.pack.packed(source or name), name=name)
        alone = Pack(
            self._subspace(),
            self.pack.info,
            {},
            self.pack.fit_info,
            base_model=self.pack.base_model,
            revision=self.pack.revision,
            coefficient_dtype=self.pack.coefficient_storage,
        )
        alone.add(source, name=name, warn_above=warn_above, **options)
        return alone.packed(name)

    def _hold(self, packed: PackedAdapter) -> Held:
        check_whole(packed)
        self._check_kernels(packed)
        packed = self._of_now(packed)
        names, dtype = self._tensor_names, self.pack.coefficient_dtype
        with without_autograd(self._device):
            found = heads(packed, self.model, names) if names is not None else Heads()
            return hold(packed, self.pack.info, self._places, found, self._layouts, dtype, self._device)

    def _check_kernels(self, packed: PackedAdapter) -> None:
        for module, coefficients in packed.coefficients.items():
            name = self._places.get(packed.places[module])
            if name is None:
                continue
            kernel = convolution.kernel_of(self.model.get_submodule(name))
            if not convolution.kernels_match(coefficients.kernel, kernel):
                raise ShapeError(
                    f"adapter {packed.name!r}, module {module}: its kernel is {coefficients.kernel}, that of the model "
                    f"{kernel}. It belongs to a different base model."
                )

    def _of_now(self, packed: PackedAdapter) -> PackedAdapter:
        """An adapter with coefficients on all components: one of before the subspace grew has fewer, and gets zeros."""
        lineage = self.pack.info.lineage
        if packed.subspace is None or packed.subspace == lineage[-1]:
            return packed
        if packed.subspace not in lineage:
            raise OptionError(
                f"adapter {packed.name!r} is of the subspace {packed.subspace[:12]}…, which the bank's pack never had. "
                "Take it from that pack, or give it as a LoRA: other.adapter(name)."
            )
        wide = {}
        for module, coefficients in packed.coefficients.items():
            sides = self.pack.info.modules[packed.places[module]]
            wide[module] = pad_coefficients(coefficients, sides["down"].k, sides["up"].k)
        return replace(packed, coefficients=wide)

    def _subspace(self) -> Subspace:
        """The pack's bases. Of a pack that the bank alone has, and has in 8 bits itself, they are read and not kept."""
        return (copy.copy(self.pack) if self._forgets else self.pack).subspace

    def _put(self, held: Held) -> None:
        with self._lock:
            for name in held.heads.modules:
                if name not in self._headed:
                    check_hooks_are_seen(self.model, name)
                    module = self.model.get_submodule(name)
                    layer = self._headed[name] = Headed(module, name, self._plan)
                    # before the update of a linear module, which is added to its output with the trained bias
                    self._handles.append(module.register_forward_hook(layer.hook(), prepend=True, with_kwargs=True))
                    requests.renew(self.model)
            self._adapters[held.name] = held
            if held.name == self._default:
                self._default_plan = requests.alone(held, self._compute)


def _opened(pack: Pack | str | PathLike[str], adapters: list[str] | None) -> Pack:
    if isinstance(pack, Pack):
        return pack
    return Pack.open(pack) if Path(pack).exists() else Pack.from_pretrained(pack, adapters=adapters)


def _matched(model: nn.Module, pack: Pack) -> dict[str, str]:
    """Each module of the subspace that the model has, and the model's name of it."""
    there = sizes(model)
    found = {
        place: name for name, place in module_names.resolve_all(there, pack.info.modules).items() if place is not None
    }
    if not found:
        raise ModuleNameError(
            f"the model has none of the {len(pack.info.modules)} modules of the pack, such as "
            f"{min(pack.info.modules)!r}. It is a different base model; the pack is for {pack.base_model!r}."
        )
    for place, name in sorted(found.items()):
        sides = pack.info.modules[place]
        wanted = sides["up"].dimension, sides["down"].dimension
        if there[name] != wanted:
            raise ShapeError(
                f"module {name}: (out, in) is {there[name]} in the model and {wanted} in the pack. It belongs to a "
                "different base model."
            )
        check_hooks_are_seen(model, name)
        if isinstance(model.get_submodule(name), NonDynamicallyQuantizableLinear):
            raise ModuleNameError(
                f"module {name} is a part of nn.MultiheadAttention, which uses its weight without calling it: "
                "the bank cannot serve it. Load exported adapters with PEFT (`eigenlorax export`)."
            )
    return found
