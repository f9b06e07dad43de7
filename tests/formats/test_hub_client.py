"""Adapters from the Hub, by a Hub on this machine: what is asked for, by which token, and what is said if it fails."""

import importlib
import json
import shutil
import sys

import pytest

import eigenlorax as ex
from adapters import make_adapter
from children import load_command, needs_fork
from eigenlorax.errors import FormatError
from eigenlorax.formats import hub_client as hub_module
from fake_hub import FakeHub, commit, running
from outcomes import assert_refused, contents, json_of, succeeded

pytestmark = needs_fork
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()
    # what it needs in turn; itself it is imported anew in each fork
    importlib.import_module("huggingface_hub.hf_api")


@pytest.fixture
def hub(tmp_path):
    make_adapter(tmp_path / "hub" / "main", seed=1)
    (tmp_path / "hub" / "main" / "README.md").write_text("a card")
    (tmp_path / "hub" / "main" / "optimizer.pt").write_bytes(b"large")
    shutil.copy(tmp_path / "hub" / "main" / WEIGHTS, tmp_path / "hub" / "main" / PICKLE)
    make_adapter(tmp_path / "hub" / "v2", seed=2, rank=2)
    make_adapter(tmp_path / "hub" / "pickled", seed=1, pickled=True)
    make_adapter(tmp_path / "hub" / "checkpoints" / "step-5" / "best", seed=3)
    main, v2 = tmp_path / "hub" / "main", tmp_path / "hub" / "v2"
    with running(
        FakeHub(
            {
                "org/one": {"main": main, "v2": v2, "refs/pr/1": v2},
                "org/pickled": {"main": tmp_path / "hub" / "pickled"},
                "org/checkpoints": {"main": tmp_path / "hub" / "checkpoints"},
                "org/secret": {"main": main},
                "org/empty": {"main": tmp_path / "hub" / "nothing"},
            },
            private={"org/secret": "hf_right"},
        )
    ) as server:
        yield server


class TestWhatIsFetched:
    def test_the_config_and_the_safetensors_of_an_id(self, online, hub):
        found = json_of(online("inspect", "org/one", "--json"))
        assert (found["adapter"], found["ranks"]) == ("org/one", [3])
        assert hub.fetched == ["README.md", CONFIG, WEIGHTS]

    @pytest.mark.parametrize("given", ["org/one@v2", "org/one@refs/pr/1"])
    def test_those_of_a_revision(self, online, hub, given):
        assert json_of(online("inspect", given, "--json"))["ranks"] == [2]
        revision = given.partition("@")[2]
        assert any(commit("org/one", revision) in path for _, path, _ in hub.requests)

    def test_those_of_a_revision_by_option_or_commit(self, online):
        assert json_of(online("inspect", "org/one", "--revision", "v2", "--json"))["ranks"] == [2]
        assert json_of(online("inspect", f"org/one@{commit('org/one', 'v2')}", "--json"))["ranks"] == [2]

    def test_not_two_revisions(self, online, hub):
        assert_refused(online("inspect", "org/one@v2", "--revision", "main"), 3, "two revisions", "'v2'", "'main'")
        assert hub.requests == []

    def test_never_a_pickle_without_the_flag(self, online, hub):
        done = online("inspect", "org/pickled")
        assert_refused(done, 3, WEIGHTS, PICKLE, "(the Hub's .bin file is downloaded with --allow-pickle only).")
        assert hub.fetched == [CONFIG]
        assert json_of(online("inspect", "org/pickled", "--allow-pickle", "--json"))["ranks"] == [3]
        assert hub.fetched == [CONFIG, PICKLE]

    def test_a_subfolder(self, online, hub):
        def call():
            adapter = ex.read_adapter("org/checkpoints", subfolder="step-5/best/")
            sys.stdout.write(json.dumps([adapter.name, list(adapter.ranks)]))

        assert json_of(online(call=call)) == ["org--checkpoints--step-5--best", [3]]
        assert hub.fetched == [f"step-5/best/{CONFIG}", f"step-5/best/{WEIGHTS}"]

    def test_a_folder_of_that_name_goes_first(self, online, hub, tmp_path):
        make_adapter(tmp_path / "here" / "org" / "one", seed=1, rank=5)
        assert json_of(online("inspect", "org/one", "--json"))["ranks"] == [5]
        assert hub.requests == []

    def test_what_is_in_the_cache_is_not_fetched_again(self, online, hub):
        succeeded(online("inspect", "org/one"))
        hub.requests.clear()
        succeeded(online("inspect", "org/one"))
        assert hub.fetched == []

    def test_another_cache_may_be_named(self, online, tmp_path):
        succeeded(online(call=lambda: ex.read_adapter("org/one", cache_dir=tmp_path / "mine")))
        assert list((tmp_path / "mine").glob(f"models--org--one/snapshots/*/{WEIGHTS}"))


class TestInAPack:
    def test_its_name_has_no_slash(self, online, tmp_path):
        found = json_of(online("fit", "org/one", "two=org/one@v2", "-o", tmp_path / "pack", "-k", 4, "--json"))
        assert sorted(found["adapter_records"]) == ["org--one", "two"]

    def test_it_is_the_same_as_the_folder_itself(self, online, tmp_path):
        succeeded(online("fit", "x=org/one", "-o", tmp_path / "one", "-k", 3))
        succeeded(online("fit", f"x={tmp_path / 'hub' / 'main'}", "-o", tmp_path / "two", "-k", 3))
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_it_may_be_added(self, online, tmp_path):
        succeeded(online("fit", "org/one", "-o", tmp_path / "pack", "-k", 3))
        found = json_of(online("add", tmp_path / "pack", "v2=org/one", "--revision", "v2", "--json"))
        assert {name: record["ranks"] for name, record in found["added"].items()} == {"v2": [2]}


class TestTokens:
    def test_none_is_sent_where_there_is_none(self, online, hub):
        succeeded(online("inspect", "org/one"))
        assert hub.tokens == {None}

    def test_that_of_the_environment_is_sent(self, online, hub):
        succeeded(online("inspect", "org/secret", HF_TOKEN="hf_right"))
        assert hub.tokens == {"Bearer hf_right"}

    def test_that_of_the_call_is_sent(self, online, hub):
        succeeded(online(call=lambda: ex.read_adapter("org/secret", token="hf_right"), HF_TOKEN="hf_other"))
        assert hub.tokens == {"Bearer hf_right"}

    @pytest.mark.parametrize("env", [{}, {"HF_TOKEN": "hf_wrong"}])
    def test_a_private_repository_says_that_it_wants_one(self, online, env):
        done = online("inspect", "org/secret", **env)
        assert_refused(done, 3, "org/secret", "needs a token (HF_TOKEN)")
        assert "hf_wrong" not in done.err


class TestWhatFails:
    # --skip-bad is for adapters that are broken; a slip in a name is none
    @pytest.mark.parametrize("options", [[], ["--skip-bad"]])
    def test_a_repository_that_is_not_there(self, online, tmp_path, options):
        done = online("fit", "org/one", "org/gone", "-o", tmp_path / "pack", *options)
        assert_refused(done, 3, "org/gone is neither a local folder nor a repository that the Hub shows you")
        assert not (tmp_path / "pack").exists()

    def test_a_revision_that_is_not_there(self, online):
        assert_refused(online("inspect", "org/one@v9"), 3, "org/one", "at revision v9")

    @pytest.mark.parametrize("given", ["org/checkpoints", "org/empty"])
    def test_a_repository_without_an_adapter(self, online, given):
        assert_refused(online("inspect", given), 3, given.replace("/", "--"), f"has no {CONFIG}")

    @pytest.mark.parametrize("status", [403, 500, 503])
    def test_a_hub_that_is_down(self, online, hub, status):
        hub.down = status
        done = online("inspect", "org/one")
        assert_refused(done, 3, "org/one", str(status))

    def test_no_hub_at_all(self, online):
        done = online("inspect", "org/one", HF_ENDPOINT="http://127.0.0.1:1")
        assert_refused(done, 3, "org/one", "Check the path, or run it once with a connection")

    @pytest.mark.parametrize("given", ["org/one/two", "one", "org/", "/one", "org/one@", "org /one", "c:/org"])
    def test_what_is_no_id(self, online, hub, given):
        assert_refused(online("inspect", given), 3, given, "does not exist", "(org/name)")
        assert hub.requests == []

    @pytest.mark.parametrize("given", ["org/one--two", "org/one..two", "org/" + "a" * 97])
    def test_what_the_hub_takes_for_no_id(self, online, given):
        assert_refused(online("inspect", given), 3, given)

    def test_without_network_if_it_is_in_the_cache(self, online, hub):
        succeeded(online("inspect", "org/one"))
        hub.requests.clear()
        offline = online("inspect", "org/one", "--json", HF_HUB_OFFLINE="1")
        assert json_of(offline)["ranks"] == [3]
        assert json_of(online("inspect", "org/one", "--json", HF_ENDPOINT="http://127.0.0.1:1"))["ranks"] == [3]
        assert hub.requests == []

    def test_without_network_if_it_is_not(self, online, hub):
        done = online("inspect", "org/one", HF_HUB_OFFLINE="1")
        assert_refused(done, 3, "org/one is neither a local folder nor in the Hub's cache", "offline")
        assert hub.requests == []

    def test_what_may_not_be_asked_for(self, online, hub):
        done = online(call=lambda: ex.read_adapter("org/one", local_files_only=True))
        assert "HubError: org/one is neither a local folder nor in the Hub's cache" in done.err
        assert hub.requests == []


class TestNames:
    @pytest.mark.parametrize(
        ("source", "subfolder", "name"),
        [
            ("org/one", None, "org--one"),
            ("org/one@main", None, "org--one"),
            ("org/one@refs/pr/1", None, "org--one"),
            ("org/one", "a/b/", "org--one--a--b"),
        ],
    )
    def test_of_ids(self, tmp_path, monkeypatch, source, subfolder, name):
        monkeypatch.chdir(tmp_path)
        assert hub_module.adapter_name(source, subfolder) == name

    def test_of_folders(self, tmp_path):
        folder = make_adapter(tmp_path / "parent" / "best", seed=1)
        (tmp_path / "link").symlink_to(folder)
        assert hub_module.adapter_name(folder) == "best"
        assert hub_module.adapter_name(f"{folder}/../best/") == "best"
        assert hub_module.adapter_name(tmp_path / "parent", "best") == "best"
        assert hub_module.adapter_name(tmp_path / "link") == "link"

    def test_a_subfolder_that_is_not_there(self, tmp_path):
        with pytest.raises(FormatError, match="gone is not a folder"):
            ex.read_adapter(make_adapter(tmp_path / "one", seed=1), subfolder="gone")
