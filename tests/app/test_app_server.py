"""The server of the page: its limits and its end, by requests."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from eigenlorax.app import server
from eigenlorax.errors import OptionError

pytestmark = pytest.mark.slow
SPACE = Path(__file__).resolve().parents[2] / "scripts/hub/space"
LIMIT = 300_000


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command's process, its URL, and its folder of temporary files."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[app]'")
    folder = tmp_path_factory.mktemp("temporary")
    words = ["-m", "eigenlorax", "app", "--json", "--port", str(free_port()), "--max-upload", str(LIMIT)]
    with subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
        encoding="utf-8",
    ) as process:
        yield process, read_json(process.stdout)["url"], folder
        process.kill()


def read_json(stream):
    """Read one JSON document from a stream that stays open."""
    text = ""
    for line in stream:
        text += line
        try:
            return json.loads(text)
        except ValueError:
            continue
    raise AssertionError(text)


def posted(url, data):
    """Return the status of an upload of one file."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.zip"\r\n'
        b"Content-Type: application/zip\r\n\r\n" + data + b"\r\n--b--\r\n"
    )
    request = urllib.request.Request(
        f"{url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_browsers_are_told_to_fetch_nothing_from_elsewhere(command):
    _, url, _ = command
    for path in ("/", "/config", "/theme.css"):
        with urllib.request.urlopen(url + path) as answer:
            policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "http" not in policy
        assert "*" not in policy


def test_gradio_reports_nothing_and_shares_nothing(command):
    _, url, _ = command
    with urllib.request.urlopen(f"{url}/config") as answer:
        config = json.load(answer)
    assert not config["analytics_enabled"]
    assert not config["show_api"] if "show_api" in config else True
    # system fonts: no style sheet of another server
    assert not [sheet for sheet in config["stylesheets"] if re.match(r"(https?:)?//", sheet)]
    with urllib.request.urlopen(f"{url}/gradio_api/info") as answer:
        assert not json.load(answer)["named_endpoints"]


def test_uploads_are_bounded(command):
    _, url, folder = command
    assert posted(url, b"0" * (LIMIT // 2)) == 200
    assert posted(url, b"0" * 2 * LIMIT) == 413
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix == ".zip"]
    assert sizes == [LIMIT // 2]


def test_files_of_the_machine_are_not_served(command):
    _, url, _ = command
    for path in (Path(__file__).resolve(), Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{url}/gradio_api/file={path}")
        assert caught.value.code in (403, 404)


def test_the_end_leaves_no_file(command):
    process, _, folder = command
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Interrupted. The page is closed."
    assert "Traceback" not in err
    assert not [path.name for path in folder.iterdir() if path.name.startswith("eigenlorax-app-")]


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "x" * 70])
def test_hosts_that_are_none(host):
    with pytest.raises(OptionError, match=r"cannot listen at host="), server.running(host):
        pass


def test_a_port_in_use():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OptionError, match="may be open already"),
        server.running("127.0.0.1", taken.getsockname()[1]),
    ):
        pass
