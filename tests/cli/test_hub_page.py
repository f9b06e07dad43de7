"""The commands and the Python of docs/hub.md run as they stand, one after another, against a Hub on this machine."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import eigenlorax as ex
from children import load_command, needs_fork
from fake_hub import FakeHub, running
from outcomes import succeeded

pytestmark = [pytest.mark.slow, needs_fork]

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
TOKEN = {"HF_TOKEN": "hf_writer"}


@pytest.fixture
def hub(tmp_path):
    load_command()
    importlib.import_module("huggingface_hub.hf_api")
    (tmp_path / "commits").mkdir()
    with running(FakeHub({}, room=tmp_path / "commits")) as server:
        yield server


def test_the_page_on_the_hub(pack, online, hub):
    # the commands run in an empty folder beside the pack
    Path("pack").symlink_to(pack)
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for language, text in blocks:
        for line in [text] if language == "python" else text.splitlines():
            succeeded(run(online, language, line))
    assert ex.Pack.open(hub.repos["org/name"]["main"]).names == ["alpha", "beta"]
    card = (hub.repos["org/name"]["main"] / "README.md").read_text("utf-8")
    assert 'license: "apache-2.0"' in card
    assert "eigenlorax export org/name" in card
    assert Path("offline/beta/adapter_config.json").read_bytes() == Path("loras/beta/adapter_config.json").read_bytes()


def run(online, language, text):
    if language == "python":
        return online(call=lambda: exec(compile(text, str(PAGE), "exec"), {"__name__": "page"}), **TOKEN)
    words = shlex.split(text)
    settings = dict(word.split("=", 1) for word in words if word.startswith("HF_"))
    program, *arguments = words[len(settings) :]
    assert program == "eigenlorax"
    return online(*arguments, **{**TOKEN, **settings})
