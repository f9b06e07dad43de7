"""`AdapterBank`: any number of adapters of one pack on one model."""

import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import int8_rows, keys
from ...core.adapter import Adapter
from ...core.coefficients import pad_coefficients
from ...core.layer_update import without_autograd
from ...core.options import name_list, to_float, to_int
from ...core.subspace import Subspace
from ...errors import WARN_ABOVE, AdapterNameError, OptionError
from ...formats import checks
from ...formats.sources import Source
from ...pack.pack import Pack
from ...pack.packed_adapter import PackedAdapter
from ...pack.record import Record
from . import requests
from .bank_adapter import BankAdapter, BankStorage, check_none_carried, check_not_carried
from .heads import Heads, make_heads, tensor_names
from .hooks import HeadHook, UpdateHook, device_of
from .mixtures import plan_mixture
from .modules import check_kernel, check_not_compiled, match_modules, match_version
from .requests import RequestPlan, RunningPlan, current_plan
from .versions import BankVersions, as_residual

BASE = "__base__"
"""PEFT's name for the base model."""


class AdapterBank:
    """
    Any number of adapters of one pack on one model, which share one basis.

    A request runs with one adapter for all rows, or with one adapter per row. It uses the same adapters from its start
    to its end, whatever is added, removed or replaced meanwhile. Requests of several threads are independent.

    Versions of the pack's histories have names such as "run@1000", and "run@latest" for the version that is the last
    when a request starts. They are loaded at their first request. The bank follows the pack in a folder or on the Hub
    as it changes; of a pack that is passed as a `Pack`, it serves the histories of that object.

    Args:
        model (`nn.Module`):
            The model. Its modules are matched to the pack's by name and get forward hooks; `unload` removes them.
        pack ([`Pack`], `str` or `os.PathLike`):
            A pack, its folder, or a repository on the Hub.
        adapters (`str` or `Sequence[str]`, *optional*):
            The adapters to load. By default all; an empty list loads none.
        heads (`bool`):
            Whether rows of an adapter use the adapter's own heads and trained biases. If False, all rows use the heads
            and biases of the model. Defaults to `True`.
        basis_dtype (`str` or `torch.dtype`, *optional*):
            "int8" stores the bases in 8 bits per entry and a scale per row. The pack's own bases are then only kept in
            memory if the pack is passed as a `Pack`. By default the bases are floats.
        version_bytes (`int`):
            Maximum bytes of loaded versions. Those that were not used for longest are dropped, and loaded again when
            they are requested. Defaults to 1 GiB.

    Raises:
        AdapterNameError: The pack has no adapter of a name in `adapters`.
        ModuleNameError: The model lacks a module of the pack.
        OptionError: An adapter has tensors that a bank cannot apply, or an option is invalid.
        ShapeError: A module of the model has another shape than that of the pack.

    Example:
        >>> import eigenlorax, transformers
        >>> model = transformers.AutoModelForCausalLM.from_pretrained("model/")
        >>> bank = eigenlorax.AdapterBank(model, "lm-pack/")
        >>> output = bank(torch.tensor([[3, 4], [5, 6]]), adapter_names=["a0", "a1"])
    """

    def __init__(
        self,
        model: nn.Module,
        pack: Pack | str | PathLike[str],
        *,
        adapters: str | Sequence[str] | None = None,
        heads: bool = True,
        basis_dtype: str | torch.dtype | None = None,
        version_bytes: int = 2**30,
    ) -> None:
        in_int8 = int8_rows.is_int8("basis_dtype", basis_dtype)
        names = list(dict.fromkeys(name_list(adapters))) if adapters is not None else None
        self.model = model
        self.pack = _open(pack, names)
        self._discards_bases = in_int8 and not isinstance(pack, Pack)
        for name in names or ():
            if name in self.pack.histories or keys.is_version(name):
                raise AdapterNameError(
                    f"adapters has {name!r}, and is for adapters of the pack only: versions are loaded when a request "
                    "names them. Remove it."
                )
            keys.check_known(name, self.pack.names)
        if names is None:
            check_none_carried(self.pack)
        checks.warn_of_other_model(self.pack.base_model, getattr(model, "name_or_path", None))
        self._versions = BankVersions(pack, self._store_version, to_int("version_bytes", version_bytes))
        with without_autograd(torch.device("cpu")):
            subspace = self._subspace()
        self._tensor_names = tensor_names(model) if heads else None
        self._dtype = torch.promote_types(self.pack.dtype, torch.float32)
        self._model_names = match_modules(model, self.pack)
        self._lock = threading.RLock()
        self._adapters: dict[str, BankAdapter] = {}
        self._head_hooks: dict[str, HeadHook] = {}
        self._handles: list[Any] = []
        self._default: str | None = None
        self._default_adapter: BankAdapter | None = None
        # None if the default adapter was removed
        self._default_plan: RequestPlan | None = RequestPlan()
        self._unloaded = False
        self._update_hooks: dict[str, UpdateHook] = {}
        for subspace_name in self._model_names:
            pair = subspace.modules[subspace_name]
            rows = pair.down.components, pair.up.components
            self._add_update_hook(subspace_name, rows, torch.int8 if in_int8 else self._dtype)
        hooked = next(iter(self._update_hooks.values()), None)
        self._device = hooked.bases.down.device if hooked is not None else device_of(model)
        info = self.pack.info.modules
        components = {name: (info[name]["down"].k, info[name]["up"].k) for name in self._model_names}
        self._storage = BankStorage(components, self.pack.coefficient_dtype, self._device)
        self._unwrap_calls = requests.wrap_calls(model, self._request)
        try:
            for name in self.pack.names if names is None else names:
                self._put(self._store(self.pack.packed(name)))
        except BaseException:
            self.unload()
            raise

    def _add_update_hook(self, subspace_name: str, bases: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        name = self._model_names[subspace_name]
        module = self.model.get_submodule(name)
        with without_autograd(torch.device("cpu")):
            hook = UpdateHook(module, name, self._plan, subspace_name=subspace_name, bases=bases, dtype=dtype)
        self._update_hooks[name] = hook
        self._handles.append(module.register_forward_hook(hook.forward_hook(), with_kwargs=True))

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters or (keys.is_version(name) and name in self._versions)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"<AdapterBank of {len(self)} adapters on {len(self._model_names)} modules of a {model}>"

    @property
    def names(self) -> list[str]:
        """The adapters' names, sorted. Versions are not among them."""
        with self._lock:
            return sorted(self._adapters)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the bank: bases, coefficients, residuals, heads and loaded versions.

        Bases of the pack are included if the pack keeps a second copy in memory.
        """
        with self._lock:
            adapters = [*self._adapters.values(), *self._versions.adapters]
            tensors = [tensor for adapter in adapters for tensor in adapter.tensors]
        tensors += [tensor for hook in self._update_hooks.values() for tensor in hook.tensors]
        if not self._discards_bases:
            bases = [pair.side(side) for pair in self.pack.subspace.modules.values() for side in keys.SIDES]
            tensors += [basis.components for basis in bases]
            tensors += [tensor for basis in bases for tensor in (basis.payload or {}).values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def active_adapter(self) -> str | None:
        """The adapter of requests that do not name one; None for the base model."""
        return self._default

    def set_adapter(self, name: str | None) -> None:
        """Set the adapter of requests that do not name one.

        Args:
            name (`str`, *optional*):
                The name of the adapter or version; None or "__base__" for the base model. "run@latest" is looked up at
                the start of each request.

        Raises:
            AdapterNameError: The bank has no adapter of this name.

        Example:
            >>> bank.set_adapter("a0")
            >>> bank.active_adapter
            'a0'
        """
        name = None if name == BASE else name
        # not under the lock, because a version may be read from disk
        version = self._adapter(name) if keys.is_version(name) else None
        with self._lock:
            self._set_default(name, version or self._adapter(name))

    def _set_default(self, name: str | None, adapter: BankAdapter | None) -> None:
        with self._lock:
            self._default, self._default_adapter = name, adapter
            self._default_plan = requests.plan_single(adapter, self._dtype)

    def using(self, adapter_names: str | Sequence[str | None]) -> AbstractContextManager[None]:
        """Return a context manager in which the current thread or task runs with these adapters.

        Args:
            adapter_names (`str` or `Sequence[str | None]`):
                One adapter for all rows, or one per row. "__base__", or None in a list, is the base model. The adapters
                are looked up when this is called, not when the context is entered.

        Raises:
            AdapterNameError: The bank has no adapter of a name.
            OptionError: `adapter_names` is empty.

        Example:
            >>> with bank.using(["a0", "__base__"]):
            ...     output = model(torch.tensor([[3, 4], [5, 6]]))
        """
        return RunningPlan(self, self._make_plan(adapter_names))

    def mixing(
        self, adapter_names: str | Sequence[str] | None = None, *, top: int = 3, temperature: float = 1.0
    ) -> AbstractContextManager[None]:
        """Return a context manager in which each token uses a mixture of adapters in each module (Arrow).

        The score of an adapter is |x·v|, with the input x of the module and the adapter's prototype v, the leading
        right singular vector of its update of the module. The `top` adapters with the largest scores are weighted by
        the softmax of score / temperature (arXiv 2405.11157). Ranks may differ. Heads are those of the model.

        Args:
            adapter_names (`str` or `Sequence[str]`, *optional*):
                The adapters to mix, looked up when this is called. By default all of the bank, without versions.
            top (`int`):
                Number of adapters that each token mixes, at most the number of adapters. Defaults to 3.
            temperature (`float`):
                Divisor of the scores, above 0. Large numbers give equal weights. Defaults to 1.

        Raises:
            AdapterNameError: The bank has no adapter of a name.
            OptionError: There is no adapter to mix, or `top` or `temperature` is outside its range.

        Example:
            >>> with bank.mixing(["a0", "a1", "a2"], top=2):
            ...     output = model(torch.tensor([[3, 4], [5, 6]]))
        """
        names = self.names if adapter_names is None else list(dict.fromkeys(name_list(adapter_names)))
        top, temperature = to_int("top", top), to_float("temperature", temperature)
        if not 1 <= top <= max(len(names), 1):
            raise OptionError(f"top must be at least 1 and at most the number of adapters, {len(names)}; got {top}.")
        if not 0 < temperature < math.inf:
            raise OptionError(f"temperature must be a finite number above 0, got {temperature:g}.")
        adapters = [adapter for adapter in map(self._adapter, names) if adapter is not None]
        if not names or len(adapters) < len(names):
            raise OptionError(f"mixing needs adapters, got {names}. The base model has no update to mix.")
        bases = {hook.subspace_name: hook.bases for hook in self._update_hooks.values()}
        return RunningPlan(self, plan_mixture(adapters, bases, top=top, temperature=temperature, dtype=self._dtype))

    def __call__(self, *args: Any, adapter_names: str | Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Call the model with these adapters; see `using`.

        Default: the adapters of the current request, or else the adapter of `set_adapter`.
        """
        with self._request() if adapter_names is None else self.using(adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: str | Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Call `model.generate` with one adapter for all rows of the input, or one per row, beams included.

        Args:
            args, kwargs:
                Arguments of `model.generate`.
            adapter_names (`str` or `Sequence[str | None]`, *optional*):
                One adapter for all rows, or one per row. By default the adapters of the current request.

        Raises:
            AdapterNameError: The bank has no adapter of a name.

        Example:
            >>> ids = bank.generate(torch.tensor([[3, 4]]), adapter_names="a0", max_new_tokens=1, pad_token_id=0)
            >>> ids.shape
            torch.Size([1, 3])
        """
        model: Any = self.model
        if adapter_names is None:
            plan = self._plan()
        else:
            config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
            fields = ("num_beams", "num_return_sequences")
            repeats = [kwargs.get(field) or getattr(config, field, None) or 1 for field in fields]
            plan = self._make_plan(adapter_names, repeats=(1, max(repeats)))
        with RunningPlan(self, plan):
            return model.generate(*args, **kwargs)

    def add(
        self,
        name: str,
        source: "PackedAdapter | Source | None" = None,
        *,
        warn_above: float = WARN_ABOVE,
        **options: Any,
    ) -> Record:
        """Add an adapter and return its record, which includes the error of a projection.

        Args:
            name (`str`):
                The name of the new adapter.
            source (`PackedAdapter`, `str`, `os.PathLike` or `Adapter`, *optional*):
                An adapter of the pack, its name (by default `name`), or a LoRA, its folder or its repository. A LoRA is
                projected on the subspace; see `Pack.add`.
            warn_above (`float`):
                Delta error above which a projection warns.
            options:
                Passed to `Pack.add`.

        Raises:
            AdapterNameError: The bank already has an adapter of this name, or the pack has none.
            BaseModelError, ModuleNameError, ShapeError: The LoRA does not belong to the pack.
            OptionError: The adapter belongs to another subspace, or has tensors that a bank cannot apply.

        Example:
            >>> bank.remove("a0")
            >>> record = bank.add("a0")
            >>> "a0" in bank
            True
        """
        keys.check_name(name)
        self._check_free(name)
        packed = self._packed(name, source, warn_above, options)
        adapter = self._store(packed)
        with self._lock:
            self._check_free(name)
            self._put(adapter)
        return packed.record

    def replace(
        self,
        name: str,
        source: "PackedAdapter | Source",
        *,
        warn_above: float = WARN_ABOVE,
        **options: Any,
    ) -> Record:
        """Replace an adapter from the next request on; see `add` for arguments and returned record.

        Raises:
            AdapterNameError: The bank has no adapter of this name.
            BaseModelError, ModuleNameError, ShapeError, OptionError: As `add`.

        Example:
            >>> record = bank.replace("a0", "a1")
        """
        self._adapter(name)
        packed = self._packed(name, source, warn_above, options)
        adapter = self._store(packed)
        with self._lock:
            self._adapter(name)
            self._put(adapter)
        return packed.record

    def remove(self, *names: str) -> None:
        """Remove adapters; remove none if one of the names is unknown. Running requests keep their adapters.

        Raises:
            AdapterNameError: A name is unknown.

        Example:
            >>> bank.remove("a0", "a1")
            >>> bank.names
            ['a2', 'a3']
        """
        with self._lock:
            for name in names:
                self._adapter(name)
            for name in dict.fromkeys(names):
                del self._adapters[name]
                if name == self._default:
                    self._default_plan = None

    def unload(self) -> nn.Module:
        """Remove all hooks and return the model as it was before. The bank cannot be used afterwards.

        Example:
            >>> bank.unload() is model
            True
        """
        with self._lock:
            self._unloaded = True
            for handle in self._handles:
                handle.remove()
            self._unwrap_calls()
            self._versions.clear()
            self._update_hooks, self._head_hooks, self._adapters = {}, {}, {}
            self._set_default(None, None)
        return self.model

    def _plan(self) -> RequestPlan:
        """Return the plan of the current request, or of the default adapter outside of requests."""
        plan = current_plan(self)
        if plan is None:
            self._update_default()
            plan = self._default_plan
        if plan is None:
            raise AdapterNameError(
                f"adapter {self._default!r}, chosen by set_adapter, was removed from the bank. Choose another adapter."
            )
        return plan

    def _update_default(self) -> None:
        """Look up the default adapter again if it is a version, which may have another content now."""
        name = self._default
        if name is not None and keys.is_version(name):
            version = self._versions.get(name)
            with self._lock:
                if self._default == name and version is not self._default_adapter:
                    self._set_default(name, version)

    def _request(self) -> AbstractContextManager[None]:
        """Continue the current request, or begin one with the default adapter."""
        return RunningPlan(self, self._plan())

    def _make_plan(self, adapter_names: str | Sequence[str | None], repeats: tuple[int, ...] = (1,)) -> RequestPlan:
        if isinstance(adapter_names, str):
            return requests.plan_single(self._adapter(adapter_names), self._dtype)
        # not under the lock, because a version may be read from disk
        versions = {name: self._adapter(name) for name in dict.fromkeys(adapter_names) if keys.is_version(name)}
        with self._lock:
            adapters = [versions[name] if name in versions else self._adapter(name) for name in adapter_names]
        if not adapters:
            raise OptionError("adapter_names is empty: pass one adapter for all rows, or one per row.")
        return requests.plan_mixed(adapters, self._dtype, repeats)

    def _adapter(self, name: str | None) -> BankAdapter | None:
        """Return an adapter of the bank, None for the base model; raise `AdapterNameError` for an unknown name."""
        if self._unloaded:
            raise OptionError("this bank was unloaded. Create a new one: AdapterBank(model, pack).")
        if name is None or name == BASE:
            return None
        if keys.is_version(name):
            return self._versions.get(name)
        adapter = self._adapters.get(name)
        if adapter is None:
            keys.check_known(name, self.names, "the bank")
        return adapter

    def _check_free(self, name: str) -> None:
        if self._unloaded:
            self._adapter(name)
        if name in self._adapters:
            raise AdapterNameError(f"the bank already has an adapter named {name!r}: replace it, or remove it first.")

    def _packed(
        self, name: str, source: "PackedAdapter | Source | None", warn_above: float, options: dict[str, Any]
    ) -> PackedAdapter:
        if isinstance(source, PackedAdapter):
            return replace(source, name=name)
        if source is None or (isinstance(source, str) and source in self.pack):
            return replace(self.pack.packed(source or name), name=name)
        single = Pack(
            self._subspace(),
            self.pack.info,
            {},
            self.pack.fit_info,
            base_model=self.pack.base_model,
            revision=self.pack.revision,
            coefficient_dtype=self.pack.coefficient_storage,
        )
        single.add(source, name=name, warn_above=warn_above, **options)
        return single.packed(name)

    def _store(self, packed: PackedAdapter) -> BankAdapter:
        check_not_carried(packed.name, packed.carried)
        for module, coefficients in packed.coefficients.items():
            name = self._model_names.get(packed.subspace_names[module])
            if name is not None:
                check_kernel(self.model, name, coefficients.kernel, f"adapter {packed.name!r}, module {module}")
        packed = self._extend_coefficients(packed)
        by_module = {packed.subspace_names[module]: each for module, each in packed.coefficients.items()}
        with without_autograd(self._device):
            return self._storage.store(packed.name, by_module, self._make_heads(packed.name, packed.heads))

    def _store_version(self, version: Adapter) -> BankAdapter:
        """Return a version as an adapter of the bank, with hooks on its modules and heads."""
        check_not_carried(version.name, version.carried)
        names = match_version(self.model, version)
        with self._lock:
            new = {name: version.specs[module] for module, name in names.items() if name not in self._update_hooks}
            for name, spec in new.items():
                self._model_names[name], self._storage.components[name] = name, (0, 0)
                rows = torch.empty(0, spec.in_features), torch.empty(0, spec.out_features)
                self._add_update_hook(name, rows, self._dtype)
            if new:
                requests.force_recompilation(self.model)
        with without_autograd(self._device):
            by_module = {}
            for module, factors in version.modules.items():
                subspace_name = self._update_hooks[names[module]].subspace_name
                by_module[subspace_name] = as_residual(factors, self._storage.components[subspace_name])
            heads = self._make_heads(version.name, version.heads)
            adapter = replace(self._storage, dtype=torch.float32).store(version.name, by_module, heads)
        self._add_head_hooks(adapter.heads)
        return adapter

    def _make_heads(self, name: str, tensors: Mapping[str, Tensor]) -> Heads:
        return make_heads(name, tensors, self.model, self._tensor_names) if self._tensor_names is not None else Heads()

    def _extend_coefficients(self, packed: PackedAdapter) -> PackedAdapter:
        """Pad the coefficients of an adapter with zeros for the components by which its subspace has grown."""
        lineage = self.pack.info.lineage
        if packed.subspace is None or packed.subspace == lineage[-1]:
            return packed
        if packed.subspace not in lineage:
            raise OptionError(
                f"adapter {packed.name!r} belongs to the subspace {packed.subspace[:12]}…, not to the bank's pack. Use "
                "an adapter of that pack, or pass it as a LoRA: other.adapter(name)."
            )
        wide = {}
        for module, coefficients in packed.coefficients.items():
            sides = self.pack.info.modules[packed.subspace_names[module]]
            wide[module] = pad_coefficients(coefficients, sides["down"].k, sides["up"].k)
        return replace(packed, coefficients=wide)

    def _subspace(self) -> Subspace:
        """Return the pack's bases, without caching them in the pack if the bank keeps only its own int8 copy."""
        return (copy.copy(self.pack) if self._discards_bases else self.pack).subspace

    def _put(self, adapter: BankAdapter) -> None:
        with self._lock:
            self._add_head_hooks(adapter.heads)
            self._adapters[adapter.name] = adapter
            if adapter.name == self._default:
                self._set_default(adapter.name, adapter)

    def _add_head_hooks(self, heads: Heads) -> None:
        with self._lock:
            for name in heads.modules:
                if name not in self._head_hooks:
                    check_not_compiled(self.model, name)
                    module = self.model.get_submodule(name)
                    hook = self._head_hooks[name] = HeadHook(module, name, self._plan)
                    # before the hook that adds updates, because a head replaces the output of the module
                    self._handles.append(
                        module.register_forward_hook(hook.forward_hook(), prepend=True, with_kwargs=True)
                    )
                    requests.force_recompilation(self.model)


def _open(pack: Pack | str | PathLike[str], adapters: list[str] | None) -> Pack:
    if isinstance(pack, Pack):
        return pack
    return Pack.open(pack) if Path(pack).exists() else Pack.from_pretrained(pack, adapters=adapters)
