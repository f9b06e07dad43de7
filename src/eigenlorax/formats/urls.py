"""Folders and files behind URLs (`s3://…`, `gs://…`, `hf://…`, `memory://…`), read by fsspec and its drivers.

A driver reads keys and endpoints from its own environment variables and from fsspec's configuration, and retries failed
requests.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ..errors import EigenloraxError, FormatError, MissingExtraError, UrlError, reason

# at least two characters: C:// is a drive of Windows
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<path>.*)", re.DOTALL)
_LOCAL = ("file", "local")
_HF = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?P<path>/.*)?")
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/?#]+)")

_MAX_GAP = 1 << 16
"""Largest gap in bytes between two ranges of one request: reading it takes less time than another request."""


def is_url(source: object) -> bool:
    """Return whether `source` is a string of the form `scheme://…`, which paths are not, also on Windows."""
    return isinstance(source, str) and _URL.match(source) is not None


def local_path(url: str) -> Path | None:
    """Return the path of a `file://` URL; None for other URLs."""
    from fsspec.core import strip_protocol

    return Path(strip_protocol(url)) if _split(url)[0] in _LOCAL else None


def adapter_name(url: str, subfolder: str | None = None) -> str:
    """Return the adapter name that a URL gives: its last part, without a revision of the Hub."""
    scheme, path = _split(_join(url, subfolder))
    if scheme == "hf" and (match := _HF.fullmatch(path)):
        path = match["repo"] + (match["path"] or "")
    return path.rstrip("/").rpartition("/")[2]


def folder(
    url: str, *, revision: str | None = None, subfolder: str | None = None, token: str | bool | None = None
) -> "RemoteFolder":
    """Return the folder behind a URL, without a request.

    Args:
        url: The URL.
        revision: Revision of a repository on the Hub, for `hf://` URLs only.
        subfolder: Folder below the URL.
        token: Access token of the Hub, for `hf://` URLs only.

    Raises:
        FormatError: The URL is a web page of the Hub, or names another revision than `revision`.
    """
    if page := _HUB_PAGE.match(url):
        raise FormatError(f"{url} is a page of the Hub. Pass the id of the repository: {page['repo']}.")
    scheme, path = _split(url)
    if scheme != "hf":
        return RemoteFolder(_join(url, subfolder))
    match = _HF.fullmatch(path.rstrip("/"))
    if revision and match:
        if match["revision"] and unquote(match["revision"]) != revision:
            raise FormatError(f"two revisions for {url}: {match['revision']!r} and {revision!r}. Pass one.")
        url = f"hf://{match['repo']}@{quote(revision, safe='')}{match['path'] or ''}"
    return RemoteFolder(_join(url, subfolder), token)


def _split(url: str) -> tuple[str, str]:
    """Return the scheme of a URL, in lower case, and the part after `://`."""
    match = _URL.fullmatch(url)
    assert match is not None
    return match["scheme"].lower(), match["path"]


def _join(url: str, subfolder: str | None) -> str:
    scheme, path = _split(url)
    segments = [path.rstrip("/"), *([subfolder.strip("/")] if subfolder else [])]
    return f"{scheme}://" + "/".join(segments)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL, with its size in bytes at the moment it was described."""

    url: str
    size: int
    token: str | bool | None = field(default=None, repr=False)

    def read_into(self, targets: Sequence[tuple[int, memoryview]]) -> None:
        """Read ranges of bytes, each from an offset into memory. One request reads neighbouring ranges.

        Raises:
            FormatError: The file is shorter than it was, or the server does not support ranges.
            UrlError: The file no longer exists, or cannot be read.
        """
        ranges = sorted(
            ((begin, begin + len(memory), memory) for begin, memory in targets if len(memory)), key=itemgetter(0)
        )
        requests: list[tuple[int, int]] = []
        for begin, end, _ in ranges:
            if requests and begin - requests[-1][1] <= _MAX_GAP:
                requests[-1] = requests[-1][0], max(requests[-1][1], end)
            else:
                requests.append((begin, end))
        responses = dict(zip(requests, self._fetch(requests), strict=True))
        for begin, end, memory in ranges:
            request = next(request for request in requests if request[0] <= begin and end <= request[1])
            memory[:] = responses[request][begin - request[0] : end - request[0]]

    def _fetch(self, requests: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return the bytes of ranges (begin, end)."""
        with _driver_errors(self.url):
            driver, path = _driver(self.url, self.token)
            try:
                responses = _responses(driver, path, requests)
            except FileNotFoundError as error:
                raise UrlError(f"{self.url} no longer exists; it existed at the first request.") from error
        for (begin, end), response in zip(requests, responses, strict=True):
            if len(response) != end - begin:
                raise FormatError(
                    f"{self.url}: {end - begin:,} bytes from {begin:,} were requested, got {len(response):,}. The file "
                    f"of {self.size:,} bytes was changed, or its server does not support ranges: download it first."
                )
        return [memoryview(response) for response in responses]

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder behind a URL."""

    url: str
    token: str | bool | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def source(self) -> str:
        """The source by which `read_adapter` reads an adapter in this folder."""
        return self.url

    def at(self, name: str) -> str:
        """Return the URL of a file in the folder."""
        return f"{self.url}/{name}"

    def kind(self) -> str | None:
        """Return "directory" or "file", or None if there is nothing at the URL."""
        try:
            with _driver_errors(self.url):
                driver, path = _driver(self.url, self.token)
                return str(driver.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def refresh(self) -> None:
        """Clear the driver's cache of the folder, which may have changed since it was listed."""
        # some drivers look up the path whose cache they clear
        with suppress(FileNotFoundError), _driver_errors(self.url):
            driver, path = _driver(self.url, self.token)
            driver.invalidate_cache(path)

    def is_file(self, name: str) -> bool:
        """Return whether the folder has a file of that name."""
        try:
            return bool(self._info(name)["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read(self, name: str, limit: int) -> bytes:
        """Read a small file; raise `FormatError` if its server reports more than `limit` bytes."""
        url, size = self.at(name), self._info(name).get("size")
        if isinstance(size, int) and size > limit:
            raise FormatError(f"{url} has {size:,} bytes; at most {limit:,} were expected.")
        with _driver_errors(url):
            driver, path = _driver(url, self.token)
            return bytes(driver.cat_file(path))

    def file(self, name: str) -> RemoteFile:
        """Return a description of an existing file, from which byte ranges can be read."""
        size = self._info(name).get("size")
        if not isinstance(size, int) or size < 0:
            raise UrlError(f"{self.at(name)} has an unknown size, so no ranges can be read. Download it first.")
        return RemoteFile(self.at(name), size, self.token)

    def folders(self) -> list["RemoteFolder"]:
        """List the subfolders by name, without hidden ones."""
        return [
            RemoteFolder(self.at(name), self.token)
            for name, kind in self._entries()
            if kind == "directory" and not name.startswith(".")
        ]

    def files(self) -> list[str]:
        """List the names of the files in the folder."""
        return [name for name, kind in self._entries() if kind == "file"]

    def _info(self, name: str) -> dict[str, Any]:
        url = self.at(name)
        with _driver_errors(url):
            driver, path = _driver(url, self.token)
            info: dict[str, Any] = driver.info(path)
            return info

    def _entries(self) -> list[tuple[str, str]]:
        """Return name and kind of each file and subfolder, sorted by name."""
        with _driver_errors(self.url):
            driver, path = _driver(self.url, self.token)
            # a bucket may list an object with the name of the folder itself
            return sorted(
                (info["name"].rstrip("/").rpartition("/")[2], info["type"])
                for info in driver.ls(path, detail=True)
                if info["name"].strip("/") != path.strip("/")
            )


def _driver(url: str, token: str | bool | None) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, of which each thread has its own, and the path in it."""
    from fsspec.core import url_to_fs

    options = {"token": token} if token is not None else {}
    return url_to_fs(url, **options)  # type: ignore[no-any-return]


@contextmanager
def _driver_errors(url: str) -> Iterator[None]:
    """Convert the errors of drivers to `UrlError` and `MissingExtraError`, except errors of a missing path."""
    try:
        yield
    except (EigenloraxError, FileNotFoundError, NotADirectoryError):
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{url} needs a driver of fsspec that is not installed: pip install {_package(url)}"
        ) from error
    except PermissionError as error:
        raise UrlError(
            f"{url} may not be read: {reason(error)}. Set the keys in the environment variables or files of its driver."
        ) from error
    except Exception as error:
        # drivers raise exceptions of their own libraries, which share no base class
        raise UrlError(f"{url} could not be read: {reason(error).rstrip('.')} ({type(error).__name__}).") from error


def _responses(driver: Any, path: str, requests: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return what a driver reads of ranges (begin, end), all at once if it is asynchronous."""
    if not driver.async_impl:
        # by default, they read megabytes ahead
        return [driver.cat_file(path, begin, end, cache_type="none") for begin, end in requests]
    begins, ends = [begin for begin, _ in requests], [end for _, end in requests]
    responses: list[Any] = driver.cat_ranges([path] * len(requests), begins, ends)
    for response in responses:
        if isinstance(response, Exception):
            raise response
    return responses


def _package(url: str) -> str:
    """Return the package, as an argument of `pip install`, with the driver of a URL."""
    from fsspec.registry import known_implementations

    scheme = _split(url)[0]
    package = known_implementations[scheme]["class"].partition(".")[0] if scheme in known_implementations else scheme
    return f"'fsspec[{scheme}]'" if package == "fsspec" else package
