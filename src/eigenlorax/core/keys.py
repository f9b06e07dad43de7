"""Names of tensors, files and fields: the one place where they are spelled. No torch, no I/O."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import AdapterNameError, FormatError
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
RESIDUALS = {"down": "eigenlorax_down_rest", "up": "eigenlorax_up_rest"}
"""Beside coefficients, what the bases do not hold of the two factors; either may be missing."""
RESIDUAL_SIDES = "rests"
"""What an adapter's config calls the sides that have a rest, by module."""
COEFFICIENT_DTYPE = "coefficient_dtype"
"""What the config of an adapter of a pack calls how its file has coefficients, where that is not as floats."""
KERNELS = "kernels"
"""What an adapter's config calls the kernels of its convolutions, by module."""
EMBEDDED = {"down": "eigenlorax_embedded_down", "up": "eigenlorax_embedded_up"}
LORA_PARTS = {"down": "lora_A", "up": "lora_B"}
OFFICIAL_SIDES = {"eigenlora_A": "down", "eigenlora_B": "up"}
OFFICIAL_COMPONENTS, OFFICIAL_COEFFICIENTS = "components", "loadings"

MAX_CHARACTERS = 1024
"""Of the name of a tensor of an adapter. Real ones have some two hundred."""

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
        if len(name) > MAX_CHARACTERS:
            raise FormatError(
                f"{where}: the name of tensor {name[:40]!r}… has {len(name):,} characters; at most {MAX_CHARACTERS:,} "
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


def residual_key(module: str, side: str) -> str:
    """The key under which our adapters keep what the bases do not hold of the factor of one side."""
    return f"{MODEL_PREFIX}{module}.{RESIDUALS[side]}"


def module_of_key(key: str) -> str | None:
    """The module that a key of our adapters' files is of: coefficients, rests, embedded bases, trained biases; or
    None."""
    module, _, part = key.removeprefix(MODEL_PREFIX).rpartition(".")
    if part in (*COEFFICIENTS.values(), CORE, *RESIDUALS.values(), *EMBEDDED.values()):
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


def name_from_file(file: str, folder: str) -> str:
    """The name that a LoRA file gives an adapter: its own without the suffix, or its folder's where diffusers calls all
    of them alike. What no name may have is left out: files of styles are called whatever their makers like."""
    stem = folder if file == LORA_FILE else file[: -len(LORA_SUFFIX)]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._-")[:96].rstrip("._-") or stem


def is_valid_name(text: str) -> bool:
    """Whether `check_name` would pass."""
    return _NAME.fullmatch(text) is not None and not text.endswith(".")
