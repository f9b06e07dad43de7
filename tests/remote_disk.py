"""A driver of fsspec for `disk://`: the disk of this machine as if it were far away, and what was read from there.

Registered when it is imported, in a worker process too.
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class Disk(AbstractFileSystem):
    """`disk://` and an absolute path. `read`: bytes by path; `requests`: how many; `happen` runs before."""

    protocol = "disk"
    read: ClassVar[Counter[str]] = Counter()
    requests: ClassVar[Counter[str]] = Counter()
    happen: ClassVar[Callable[[str], object] | None] = None

    @classmethod
    def forget(cls) -> None:
        cls.read.clear()
        cls.requests.clear()
        cls.happen = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("disk://").strip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._ask(path)
        kind = "directory" if os.path.isdir(path) else "file"
        return {"name": path, "size": os.stat(path).st_size, "type": kind}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list:
        path = self._strip_protocol(path)
        self._ask(path)
        found = [self.info(f"{path}/{name}") for name in os.listdir(path)]
        return found if detail else [one["name"] for one in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        self._ask(path)
        with open(path, "rb") as file:
            file.seek(start or 0)
            data = file.read() if end is None else file.read(end - (start or 0))
        self.read[path] += len(data)
        return data

    def _ask(self, path: str) -> None:
        self.requests[path] += 1
        if Disk.happen is not None:
            Disk.happen(path)


fsspec.register_implementation("disk", Disk, clobber=True)
