"""Names of tensors, files, config fields and adapters: all names on disk are defined and parsed here."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import AdapterNameError, FormatError
from .options import suggestion

# Newest pack format that can be read and written (docs/pack-format.md)
FORMAT_VERSION = 8
# First format version whose files of bases are those of `FORMAT_VERSION`
BASES_VERSION = 7
PEFT_TYPE = "EIGENLORAX"
# `peft_type` in the adapters of the authors' own code
OFFICIAL_PEFT_TYPE = "EIGENLORA"
# `peft_type` of PEFT's AdaLoRA
ADALORA_PEFT_TYPE = "ADALORA"
# Path from an adapter's folder in a pack to the pack, by which its config refers to the subspace
INSIDE_PACK = "../.."

# Files and folders of a pack
MANIFEST = "subspace_config.json"
ADAPTERS = "adapters"
CARD = "README.md"
# File with the licence of an adapter
LICENSE = "LICENSE"
REPORT_FIGURES = "report.json"
REPORT_PAGE = "report.html"
# Files that `fit` writes into a pack's folder and the manifest does not list
REPORTS = (REPORT_FIGURES, REPORT_PAGE)
REPORT_SCHEMA = "eigenlorax-report"
LOCK = ".lock"
SUBSPACE_FILE = re.compile(r"subspace-[0-9a-f]{8}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Folder of the versions of all histories, and the files in it, each named by content
VERSIONS = "versions"
VERSION_FILE = re.compile(r"[0-9a-f]{16}\.bin")
# Character between the name of a history and the label of a version, and the label that stands for the last version
VERSION_MARK = "@"
LATEST = "latest"
# Label of the adapter that all members of a population refer to
COMMON = "common"
# Files of an adapter: PEFT's own names first
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
MAGNITUDE = "lora_magnitude_vector"
"""Name of the tensor of a module with DoRA."""
SOURCE_CONFIG = "source_config.json"
# Format and metadata of the single file that an adapter was read from (`adapter.Origin`)
SOURCE_FILE = "source_file.json"
# Name of the LoRA file in diffusers' folders and repositories
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_SUFFIX = ".safetensors"
# Files of mlx-lm: the adapter, and its state after a number of iterations
MLX_WEIGHTS = "adapters.safetensors"
MLX_ARCHIVE = "adapters.npz"  # of releases before safetensors
MLX_CHECKPOINT = re.compile(r"(\d{7,18})_adapters\.safetensors")
GGUF_SUFFIX = ".gguf"
# Suffixes of adapters that are one file
FILE_SUFFIXES = (LORA_SUFFIX, GGUF_SUFFIX)
CARRIED = "carried.safetensors"

MODEL_PREFIX = "base_model.model."
SIDES = ("down", "up")
# Tensors of an adapter in a pack of floats or group integers
COEFFICIENTS = {"down": "eigenlorax_down", "up": "eigenlorax_up"}
# Tensor of an adapter that was trained with a core between its coefficients
CORE = "eigenlorax_core"
# Tensors in place of coefficients, in packs with cores
CORES = {"full": "eigenlorax_core_full", "diagonal": "eigenlorax_core_diagonal"}
# Tensor with all modules of an adapter, in coded packs
CODED = "eigenlorax_coded"
# Tensors with all coded heads, and all coded carried tensors, of an adapter in a coded pack
CODED_HEADS, CODED_CARRIED = "eigenlorax_heads", "eigenlorax_carried"
# Tensor with the reference tensors of coded heads, in the file of the bases
REFERENCES = "references.coded"
# Tensor with the fitted components of all modules, in coded packs
CODED_COMPONENTS = "components.coded"
# Config field: the adapter of the pack whose codes are those of this one, and their sha256
PARENT = "parent"
# Residuals beside the coefficients; either may be missing. On disk they are called rests.
RESIDUALS = {"down": "eigenlorax_down_rest", "up": "eigenlorax_up_rest"}
# Config field: the sides that have a residual, by module
RESIDUAL_SIDES = "rests"
# Config field of coded packs in place of that: a digit for each module
RESIDUAL_DIGITS = "residual_sides"
# Config field: the storage of the coefficients in a pack, where that is not a float dtype
COEFFICIENT_DTYPE = "coefficient_dtype"
# Config field: the dtype that the LoRA factors of an adapter had before they were packed
SOURCE_DTYPE = "source_dtype"
# Config field: names of the adapted modules; without it, an adapter of a pack has all modules of the subspace
TARGET_MODULES = "target_modules"
# Config field: kernel sizes of convolutions, by module
KERNELS = "kernels"
# Bases within an adapter's own file, for adapters that are saved without a pack
EMBEDDED = {"down": "eigenlorax_embedded_down", "up": "eigenlorax_embedded_up"}
# Gradient components of an adapter: int8 integers (k, d) and the scale of each row, (k, 1)
GRADIENT = {"down": "eigenlorax_gradient_down", "up": "eigenlorax_gradient_up"}
GRADIENT_SCALES = {side: f"{name}_scales" for side, name in GRADIENT.items()}
# Tensors of an adapter's file that are bases
BASIS_TENSORS = (*EMBEDDED.values(), *GRADIENT.values(), *GRADIENT_SCALES.values())
LORA_PARTS = {"down": "lora_A", "up": "lora_B"}
# Tensors of a module in PEFT's AdaLoRA: B diag(E) A in place of B A
ADALORA_VALUES = "lora_E"
ADALORA_PARTS = (*LORA_PARTS.values(), ADALORA_VALUES)
# The authors' own code keeps components and coefficients ("loadings") as parameters of one layer per side
OFFICIAL_SIDES = {"eigenlora_A": "down", "eigenlora_B": "up"}
OFFICIAL_COMPONENTS, OFFICIAL_COEFFICIENTS = "components", "loadings"

# Longest tensor name that is read. Real names have about two hundred characters.
MAX_CHARACTERS = 1024

# Names of adapters are names of folders, on every system. Labels of versions become parts of such names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# `adapter` is the name that the adapter had in the model it was saved from, such as `default`. PEFT leaves it out of
# files, other tools do not.
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(\.(?P<adapter>[^.]+))?\.weight")
_CARRIED = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)"
    r"(\.(?!weight$)(?P<adapter>[^.]+))?(?P<tail>\.weight)?"
)
_FACTOR_BIAS = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(\.(?P<adapter>[^.]+))?(?P<tail>\.bias)")
_HEAD = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<tail>.+)")
# parameters, not layers: they have no `.weight`
_ADALORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_E)(\.(?!(?:weight|bias)$)[^.]+)?")
_OFFICIAL = re.compile(
    r"(?P<module>.+)\.(?P<side>eigenlora_A|eigenlora_B)(\.[^.]+)?\.(?P<part>components|loadings)(\.[^.]+)?"
)
# Tensors of other adapter methods and file formats, which do not belong to a PEFT LoRA.
_FOREIGN = re.compile(
    r"(^|[._])(lora|eigenlora|ia3|vera|hada|lokr|oft|boft|hra|fourierft|vblora|loha)([._]|$)|\.alpha$|dora_scale"
)


class Kind(Enum):
    """Role of a tensor in a LoRA file."""

    DOWN = "down"
    UP = "up"
    HEAD = "head"
    CARRIED = "carried"


@dataclass(frozen=True, slots=True)
class TensorName:
    """A parsed tensor name.

    Attributes:
        kind: Role of the tensor.
        module: Module that it belongs to, without `base_model.model.`.
        key: Name under which PEFT writes it.
    """

    kind: Kind
    module: str
    key: str


def is_digest(text: str) -> bool:
    """Return whether a text is a sha256 in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None


def subspace_file(sha256: str) -> str:
    """Return the name of a subspace's file, after the sha256 of its bytes."""
    return f"subspace-{sha256[:8]}.safetensors"


def version_file(sha256: str) -> str:
    """Return the path in a pack of a version's file, after the sha256 of its bytes."""
    return f"{VERSIONS}/{sha256[:16]}.bin"


def check_tensor_names(names: Iterable[str], where: str) -> None:
    """Raise `FormatError` for a name that is longer than any real one.

    The regular expressions here backtrack, so that parsing a very long name could take very long.
    """
    for name in names:
        if len(name) > MAX_CHARACTERS:
            raise FormatError(
                f"{where}: the name of tensor {name[:40]!r}… has {len(name):,} characters; at most {MAX_CHARACTERS:,} "
                "were expected."
            )


def parse_peft_key(raw: str, modules_to_save: Sequence[str] = ()) -> TensorName:
    """Parse the name of a tensor in a LoRA file.

    Args:
        raw: The name in the file.
        modules_to_save: Modules that the config lists as trained in full; their tensors may have any name.

    Raises:
        FormatError: The tensor belongs to another adapter method or file format.
    """
    key = raw.removeprefix(MODEL_PREFIX)
    if match := _FACTOR.fullmatch(key):
        kind = Kind.DOWN if match["part"] == LORA_PARTS["down"] else Kind.UP
        return TensorName(kind, match["module"], lora_key(match["module"], kind.value))
    if match := _CARRIED.fullmatch(key) or _FACTOR_BIAS.fullmatch(key):
        return TensorName(
            Kind.CARRIED, match["module"], f"{MODEL_PREFIX}{match['module']}.{match['part']}{match['tail'] or ''}"
        )
    if match := _HEAD.fullmatch(key):
        return TensorName(
            Kind.HEAD, match["module"], f"{MODEL_PREFIX}{match['module']}.{_without_adapter(match['tail'])}"
        )
    if _FOREIGN.search(key) and not any(f".{module}." in f".{key}" for module in modules_to_save):
        raise FormatError(
            f"tensor {raw!r} is not part of a PEFT LoRA: known are lora_A, lora_B, lora_embedding_A/B, "
            "lora_magnitude_vector, trained biases and modules_to_save. Nothing was read, since the tensor would be "
            "dropped. Save the adapter as a PEFT LoRA."
        )
    return TensorName(Kind.HEAD, key.rpartition(".")[0], f"{MODEL_PREFIX}{key}")


def is_factor_key(raw: str) -> bool:
    """Return whether the name of a tensor is that of a LoRA's factor, such as `….lora_A.weight`."""
    return _FACTOR.fullmatch(raw.removeprefix(MODEL_PREFIX)) is not None


def parse_adalora_key(raw: str) -> tuple[str, str] | None:
    """Parse the name of a tensor in an AdaLoRA checkpoint.

    Returns:
        Module and part (one of `ADALORA_PARTS`); None if the name has another form, as the names of heads have.
    """
    match = _ADALORA.fullmatch(raw.removeprefix(MODEL_PREFIX))
    return (match["module"], match["part"]) if match else None


def parse_official_key(raw: str) -> tuple[str, str, str] | None:
    """Parse the name of a tensor in a file of the authors' own code.

    Returns:
        Module, side ("down" or "up") and part ("components" or "loadings"); None if the name has another form.
    """
    match = _OFFICIAL.fullmatch(raw.removeprefix(MODEL_PREFIX))
    return (match["module"], OFFICIAL_SIDES[match["side"]], match["part"]) if match else None


def _without_adapter(name: str) -> str:
    """Return `weight` for `default.weight`: below `modules_to_save`, the first of several components is an adapter."""
    first, dot, remainder = name.partition(".")
    return remainder if dot else first


def lora_key(module: str, side: str) -> str:
    """Return PEFT's name of the LoRA factor of one side."""
    return f"{MODEL_PREFIX}{module}.{LORA_PARTS[side]}.weight"


def coefficients_key(module: str, side: str) -> str:
    """Return the name of one side's coefficients in an adapter file."""
    return f"{MODEL_PREFIX}{module}.{COEFFICIENTS[side]}"


def core_key(module: str, kind: str) -> str:
    """Return the name of a module's core, of kind "full" or "diagonal", in an adapter file."""
    return f"{MODEL_PREFIX}{module}.{CORES[kind]}"


def residual_key(module: str, side: str) -> str:
    """Return the name of one side's residual in an adapter file."""
    return f"{MODEL_PREFIX}{module}.{RESIDUALS[side]}"


def module_of_key(key: str) -> str | None:
    """Return the module that a tensor of an adapter file belongs to, or None.

    Coefficients, cores, residuals, embedded bases, gradient components and trained biases are recognised.
    """
    module, _, parameter = key.removeprefix(MODEL_PREFIX).rpartition(".")
    if parameter in (*COEFFICIENTS.values(), CORE, *RESIDUALS.values(), *BASIS_TENSORS):
        return module
    return module.removesuffix(".base_layer") if parameter == "bias" and module.endswith(".base_layer") else None


def components_key(module: str, side: str) -> str:
    """Return the name of a side's fitted components in the subspace file."""
    return f"{module}.{side}.components"


def singular_values_key(module: str, side: str) -> str:
    """Return the name of a side's singular values in the subspace file."""
    return f"{module}.{side}.singular_values"


def extra_check_key(module: str, side: str) -> str:
    """Return the name of the checksums of a side's augmented components in the subspace file."""
    return f"{module}.{side}.extra_check"


def check_name(name: str, *, kind: str = "adapter") -> str:
    """Return `name` if it may name an adapter or a history, the `kind`; otherwise raise `AdapterNameError`.

    It becomes the name of a folder, so separators, leading dots and the like are not allowed.
    """
    if not _NAME.fullmatch(name) or name.endswith("."):
        remedy = "Pass another name as name= (--name)."
        if kind == "adapter":
            remedy = "Set another name: NAME=PATH for an adapter to read, name= (--name) for one to train."
        raise AdapterNameError(
            f"{kind} name {name!r} is not allowed: 1 to 96 letters, digits, '.', '_' or '-', starting with a letter "
            f"or digit and not ending with '.'. {remedy}"
        )
    return name


def check_label(label: str) -> str:
    """Return `label` if it may be the label of a version, otherwise raise `AdapterNameError`."""
    if not _LABEL.fullmatch(label) or label.endswith(".") or label.lower() == LATEST:
        raise AdapterNameError(
            f"version label {label!r} is not allowed: 1 to 64 letters, digits, '.', '_' or '-', starting with a letter "
            f"or digit, not ending with '.', and not {LATEST!r}, which stands for the last version. Pass another label."
        )
    return label


def split_version(name: object) -> tuple[str, str] | None:
    """Return history and label of a name such as "run@1000"; None if it is not the name of a version."""
    if not isinstance(name, str) or VERSION_MARK not in name:
        return None
    history, _, label = name.partition(VERSION_MARK)
    return history, label


def file_name(name: str) -> str:
    """Return the name of the file or folder of an exported adapter: "run-1000" for the version "run@1000"."""
    return name.replace(VERSION_MARK, "-")


def is_version(name: object) -> bool:
    """Return whether a name is that of a version, and not of an adapter. It need not be valid."""
    return split_version(name) is not None


def is_valid_version(text: str) -> bool:
    """Return whether a text can be the name of a version, such as "run@1000" or "run@latest"."""
    history, _, label = text.partition(VERSION_MARK)
    return is_valid_name(history) and _LABEL.fullmatch(label) is not None and not label.endswith(".")


def check_known(name: str, adapters: Iterable[str], where: str = "the pack", *, kind: str = "adapter") -> None:
    """Raise `AdapterNameError`, with the closest name, unless `name` is one of the known adapters."""
    names = sorted(adapters)
    if name not in names:
        listing = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        raise AdapterNameError(
            f"no {kind} named {name!r} in {where}.{suggestion(name, names)} It has: {listing or 'none'}."
        )


def name_from_file(file: str, folder: str) -> str:
    """Return an adapter name for a LoRA file.

    It is the file's name without suffix, or the folder's if the file has the standard name of diffusers or mlx-lm.
    Characters that adapter names may not have are replaced or removed, since image LoRA files may have any name.
    """
    stem = folder if file in (LORA_FILE, MLX_WEIGHTS) else file[: file.rindex(".")]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._-")[:96].rstrip("._-") or stem


def is_valid_name(text: str) -> bool:
    """Return whether `check_name` accepts the name."""
    return _NAME.fullmatch(text) is not None and not text.endswith(".")
