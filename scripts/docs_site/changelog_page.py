"""MkDocs hook: CHANGELOG.md as a page of the site, with links from its place in docs/."""

import re
from pathlib import Path
from typing import Any

PAGE = "changelog.md"
ROOT = Path(__file__).parents[2]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=markdown((ROOT / "CHANGELOG.md").read_text("utf-8"))))
    return files


def markdown(changelog: str) -> str:
    """Return the changelog with links relative to docs/ instead of the folder above it."""
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", lambda link: f"]({_from_docs(link[1])})", changelog)


def _from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
