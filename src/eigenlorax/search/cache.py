"""Indexes of large packs, kept in the user's cache folder, so that the next command does not build them again.

A file is named after the digest of the pack's manifest, which covers every byte of the pack, so that it never belongs
to another state of the pack. It starts with the digest of its own content; a damaged file is replaced.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import atomic_files
from ..core.progress import Progress
from ..pack.folder import PackFolder
from . import documents
from .documents import Document
from .text_index import TextIndex, index_documents

if TYPE_CHECKING:
    from ..pack.pack import Pack
    from .similarity_index import SimilarityIndex

SMALLEST = 256
"""Number of adapters from which on an index is kept: those of smaller packs are built in a second or two."""
MAX_FILES = 16
"""Number of files that are kept; the oldest ones are removed."""
_VERSION = 1
_DIGEST_BYTES = 32
_MAX_BYTES = 1 << 32


def cache_folder() -> Path:
    """Return the folder of the indexes, `$XDG_CACHE_HOME/eigenlorax/search` or `~/.cache/eigenlorax/search`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "eigenlorax" / "search"


def text_index(opened: PackFolder, *, cards: Path | None = None) -> TextIndex:
    """Return the index of a pack's texts, from the cache if it is there; arguments and errors as `TextIndex.from_pack`.

    Model cards, which are not in the pack, are read each time.
    """
    content = _content("texts", opened, lambda: _to_json(documents.of_folder(opened)))
    return index_documents([Document(**fields) for fields in json.loads(content)], cards=cards)


def similarity_index(pack: "Pack", opened: PackFolder, progress: Progress | None = None) -> "SimilarityIndex":
    """Return the index of a pack's updates, from the cache if it is there.

    Args:
        pack: The pack, as it is in the folder.
        opened: Folder of the pack.
        progress: Callback with the arguments (stage, done, total).
    """
    # needs torch, which a search by words does not wait for
    from . import similarity_index as updates

    def build() -> bytes:
        return updates.to_bytes(updates.SimilarityIndex.from_pack(pack, progress=progress))

    return updates.from_bytes(pack, _content("updates", opened, build))


def _to_json(listed: list[Document]) -> bytes:
    return json.dumps([asdict(document) for document in listed]).encode("utf-8", errors="surrogatepass")


def _content(kind: str, opened: PackFolder, build: Callable[[], bytes]) -> bytes:
    """Return the content of an index, from its file or built.

    Args:
        kind: Kind of index, for the name of the file.
        opened: Folder of the pack.
        build: Builds the content.
    """
    if len(opened.manifest.adapters) < SMALLEST:
        return build()
    path = cache_folder() / f"{kind}-{_VERSION}-{opened.digest}.index"
    data = None
    # a folder that cannot be read or written is one without a cache
    with suppress(OSError):
        data = atomic_files.read_regular_file(path, _MAX_BYTES)
    if data is not None and sha256(data[_DIGEST_BYTES:]).digest() == data[:_DIGEST_BYTES]:
        return data[_DIGEST_BYTES:]
    content = build()
    with suppress(OSError), atomic_files.ensure_folder(path.parent):
        atomic_files.write_file(path, sha256(content).digest() + content)
        _remove_oldest(path.parent)
    return content


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.index"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MAX_FILES]:
        file.unlink(missing_ok=True)
