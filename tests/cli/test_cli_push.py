"""`eigenlorax push` and `pull`, and Hub ids in the place of packs, by a Hub on this machine. What becomes of a
repository is in test_remote.py."""

import importlib
import json
import re
import shutil

import pytest

import eigenlorax as ex
from adapters import make_adapter
from children import load_command, needs_fork
from fake_hub import FakeHub, running
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded
from runs import make_run

pytestmark = needs_fork
TOKEN = {"HF_TOKEN": "hf_writer"}
CONFIG, MANIFEST = "adapter_config.json", "subspace_config.json"


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()
    importlib.import_module("huggingface_hub.hf_api")


@pytest.fixture
def hub(pack, tmp_path):
    place = tmp_path / "hub"
    shutil.copytree(pack, place / "pack")
    ex.fit(tmp_path / "in" / "alpha", n_components=2).save(place / "v2")
    (place / "commits").mkdir()
    repos = {
        "org/pack": {"main": place / "pack", "v2": place / "v2"},
        "org/lora": {"main": make_adapter(place / "lora", seed=3)},
    }
    with running(FakeHub(repos, room=place / "commits")) as server:
        yield server


def main_of(hub, repo):
    return ex.Pack.open(hub.repos[repo]["main"])


class TestPush:
    def test_says_what_was_pushed_and_where(self, online, hub, pack):
        found = json_of(online("push", pack, "org/new", "--json", **TOKEN))
        commit = hub.head("org/new", "main")
        assert found == {
            "pack": str(pack),
            "repo": "org/new",
            "adapters": ["alpha", "beta", "gamma"],
            "commit": commit,
            "url": f"{hub.url}/org/new/commit/{commit}",
            "pull_request": None,
            "license": None,
        }
        assert main_of(hub, "org/new").names == ["alpha", "beta", "gamma"]

    def test_in_a_table(self, online, hub, pack):
        out = succeeded(online("push", pack, "org/new", "--create-pr", **TOKEN)).out
        assert "pack org/new" in out
        assert f"{hub.url}/org/new/discussions/1" in out

    def test_its_options(self, online, hub, pack):
        options = [
            "--adapter",
            "beta",
            "--adapter",
            "alpha",
            "--private",
            "--revision",
            "small",
            "--message",
            "two of them",
            "--license",
            "mit",
        ]
        assert json_of(online("push", pack, "me/new", *options, "--json", **TOKEN))["adapters"] == ["alpha", "beta"]
        assert hub.log == [{"repo": "me/new", "revision": "small", "message": "two of them"}]
        assert ex.Pack.open(hub.repos["me/new"]["small"]).names == ["alpha", "beta"]
        assert "me/new" in hub.private
        assert '\nlicense: "mit"\n' in (hub.repos["me/new"]["small"] / "README.md").read_text()

    def test_an_error_is_one_message(self, online, hub, pack):
        before = contents(pack)
        assert_refused(online("push", pack, "org/new"), 3, "cannot push to org/new", "hf auth login")
        assert_refused(online("push", pack, "org/new", "--adapter", "delta", **TOKEN), 3, "delta", "alpha, beta, gamma")
        assert_refused(
            online("push", pack, "org/pack", "--private", **TOKEN), 3, "org/pack already exists and is public"
        )
        assert_refused(online("push", pack, "org/pack", "--create-pr", "--revision", "v2", **TOKEN), 3, "(v2)")
        assert_refused(online("push", pack.parent / "in", "org/new", **TOKEN), 4, "is not a pack")
        assert (hub.log, contents(pack)) == ([], before)
        assert_usage_error(online("push", pack), "REPO")

    def test_another_push_in_between(self, online, hub, pack):
        def interfere():
            hub.new("org/pack", "main", hub.repos["org/pack"]["main"], lambda folder: (folder / "x").write_text("x"))

        hub.before_commit = interfere
        assert_refused(
            online("push", pack, "org/pack", **TOKEN), 5, "org/pack was changed on the Hub", "run the command again"
        )


class TestLicences:
    """Licences of adapters from the Hub, in the card of a pack that is pushed."""

    @pytest.fixture
    def collection(self, online, hub, tmp_path):
        """A pack of an adapter from the Hub of Apache 2.0, and of one on disk that states nothing."""
        (hub.repos["org/lora"]["main"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
        other = make_adapter(tmp_path / "other", seed=5)
        json_of(online("fit", "org/lora", other, "-o", tmp_path / "two", "-k", "2", "--json"))
        return tmp_path / "two"

    def test_that_differ(self, online, hub, collection):
        done = succeeded(online("push", collection, "org/two", **TOKEN))
        assert "the model card states no licence" in done.err
        assert "(apache-2.0 (1), not stated (1))" in " ".join(done.err.split())
        text = (hub.repos["org/two"]["main"] / "README.md").read_text()
        assert "\nlicense:" not in text
        assert "| `apache-2.0` | 1 | `org--lora` |\n| not stated | 1 | `other` |" in text

    def test_that_all_adapters_state(self, online, hub, collection):
        options = ["--adapter", "org--lora", "--json"]
        assert json_of(online("push", collection, "org/one", *options, **TOKEN))["license"] == "apache-2.0"
        assert '\nlicense: "apache-2.0"\n' in (hub.repos["org/one"]["main"] / "README.md").read_text()
        # from the Hub, as from disk
        assert main_of(hub, "org/one")["org--lora"].license.id == "apache-2.0"
        assert json_of(online("inspect", "org/one", "--json"))["licenses"] == {
            "org--lora": {"id": "apache-2.0", "name": None, "link": None}
        }

    def test_that_are_overruled(self, online, hub, collection):
        done = succeeded(online("push", collection, "org/two", "--license", "openrail++", **TOKEN))
        assert "states no licence" not in done.err
        assert '\nlicense: "openrail++"\n' in (hub.repos["org/two"]["main"] / "README.md").read_text()

    def test_of_an_adapter_on_the_hub(self, online, collection):
        assert json_of(online("inspect", "org/lora", "--json"))["license"]["id"] == "apache-2.0"
        assert "apache-2.0" in succeeded(online("inspect", collection)).out


class TestHistories:
    """Packs with histories, and packs of histories only."""

    @pytest.fixture
    def history(self, tmp_path):
        pack = ex.Pack.empty()
        for checkpoint in make_run(tmp_path / "run", (10, 20)):
            pack.append(checkpoint)
        return pack.save(tmp_path / "history")

    def test_are_pushed_and_pulled(self, online, hub, history, tmp_path):
        document = json_of(online("push", history, "org/history", "--json", **TOKEN))
        assert (document["adapters"], document["histories"]) == ([], ["run"])
        assert main_of(hub, "org/history").histories["run"].labels == ["10", "20"]
        out = succeeded(online("pull", "org/history", "-o", tmp_path / "mine")).out
        assert re.search(r"\n run +2 +20 ", out)
        assert "components" not in out
        assert out == succeeded(online("inspect", tmp_path / "mine")).out
        pulled = json_of(online("pull", "org/history", "-o", tmp_path / "more", "--json"))
        assert pulled["histories"]["run"]["versions"] == 2

    def test_are_pushed_beside_adapters(self, online, hub, pack, tmp_path):
        with ex.Pack.edit(pack) as opened:
            opened.append(make_run(tmp_path / "run", (10,))[0])
        out = succeeded(online("push", pack, "org/pack", **TOKEN)).out
        assert re.search(r"adapters +3\n +histories +1\n", out)
        assert sorted(main_of(hub, "org/pack").histories) == ["run"]
        succeeded(online("push", pack, "org/pack", "--adapter", "run", **TOKEN))
        assert (main_of(hub, "org/pack").names, sorted(main_of(hub, "org/pack").histories)) == ([], ["run"])


class TestPull:
    def test_the_pack_as_it_was_pushed(self, online, pack, tmp_path):
        found = json_of(online("pull", "org/pack", "-o", tmp_path / "mine", "--json"))
        assert found == {**json_of(online("inspect", pack, "--json")), "pack": str(tmp_path / "mine")}
        assert contents(tmp_path / "mine") == contents(pack)

    def test_can_be_changed(self, online, tmp_path):
        succeeded(online("pull", "org/pack", "-o", tmp_path / "mine"))
        succeeded(online("remove", tmp_path / "mine", "beta"))
        succeeded(online("add", tmp_path / "mine", tmp_path / "new"))
        assert ex.Pack.open(tmp_path / "mine").names == ["alpha", "gamma", "new"]

    def test_the_basis_and_one_adapter(self, online, hub, tmp_path):
        out = succeeded(online("pull", "org/pack", "--adapter", "beta", "-o", tmp_path / "mine")).out
        assert f"pack {tmp_path / 'mine'}" in out
        pulled = ex.Pack.open(tmp_path / "mine")
        pulled.verify()
        assert pulled.names == ["beta"]
        assert {file.split("/")[1] for file in hub.asked if "/" in file} == {"beta"}

    @pytest.mark.parametrize("arguments", [["org/pack@v2"], ["org/pack", "--revision", "v2"]])
    def test_a_revision(self, online, tmp_path, arguments):
        assert json_of(online("pull", *arguments, "-o", tmp_path / "mine", "--json"))["adapters"] == 1

    def test_over_a_pack(self, online, hub, tmp_path):
        succeeded(online("pull", "org/pack", "-o", tmp_path / "mine"))
        hub.requests.clear()
        assert_refused(online("pull", "org/pack@v2", "-o", tmp_path / "mine"), 4, "is a pack already", "--overwrite")
        assert hub.requests == []
        succeeded(online("pull", "org/pack@v2", "-o", tmp_path / "mine", "--overwrite"))
        assert ex.Pack.open(tmp_path / "mine").names == ["alpha"]

    def test_what_it_refuses(self, online, tmp_path):
        mine = tmp_path / "mine"
        assert_refused(online("pull", "org/lora", "-o", mine), 4, "org/lora is not a pack")
        assert_refused(online("pull", "org/gone", "-o", mine), 3, "org/gone is neither a local folder nor a repository")
        assert_refused(online("pull", "org/pack", "--adapter", "x", "-o", mine), 3, "no adapter named 'x' in the pack")
        assert not mine.exists()

    def test_not_a_part_of_a_pack_over_the_whole(self, online, pack):
        before = contents(pack)
        done = online("pull", pack, "--adapter", "beta", "-o", pack, "--overwrite")
        assert_refused(done, 3, "would remove its other adapters")
        assert contents(pack) == before


class TestHubIdsInThePlaceOfPacks:
    def test_inspect(self, online, hub, pack):
        found, local = (json_of(online("inspect", each, "--json")) for each in ("org/pack", pack))
        # the model card is not downloaded
        assert local.pop("files")["pack"] - found.pop("files")["pack"] == (pack / "README.md").stat().st_size
        assert found == {**local, "pack": "org/pack"}
        assert "adapters/gamma/adapter_model.safetensors" in hub.asked
        assert json_of(online("inspect", "org/pack", "--revision", "v2", "--json"))["adapters"] == 1
        assert json_of(online("inspect", "org/lora", "--json"))["adapter"] == "org/lora"

    def test_inspect_checks_every_byte(self, online, hub):
        path = hub.repos["org/pack"]["main"] / "adapters" / "beta" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert_refused(online("inspect", "org/pack"), 4, "beta/adapter_model.safetensors was changed")

    def test_export(self, online, hub, tmp_path):
        found = json_of(online("export", "org/pack", "beta", "-o", tmp_path / "out", "--json"))
        assert found["written"] == {"beta": str(tmp_path / "out" / "beta")}
        assert {file.split("/")[1] for file in hub.asked if "/" in file} == {"beta"}
        assert json.loads((tmp_path / "out" / "beta" / CONFIG).read_text())["peft_type"] == "LORA"
        succeeded(online("export", "org/pack@v2", "-o", tmp_path / "all"))
        assert [path.name for path in (tmp_path / "all").iterdir()] == ["alpha"]

    def test_export_of_what_is_not_there(self, online, hub, tmp_path):
        assert_refused(online("export", "org/pack", "x", "-o", tmp_path / "out"), 3, "no adapter named 'x' in the pack")
        assert hub.asked == [MANIFEST]
        assert_refused(online("export", "org/lora", "-o", tmp_path / "out"), 4, "org/lora is not a pack")
        assert_refused(online("export", "nowhere", "-o", tmp_path / "out"), 4, "nowhere is not a pack")

    def test_a_pack_is_changed_in_a_folder_alone(self, online, hub, tmp_path):
        assert_refused(online("remove", "org/pack", "beta"), 4, "`eigenlorax pull ORG/NAME -o org/pack`")
        succeeded(online("inspect", "org/pack"))
        (place,) = (tmp_path / "home" / "hub" / "models--org--pack" / "snapshots").iterdir()
        before = contents(place)
        assert_refused(online("remove", place, "beta"), 3, "is the copy of org/pack in the Hub's cache")
        assert_refused(online("add", place, tmp_path / "new"), 3, "eigenlorax pull org/pack -o pack/")
        assert contents(place) == before
        assert hub.log == []

    def test_as_an_adapter_it_is_refused(self, online, tmp_path):
        done = online("fit", "org/pack", "-o", tmp_path / "out")
        assert_refused(done, 3, "is a pack, not an adapter")
