"""Names of tensors, files and fields: the one place where they are spelled. No torch, no I/O."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .errors import AdapterNameError, FormatError, ModuleNameError

FORMAT_VERSION = 4
PEFT_TYPE = "EIGENLORAX"
OFFICIAL_PEFT_TYPE = "EIGENLORA"
"""What the authors' own code calls its adapters."""
INSIDE_PACK = "../.."
"""What the adapters of a pack call their subspace: where it is, seen from their own folder."""

MANIFEST = "subspace_config.json"
ADAPTERS = "adapters"
CARD = "README.md"
REPORT_FIGURES = "report.json"
REPORT_PAGE = "report.html"
REPORTS = (REPORT_FIGURES, REPORT_PAGE)
"""What `fit` leaves beside a pack's own files; the manifest does not list it."""
REPORT_SCHEMA = "eigenlorax-report"
LOCK = ".lock"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
SOURCE_CONFIG = "source_config.json"
CARRIED = "carried.safetensors"

MODEL_PREFIX = "base_model.model."
SIDES = ("down", "up")
COEFFICIENTS = {"down": "eigenlorax_down", "up": "eigenlorax_up"}
CORE = "eigenlorax_core"
KERNELS = "kernels"
"""What an adapter's config calls the kernels of its convolutions, by module."""
EMBEDDED = {"down": "eigenlorax_embedded_down", "up": "eigenlorax_embedded_up"}
LORA_PARTS = {"down": "lora_A", "up": "lora_B"}
OFFICIAL_SIDES = {"eigenlora_A": "down", "eigenlora_B": "up"}
OFFICIAL_COMPONENTS, OFFICIAL_COEFFICIENTS = "components", "loadings"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

# `.default` stands for the name an adapter had in the model it was saved from: any one component.
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(\.(?P<adapter>[^.]+))?\.weight")
_CARRIED = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)"
    r"(\.(?!weight$)(?P<adapter>[^.]+))?(?P<rest>\.weight)?"
)
_FACTOR_BIAS = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(\.(?P<adapter>[^.]+))?(?P<rest>\.bias)")
_HEAD = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
_OFFICIAL = re.compile(
    r"(?P<module>.+)\.(?P<side>eigenlora_A|eigenlora_B)(\.[^.]+)?\.(?P<part>components|loadings)(\.[^.]+)?"
)
# What other adapter methods and dialects leave in a file: held under a PEFT LoRA config, it would not be understood.
_FOREIGN = re.compile(
    r"(^|[._])(lora|eigenlora|ia3|vera|hada|lokr|oft|boft|hra|fourierft|vblora|loha)([._]|$)|\.alpha$|dora_scale"
)


class Kind(Enum):
    """What a tensor of a LoRA file is."""

    DOWN = "down"
    UP = "up"
    HEAD = "head"
    CARRIED = "carried"


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor's place: its module, its kind, and the key PEFT writes it under."""

    kind: Kind
    module: str
    key: str


def parse_peft_key(raw: str, modules_to_save: Sequence[str] = ()) -> TensorName:
    """What `raw`, a key of a LoRA file, stands for. `FormatError` names a key that is not understood."""
    key = raw.removeprefix(MODEL_PREFIX)
    if match := _FACTOR.fullmatch(key):
        kind = Kind.DOWN if match["part"] == LORA_PARTS["down"] else Kind.UP
        return TensorName(kind, match["module"], lora_key(match["module"], kind.value))
    if match := _CARRIED.fullmatch(key) or _FACTOR_BIAS.fullmatch(key):
        return TensorName(
            Kind.CARRIED, match["module"], f"{MODEL_PREFIX}{match['module']}.{match['part']}{match['rest'] or ''}"
        )
    if match := _HEAD.fullmatch(key):
        return TensorName(
            Kind.HEAD, match["module"], f"{MODEL_PREFIX}{match['module']}.{_without_adapter(match['rest'])}"
        )
    if _FOREIGN.search(key) and not any(re.search(rf"(^|\.){re.escape(m)}\.", key) for m in modules_to_save):
        raise FormatError(
            f"tensor {raw!r} is not one of a PEFT LoRA: known are lora_A, lora_B, lora_embedding_A/B, "
            "lora_magnitude_vector, trained biases and modules_to_save. It would be lost, so nothing was read."
        )
    return TensorName(Kind.HEAD, key.rpartition(".")[0], f"{MODEL_PREFIX}{key}")


def parse_official_key(raw: str) -> tuple[str, str, str] | None:
    """Module, side ("down" or "up") and part ("components" or "loadings") of a tensor of the authors' files; None for
    one that is not theirs. An adapter's name, or `weight`, may stand before or after the part."""
    match = _OFFICIAL.fullmatch(raw.removeprefix(MODEL_PREFIX))
    return (match["module"], OFFICIAL_SIDES[match["side"]], match["part"]) if match else None


def _without_adapter(rest: str) -> str:
    """`default.weight` → `weight`: under `modules_to_save` the first of several components is the adapter's name."""
    first, dot, tail = rest.partition(".")
    return tail if dot else first


def lora_key(module: str, side: str) -> str:
    """The key under which PEFT saves one LoRA factor."""
    return f"{MODEL_PREFIX}{module}.{LORA_PARTS[side]}.weight"


def coefficients_key(module: str, side: str) -> str:
    """The key under which our adapters keep the coefficients of one side."""
    return f"{MODEL_PREFIX}{module}.{COEFFICIENTS[side]}"


def components_key(module: str, side: str) -> str:
    """The key of a side's fitted components in the subspace's file."""
    return f"{module}.{side}.components"


def singular_values_key(module: str, side: str) -> str:
    """The key of a side's spectrum in the subspace's file."""
    return f"{module}.{side}.singular_values"


def extra_check_key(module: str, side: str) -> str:
    """The key of the numbers that check a side's augmented directions after they were rebuilt."""
    return f"{module}.{side}.extra_check"


def check_name(name: str) -> str:
    """`name`, if it may stand for an adapter; it becomes a folder, so nothing that climbs or hides is allowed."""
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise AdapterNameError(
            f"adapter name {name!r} is not allowed: 1 to 96 letters, digits, '.', '_' or '-', starting with a letter "
            "or digit and not ending with '.'. Give one with NAME=PATH."
        )
    return name


def check_known(name: str, known: Iterable[str]) -> None:
    """`AdapterNameError` if `name` is not among the adapters of a pack."""
    names = sorted(known)
    if name not in names:
        listed = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        raise AdapterNameError(f"no adapter named {name!r} in the pack. It has: {listed or 'none'}.")


def is_name(text: str) -> bool:
    """Whether `check_name` would pass."""
    return _NAME.fullmatch(text) is not None and not text.endswith(".")


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value that PEFT's `rank_pattern` or `alpha_pattern` has for a module.

    It is that of the first key that, as a regular expression, fits the whole name or its last components
    (peft.utils.other.get_pattern_key).
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def shorter(name: str) -> str | None:
    """`bert.encoder.x` → `encoder.x`: without its first component; None where there is but one."""
    _, dot, rest = name.partition(".")
    return rest if dot else None


def one_name_per_module(adapters: Iterable[Iterable[str]]) -> dict[str, str]:
    """Each module name of any adapter → the name the module has in the subspace.

    Names that differ only by one leading component (the architecture's prefix: `bert.encoder…`, `encoder…`) are one
    module, and the longest form is kept, unless some adapter has both: there they are two modules. A short form that
    fits two longer ones is an error.
    """
    sets = [frozenset(names) for names in adapters]
    every = frozenset().union(*sets)
    parents: dict[str, list[str]] = {}
    for name in sorted(every):
        short = shorter(name)
        if short in every and not any(name in names and short in names for names in sets):
            parents.setdefault(short, []).append(name)
    for short, longer in parents.items():
        if len(longer) > 1:
            raise ModuleNameError(
                f"module {short!r} of one adapter could be {longer[0]!r} or {longer[1]!r} of others. Fit the adapters "
                f"apart, or leave the module out with --exclude-module {short}."
            )

    def longest(name: str) -> str:
        return longest(parents[name][0]) if name in parents else name

    found = {name: longest(name) for name in every}
    for names in sets:
        if len({found[name] for name in names}) < len(names):
            twice = next(one for one in sorted(names) if found[one] != one and found[one] in names)
            raise ModuleNameError(
                f"modules {twice!r} and {found[twice]!r} of one adapter could be one, by the names other adapters have "
                f"for them. Fit the adapters apart, or leave the module out with --exclude-module {twice}."
            )
    return found


def resolve(name: str, modules: Iterable[str]) -> str | None:
    """The module of a subspace that `name` stands for: the same name, or the only one that differs by leading
    components. None where there is none; an error where there are two."""
    modules = frozenset(modules)
    if name in modules:
        return name
    found = sorted(m for m in modules if m.endswith(f".{name}") or name.endswith(f".{m}"))
    if len(found) > 1:
        raise ModuleNameError(f"module {name!r} fits two modules of the subspace, {found[0]!r} and {found[1]!r}.")
    return found[0] if found else None


def resolve_all(names: Iterable[str], modules: Iterable[str]) -> dict[str, str | None]:
    """`resolve` for the modules of one adapter, no two of which stand for one module of the subspace."""
    names, modules = list(names), frozenset(modules)
    exact = modules & set(names)
    free = modules - exact
    found = {name: name if name in exact else resolve(name, free) for name in names}
    owner: dict[str, str] = {}
    for name, place in found.items():
        if place is not None and owner.setdefault(place, name) != name:
            raise ModuleNameError(
                f"modules {owner[place]!r} and {name!r} of one adapter both fit the module {place!r} of the subspace."
            )
    return found
