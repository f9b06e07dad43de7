"""Files of the sources' configs: a config is stored as its differences from fields that most configs of a pack share.

PEFT writes some thirty fields for each LoRA, of which few differ within a collection.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core import keys, limits
from ..core.json_dataclasses import reject_constant

CHANGED, REMOVED = "eigenlorax_changed", "eigenlorax_removed"
"""Fields of a file with differences: fields with other values, by name, and names of fields that the config lacks."""
MODULES = "eigenlorax_modules"
"""Field of a file with differences that is true if `target_modules` are all modules of the subspace, sorted."""
INDENT, END = "eigenlorax_indent", "eigenlorax_end"
"""Fields of a file with differences that state the layout of the text, where it is not PEFT's."""
_PEFT_LAYOUT: Mapping[str, Any] = {INDENT: 2, END: ""}

MAX_SHARED_CHARACTERS = 2**16
"""Largest text of the shared fields, because each adapter has all of them again in memory."""

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Layout of a text with sorted keys.

    Attributes:
        indent: Blanks per level, 1 to 8; PEFT writes 2.
        end: Text after the last brace, empty or a line feed; PEFT writes none.
    """

    indent: int
    end: str

    def __post_init__(self) -> None:
        if type(self.indent) is not int or not 1 <= self.indent <= 8 or self.end not in ("", "\n"):
            raise ValueError(f"{keys.SOURCE_CONFIG} has differences of an unknown form")

    @classmethod
    def of(cls, text: str) -> "_Layout":
        """Return the layout that a text has if it is one with sorted keys."""
        blanks = re.match(r"\{\n( {1,8})", text)
        return cls(len(blanks.group(1)) if blanks else 2, "\n" if text.endswith("\n") else "")

    @classmethod
    def from_fields(cls, fields: Fields) -> "_Layout":
        """Return the layout that a file with differences states; `ValueError` for an impossible one."""
        stated = {**_PEFT_LAYOUT, **fields}
        return cls(stated[INDENT], stated[END])

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that state the layout; none for PEFT's."""
        stated = {INDENT: self.indent, END: self.end}
        return {name: value for name, value in stated.items() if value != _PEFT_LAYOUT[name]}

    def text(self, fields: Fields) -> str:
        """Return fields as a text."""
        return json.dumps(fields, indent=self.indent, sort_keys=True) + self.end


def shared_fields(configs: Iterable[str], modules: Collection[str] | None = None) -> dict[str, Any]:
    """Return the most common value of each field that at least two configs have alike, sorted by name.

    Fields that would exceed `MAX_SHARED_CHARACTERS` are left out.

    Args:
        configs: Texts of the configs. Their order does not matter.
        modules: Modules of the subspace, which `to_bytes` does not repeat in a config that lists all of them.
    """
    counts: dict[str, Counter[str]] = {}
    for config in configs:
        for name, value in (_canonical_fields(config) or {}).items():
            if not _is_all_modules(name, value, modules):
                counts.setdefault(name, Counter())[_text(value)] += 1
    shared: dict[str, Any] = {}
    for name, values in sorted(counts.items()):
        # of values that are as common, the first one in the order of texts
        text, count = min(values.items(), key=lambda pair: (-pair[1], pair[0]))
        if count > 1 and is_small({**shared, name: json.loads(text)}):
            shared[name] = json.loads(text)
    return shared


def is_small(shared: Fields) -> bool:
    """Return whether fields are so few and short that the adapters of a pack may share them."""
    return len(_text(shared)) <= MAX_SHARED_CHARACTERS


def to_bytes(config: str, shared: Fields, modules: Collection[str] | None = None) -> bytes:
    """Return the file of a config: its differences from `shared`, or the config word for word.

    Only a config with sorted keys and 1 to 8 blanks of indentation can be stored as differences. PEFT writes 2 blanks.

    Args:
        config: Text of the config.
        shared: Fields that most configs share.
        modules: Modules of the subspace; None if the file is not in a pack with one.
    """
    whole = config.encode("utf-8")
    fields = _canonical_fields(config)
    if fields is None:
        return whole
    changed = {
        name: value for name, value in fields.items() if name not in shared or _text(shared[name]) != _text(value)
    }
    has_all_modules = _is_all_modules(keys.TARGET_MODULES, changed.get(keys.TARGET_MODULES), modules)
    if has_all_modules:
        del changed[keys.TARGET_MODULES]
    removed = sorted(shared.keys() - fields.keys())
    differences = {
        CHANGED: changed,
        **({REMOVED: removed} if removed else {}),
        **({MODULES: True} if has_all_modules else {}),
        **_Layout.of(config).fields,
    }
    data = (_text(differences) + "\n").encode("utf-8")
    return data if len(data) < len(whole) else whole


def from_bytes(data: bytes, shared: Fields, modules: Collection[str] | None = None) -> tuple[str, dict[str, Any]]:
    """Return the text of a config and its fields, from the bytes that `to_bytes` returned.

    Args:
        data: The bytes.
        shared: Fields that most configs share.
        modules: Modules of the subspace; None if the file is not in a pack with one.

    Raises:
        ValueError: The bytes are not a JSON object, their differences have another form, or they are nested too deep.
    """
    text, fields = limits.parse_json_object(data, keys.SOURCE_CONFIG)
    if CHANGED not in fields:
        return text, fields
    changed, removed, has_all_modules = fields[CHANGED], fields.get(REMOVED, []), fields.get(MODULES, False)
    if (
        not isinstance(changed, dict)
        or not isinstance(removed, list)
        or type(has_all_modules) is not bool
        or (has_all_modules and modules is None)
        or not fields.keys() <= {CHANGED, REMOVED, MODULES, INDENT, END}
    ):
        raise ValueError(f"{keys.SOURCE_CONFIG} has differences of an unknown form")
    complete = {name: value for name, value in shared.items() if name not in removed} | changed
    if has_all_modules:
        complete[keys.TARGET_MODULES] = sorted(modules or ())
    text = _Layout.from_fields(fields).text(complete)
    # parsed again, so that values of `shared` are not shared between adapters
    parsed = json.loads(text)
    limits.check_depth(parsed, keys.SOURCE_CONFIG)
    return text, parsed


def _is_all_modules(name: str, value: Any, modules: Collection[str] | None) -> bool:
    """Return whether a field lists all modules of the subspace, in sorted order."""
    return name == keys.TARGET_MODULES and modules is not None and value == sorted(modules)


def _canonical_fields(config: str) -> dict[str, Any] | None:
    """Return the fields of a config whose text follows from its fields and a layout; None for any other text."""
    try:
        fields = json.loads(config, parse_constant=reject_constant)
        is_canonical = isinstance(fields, dict) and _Layout.of(config).text(fields) == config
    except (ValueError, RecursionError):
        return None
    return fields if is_canonical and CHANGED not in fields else None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
