"""Licence of an adapter in its source: metadata of the file, the model card, and a file LICENSE."""

import re
from collections.abc import Mapping
from typing import Any

from ..core import keys
from ..core.license import OTHER, License, from_fields
from ..errors import FormatError, UrlError
from .folders import AdapterLocation, Folder

_MAX_CARD_BYTES = 1 << 20
_MAX_FRONT_MATTER = 1 << 16
_MAX_FIELDS = 1 << 12
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_FIELD = re.compile(r"^license(?:_name|_link)?[ \t]*:.*(?:\n(?:[ \t-].*)?)*", re.MULTILINE)
"""One field about the licence at the top level of front matter, with its further lines."""
_METADATA_KEYS = ("modelspec.license", "license")
"""Metadata of safetensors files: https://github.com/Stability-AI/ModelSpec, which kohya's scripts follow."""
_TITLES = {
    "mit license": "mit",
    "the mit license": "mit",
    "apache license version 2.0": "apache-2.0",
    "bsd 2-clause license": "bsd-2-clause",
    "bsd 3-clause license": "bsd-3-clause",
    "gnu general public license version 3": "gpl-3.0",
    "gnu affero general public license version 3": "agpl-3.0",
    "mozilla public license version 2.0": "mpl-2.0",
    "cc0 1.0 universal": "cc0-1.0",
    "creative commons legal code cc0 1.0 universal": "cc0-1.0",
    "attribution 4.0 international": "cc-by-4.0",
    "attribution-sharealike 4.0 international": "cc-by-sa-4.0",
    "attribution-noncommercial 4.0 international": "cc-by-nc-4.0",
    "attribution-noncommercial-sharealike 4.0 international": "cc-by-nc-sa-4.0",
    "attribution-noderivatives 4.0 international": "cc-by-nd-4.0",
    "attribution-noncommercial-noderivatives 4.0 international": "cc-by-nc-nd-4.0",
}
"""First words of the texts of licences → identifier."""


def find(location: AdapterLocation, metadata: Mapping[str, str]) -> License | None:
    """Return the licence of an adapter, or None if its source states none that can be read.

    The metadata of the file come first, then the card in its folder. A file LICENSE counts for an adapter that is a
    folder: beside single files, it is often that of a program.

    Args:
        location: Location of the adapter.
        metadata: Metadata of its file.
    """
    for key in _METADATA_KEYS:
        stated = from_fields(metadata.get(key))
        if stated is not None:
            return stated
    stated = of_card(_read(location.folder, keys.CARD))
    is_folder = location.file in (None, keys.LORA_FILE)
    return stated if stated is not None or not is_folder else of_text(_read(location.folder, keys.LICENSE))


def of_gguf(metadata: Mapping[str, Any]) -> License | None:
    """Return the licence in the metadata of a GGUF file, or None."""
    stated = (metadata.get(f"general.license{suffix}") for suffix in ("", ".name", ".link"))
    return from_fields(*(value if isinstance(value, str) else None for value in stated))


def of_card(text: str) -> License | None:
    """Return the licence in the front matter of a model card; None if it has none, or is not valid YAML."""
    matter = _FRONT_MATTER.match(text[:_MAX_FRONT_MATTER])
    if matter is None:
        return None
    import yaml

    # without other fields: they need not be valid, and PyYAML takes seconds for long ones
    stated = "\n".join(match[0].rstrip() for match in _FIELD.finditer(matter[1]))
    try:
        # every scalar is a text, and merge keys are not expanded
        fields = yaml.load(stated[:_MAX_FIELDS], Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    return from_fields(*(_field_text(fields.get(f"license{suffix}")) for suffix in ("", "_name", "_link")))


def _field_text(value: Any) -> str | None:
    """Return a field as text: a card may list several licences."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else None


def of_text(text: str) -> License | None:
    """Return the licence of a text: by its title, or its first line as the name of another licence."""
    words = " ".join(text[:_MAX_FIELDS].replace(",", " ").split()).lower()
    title = next((title for title in _TITLES if re.match(rf"{re.escape(title)}\b", words)), None)
    if title is not None:
        return from_fields(_TITLES[title])
    first = text.strip().partition("\n")[0]
    return from_fields(OTHER, first) if first else None


def _read(folder: Folder, name: str) -> str:
    """Return the text of a file; empty if it is missing or cannot be read, since an adapter is valid without it."""
    try:
        data = folder.read(name, _MAX_CARD_BYTES)
    except (FormatError, UrlError, OSError):
        return ""
    return data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
