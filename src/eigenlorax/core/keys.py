"""Names of tensors, files and fields: the one place where they are spelled. No torch, no I/O."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from ..errors import AdapterNameError, FormatError, ModuleNameError
from . import renamed_modules
from .linear_regex import Effort, LinearRegex, PatternError
from .options import suggestion

FORMAT_VERSION = 5
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
SOURCE_FILE = "source_file.json"
"""What an adapter's folder in a pack has of the single file that it came in."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the LoRA in a folder or repository."""
LORA_SUFFIX = ".safetensors"
CARRIED = "carried.safetensors"

MODEL_PREFIX = "base_model.model."
SIDES = ("down", "up")
COEFFICIENTS = {"down": "eigenlorax_down", "up": "eigenlorax_up"}
CORE = "eigenlorax_core"
CORES = {"full": "eigenlorax_core_full", "diagonal": "eigenlorax_core_diagonal"}
"""In the place of coefficients, in packs with cores."""
CODED = "eigenlorax_coded"
"""The whole of an adapter, in packs that are coded."""
REST = {"down": "eigenlorax_down_rest", "up": "eigenlorax_up_rest"}
"""Beside coefficients, what the bases do not hold of the two factors; either may be missing."""
RESTS = "rests"
"""What an adapter's config calls the sides that have a rest, by module."""
STORED_AS = "coefficient_dtype"
"""What the config of an adapter of a pack calls how its file has coefficients, where that is not as floats."""
KERNELS = "kernels"
"""What an adapter's config calls the kernels of its convolutions, by module."""
EMBEDDED = {"down": "eigenlorax_embedded_down", "up": "eigenlorax_embedded_up"}
LORA_PARTS = {"down": "lora_A", "up": "lora_B"}
OFFICIAL_SIDES = {"eigenlora_A": "down", "eigenlora_B": "up"}
OFFICIAL_COMPONENTS, OFFICIAL_COEFFICIENTS = "components", "loadings"

MOST_CHARACTERS = 1024
"""Of the name of a tensor of an adapter. Real ones have some two hundred."""

# a key of a pattern that is a name, in which a dot may be escaped or stand for any character
_LITERAL = re.compile(r"(?P<anchor>\^?)(?P<name>(?:[A-Za-z0-9_.-]|\\[^A-Za-z0-9\s\\])*)\$?")
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


def check_tensor_names(names: Iterable[str], where: str) -> None:
    """`FormatError` for a name that is longer than any real one: to look for its parts could take very long."""
    for name in names:
        if len(name) > MOST_CHARACTERS:
            raise FormatError(
                f"{where}: the name of tensor {name[:40]!r}… has {len(name):,} characters; at most {MOST_CHARACTERS:,} "
                "are read."
            )


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
    if _FOREIGN.search(key) and not any(f".{module}." in f".{key}" for module in modules_to_save):
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


def core_key(module: str, kind: str) -> str:
    """The key under which an adapter of a pack with cores keeps that of a module."""
    return f"{MODEL_PREFIX}{module}.{CORES[kind]}"


def rest_key(module: str, side: str) -> str:
    """The key under which our adapters keep what the bases do not hold of the factor of one side."""
    return f"{MODEL_PREFIX}{module}.{REST[side]}"


def owner(key: str) -> str | None:
    """The module that a key of our adapters' files is of: coefficients, rests, embedded bases, trained biases; or
    None."""
    module, _, part = key.removeprefix(MODEL_PREFIX).rpartition(".")
    if part in (*COEFFICIENTS.values(), CORE, *REST.values(), *EMBEDDED.values()):
        return module
    return module.removesuffix(".base_layer") if part == "bias" and module.endswith(".base_layer") else None


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


def check_known(name: str, known: Iterable[str], where: str = "the pack") -> None:
    """`AdapterNameError` if `name` is not among the adapters of `where`, with the one that is spelled most like it."""
    names = sorted(known)
    if name not in names:
        listed = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        near = suggestion(name, names)
        raise AdapterNameError(f"no adapter named {name!r} in {where}.{near} It has: {listed or 'none'}.")


def name_of_file(file: str, folder: str) -> str:
    """The name that a LoRA file gives an adapter: its own without the suffix, or its folder's where diffusers calls all
    of them alike. What no name may have is left out: files of styles are called whatever their makers like."""
    stem = folder if file == LORA_FILE else file[: -len(LORA_SUFFIX)]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._-")[:96].rstrip("._-") or stem


def is_name(text: str) -> bool:
    """Whether `check_name` would pass."""
    return _NAME.fullmatch(text) is not None and not text.endswith(".")


class Patterns:
    """PEFT's `rank_pattern` or `alpha_pattern`, to be asked for many modules.

    effort: what matching may take in all. A config is somebody else's, and may have been made to take long.
    """

    __slots__ = ("_effort", "_keys", "_matchers", "_pattern", "_whole")

    def __init__(self, pattern: Mapping[str, Any], effort: Effort | None = None) -> None:
        self._pattern, self._effort = pattern, effort or Effort()
        # files of image models may have a pattern for each of a thousand modules, that fits it alone (`^name$`)
        self._whole: dict[str, int] = {}
        self._keys: list[tuple[int, str]] = []
        self._matchers: list[Callable[[str], bool]] = []
        for place, key in enumerate(pattern):
            name = re.sub(r"\\([^A-Za-z0-9])", r"\1", key[1:-1])
            if key == whole_name(name):
                self._whole[name] = place
            else:
                self._keys.append((place, key))

    def value(self, module: str, default: Any) -> Any:
        """The value of a module.

        It is that of the first key that, as a regular expression, fits the whole name or its last components; where
        none does, that of the name itself (peft.utils.other.get_pattern_key). `FormatError` where a key is no such
        expression, or takes too long.
        """
        at = self._whole.get(module)
        for number, (place, key) in enumerate(self._keys):
            if at is not None and place > at:
                break
            try:
                if number == len(self._matchers):
                    self._matchers.append(_matcher(key, self._effort))
                fits = self._matchers[number](module)
            except PatternError as error:
                raise FormatError(
                    f"the key {key!r} of rank_pattern or alpha_pattern cannot be used as a regular expression: {error}."
                ) from error
            if fits:
                return self._pattern[key]
        return self._pattern.get(module, default) if at is None else self._pattern[whole_name(module)]


def _matcher(key: str, effort: Effort) -> Callable[[str], bool]:
    """Whether a key of a pattern fits a module, as PEFT finds it."""
    literal = _LITERAL.fullmatch(key)
    if literal is not None:
        return partial(_fits_literal, literal["anchor"] == "^", *_pieces(literal["name"]), effort)
    return LinearRegex(rf"(.*\.)?({key})$", effort).begins


def _pieces(name: str) -> tuple[int, list[tuple[int, str]]]:
    """The length of what a pattern without repetitions fits, and its pieces between dots, which stand for any
    character, with their places."""
    length, pieces = 0, []
    for piece in re.split(r"(?<!\\)\.", name):
        text = piece.replace("\\", "")
        pieces.append((length, text))
        length += len(text) + 1
    return length - 1, pieces


def _fits_literal(whole: bool, length: int, pieces: Sequence[tuple[int, str]], effort: Effort, module: str) -> bool:
    effort.spend(1)
    start = len(module) - length
    if start < 0 or (start > 0 and (whole or module[start - 1] != ".")):
        return False
    # the last components tell modules apart
    return all(module.startswith(piece, start + place) for place, piece in reversed(pieces))


def whole_name(module: str) -> str:
    """A pattern that fits this module alone: without the anchor, `0.query` would fit `decoder.0.query` too."""
    return f"^{re.escape(module)}$"


def shorter(name: str) -> str | None:
    """`bert.encoder.x` → `encoder.x`: without its first component; None where there is but one."""
    _, dot, rest = name.partition(".")
    return rest if dot else None


def endings(name: str) -> Iterator[str]:
    """`a.b.c` → itself, `b.c`, `c`."""
    one: str | None = name
    while one is not None:
        yield one
        one = shorter(one)


def one_name_per_module(adapters: Iterable[Iterable[str]]) -> dict[str, str]:
    """Each module name of any adapter → the name the module has in the subspace.

    Names that differ only by one leading component (the architecture's prefix: `bert.encoder…`, `encoder…`) are one
    module, and the longest form is kept, unless some adapter has both: there they are two modules. A short form that
    fits two longer ones is an error. So are names of before and after a renaming by transformers (`renamed`) one
    module, and the newest one is kept.
    """
    sets = {frozenset(names) for names in adapters}
    found = _without_prefixes(sets)
    kept = {frozenset(found[name] for name in names) for names in sets}
    by_newest: dict[str, list[str]] = {}
    for name in sorted(frozenset().union(*kept), key=lambda name: (renamed_modules.age(name), name)):
        by_newest.setdefault(renamed_modules.newest(name), []).append(name)
    renamings = [same for same in by_newest.values() if len(same) > 1]
    for names in kept:
        for same in renamings:
            if len(twice := [name for name in same if name in names]) > 1:
                raise ModuleNameError(
                    f"modules {twice[0]!r} and {twice[1]!r} of one adapter could be one, by the names that "
                    "transformers has given it. Fit the adapters apart, or leave the module out with "
                    f"exclude_modules=[{twice[1]!r}] (--exclude-module {twice[1]})."
                )
    longest = _without_prefixes({frozenset(map(renamed_modules.newest, names)) for names in kept})
    return {name: by_newest[longest[renamed_modules.newest(one)]][0] for name, one in found.items()}


def _without_prefixes(sets: Collection[frozenset[str]]) -> dict[str, str]:
    """Each name → the longest one that differs from it by leading components, in other sets than its own."""
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
                f"apart, or leave the module out with exclude_modules=[{short!r}] (--exclude-module {short})."
            )

    def longest(name: str) -> str:
        return longest(parents[name][0]) if name in parents else name

    found = {name: longest(name) for name in every}
    for names in sets:
        if len({found[name] for name in names}) < len(names):
            twice = next(one for one in sorted(names) if found[one] != one and found[one] in names)
            raise ModuleNameError(
                f"modules {twice!r} and {found[twice]!r} of one adapter could be one, by the names other adapters have "
                f"for them. Fit the adapters apart, or leave the module out with exclude_modules=[{twice!r}] "
                f"(--exclude-module {twice})."
            )
    return found


def resolve(name: str, modules: Iterable[str]) -> str | None:
    """The module of a subspace that `name` stands for: the same name, or the only one that differs by leading
    components, or else by that and by what transformers has renamed. None where there is none; an error where there
    are two."""
    modules = frozenset(modules)
    if name in modules:
        return name
    for form in (_as_it_is, renamed_modules.newest):
        now = form(name)
        # a list of a few hundred names is gone through faster than it is put in order
        found = [m for m in modules if _is_end(form(m), now)]
        if found:
            return _only(name, found)
    return None


def resolve_all(names: Iterable[str], modules: Iterable[str]) -> dict[str, str | None]:
    """`resolve` for the modules of one adapter, no two of which stand for one module of the subspace. What fits as it
    is goes before what was renamed."""
    names, free = list(names), frozenset(modules)
    found: dict[str, str | None] = dict.fromkeys(names)
    found |= {name: name for name in names if name in free}
    for form in (_as_it_is, renamed_modules.newest):
        free -= {place for place in found.values() if place is not None}
        endings = _Endings(free, form)
        matched = {name: endings.of(name) for name, place in found.items() if place is None}
        owner: dict[str, str] = {}
        for name, place in matched.items():
            if place is not None and owner.setdefault(place, name) != name:
                raise ModuleNameError(
                    f"modules {owner[place]!r} and {name!r} of one adapter both fit the module {place!r} of the "
                    "subspace."
                )
        found |= matched
    return found


def _as_it_is(name: str) -> str:
    return name


class _Endings:
    """Modules by all that their names end with, in one form of names."""

    def __init__(self, modules: Iterable[str], form: Callable[[str], str]) -> None:
        self._form = form
        self._whole: dict[str, list[str]] = {}
        self._by_ending: dict[str, list[str]] = {}
        for module in sorted(modules):
            now = form(module)
            self._whole.setdefault(now, []).append(module)
            for ending in endings(now):
                self._by_ending.setdefault(ending, []).append(module)

    def of(self, name: str) -> str | None:
        """The only module that is called so, or that ends with this name, or is the end of it."""
        now = self._form(name)
        longer = self._by_ending.get(now, [])
        found = [*longer, *(module for ending in list(endings(now))[1:] for module in self._whole.get(ending, []))]
        return _only(name, found) if found else None


def _only(name: str, found: Sequence[str]) -> str:
    if len(found) > 1:
        first, second, *_ = sorted(found)
        raise ModuleNameError(f"module {name!r} fits two modules of the subspace, {first!r} and {second!r}.")
    return found[0]


def _is_end(one: str, other: str) -> bool:
    """Whether names are the same, or one is the end of the other."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")
