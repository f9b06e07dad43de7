"""Checks of adapters: finite numbers, names, and whether they belong to one base model with one set of shapes."""

import fnmatch
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import formats
from ..core import dtypes, keys, limits, printable
from ..core import subspace as spaces
from ..core.adapter import Adapter, ModuleSpec, delta_square
from ..core.keys import Kind
from ..core.options import suggestion
from ..errors import (
    AdapterNameError,
    BaseModelError,
    BaseModelWarning,
    FormatError,
    ModuleNameError,
    NonFiniteError,
    NothingSharedWarning,
    OptionError,
    ShapeError,
    UnknownBaseWarning,
)
from . import lora_config
from .image import families
from .sources import AdapterSource


@dataclass(frozen=True, slots=True)
class Scan:
    """Content hash and norms of an adapter, from one pass over its tensors.

    Attributes:
        content_hash: SHA-256 of tensors and scalings, independent of their order in the file.
        delta_squares: Squared Frobenius norm of the update of each module.
    """

    content_hash: str
    delta_squares: Mapping[str, float]


def scan(adapter: Adapter) -> Scan:
    """Read an adapter once, one module at a time.

    Raises:
        NonFiniteError: A tensor has NaN or Inf, or the norm of the update overflows float64.
    """
    digest = sha256()
    squares: dict[str, float] = {}
    for module in sorted(adapter.modules):
        factors = adapter.modules[module]
        squares[module] = delta_square(factors)
        if factors.kernel:
            digest.update(f"{module}\0{factors.kernel}\0".encode())
        for side, tensor in (("down", factors.down), ("up", factors.up)):
            # NaN and Inf reach the norm, so only a norm that is not finite makes a search necessary
            if not math.isfinite(squares[module]):
                _check_finite(adapter, f"{module} ({side})", tensor)
            digest.update(f"{module}\0{side}\0{tuple(tensor.shape)}\0{tensor.dtype}\0{factors.scaling!r}\0".encode())
            digest.update(spaces.tensor_bytes(tensor))
    for group in (adapter.heads, adapter.carried):
        for key in sorted(group):
            tensor = group[key]
            if tensor.is_floating_point():
                _check_finite(adapter, key, tensor)
            digest.update(f"{key}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
            digest.update(spaces.tensor_bytes(tensor))
    if not math.isfinite(sum(squares.values())):
        raise NonFiniteError(
            f"adapter {adapter.name!r}: the norm of its update overflows float64. Its training has diverged: use "
            "an earlier checkpoint, or train it again."
        )
    return Scan(digest.hexdigest(), squares)


def _check_finite(adapter: Adapter, name: str, tensor: Tensor) -> None:
    if tensor.dtype.itemsize == 1 and dtypes.name(tensor.dtype).startswith("float4_"):
        # four-bit floats have neither NaN nor Inf, and torch cannot convert them
        return
    wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
    bad = int((~wide.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"adapter {adapter.name!r}: {bad} of {tensor.numel()} numbers of {name} are NaN or Inf. Its training "
            "has diverged, or the file is damaged: use an earlier checkpoint, or another copy."
        )


def read_source(source: AdapterSource, options: Mapping[str, Any]) -> Adapter:
    """Read the adapter of a source, or check an adapter in memory.

    Args:
        source: The source.
        options: Options of `read_adapter`.
    """
    if isinstance(source.source, Adapter):
        check_in_memory(source.source)
        return source.source
    return formats.read_adapter(source.source, name=source.name, **options)


def check_in_memory(adapter: Adapter) -> None:
    """Raise the errors that reading would raise, for an adapter that was made in memory."""
    for module in adapter.specs:
        if not module.isprintable() or " " in module or not module.strip(".") or module.startswith(keys.MODEL_PREFIX):
            raise ModuleNameError(
                f"adapter {adapter.name!r}: {module!r} is not a module name. Expected a name like "
                f"'encoder.layer.0.query', without {keys.MODEL_PREFIX!r}."
            )
    config = _config(adapter)
    numbers = lora_config.ScalingConfig(config, adapter.name) if config is not None else None
    for module, factors in adapter.modules.items():
        if factors.spec != adapter.specs[module]:
            raise ShapeError(
                f"adapter {adapter.name!r}, module {module}: its factors are {factors.spec}, but its spec is "
                f"{adapter.specs[module]}. Create the adapter with eigenlorax.from_factors."
            )
        if numbers is not None:
            numbers.check(module, factors.spec)
    for key in adapter.heads:
        if keys.parse_peft_key(key).kind is not Kind.HEAD:
            raise FormatError(f"adapter {adapter.name!r}: head {key!r} has the name of a LoRA tensor.")


def _config(adapter: Adapter) -> dict[str, Any] | None:
    try:
        config = json.loads(adapter.source_config) if adapter.source_config is not None else None
    except ValueError as error:
        raise FormatError(f"adapter {adapter.name!r}: its source_config is not valid JSON: {error}") from error
    if not isinstance(config, dict | None):
        raise FormatError(f"adapter {adapter.name!r}: its source_config is not a JSON object.")
    return config


def check_names(names: Iterable[str], *, in_memory: bool = False) -> None:
    """Raise `AdapterNameError` if two names are equal except for case: they are one folder on many file systems.

    Args:
        names: Names of the adapters.
        in_memory: True if there are adapters from memory, such as `PeftModel`s, which NAME=PATH cannot name.
    """
    seen: dict[str, str] = {}
    for name in names:
        earlier = seen.get(name.lower())
        if earlier is not None:
            mapping = "a mapping, {'name': source}"
            raise AdapterNameError(
                f"two adapters have the same name, {name!r}"
                + (f" (and {earlier!r}: case is ignored)" if earlier != name else "")
                + ". Set another name for one of them: pass "
                + (f"{mapping}." if in_memory else f"NAME=PATH, or in Python {mapping}.")
            )
        seen[name.lower()] = name


@dataclass(frozen=True, slots=True)
class StatedBase:
    """Base model that an adapter or a pack states.

    Attributes:
        owner: Who states it, for messages, such as "adapter 'sst2'".
        base_model: Name or path of the base model; None if it states none.
        revision: Revision of the base model, likewise.
    """

    owner: str
    base_model: str | None
    revision: str | None

    @classmethod
    def of(cls, adapter: Adapter) -> "StatedBase":
        """Return the base model that an adapter states."""
        return cls(f"adapter {adapter.name!r}", adapter.base_model, adapter.revision)


def check_one_base(
    stated: Sequence[StatedBase], same_base: bool = False, *, remedy: str = "Fit them separately"
) -> tuple[str | None, str | None]:
    """Return the base model that all adapters were trained on, and its revision.

    An adapter without a base model is assumed to have the base model of the others, with a warning.

    Args:
        stated: Base models of the adapters.
        same_base: Whether several base models or revisions are accepted as names of one model. The most common one is
            returned.
        remedy: What to do, the beginning of a sentence for the error.

    Raises:
        BaseModelError: Two adapters have different base models or revisions.
    """
    without_base = [each.owner for each in stated if each.base_model is None]
    if without_base and len(without_base) < len(stated):
        warnings.warn(
            f"no base model is stated by {printable.first_names(without_base)}; assuming the base model of the other "
            "adapters.",
            UnknownBaseWarning,
            stacklevel=3,
        )
    for field in ("base_model", "revision"):
        named = [(getattr(each, field), each.owner) for each in stated if getattr(each, field)]
        for value, owner in named:
            if value != named[0][0] and not same_base:
                label = "base models" if field == "base_model" else "revisions of the base model"
                first, first_owner = named[0]
                raise BaseModelError(
                    f"different {label}: {owner} has {value!r}, and {first_owner} has {first!r}. {remedy}, "
                    "or pass same_base=True (--same-base) if both names mean one model."
                )
    return _most_common(each.base_model for each in stated), _most_common(each.revision for each in stated)


def family(adapter: Adapter) -> str | None:
    """Return the image models that an adapter may belong to, as text; None if its modules do not show it."""
    return families.describe(_families(adapter)) or None


def _families(adapter: Adapter) -> frozenset[str]:
    return families.families((name, spec.channels) for name, spec in adapter.specs.items())


def check_one_family(adapters: Sequence[Adapter], *, remedy: str | None = None) -> None:
    """Raise `BaseModelError` if two adapters belong to different image models, by names and widths of their modules.

    Such adapters may have no module in common, so a comparison of shapes would not detect it.

    Args:
        adapters: The adapters.
        remedy: What to do, a sentence for the error. Default: what the user of a fit does.
    """
    models_by_adapter = {adapter.name: models for adapter in adapters if (models := _families(adapter))}
    for family in dict.fromkeys(models_by_adapter.values()):
        outside = [name for name, models in models_by_adapter.items() if not models & family]
        if not outside:
            continue
        inside = [name for name, models in models_by_adapter.items() if models & family]
        minority = min(inside, outside, key=len)
        more = " …" if len(minority) > 12 else ""
        flags = " ".join(word for name in minority[:12] for word in ("--exclude-adapter", name))
        if remedy is None:
            remedy = (
                f"Fit them separately, or exclude the {len(minority)} of the smaller group: "
                f"exclude_adapters={minority[:12]}{more} ({flags}{more})."
            )
        raise BaseModelError(
            f"adapters of two models: {inside[0]!r} is for {families.describe(models_by_adapter[inside[0]])}, and "
            f"{outside[0]!r} is for {families.describe(models_by_adapter[outside[0]])}, by the names and widths of "
            f"their modules. {remedy}"
        )


def warn_of_nothing_shared(modules: Mapping[str, Iterable[str]]) -> None:
    """Warn if adapters fall into groups that have no module in common.

    Args:
        modules: Modules in the subspace by name of the adapter. Adapters without modules are ignored.
    """
    # adapter names and modules of each group; an adapter merges all groups with which it has a module in common
    groups: list[tuple[list[str], set[str]]] = []
    for name, adapter_modules in sorted(modules.items()):
        members, members_modules = [name], set(adapter_modules)
        if not members_modules:
            continue
        separate = []
        for group in groups:
            if members_modules.isdisjoint(group[1]):
                separate.append(group)
            else:
                members, members_modules = group[0] + members, members_modules | group[1]
        groups = [*separate, (members, members_modules)]
    if len(groups) < 2:
        return
    groups.sort(key=lambda group: (-len(group[0]), group[0]))
    listed = "; ".join(
        f"{_listing(sorted(names))}, with modules like {min(group_modules)!r}" for names, group_modules in groups[:5]
    )
    more = f"; and {len(groups) - 5} more groups" if len(groups) > 5 else ""
    warnings.warn(
        f"{len(groups)} groups of adapters have no module in common, so nothing is shared between them: {listed}{more}."
        " If they belong to different models, fit a separate pack for each group.",
        NothingSharedWarning,
        stacklevel=3,
    )


def check_family(adapter: Adapter, modules: Iterable[tuple[str, int]]) -> None:
    """Raise `BaseModelError` if an adapter belongs to another image model than a pack.

    Args:
        adapter: The adapter.
        modules: Name and input width of each module in the pack.
    """
    adapter_models, pack_models = _families(adapter), families.families(modules)
    if adapter_models and pack_models and not adapter_models & pack_models:
        raise BaseModelError(
            f"adapter {adapter.name!r} is for {families.describe(adapter_models)}, and the pack is for "
            f"{families.describe(pack_models)}, by the names and widths of their modules. Fit it in a pack for its "
            "model."
        )


def warn_of_other_model(pack_model: str | None, model: object, stacklevel: int = 3) -> None:
    """Warn if a pack is loaded into another base model than its own, which shapes alone may not show.

    Only names of repositories are compared, since a local folder may hold any model. Only the last part of the name is
    compared: `gpt2` equals `openai-community/gpt2`.

    Args:
        pack_model: Base model of the pack.
        model: `name_or_path` of the loaded model.
        stacklevel: Level of the caller that the warning is attributed to, as for `warnings.warn`.
    """
    if not isinstance(model, str) or not model or not pack_model or Path(model).exists() or Path(pack_model).exists():
        return
    if model.rpartition("/")[2].lower() != pack_model.rpartition("/")[2].lower():
        warnings.warn(
            f"the subspace was fitted to adapters of {pack_model!r}, and this model is {model!r}. If these are "
            "different models, use a pack that was fitted to adapters of this model.",
            BaseModelWarning,
            stacklevel=stacklevel,
        )


def _most_common(names: Iterable[str | None]) -> str | None:
    counts = Counter(name for name in names if name)
    # ties are broken by name, so that the order of adapters does not matter
    return min(counts, key=lambda name: (-counts[name], name)) if counts else None


def check_one_shape(
    adapters: Sequence[Adapter], names: Mapping[str, str], *, remedy: str | None = None
) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of each module by its name in the subspace.

    A linear layer equals a convolution of kernel 1: their rows have the same meaning.

    Args:
        adapters: The adapters.
        names: Name in the subspace by module name in an adapter. Other modules are ignored.
        remedy: What to do, a sentence for the error. Default: what the user of a fit does.

    Raises:
        ShapeError: Two adapters differ in shape or kernel of a module, or one is beyond the limits of a pack.
    """
    shapes: dict[str, tuple[int, int]] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    first: dict[str, str] = {}
    for adapter in adapters:
        for module, spec in adapter.specs.items():
            if module not in names:
                continue
            name, shape = names[module], (spec.out_features, spec.in_features)
            _check_limits(adapter.name, name, spec)
            excluding = (
                f"Fit them separately, or exclude the module with exclude_modules=[{name!r}] (--exclude-module {name})."
            )
            if shapes.setdefault(name, shape) != shape:
                raise ShapeError(
                    f"module {name}: (out, in) is {shapes[name]} in adapter {first[name]!r} and {shape} in "
                    f"{adapter.name!r}. They belong to different base models. {remedy or excluding}"
                )
            if kernels.setdefault(name, _effective_kernel(spec.kernel)) != _effective_kernel(spec.kernel):
                raise ShapeError(
                    f"module {name}: its kernel is {kernels[name] or 1} in adapter {first[name]!r} and "
                    f"{spec.kernel or 1} in {adapter.name!r}. They belong to different base models. "
                    f"{remedy or excluding}"
                )
            first.setdefault(name, adapter.name)
    return shapes


def _check_limits(adapter: str, module: str, spec: ModuleSpec) -> None:
    """Raise `ShapeError` for a module beyond the limits that `Pack.open` enforces."""
    sizes, limit = (spec.out_features, spec.in_features), limits.MAX_DIMENSION
    if min(sizes) < 1 or max(sizes) > limit or spec.rank > max(sum(sizes), limits.MAX_RANK):
        raise ShapeError(
            f"module {module} of adapter {adapter!r} has the rank {spec.rank} and the shape {sizes}, (out, in). A pack "
            f"has sizes from 1 to {limit:,}, and ranks up to out + in, or {limits.MAX_RANK:,} if that is more. Exclude "
            f"the module with exclude_modules=[{module!r}] (--exclude-module {module})."
        )


def _effective_kernel(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return the kernel of a convolution, or () for kernel 1 and for linear layers."""
    return () if set(kernel) <= {1} else kernel


def excluded(modules: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """Return the modules that match a shell-style pattern, as a whole or in their last components.

    Raises:
        OptionError: A pattern matches no module, probably because of a typing error.
    """
    modules = list(modules)
    suggestions = {*modules, *(module.rpartition(".")[2] for module in modules)}
    matches: set[str] = set()
    for pattern in patterns:
        matched = {m for m in modules if fnmatch.fnmatchcase(m, pattern) or fnmatch.fnmatchcase(m, f"*.{pattern}")}
        if not matched:
            raise OptionError(
                f"{pattern!r} matches no module (exclude_modules, --exclude-module).{suggestion(pattern, suggestions)} "
                f"Modules are named like {_listing(sorted(modules)[:2])}; shell wildcards (*, ?, [...]) may be used."
            )
        matches |= matched
    return frozenset(matches)


def _listing(names: Sequence[str]) -> str:
    return printable.first_names([repr(name) for name in names])
