"""A pack on the Hub that is served: what is fetched, when the Hub is asked again, and what happens while it is away."""

import importlib
import json
import shutil
import sys

import pytest

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from children import load_command, needs_fork
from eigenlorax.core.atomic_files import digest
from eigenlorax.errors import AdapterNameError, HubError, PackMissingError
from eigenlorax.serving import watched
from eigenlorax.serving.vllm.adapter_folders import AdapterFolders
from eigenlorax.serving.vllm.settings import Settings
from fake_hub import FakeHub, running
from outcomes import json_of

pytestmark = [pytest.mark.slow, needs_fork]
FILES = ("adapter_config.json", "adapter_model.safetensors", "source_config.json")


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()
    importlib.import_module("huggingface_hub.hf_api")


@pytest.fixture
def hub(tmp_path):
    """`org/pack` has alpha and beta; it may be pushed to."""
    make_adapters(tmp_path / "in", "alpha beta")
    ex.fit(tmp_path / "in", n_components=4).save(tmp_path / "pack")
    shutil.copytree(tmp_path / "pack", tmp_path / "first")
    (tmp_path / "commits").mkdir()
    with running(FakeHub({"org/pack": {"main": tmp_path / "first"}}, room=tmp_path / "commits")) as server:
        yield server


@pytest.fixture
def seconds(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(watched.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def ask(online):
    """What a call gives, in a fork where the Hub is the one on this machine."""

    def found(call):
        return json_of(online(call=lambda: sys.stdout.write(json.dumps(call()))))

    return found


def folders_of(tmp_path, source="org/pack", **options):
    return AdapterFolders(Settings(source, cache=tmp_path / "cache", **options))


def content(folders, name):
    path = folders.request(name).result(timeout=60).path
    return {file.name: digest(file.read_bytes()) for file in path.iterdir()}


def push_with_gamma(tmp_path):
    with ex.Pack.edit(tmp_path / "pack") as pack:
        pack.add(make_adapter(tmp_path / "gamma", seed=7))
    ex.Pack.open(tmp_path / "pack").push_to_hub("org/pack", token="hf_writer")


def test_what_is_not_asked_for_is_not_fetched(hub, ask, tmp_path):
    ask(lambda: content(folders_of(tmp_path), "alpha"))
    fetched = [file for file in hub.fetched if file.startswith("adapters/")]
    assert fetched == [f"adapters/alpha/{file}" for file in FILES]


def test_it_is_what_a_local_pack_gives(hub, ask, tmp_path):
    remote = ask(lambda: content(folders_of(tmp_path), "alpha"))
    assert remote == content(folders_of(tmp_path, str(tmp_path / "pack")), "alpha")


def test_a_flood_of_unknown_names_does_not_reach_the_hub(hub, ask, tmp_path, seconds):
    def flood():
        folders = folders_of(tmp_path)
        for i in range(20):
            with pytest.raises(AdapterNameError, match="no adapter named"):
                folders.request(f"name{i}").result(timeout=60)

    def requests_of(call):
        before = len(hub.requests)
        ask(call)
        return len(hub.requests) - before

    requests_of(flood)
    assert requests_of(flood) == requests_of(lambda: len(folders_of(tmp_path).pack)) > 0


def test_an_adapter_that_is_pushed_is_found_after_a_while(hub, ask, tmp_path, seconds):
    def wait():
        folders = folders_of(tmp_path)
        push_with_gamma(tmp_path)
        seconds[0] += watched.HUB_SECONDS - 1
        with pytest.raises(AdapterNameError, match="no adapter named 'gamma'"):
            content(folders, "gamma")
        seconds[0] += 2
        return content(folders, "gamma")

    found = ask(wait)
    assert found == content(folders_of(tmp_path, str(tmp_path / "pack")), "gamma")


def test_a_revision_stays_what_it_is(hub, ask, tmp_path, seconds):
    commit = hub.head("org/pack", "main")

    def wait():
        folders = folders_of(tmp_path, f"org/pack@{commit}")
        push_with_gamma(tmp_path)
        seconds[0] += 2 * watched.HUB_SECONDS
        with pytest.raises(AdapterNameError, match="no adapter named 'gamma'"):
            content(folders, "gamma")
        return content(folders, "alpha")

    assert ask(wait)


def test_while_the_hub_is_away_what_is_there_is_served(hub, ask, tmp_path, seconds, monkeypatch):
    def wait():
        folders = folders_of(tmp_path)
        before = content(folders, "alpha")
        seconds[0] += 2 * watched.HUB_SECONDS
        monkeypatch.setattr(watched.remote, "fetch", away)
        assert content(folders, "alpha") == before
        with pytest.raises(AdapterNameError, match="no adapter named 'gamma'"):
            content(folders, "gamma")
        with pytest.raises(HubError, match="no connection"):
            content(folders, "beta")

    def away(*arguments, **options):
        raise HubError("no connection")

    ask(wait)


def test_a_repository_that_is_not_there_is_an_error_at_once(hub, ask, tmp_path):
    def start():
        with pytest.raises(HubError, match="org/nowhere is neither a local folder nor a repository"):
            folders_of(tmp_path, "org/nowhere")

    ask(start)


def test_one_that_is_no_pack_is_an_error_at_once(hub, ask, tmp_path):
    hub.repos["org/lora"] = {"main": tmp_path / "in" / "alpha"}

    def start():
        with pytest.raises(PackMissingError, match="org/lora is not a pack"):
            folders_of(tmp_path, "org/lora")

    ask(start)


def test_a_local_pack_is_read_again_only_where_it_has_changed(hub, tmp_path):
    one = watched.WatchedPack(tmp_path / "pack")
    before = one.current()
    assert one.current() is before
    with ex.Pack.edit(tmp_path / "pack") as pack:
        pack.add(make_adapter(tmp_path / "gamma", seed=7))
    assert one.current().names == ["alpha", "beta", "gamma"]
    assert one.current() is not before
