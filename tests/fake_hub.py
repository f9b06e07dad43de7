"""A Hub on this machine: the part of its HTTP interface that downloads use, over folders. Every request is noted."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """`repos`: id → revision → folder. `private`: id → the token it wants. `down`: every answer is this status."""

    repos: dict[str, dict[str, Path]]
    private: dict[str, str] = field(default_factory=dict)
    down: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    @property
    def fetched(self) -> list[str]:
        """The files that were asked for, without their repositories and revisions, sorted."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return sorted({path.partition("/resolve/")[2].partition("/")[2] for path in paths})

    @property
    def tokens(self) -> set[str | None]:
        """What requests carried as authorization."""
        return {token for _, _, token in self.requests}


def commit(repo: str, revision: str) -> str:
    """The commit that a branch or tag stands for."""
    return sha1(f"{repo}@{revision}".encode()).hexdigest()


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """The Hub, answering at `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_ABOUT_MODELS = re.compile(r"/api/models/[^/]+/[^/]+/(revision|tree)/|/[^/]+/[^/]+/resolve/")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        if not _ABOUT_MODELS.match(path):
            # what else the library wants to know
            self._answer(404, b"")
            return
        token = self.headers.get("authorization")
        self.hub.requests.append((self.command, path, token))
        repo, what, revision, file = _parts(path)
        wanted = self.hub.private.get(repo)
        if self.hub.down is not None:
            self._answer(self.hub.down, b"down for maintenance")
        elif repo not in self.hub.repos or (wanted is not None and token != f"Bearer {wanted}"):
            # the Hub does not tell what is private from what is not there; to strangers it says 401
            self._answer(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            revisions = {name: name for name in self.hub.repos[repo]}
            revisions |= {commit(repo, name): name for name in self.hub.repos[repo]}
            if revision not in revisions:
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                self._answer_about(repo, what, revisions[revision], file)

    def _answer_about(self, repo: str, what: str, revision: str, file: str) -> None:
        folder, sha = self.hub.repos[repo][revision], commit(repo, revision)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        if what == "revision":
            info = {"id": repo, "modelId": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif what == "tree":
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": sha1(path.read_bytes()).hexdigest()}
                for name, path in files.items()
            ]
            self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif file in files:
            data = files[file].read_bytes()
            self._answer(200, data, {"X-Repo-Commit": sha, "ETag": f'"{sha1(data).hexdigest()}"'})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a fork may be under way."""


def _parts(path: str) -> tuple[str, str, str, str]:
    """Repository, `revision`, `tree` or `resolve`, revision, file."""
    org, name, what, revision, *file = [unquote(part) for part in path.removeprefix("/api/models").split("/")[1:]]
    return f"{org}/{name}", what, revision, "/".join(file)
