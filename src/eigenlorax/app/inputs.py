"""Adapters from what a user of the page drops and types: uploaded files, folders, ids of the Hub."""

import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ..core import keys
from ..errors import FormatError, OptionError
from ..formats import folders, hub_client
from ..reports import numbers

MAX_ENTRIES = 10_000
"""Maximum number of files that are taken out of one zip file."""
MAX_NAMES = 256
"""Maximum number of lines with names."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods whose decompression is bounded by zipfile."""


def unpack(uploads: Sequence[Path], folder: Path, max_bytes: int) -> list[Path]:
    """Copy uploaded files into a folder, zip files unpacked, and return the folders and files of the adapters.

    Args:
        uploads: Zip files of adapter folders or LoRA files, and LoRA files.
        folder: Existing, empty folder to write into.
        max_bytes: Maximum size of all files together, unpacked.

    Raises:
        FormatError: A file is neither, is damaged, has a path that leads out of the folder, or all are too large.
    """
    sources = []
    for number, upload in enumerate(uploads):
        own = folder / str(number)
        if upload.suffix.lower() == ".zip":
            target = own / (upload.stem.strip() or "adapters")
            target.mkdir(parents=True)
            max_bytes -= _unpack_zip(upload, target, max_bytes)
            sources.append(_top(target))
        elif upload.suffix.lower() == keys.LORA_SUFFIX:
            max_bytes -= _within(upload.name, upload.stat().st_size, max_bytes)
            own.mkdir()
            sources.append(Path(shutil.copyfile(upload, own / upload.name)))
        else:
            raise FormatError(
                f"{upload.name} is neither a zip file nor a LoRA in one file ({keys.LORA_SUFFIX}). "
                "Put adapter folders into a zip file."
            )
    return sources


def parse_names(text: str, *, allows_paths: bool) -> list[str]:
    """Return the adapters of a text with one folder, URL or Hub id per line.

    Args:
        text: The text. Empty lines have no meaning.
        allows_paths: False to accept ids of the Hub only.

    Raises:
        OptionError: There are more than `MAX_NAMES` lines, or one of them is no id of the Hub although it must be.
    """
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) > MAX_NAMES:
        raise OptionError(f"{len(names):,} names were typed, at most {MAX_NAMES} are accepted. Pass a parent folder.")
    for name in names:
        if not allows_paths and (hub_client.parsed(name) is None or Path(name).exists()):
            raise OptionError(
                f"{name!r} is not the id of a repository on the Hub (org/name). This page reads no folders of the "
                "machine that it runs on: upload them as a zip file."
            )
    return names


def _unpack_zip(path: Path, target: Path, max_bytes: int) -> int:
    """Unpack a zip file, and return the number of bytes that were written; errors as `unpack`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not _is_ignored(entry)]
            if len(entries) > MAX_ENTRIES:
                raise FormatError(f"{path.name} has {len(entries):,} files, at most {MAX_ENTRIES:,} are accepted.")
            size = _within(path.name, sum(entry.file_size for entry in entries), max_bytes)
            for entry in entries:
                # zipfile never yields more bytes than the size that was summed up
                _unpack_entry(path, archive, entry, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise FormatError(f"{path.name} is damaged, or no zip file: {error}. Upload it again.") from error
    return size


def _unpack_entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Write one file of a zip file below `target`."""
    place = PurePosixPath(entry.filename)
    leads_out = place.is_absolute() or ".." in place.parts or any(mark in entry.filename for mark in "\\:")
    if leads_out or stat.S_ISLNK(entry.external_attr >> 16):
        raise FormatError(f"{path.name} has {entry.filename!r}, which is a link or leads out of the folder.")
    if entry.flag_bits & 1 or entry.compress_type not in _METHODS:
        raise FormatError(
            f"{path.name} has {entry.filename!r} encrypted, or compressed by another method than deflate. "
            "Write it as an ordinary zip file."
        )
    file = target.joinpath(*place.parts)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, file.open("xb") as written:
            shutil.copyfileobj(source, written)
    except (FileExistsError, NotADirectoryError) as error:
        raise FormatError(f"{path.name} has {entry.filename!r} twice.") from error


def _is_ignored(entry: zipfile.ZipInfo) -> bool:
    """Return whether an entry is a folder, or a file that systems add by themselves."""
    parts = PurePosixPath(entry.filename).parts
    return entry.is_dir() or not parts or parts[0] == "__MACOSX" or parts[-1] == ".DS_Store"


def _within(name: str, size: int, max_bytes: int) -> int:
    """Return the size; `FormatError` if it exceeds what remains."""
    if size > max_bytes:
        raise FormatError(
            f"{name} has {numbers.size(size)} unpacked, and {numbers.size(max(max_bytes, 0))} are left of what this "
            "page accepts. Upload fewer adapters, or run `eigenlorax app` with a larger max_upload (--max-upload)."
        )
    return size


def _top(folder: Path) -> Path:
    """Return the folder itself, or the first one below it that has more than one child or is an adapter."""
    with suppress(ValueError):
        (child,) = folder.iterdir()
        if child.is_dir() and not folders.is_adapter(folders.LocalFolder(folder)):
            return _top(child)
    return folder
