"""Without the Hub: one request says that it does not answer, and no folder is a reason for a request."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest

import eigenlorax as ex
import trainable
from adapters import make_adapters
from trainable import write_jsonl

pytestmark = pytest.mark.slow

SCRIPT = """
import contextlib, io, json, sys
from eigenlorax.formats import hub_client
from eigenlorax.cli import main

for line in sys.stdin:
    asked = json.loads(line)
    hub_client._answers.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        code = None
        try:
            main(asked)
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Counting:
    """A server that answers nothing: it hangs up at once, or it keeps the connection and says nothing."""

    def __init__(self):
        self.connections, self.hangs_up, self._kept = 0, True, []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            if self.hangs_up:
                connection.close()
            else:
                self._kept.append(connection)

    def close(self):
        self._socket.close()
        for connection in self._kept:
            connection.close()


@pytest.fixture(scope="module")
def server():
    found = Counting()
    yield found
    found.close()


@pytest.fixture(scope="module")
def command(server, tmp_path_factory):
    """The command in one process for all tests, for which `server` is the Hub."""
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(home / "hub")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**env, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1"},
    )

    def run(*arguments):
        server.connections = 0
        process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    run.cache = home / "hub"
    yield run
    process.kill()
    process.communicate()


# two steps learn nothing
CLASSIFY = "--task text-classification --rank 4 --trainer-options {place}/options.yaml --force"
ASKING = {
    "train": "train {place}/pack --train {place}/train.jsonl -o {place}/out --model no/such " + CLASSIFY,
    "evaluate": "evaluate {place}/pack a1 --data {place}/lm-eval.jsonl --task causal-lm --model no/such",
    "compare": "compare {place}/pack --train {place}/train.jsonl --eval {place}/eval.jsonl -o {place}/c.json "
    "--model no/such",
    "report": "report {place}/small -a {place}/in --evaluate {place}/eval.jsonl --labels bad,good --model no/such",
    "serve-check": "serve-check {place}/pack --model no/such",
    "fit": "fit no/such no/other -o {place}/fitted",
    "export": "export no/such -o {place}/exported",
    "pull": "pull no/such -o {place}/pulled",
    "push": "push {place}/pack no/such",
    "inspect": "inspect no/such",
}


@pytest.fixture
def place(place):
    (place / "options.yaml").write_text("max_steps: 2\nsave_strategy: steps\nsave_steps: 1\n")
    return place


@pytest.mark.parametrize(("verb", "hangs_up"), [*((verb, True) for verb in ASKING), ("train", False), ("fit", False)])
def test_one_request_is_enough_to_know(command, server, place, verb, hangs_up):
    server.hangs_up = hangs_up
    if verb == "report":
        make_adapters(place / "in", "alpha beta gamma")
        ex.fit(place / "in", n_components=4).save(place / "small")
    code, out, err = command(*ASKING[verb].format(place=place).split())
    assert (code, out) == (3, "")
    assert "no/such" in err
    assert f"{server.url} does not answer" in err
    assert server.connections == 1


def test_folders_are_read_without_a_request(command, server, place):
    classify = CLASSIFY.format(place=place).split()
    code, _, err = command("train", place / "pack", "--train", place / "train.jsonl", "-o", place / "out", *classify)
    assert code == 0, err
    rows = write_jsonl(place / "numbers.jsonl", [{"text": "w1 good", "label": 1}, {"text": "w2 bad", "label": 0}])
    code, _, err = command("evaluate", place / "pack", "out", "--data", rows)
    assert code == 0, err
    assert server.connections == 0


def test_a_model_in_the_cache_is_trained_without_the_hub(command, server, place):
    base = ex.Pack.open(place / "pack").base_model
    cached, sha = command.cache / "models--org--tiny", "5" * 40
    shutil.copytree(base, cached / "snapshots" / sha)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(sha)
    trainable.bert_pack(place / "named", "org/tiny")
    classify = CLASSIFY.format(place=place).split()
    code, _, err = command("train", place / "named", "--train", place / "train.jsonl", "-o", place / "out", *classify)
    assert code == 0, err
    # neither transformers nor PEFT, which writes two checkpoints
    assert server.connections == 1
    assert json.loads((place / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
