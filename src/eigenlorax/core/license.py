"""Licence of an adapter, as the card or the file of its source states it."""

import re
from dataclasses import dataclass

from . import printable

OTHER = "other"
"""Identifier of the Hub for a licence that has no identifier."""
_HUB_IDS = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr "
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail "
    "openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib"
)
HUB_IDS = frozenset(_HUB_IDS.split())
"""Identifiers that the Hub accepts as `license` of a model card, without "other" and "unknown".

https://huggingface.co/docs/hub/repositories-licenses
"""
ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
"""Form of an identifier, also of one that the Hub adds later."""
MAX_NAME = 100
"""Largest number of characters of a licence's name."""
_LINK = re.compile(r"https?://[\w.~:/?#@%&=+;,-]{1,300}", re.ASCII)
_NOT_STATED = ("", "~", "null", "none", "unknown")


@dataclass(frozen=True, slots=True)
class License:
    """Licence of an adapter, as its source states it.

    Attributes:
        id: Identifier of the Hub, such as "apache-2.0"; "other" for a licence that has none.
        name: Name of a licence without identifier, in one line; None if it has an identifier or no name.
        link: URL of the text of a licence without identifier, if it was stated.

    Raises:
        ValueError: A field does not have this form.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        name_fits = self.name is None or (self.name and _clean(self.name) == self.name)
        link_fits = self.link is None or _LINK.fullmatch(self.link)
        if not (ID.fullmatch(self.id) and name_fits and link_fits):
            raise ValueError(f"{self.id!r:.100}, {self.name!r:.100} and {self.link!r:.100} do not describe a licence")

    @property
    def title(self) -> str:
        """Name of the licence, or its identifier."""
        return self.name or self.id


def from_fields(license: str | None, name: str | None = None, link: str | None = None) -> License | None:
    """Return the licence of the fields `license`, `license_name` and `license_link` of a model card, or None.

    Args:
        license: Identifier of the Hub in any case; or free text, the name of a licence without identifier.
        name: Name of the licence, if `license` is "other".
        link: URL of its text, if `license` is "other". A link that is not a plain URL, such as the name of a file, is
            ignored.
    """
    text, name = _clean(license or ""), _clean(name or "")
    if name.lower() in _NOT_STATED:
        name = ""
    if text.lower() in _NOT_STATED:
        if not name:
            return None
        text = OTHER
    identifier = "-".join(text.lower().split())
    if identifier in HUB_IDS:
        return License(identifier)
    link = link.strip() if link is not None else ""
    other_name = name if identifier == OTHER else text
    return License(OTHER, other_name or None, link if _LINK.fullmatch(link) else None)


def _clean(text: str) -> str:
    """Return text in one line without control characters, of at most `MAX_NAME` characters."""
    # cut before as well, because foreign text may be long, and an escape is longer than its character
    line = printable.one_line(" ".join(text[: 4 * MAX_NAME].split()))
    return line if len(line) <= MAX_NAME else line[: MAX_NAME - 1].rstrip() + "…"
