"""A Hub on this machine: the part of its HTTP interface that downloads and commits use, over folders. Every request
about a repository is noted, and how much of each file was sent."""

import base64
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import children
from eigenlorax.cli import main


@dataclass
class FakeHub:
    """`repos`: id → revision → folder. `private`: id → the token it wants. `down`: every answer is this status.

    Commits: `room` is a folder for what they make, `writer` the token that may make them; `log` has what each was, and
    `before_commit` runs once, just before the next one.
    """

    repos: dict[str, dict[str, Path]]
    private: dict[str, str] = field(default_factory=dict)
    down: int | None = None
    room: Path | None = None
    writer: str = "hf_writer"
    before_commit: Callable[[], object] | None = None
    log: list[dict[str, object]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""

    @property
    def fetched(self) -> list[str]:
        """The files that were asked for, without their repositories and revisions, sorted."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return sorted({path.partition("/resolve/")[2].partition("/")[2] for path in paths})

    @property
    def asked(self) -> list[str]:
        """The same, with those of which the client has the bytes already, under another name."""
        paths = {path for _, path, _ in self.requests if "/resolve/" in path}
        return sorted({path.partition("/resolve/")[2].partition("/")[2] for path in paths})

    @property
    def tokens(self) -> set[str | None]:
        """What requests carried as authorization."""
        return {token for _, _, token in self.requests}

    def head(self, repo: str, revision: str) -> str:
        """The commit that a branch, tag or commit stands for."""
        folder = self.repos[repo][revision]
        if re.fullmatch("[0-9a-f]{40}", revision):
            return revision
        # folders that commits have made are named by them
        return folder.name if self.room is not None and folder.parent == self.room else commit(repo, revision)

    def new(self, repo: str, revision: str, before: Path | None, change: Callable[[Path], object]) -> str:
        """A commit: the folder `before`, changed. The commits before stay, as they do in git."""
        assert self.room is not None
        made = sha1(f"{repo}@{revision}, commit {len(list(self.room.iterdir()))}".encode()).hexdigest()
        if before is None:
            (self.room / made).mkdir()
        else:
            shutil.copytree(before, self.room / made)
            if revision in self.repos[repo]:
                self.repos[repo][self.head(repo, revision)] = before
        change(self.room / made)
        self.repos[repo] |= {revision: self.room / made, made: self.room / made}
        return made


def client(hub: FakeHub, home: Path) -> Callable[..., children.Done]:
    """Runs the command, or `call`, in a fork of this process where `hub` is the Hub, and its cache in `home`."""

    def run(*arguments: object, call: Callable[[], object] | None = None, **env: str) -> children.Done:
        def fresh() -> None:
            # it reads its environment when it is imported
            for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
                del sys.modules[name]
            (call or (lambda: main([str(argument) for argument in arguments])))()

        place = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(home / "hub")}
        # large files by plain HTTP: the other way has a server of its own
        plain = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        return children.run(fresh, env={**place, **plain, **env})

    return run


def commit(repo: str, revision: str) -> str:
    """The commit that a branch or tag stands for as long as none was made."""
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


_ABOUT_MODELS = re.compile(
    r"/api/models/[^/]+/[^/]+(/(revision|tree|branch|preupload|commit)/|$)|/[^/]+/[^/]+/resolve/"
)
_LARGE = re.compile(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("POST", "PUT") and self.hub.down is not None:
            self._answer(self.hub.down, b"down for maintenance")
            return
        if self.command in ("POST", "PUT") and self._served_beside_models(path):
            return
        if not _ABOUT_MODELS.match(path):
            # what else the library wants to know; an older one looks for the organisation as a model too
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"} if path.startswith("/api/models/") else None)
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
            revisions |= {self.hub.head(repo, name): name for name in self.hub.repos[repo]}
            if what == "branch":
                self._make_branch(repo, revision)
            elif revision not in revisions:
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif self.command == "POST":
                self._change(repo, what, revisions[revision])
            else:
                self._answer_about(repo, what, revisions[revision], file)

    def _served_beside_models(self, path: str) -> bool:
        """Answer what is not about one model: new repositories, cards, large files. False for anything else."""
        if path == "/api/validate-yaml":
            front = json.loads(self.body)["content"].split("---")[1]
            bad = re.search(r'base_model: "([^"]*)"', front)
            if bad and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", bad[1]):
                error = {"message": f'"base_model" with value "{bad[1]}" is not valid.'}
                self._answer_json({"errors": [error], "warnings": []}, 400)
            else:
                self._answer_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._make_repository()
        elif _LARGE.fullmatch(path):
            if self.headers.get("authorization") is None:
                self._answer(401, b"")
            else:
                wanted = json.loads(self.body)["objects"]
                self._answer_json({"transfer": "basic", "objects": [self._where_to_put(one) for one in wanted]})
        elif path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = self.body
            self._answer(200, b"")
        else:
            return False
        return True

    def _where_to_put(self, one: dict[str, object]) -> dict[str, object]:
        if one["oid"] in self.hub.large:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}}

    def _may_write(self, repo: str) -> bool:
        """Whether this request may; if not, it is answered."""
        token = self.headers.get("authorization")
        if token is None:
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif token != f"Bearer {self.hub.writer}":
            self._answer(403, b"", {"X-Error-Message": f"You have no rights to write to {repo}"})
        return token == f"Bearer {self.hub.writer}"

    def _make_repository(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._may_write(repo):
            return
        is_new = repo not in self.hub.repos
        if is_new:
            self.hub.repos[repo] = {}
            self.hub.new(repo, "main", None, lambda folder: (folder / ".gitattributes").write_text("*.safetensors lfs"))
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private[repo] = self.hub.writer
        self._answer_json({"url": f"{self.hub.url}/{repo}"}, 200 if is_new else 409)

    def _make_branch(self, repo: str, branch: str) -> None:
        if self._may_write(repo):
            is_new = branch not in self.hub.repos[repo]
            if is_new:
                self.hub.new(repo, branch, self.hub.repos[repo]["main"], lambda folder: None)
            self._answer_json({}, 200 if is_new else 409)

    def _change(self, repo: str, what: str, revision: str) -> None:
        is_pull_request = "create_pr=1" in urlsplit(self.path).query
        # everybody who is somebody may propose
        if not (is_pull_request and self.headers.get("authorization")) and not self._may_write(repo):
            return
        if what == "preupload":
            files = [
                {"path": one["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(self.body)["files"]
            ]
            self._answer_json({"files": files})
            return
        if self.hub.before_commit is not None:
            happen, self.hub.before_commit = self.hub.before_commit, None
            happen()
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", self.hub.head(repo, revision)) != self.hub.head(repo, revision):
            self._answer(412, b"", {"X-Error-Message": "A commit has happened since. Please refresh and try again."})
            return
        target = f"refs/pr/{len(self.hub.log) + 1}" if is_pull_request else revision
        made = self.hub.new(
            repo, target, self.hub.repos[repo][revision], lambda folder: self._apply(folder, operations)
        )
        self.hub.log.append({"repo": repo, "revision": target, "message": header["value"]["summary"]})
        url = f"{self.hub.url}/{repo}/commit/{made}"
        number = target.removeprefix("refs/pr/")
        pull_request = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"} if is_pull_request else {}
        self._answer_json({"commitUrl": url, "commitOid": made, **pull_request})

    def _apply(self, folder: Path, operations: list[dict[str, dict[str, str]]]) -> None:
        for operation in operations:
            value = operation["value"]
            path = folder / value["path"]
            if operation["key"] == "deletedFile":
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            else:
                data = self.hub.large[value["oid"]]
                assert sha256(data).hexdigest() == value["oid"]
                path.write_bytes(data)

    def _answer_json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer_about(self, repo: str, what: str, revision: str, file: str) -> None:
        folder, sha = self.hub.repos[repo][revision], self.hub.head(repo, revision)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        if what == "revision":
            info = {"id": repo, "modelId": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            self._answer_json({**info, "private": repo in self.hub.private})
        elif what == "tree":
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": sha1(path.read_bytes()).hexdigest()}
                for name, path in files.items()
            ]
            if not re.search("recursive=true", self.path, re.IGNORECASE):
                tree = _direct(tree, file)
            if file and not tree:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer_json(tree)
        elif file in files:
            data = files[file].read_bytes()
            about = {"X-Repo-Commit": sha, "ETag": f'"{sha1(data).hexdigest()}"'}
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if self.command == "GET":
                part = data[int(span[1]) : int(span[2]) + 1] if span else data
                self.hub.sent[file] = self.hub.sent.get(file, 0) + len(part)
                self._answer(206 if span else 200, part, about)
            else:
                self._answer(200, data, about)
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


def _direct(tree: list[dict[str, object]], folder: str) -> list[dict[str, object]]:
    """What lies in a folder of the repository itself: files, and folders for what is deeper."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, object]] = {}
    for one in tree:
        name, deeper, _ = str(one["path"]).removeprefix(prefix).partition("/")
        if str(one["path"]).startswith(prefix):
            entry = {"type": "directory", "path": prefix + name, "size": 0, "oid": sha1(name.encode()).hexdigest()}
            found[name] = entry if deeper else one
    return list(found.values())


def _parts(path: str) -> tuple[str, str, str, str]:
    """Repository, `revision`, `tree`, `resolve` or another verb, revision, file."""
    org, name, *rest = [unquote(part) for part in path.removeprefix("/api/models").split("/")[1:]]
    what, revision, *file = rest or ["revision", "main"]
    return f"{org}/{name}", what, revision, "/".join(file)
