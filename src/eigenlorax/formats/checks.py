"""Do these adapters belong together, and is each of them sound? Reads and compares; changes nothing."""

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
from ..core import boundary, dtypes, keys
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
    """What one reading of an adapter tells.

    content_hash: sha256 of its tensors and scalings, in an order that does not depend on the file's.
    delta_squares: ‖delta weight‖² of each module.
    """

    content_hash: str
    delta_squares: Mapping[str, float]


def scan(adapter: Adapter) -> Scan:
    """Read an adapter once, one module at a time; `NonFiniteError` names the first tensor with NaN or Inf."""
    digest = sha256()
    squares: dict[str, float] = {}
    for module in sorted(adapter.modules):
        factors = adapter.modules[module]
        squares[module] = delta_square(factors)
        if factors.kernel:
            digest.update(f"{module}\0{factors.kernel}\0".encode())
        for side, tensor in (("down", factors.down), ("up", factors.up)):
            # one number that is none makes none of the norm
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
            f"adapter {adapter.name!r}: the norm of its update is beyond float64. Its training has diverged: take "
            "an earlier checkpoint, or train it again."
        )
    return Scan(digest.hexdigest(), squares)


def _check_finite(adapter: Adapter, what: str, tensor: Tensor) -> None:
    if tensor.dtype.itemsize == 1 and dtypes.name(tensor.dtype).startswith("float4_"):
        # these have no NaN and no Inf, and torch makes no wider floats of them
        return
    wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
    bad = int((~wide.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"adapter {adapter.name!r}: {bad} of {tensor.numel()} numbers of {what} are NaN or Inf. Its training "
            "has diverged, or the file is damaged: take an earlier checkpoint, or another copy."
        )


def read_source(found: AdapterSource, options: Mapping[str, Any]) -> Adapter:
    """The adapter of a source: read, or, where it was made in memory, checked. options: those of `read_adapter`."""
    if isinstance(found.source, Adapter):
        check_made(found.source)
        return found.source
    return formats.read_adapter(found.source, name=found.name, **options)


def check_made(adapter: Adapter) -> None:
    """What a reader would have refused is refused of an adapter that was made in memory."""
    for module in adapter.specs:
        if not module.isprintable() or " " in module or not module.strip(".") or module.startswith(keys.MODEL_PREFIX):
            raise ModuleNameError(
                f"adapter {adapter.name!r}: {module!r} is no module's name. One is like 'encoder.layer.0.query', "
                f"without {keys.MODEL_PREFIX!r}."
            )
    config = _config(adapter)
    numbers = lora_config.Numbers(config, adapter.name) if config is not None else None
    for module, factors in adapter.modules.items():
        if factors.spec != adapter.specs[module]:
            raise ShapeError(
                f"adapter {adapter.name!r}, module {module}: its factors are {factors.spec}, and its specs say "
                f"{adapter.specs[module]}. eigenlorax.from_factors makes both agree."
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


def check_names(names: Iterable[str]) -> None:
    """`AdapterNameError` where two names differ by case at most: they would be one folder on many machines."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.get(name.lower())
        if other is not None:
            raise AdapterNameError(
                f"two adapters go by the name {name!r}"
                + (f" (and {other!r}: case does not count)" if other != name else "")
                + ". Give one of them another name with NAME=PATH."
            )
        seen[name.lower()] = name


def check_one_base(adapters: Sequence[Adapter], same_base: bool = False) -> tuple[str | None, str | None]:
    """The base model, and its revision, that all adapters were trained on.

    A base or a revision that is not stated equals any; the first is warned of. Two that are stated and differ are an
    error, unless `same_base` says that they are one under two names; then the commonest stands for all.
    """
    silent = [adapter.name for adapter in adapters if adapter.base_model is None]
    if silent and len(silent) < len(adapters):
        warnings.warn(
            f"no base model is stated by {_listing(silent)}; taken to be that of the others.",
            UnknownBaseWarning,
            stacklevel=3,
        )
    for field in ("base_model", "revision"):
        stated = [(getattr(adapter, field), adapter.name) for adapter in adapters if getattr(adapter, field)]
        for value, name in stated:
            if value != stated[0][0] and not same_base:
                what = "base model" if field == "base_model" else "revision of the base model"
                raise BaseModelError(
                    f"adapters of two bases: the {what} of {stated[0][1]!r} is {stated[0][0]!r}, that of {name!r} is "
                    f"{value!r}. Fit them apart; if both names stand for one model, pass same_base=True "
                    "(--same-base)."
                )
    return _commonest(a.base_model for a in adapters), _commonest(a.revision for a in adapters)


def family(adapter: Adapter) -> str | None:
    """The model that an adapter of an image model is for, in words, as far as its modules tell; None for others."""
    return families.called(_family(adapter)) or None


def _family(adapter: Adapter) -> frozenset[str]:
    return families.families((name, spec.channels) for name, spec in adapter.specs.items())


def check_one_family(adapters: Sequence[Adapter]) -> None:
    """`BaseModelError` where two adapters are of different image models, by the names and widths of their modules: they
    may have no module in common, so that no shape would tell."""
    known = {adapter.name: own for adapter in adapters if (own := _family(adapter))}
    for family in dict.fromkeys(known.values()):
        others = [name for name, own in known.items() if not own & family]
        if not others:
            continue
        these = [name for name, own in known.items() if own & family]
        few = min(these, others, key=len)
        more = " …" if len(few) > 12 else ""
        leave_out = (
            f"exclude_adapters={few[:12]}{more} ({' '.join(f'--exclude-adapter {name}' for name in few[:12])}{more})"
        )
        raise BaseModelError(
            f"adapters of two models: {these[0]!r} is for {families.called(known[these[0]])}, and {others[0]!r} is for "
            f"{families.called(known[others[0]])}, by the names and widths of their modules. Fit them apart; without "
            f"the {len(few)} that are not of the others' model: {leave_out}."
        )


def warn_of_nothing_shared(modules: Mapping[str, Iterable[str]]) -> None:
    """Warn where adapters fall into groups that have no module in common.

    modules: of each adapter, by its name, the modules that it has in the subspace. Adapters with none do not count.
    """
    groups: list[tuple[list[str], set[str]]] = []
    for name, own in sorted(modules.items()):
        joined, found = [name], set(own)
        if not found:
            continue
        apart = []
        for group in groups:
            if found.isdisjoint(group[1]):
                apart.append(group)
            else:
                joined, found = group[0] + joined, found | group[1]
        groups = [*apart, (joined, found)]
    if len(groups) < 2:
        return
    groups.sort(key=lambda group: (-len(group[0]), group[0]))
    listed = "; ".join(f"{_listing(sorted(names))}, with modules like {min(own)!r}" for names, own in groups[:5])
    more = f"; and {len(groups) - 5} more groups" if len(groups) > 5 else ""
    warnings.warn(
        f"{len(groups)} groups of adapters have no module in common, so nothing is shared between them: {listed}{more}."
        " If they belong to different models, fit each group in a pack of its own.",
        NothingSharedWarning,
        stacklevel=3,
    )


def check_family(adapter: Adapter, modules: Iterable[tuple[str, int]]) -> None:
    """`BaseModelError` where an adapter is of another image model than a pack with these modules, each with the width
    of its input."""
    own, other = _family(adapter), families.families(modules)
    if own and other and not own & other:
        raise BaseModelError(
            f"adapter {adapter.name!r} is for {families.called(own)}, and the pack is for {families.called(other)}, by "
            "the names and widths of their modules. Fit it in a pack of its own model."
        )


def warn_of_other_model(wanted: str | None, model: object, stacklevel: int = 3) -> None:
    """Warn where a pack names another base model than the one that it is put on, and shapes alone would not tell.

    Local folders may hold any model, so only names of repositories are compared, by their last part: `gpt2` is
    `openai-community/gpt2`.
    """
    if not isinstance(model, str) or not model or not wanted or Path(model).exists() or Path(wanted).exists():
        return
    if model.rpartition("/")[2].lower() != wanted.rpartition("/")[2].lower():
        warnings.warn(
            f"the subspace was found in adapters of {wanted!r}, and this model is {model!r}. If that is another one, "
            "its modules mean something else: take a pack of its own adapters.",
            BaseModelWarning,
            stacklevel=stacklevel,
        )


def _commonest(values: Iterable[str | None]) -> str | None:
    counts = Counter(value for value in values if value)
    # ties by name, so that the order of adapters does not matter
    return min(counts, key=lambda value: (-counts[value], value)) if counts else None


def check_one_shape(adapters: Sequence[Adapter], names: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every module by its name in the subspace; an error names both adapters.

    A linear layer and a convolution of kernel 1 are one: their rows mean the same.

    names: module name in an adapter → in the subspace; modules that are not in it are left out.
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
            if shapes.setdefault(name, shape) != shape:
                raise ShapeError(
                    f"module {name}: (out, in) is {shapes[name]} in adapter {first[name]!r} and {shape} in "
                    f"{adapter.name!r}. They belong to different base models: fit them apart, or keep the module out "
                    f"of the subspace with exclude_modules=[{name!r}] (--exclude-module {name})."
                )
            if kernels.setdefault(name, _wide(spec.kernel)) != _wide(spec.kernel):
                raise ShapeError(
                    f"module {name}: its kernel is {kernels[name] or 1} in adapter {first[name]!r} and "
                    f"{spec.kernel or 1} in {adapter.name!r}. They belong to different base models: fit them apart, or "
                    f"keep the module out of the subspace with exclude_modules=[{name!r}] (--exclude-module {name})."
                )
            first.setdefault(name, adapter.name)
    return shapes


def _check_limits(adapter: str, module: str, spec: ModuleSpec) -> None:
    """`ShapeError` for a module that no pack may have: what is written beyond these limits is not read again."""
    sizes, most = (spec.out_features, spec.in_features), boundary.MAX_DIMENSION
    if min(sizes) < 1 or max(sizes) > most or spec.rank > max(sum(sizes), boundary.MAX_RANK):
        raise ShapeError(
            f"module {module} of adapter {adapter!r} has the rank {spec.rank} and the shape {sizes}, (out, in). A pack "
            f"has sizes from 1 to {most:,}, and ranks up to out + in, or {boundary.MAX_RANK:,} if that is more. Keep "
            f"the module out of the subspace with exclude_modules=[{module!r}] (--exclude-module {module})."
        )


def _wide(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel that is more than one place wide; empty for others, and for linear layers."""
    return () if set(kernel) <= {1} else kernel


def excluded(modules: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """The module names that a shell-style pattern fits, as a whole or in their last components.

    A pattern that fits none is an error: it is a slip, and what it should have kept out would be fitted.
    """
    modules = list(modules)
    parts = {*modules, *(module.rpartition(".")[2] for module in modules)}
    found: set[str] = set()
    for pattern in patterns:
        fits = {m for m in modules if fnmatch.fnmatchcase(m, pattern) or fnmatch.fnmatchcase(m, f"*.{pattern}")}
        if not fits:
            raise OptionError(
                f"{pattern!r} fits no module (exclude_modules, --exclude-module).{suggestion(pattern, parts)} Modules "
                f"are named like {_listing(sorted(modules)[:2])}; shell wildcards (*, ?, [...]) may be used."
            )
        found |= fits
    return frozenset(found)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
