"""vLLM's OpenAI server on this machine, as a process of its own with the plugin's environment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenlorax.serving.vllm import settings
from offline import ENGINE, ENVIRONMENT, NEW

SECONDS_TO_START, SECONDS_TO_STOP = 240, 40
BASE_NAME = "base"


@dataclass
class Server:
    """A server that answers at `url`, or will."""

    process: subprocess.Popen
    url: str
    log_file: Path

    @property
    def log(self) -> str:
        """What it has written until now."""
        return self.log_file.read_text(errors="replace")

    @property
    def said(self) -> list[str]:
        """The lines of it that are ours."""
        return [line.partition("eigenlorax: ")[2] for line in self.log.splitlines() if "eigenlorax: " in line]

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS_TO_START) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())

    def status(self, model: str) -> int:
        """Of the answer to a short request."""
        return self.post("/v1/completions", {"model": model, "prompt": [5, 6, 7], "max_tokens": 1})[0]

    def greedy(self, model: str, prompt: Sequence[int]) -> list[int]:
        """The tokens that follow, as `offline.greedy` has them."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        status, answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


def _parsed(body: bytes) -> Any:
    """JSON, or the text that some of its answers are."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


@contextmanager
def starting(
    base: Path,
    pack: Path | str,
    log_file: Path,
    *,
    shared: bool = False,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """A server with a pack, as it starts; the base model is served as `BASE_NAME`. It ends with the block.

    options: as of `offline.with_engine`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = {settings.PACK: str(pack), settings.SHARED_BASIS: str(int(shared))}
    switches = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "OMP_NUM_THREADS": "1",
    }
    described = {**ENGINE, **options}
    del described["distributed_executor_backend"]
    flags = [
        part
        for name, value in described.items()
        for part in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)),
                *("--served-model-name", BASE_NAME, "--host", "127.0.0.1", "--port", str(port), *flags),
            ],
            env={**os.environ, **ENVIRONMENT, **switches, **asked, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # a group of its own: its engine is a process too
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log_file)
    try:
        yield server
    finally:
        _stop(server)


@contextmanager
def serving(base: Path, pack: Path | str, log_file: Path, **options: Any) -> Iterator[Server]:
    """The same, once it answers; and it has to be alive when the block ends."""
    with starting(base, pack, log_file, **options) as server:
        until = time.monotonic() + SECONDS_TO_START
        while not _answers(server.url):
            assert server.process.poll() is None, server.log[-4000:]
            assert time.monotonic() < until, server.log[-4000:]
            time.sleep(0.2)
        yield server
        assert server.process.poll() is None, server.log[-4000:]


def _stop(server: Server) -> None:
    """End a server as a user does, and what does not listen at once."""
    if server.process.poll() is None:
        server.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(SECONDS_TO_STOP)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(SECONDS_TO_STOP)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
