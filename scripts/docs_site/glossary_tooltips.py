"""MkDocs hook: each term of the glossary is explained where the pointer rests on it, once on every page."""

import re
from pathlib import Path
from typing import Any

GLOSSARY = "concepts/glossary.md"
# words that also have their everyday meaning on these pages, and one that every reader of them knows
EVERYDAY = {"adapter", "carried", "core", "fit", "history", "k", "pack", "project", "side", "update", "version"}

_HEADING_OR_LINK_OR_TERM = re.compile(
    r'(?P<tag></?(?:h[1-6]|a)\b[^>]*>)|<abbr title="[^"]*">(?P<term>[^<]*)</abbr>', flags=re.IGNORECASE
)


def terms(glossary: str) -> dict[str, str]:
    """Return term → explanation: headings of the third level, and the paragraph below each."""
    entries = re.findall(r"^### ([^\n]+)\n\n(.+?)(?=\n\n|\Z)", glossary, flags=re.MULTILINE | re.DOTALL)
    return {term: " ".join(explanation.split()) for term, explanation in entries}


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    if page.file.src_uri == GLOSSARY or page.file.src_uri.startswith(("get-started/", "reference/")):
        return markdown
    glossary = (Path(config.docs_dir) / GLOSSARY).read_text(encoding="utf-8")
    explained = {term: _plain(text) for term, text in terms(glossary).items() if term not in EVERYDAY}
    return markdown + "\n\n" + "\n".join(f"*[{term}]: {text}" for term, text in explained.items()) + "\n"


def on_page_content(html: str, **_: Any) -> str:
    """Keep the first explanation of each term, outside headings and links: a line under each occurrence distracts.

    A link to the glossary explains a term too.
    """
    explained: set[str] = set()
    enclosing: list[str] = []

    def keep_first(match: re.Match[str]) -> str:
        tag, term = match["tag"], match["term"]
        if tag:
            if tag.startswith("</"):
                enclosing.pop()
            else:
                enclosing.append(tag)
            return tag
        if enclosing:
            if "glossary.html#" in enclosing[-1]:
                explained.add(term)
            return term
        if term in explained:
            return term
        explained.add(term)
        return match[0]

    return _HEADING_OR_LINK_OR_TERM.sub(keep_first, html)


def _plain(text: str) -> str:
    """Return Markdown without links, code and formulas, for the title of an element."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "").replace('"', "'")
