"""Folders and files behind URLs (`s3://…`, `gs://…`, `hf://…`, `memory://…`), by fsspec and its drivers.

What a driver wants to know (keys, endpoints) it finds in its environment and in fsspec's own configuration, and trying
again is its part too. What is in a file is not known here.
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

# two characters at least: C:// is a drive
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_LOCAL = ("file", "local")
_HF = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?P<rest>/.*)?")
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/?#]+)")

_GAP = 1 << 16
"""Bytes up to which two ranges become one: to read what lies between takes less time than to ask once more."""


def is_url(source: object) -> bool:
    """Whether a text has the form of a URL. Paths are none, those of Windows (`C:\\…`) neither."""
    return isinstance(source, str) and _URL.match(source) is not None


def local_path(url: str) -> Path | None:
    """The path that a URL of this machine's disk (`file://…`) stands for; None for other URLs."""
    from fsspec.core import strip_protocol

    return Path(strip_protocol(url)) if _parts(url)[0] in _LOCAL else None


def name_of(url: str, subfolder: str | None = None) -> str:
    """The name that what lies behind a URL gives an adapter: the last part, without a revision of the Hub."""
    url = _joined(url, subfolder)
    scheme, rest = _parts(url)
    if scheme == "hf" and (match := _HF.fullmatch(rest)):
        rest = match["repo"] + (match["rest"] or "")
    return rest.rstrip("/").rpartition("/")[2]


def folder(
    url: str, *, revision: str | None = None, subfolder: str | None = None, token: str | bool | None = None
) -> "RemoteFolder":
    """The folder behind a URL, of which nothing is asked yet. revision and token: of the Hub's alone (`hf://…`)."""
    if page := _HUB_PAGE.match(url):
        raise FormatError(f"{url} is a page of the Hub. Name the repository instead: {page['repo']}.")
    scheme, rest = _parts(url)
    if scheme != "hf":
        return RemoteFolder(_joined(url, subfolder))
    match = _HF.fullmatch(rest.rstrip("/"))
    if revision and match:
        if match["revision"] and unquote(match["revision"]) != revision:
            raise FormatError(f"two revisions for {url}: {match['revision']!r} and {revision!r}. Give one.")
        url = f"hf://{match['repo']}@{quote(revision, safe='')}{match['rest'] or ''}"
    return RemoteFolder(_joined(url, subfolder), token)


def _parts(url: str) -> tuple[str, str]:
    match = _URL.fullmatch(url)
    assert match is not None
    return match["scheme"].lower(), match["rest"]


def _joined(url: str, subfolder: str | None) -> str:
    scheme, rest = _parts(url)
    parts = [rest.rstrip("/"), *([subfolder.strip("/")] if subfolder else [])]
    return f"{scheme}://" + "/".join(parts)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL, and its size when it was described."""

    url: str
    size: int
    token: str | bool | None = field(default=None, repr=False)

    def read_into(self, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Read ranges of bytes, each from an offset on into the room beside it; neighbours by one request.

        `FormatError` where the file has fewer bytes by now.
        """
        wanted = sorted(((begin, begin + len(room), room) for begin, room in parts if len(room)), key=itemgetter(0))
        spans: list[tuple[int, int]] = []
        for begin, end, _ in wanted:
            if spans and begin - spans[-1][1] <= _GAP:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            else:
                spans.append((begin, end))
        found = dict(zip(spans, self._ranges(spans), strict=True))
        for begin, end, room in wanted:
            span = next(span for span in spans if span[0] <= begin and end <= span[1])
            room[:] = found[span][begin - span[0] : end - span[0]]

    def _ranges(self, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        with _explained(self.url):
            driver, path = _driver(self.url, self.token)
            # files of drivers that are not asynchronous read ahead, megabytes at a time, unless they are told not to
            options = {} if driver.async_impl else {"cache_type": "none"}
            begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
            try:
                found = driver.cat_ranges([path] * len(spans), begins, ends, **options)
                for one in found:
                    if isinstance(one, Exception):
                        raise one
            except FileNotFoundError as error:
                raise UrlError(f"{self.url} is gone; it was there when it was first asked for.") from error
        for (begin, end), data in zip(spans, found, strict=True):
            if len(data) != end - begin:
                raise FormatError(
                    f"{self.url} gave {len(data):,} bytes where the {end - begin:,} from {begin:,} on were asked for: "
                    f"it is not the file of {self.size:,} bytes that it was, or its server gives no ranges."
                )
        return [memoryview(data) for data in found]

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
        """What an adapter in this folder is read by."""
        return self.url

    def at(self, name: str) -> str:
        """What a file in the folder is called."""
        return f"{self.url}/{name}"

    def kind(self) -> str | None:
        """What is there: "directory", "file", or None for nothing."""
        try:
            with _explained(self.url):
                driver, path = _driver(self.url, self.token)
                return str(driver.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def refresh(self) -> None:
        """Forget what its driver remembers of the folder: there may be more in it by now."""
        # some drivers look for what they are to forget
        with suppress(FileNotFoundError), _explained(self.url):
            driver, path = _driver(self.url, self.token)
            driver.invalidate_cache(path)

    def is_file(self, name: str) -> bool:
        """Whether the folder has a file of that name."""
        try:
            return bool(self._info(name)["type"] == "file")
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read(self, name: str, most: int) -> bytes:
        """All of a small file. `FormatError` where its server says that it has more bytes."""
        url, size = self.at(name), self._info(name).get("size")
        if isinstance(size, int) and size > most:
            raise FormatError(f"{url} has {size:,} bytes, more than the {most:,} that are read of such a file.")
        with _explained(url):
            driver, path = _driver(url, self.token)
            return bytes(driver.cat_file(path))

    def file(self, name: str) -> RemoteFile:
        """A file that is there, to read ranges of."""
        size = self._info(name).get("size")
        if not isinstance(size, int) or size < 0:
            raise UrlError(f"{self.at(name)} does not say how long it is, so no ranges can be read. Download it first.")
        return RemoteFile(self.at(name), size, self.token)

    def folders(self) -> list["RemoteFolder"]:
        """The folders in it by name, hidden ones aside."""
        return [
            RemoteFolder(self.at(name), self.token)
            for name, kind in self._listed()
            if kind == "directory" and not name.startswith(".")
        ]

    def files(self) -> list[str]:
        """The names of the files in it."""
        return [name for name, kind in self._listed() if kind == "file"]

    def _info(self, name: str) -> dict[str, Any]:
        url = self.at(name)
        with _explained(url):
            driver, path = _driver(url, self.token)
            found: dict[str, Any] = driver.info(path)
            return found

    def _listed(self) -> list[tuple[str, str]]:
        """Names and kinds of what is in it, sorted."""
        with _explained(self.url):
            driver, path = _driver(self.url, self.token)
            # a bucket may have an object of the folder's own name in it
            found = [
                (one["name"].rstrip("/").rpartition("/")[2], one["type"])
                for one in driver.ls(path, detail=True)
                if one["name"].strip("/") != path.strip("/")
            ]
        return sorted(found)


def _driver(url: str, token: str | bool | None) -> tuple[Any, str]:
    """The filesystem of a URL, which fsspec keeps one of for each thread, and the path that it has there."""
    from fsspec.core import url_to_fs

    options = {"token": token} if token is not None else {}
    return url_to_fs(url, **options)  # type: ignore[no-any-return]


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Our errors in the place of those that drivers end in, but for those of a path that leads nowhere."""
    try:
        yield
    except (EigenloraxError, FileNotFoundError, NotADirectoryError):
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{url} takes a driver of fsspec that is not installed: pip install {_package(url)}"
        ) from error
    except PermissionError as error:
        raise UrlError(
            f"{url} may not be read: {reason(error)}. Its driver takes keys from its own environment variables or "
            "files, as its other programs do."
        ) from error
    except Exception as error:
        # a driver raises what its own libraries raise, of classes that only it knows
        raise UrlError(f"{url} could not be read: {reason(error).rstrip('.')} ({type(error).__name__}).") from error


def _package(url: str) -> str:
    """What a URL's driver is installed by."""
    from fsspec.registry import known_implementations

    scheme = _parts(url)[0]
    package = known_implementations[scheme]["class"].partition(".")[0] if scheme in known_implementations else scheme
    return f"'fsspec[{scheme}]'" if package == "fsspec" else package
