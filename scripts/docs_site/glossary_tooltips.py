"""MkDocs hook: each term of the glossary is explained where the pointer rests on it, on every page."""

import re
from pathlib import Path
from typing import Any

GLOSSARY = "concepts/glossary.md"
# words that also have their everyday meaning on these pages, and one that every reader of them knows
EVERYDAY = {"adapter", "carried", "core", "fit", "history", "k", "pack", "project", "side", "update", "version"}


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


def _plain(text: str) -> str:
    """Return Markdown without links, code and formulas, for the title of an element."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "").replace('"', "'")
