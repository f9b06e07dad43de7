"""A pack on the Hub, by a Hub on this machine: of its adapters, those that are named are fetched."""

import importlib
import json
import sys

import pytest

import eigenlorax as ex
from children import load_command, needs_fork
from fake_hub import FakeHub, running
from outcomes import json_of

pytestmark = [pytest.mark.slow, needs_fork]


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()
    importlib.import_module("huggingface_hub.hf_api")


@pytest.fixture
def hub(packs):
    with running(FakeHub({"org/styles": {"main": packs["sd"][0], "v1": packs["sd"][0]}})) as server:
        yield server


@pytest.mark.parametrize("source", ["org/styles", "org/styles@v1"])
def test_what_is_not_named_is_not_fetched(online, hub, make, source):
    pipe = make("sd")
    done = online(call=lambda: sys.stdout.write(json.dumps(ex.load_into(pipe, source, ["ink.v2"]))))
    assert json_of(done) == {"ink_v2": {"unet": 32}}
    names = {path.split("/")[1] for path in hub.fetched if path.startswith("adapters/")}
    assert {name.partition("@")[0] for name in names} == {"ink.v2"}
