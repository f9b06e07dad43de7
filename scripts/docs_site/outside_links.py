"""MkDocs hook: links from pages to files outside docs/ lead to the repository, as they do on GitHub.

Without the setting `extra.repository` such a link becomes its text. A file that does not exist is a warning, which
fails a strict build.
"""

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
_LOG = logging.getLogger("mkdocs.hooks.outside_links")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_uri).parent
    repository = config.extra.get("repository", "").rstrip("/")

    def to_repository(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        file = (folder / path).resolve()
        if file.is_relative_to(docs):
            return link[0]
        if not file.is_relative_to(docs.parent) or not file.exists():
            _LOG.warning("%s links to %s, which is not in the repository.", page.file.src_uri, target)
        if not repository:
            return text
        kind = "tree" if file.is_dir() else "blob"
        return f"[{text}]({repository}/{kind}/main/{file.relative_to(docs.parent).as_posix()}{hash_sign}{anchor})"

    return LINK.sub(to_repository, markdown)
