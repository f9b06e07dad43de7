"""Packs on the Hub, by a Hub on this machine and the real client: what is fetched, what a push makes of a repository,
and what is said if either fails. Everything runs in forks; what they find comes back as JSON."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from torch import nn

import eigenlorax as ex
from adapters import MODULES, make_adapter, make_adapters
from children import load_command, needs_fork
from eigenlorax.errors import DuplicateAdapterWarning, OptionError
from fake_hub import FakeHub, running
from outcomes import contents, json_of, succeeded
from runs import make_run
from users import make_users

pytestmark = [pytest.mark.slow, needs_fork]
MANIFEST, CARD = "subspace_config.json", "README.md"
QUERY = "encoder.layer.0.query"
HEAD = "base_model.model.classifier.weight"
ONE = ("adapter_config.json", "adapter_model.safetensors", "source_config.json")
WRITER = "hf_writer"


def of(*names):
    return [f"adapters/{name}/{file}" for name in names for file in ONE]


def say(value):
    sys.stdout.write(json.dumps(value))


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()
    importlib.import_module("huggingface_hub.hf_api")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`one`: a pack of alpha, beta and gamma. `other`: one of alpha and delta, over another subspace."""
    place = tmp_path_factory.mktemp("made")
    make_adapters(place / "in", "alpha beta gamma")
    ex.fit(place / "in", n_components=4).save(place / "one")
    ex.fit([place / "in" / "alpha", make_adapter(place / "delta", seed=9)], n_components=3).save(place / "other")
    return place


@pytest.fixture
def local(made, tmp_path):
    """A pack of one's own."""
    return shutil.copytree(made / "one", tmp_path / "local")


@pytest.fixture
def hub(made, tmp_path):
    """`org/pack` has `one` as pack, and `other` at v2. `org/lora` is an adapter; `org/mixed` somebody's own."""
    shutil.copytree(made / "one", tmp_path / "hub" / "one")
    shutil.copytree(made / "other", tmp_path / "hub" / "other")
    (tmp_path / "hub" / "one" / "notes.txt").write_text("not of the pack")
    make_adapter(tmp_path / "hub" / "mixed" / "adapters" / "mine", seed=1)
    (tmp_path / "hub" / "mixed" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "hub" / "commits").mkdir()
    with running(
        FakeHub(
            {
                "org/pack": {"main": tmp_path / "hub" / "one", "v2": tmp_path / "hub" / "other"},
                "org/secret": {"main": tmp_path / "hub" / "one"},
                "org/lora": {"main": made / "in" / "alpha"},
                "org/mixed": {"main": tmp_path / "hub" / "mixed"},
            },
            private={"org/secret": "hf_right"},
            room=tmp_path / "hub" / "commits",
        )
    ) as server:
        yield server


def subspace_of(folder):
    return next(path.name for path in folder.glob("subspace-*.safetensors"))


class TestFetch:
    def test_all_of_a_pack_and_nothing_else(self, online, hub, made):
        def call():
            pack = ex.Pack.from_pretrained("org/pack")
            pack.verify()
            say([pack.names, pack.records["beta"].delta_error])

        wanted = ex.Pack.open(made / "one").records["beta"].delta_error
        assert json_of(online(call=call)) == [["alpha", "beta", "gamma"], wanted]
        files = [MANIFEST, subspace_of(made / "one"), *of("alpha", "beta", "gamma")]
        assert hub.asked == sorted(files)

    def test_the_basis_and_the_adapters_named(self, online, hub, made):
        def call():
            pack = ex.Pack.from_pretrained("org/pack", adapters=["beta"])
            pack.verify()
            factors = pack.adapter("beta").modules["encoder.layer.0.query"]
            say([pack.names, pack.summary.adapters, (factors.up @ factors.down).tolist()])

        names, adapters, delta = json_of(online(call=call))
        assert (names, adapters) == (["beta"], 1)
        wanted = ex.Pack.open(made / "one").adapter("beta").modules["encoder.layer.0.query"]
        assert torch.allclose(torch.tensor(delta), wanted.up @ wanted.down)
        assert hub.asked == sorted([MANIFEST, subspace_of(made / "one"), *of("beta")])

    def test_what_a_bank_serves(self, online, hub, made):
        def call():
            model = nn.Module()
            for name, (n_out, n_in) in MODULES.items():
                *parents, last = name.split(".")
                module = model
                for parent in parents:
                    if not hasattr(module, parent):
                        module.add_module(parent, nn.Module())
                    module = getattr(module, parent)
                module.add_module(last, nn.Linear(n_in, n_out))
            say(ex.AdapterBank(model, "org/pack", adapters="beta").names)

        assert json_of(online(call=call)) == ["beta"]
        assert hub.asked == sorted([MANIFEST, subspace_of(made / "one"), *of("beta")])

    def test_the_basis_alone(self, online, hub, made):
        def call():
            pack = ex.Pack.from_pretrained("org/pack", adapters=[])
            say([pack.names, pack.subspace.fingerprint])

        assert json_of(online(call=call)) == [[], ex.Pack.open(made / "one").info.fingerprint]
        assert hub.asked == sorted([MANIFEST, subspace_of(made / "one")])

    def test_what_is_there_is_not_fetched_again(self, online, hub):
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["beta"])))
        hub.requests.clear()
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["gamma", "beta"])))
        assert hub.asked == of("gamma")
        hub.requests.clear()
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["gamma", "beta"])))
        assert hub.asked == []

    def test_all_files_are_of_one_commit(self, online, hub):
        """The branch moves between the manifest and the rest."""

        def call():
            from eigenlorax.pack import hub as remote

            real = remote.folder.find_pack

            def moved(place):
                remote.folder.find_pack = real
                ex.Pack.open(hub.repos["org/pack"]["v2"]).push_to_hub("org/pack", token=WRITER)
                return real(place)

            remote.folder.find_pack = moved
            pack = ex.Pack.from_pretrained("org/pack")
            pack.verify()
            say(pack.names)

        assert json_of(online(call=call)) == ["alpha", "beta", "gamma"]
        assert [one["repo"] for one in hub.log] == ["org/pack"]

    @pytest.mark.parametrize("revision", [{"source": "org/pack@v2"}, {"source": "org/pack", "revision": "v2"}])
    def test_a_revision(self, online, revision):
        source, kept = revision["source"], {k: v for k, v in revision.items() if k != "source"}
        found = json_of(online(call=lambda: say(ex.Pack.from_pretrained(source, **kept).names)))
        assert found == ["alpha", "delta"]

    def test_a_token(self, online, hub):
        done = online(call=lambda: ex.Pack.from_pretrained("org/secret"))
        assert "HubError: org/secret is neither" in done.err
        assert "needs a token (HF_TOKEN)" in done.err
        hub.requests.clear()
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/secret", token="hf_right")))
        assert hub.tokens == {"Bearer hf_right"}

    def test_a_cache_of_ones_own(self, online, tmp_path):
        mine = tmp_path / "mine"
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", cache_dir=mine, adapters=["beta"])))
        assert {path.name for path in mine.glob("models--org--pack/snapshots/*/adapters/*")} == {"beta"}

    @pytest.mark.parametrize("how", [{"local_files_only": True}, {}])
    def test_without_the_hub(self, online, hub, made, how):
        env = {} if how else {"HF_HUB_OFFLINE": "1"}
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["beta"])))
        hub.requests.clear()
        call = lambda adapters: ex.Pack.from_pretrained("org/pack", adapters=adapters, **how).verify()  # noqa: E731
        succeeded(online(call=lambda: call(["beta"]), **env))
        done = online(call=lambda: call(None), **env)
        missing = (
            "adapters/alpha/adapter_config.json of org/pack is not in the Hub's cache, and the Hub cannot be asked"
        )
        why = "offline, or no connection" if how else "offline: HF_HUB_OFFLINE is set"
        assert f"HubError: {missing} ({why})" in done.err
        assert hub.requests == []

    def test_without_the_hub_and_nothing_in_the_cache(self, online, hub):
        done = online(call=lambda: ex.Pack.from_pretrained("org/pack", local_files_only=True))
        assert "HubError: org/pack is neither a local folder nor in the Hub's cache" in done.err
        assert hub.requests == []

    def test_an_adapter_that_is_not_there(self, online, hub):
        done = online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["beta", "delta"]))
        assert (
            "AdapterNameError: no adapter named 'delta' in the pack. Did you mean 'beta'? It has: alpha, beta, gamma."
            in done.err
        )
        assert hub.asked == [MANIFEST]

    def test_a_repository_that_is_no_pack(self, online):
        done = online(call=lambda: ex.Pack.from_pretrained("org/lora"))
        assert "PackMissingError: org/lora is not a pack: it has no subspace_config.json" in done.err

    def test_a_pack_is_no_adapter(self, online):
        done = online(call=lambda: ex.fit("org/pack"))
        assert "FormatError" in done.err
        assert "is a pack, not an adapter" in done.err

    def test_a_repository_that_lacks_a_file(self, online, hub):
        (hub.repos["org/pack"]["main"] / "adapters" / "beta" / "source_config.json").unlink()
        done = online(call=lambda: ex.Pack.from_pretrained("org/pack"))
        assert "PackDamagedError: org/pack has no adapters/beta/source_config.json on the Hub" in done.err
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["alpha"])))

    def test_a_repository_with_a_damaged_file(self, online, hub):
        path = hub.repos["org/pack"]["main"] / "adapters" / "beta" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        done = online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["beta"]).verify())
        assert "PackDamagedError" in done.err
        assert "beta/adapter_model.safetensors was changed" in done.err

    def test_an_adapter_in_its_spare_place(self, online, hub):
        """As a writer that was killed leaves one, and somebody uploads it by hand."""
        from eigenlorax.pack import folder

        place = hub.repos["org/pack"]["main"]
        beta = folder.open_pack(place).adapter("beta")
        beta.own.rename(beta.spare)
        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack", adapters=["beta"]).verify()))

    def test_a_local_folder_goes_first(self, online, hub, local):
        def call():
            say([ex.Pack.from_pretrained(str(local), adapters=["beta"]).names, ex.Pack.from_pretrained(local).names])

        assert json_of(online(call=call)) == [["beta"], ["alpha", "beta", "gamma"]]
        assert hub.requests == []


class TestTheCacheIsForReading:
    def test_a_pack_in_it_is_not_saved_there(self, online, tmp_path):
        def call():
            pack = ex.Pack.from_pretrained("org/pack")
            pack.remove("beta")
            for attempt in (pack.save, lambda: pack.save(pack.path, overwrite=True), ex.Pack.edit(pack.path).__enter__):
                with pytest.raises(OptionError, match=r"copy of org/pack in the Hub's cache.*Save the pack to another"):
                    attempt()
            pack.save(tmp_path / "mine")
            pack.remove("alpha")
            pack.save()
            say(ex.Pack.open(tmp_path / "mine").names)

        succeeded(online(call=lambda: ex.Pack.from_pretrained("org/pack")))
        before = contents(tmp_path / "home" / "hub" / "models--org--pack" / "snapshots")
        assert json_of(online(call=call)) == ["gamma"]
        assert contents(tmp_path / "home" / "hub" / "models--org--pack" / "snapshots") == before

    def test_nor_a_part_of_a_pack_over_the_whole(self, local, tmp_path):
        before = contents(local)
        pack = ex.Pack.from_pretrained(local, adapters=["beta"])
        for options in ({}, {"path": local, "overwrite": True}):
            with pytest.raises(OptionError, match="would remove its other adapters"):
                pack.save(**options)
        assert contents(local) == before
        pack.save(tmp_path / "part")
        pack.add(make_adapter(tmp_path / "new", seed=4))
        pack.save()
        assert ex.Pack.open(tmp_path / "part").names == ["beta", "new"]


def files_of(hub, repo, revision="main"):
    return sorted(contents_of(hub.repos[repo][revision]))


def contents_of(folder):
    return {name: data for name, data in contents(folder).items() if data is not None}


class TestReferences:
    """Adapters whose codes are in the file of another one."""

    @pytest.fixture
    def references(self, hub, made, tmp_path):
        """`org/references` is an entropy-coded pack of alpha, beta, and two copies of alpha; its folder."""
        alpha = made / "in" / "alpha"
        with pytest.warns(DuplicateAdapterWarning, match="copy, other have the same update as alpha"):
            pack = ex.fit({"alpha": alpha, "beta": made / "in" / "beta", "copy": alpha, "other": alpha}, max_error=0.1)
        path = pack.save(tmp_path / "references")
        hub.repos["org/references"] = {"main": path}
        return path

    def test_come_with_the_codes(self, online, hub, references):
        def call():
            pack = ex.Pack.from_pretrained("org/references", adapters=["copy"])
            pack.verify()
            say([pack.names, pack.adapter("copy").modules[QUERY].down.tolist()])

        names, down = json_of(online(call=call))
        assert names == ["copy"]
        assert down == ex.Pack.open(references).adapter("alpha").modules[QUERY].down.tolist()
        assert hub.asked == sorted([MANIFEST, subspace_of(references), *of("alpha", "copy")])

    def test_are_pulled_with_codes_of_their_own(self, online, references, tmp_path):
        command = ("pull", "org/references", "--adapter", "copy", "--adapter", "other", "-o", tmp_path / "mine")
        succeeded(online(*command))
        pulled, whole = ex.Pack.open(tmp_path / "mine"), ex.Pack.open(references)
        pulled.verify()
        assert pulled.names == ["copy", "other"]
        assert pulled.references == {"other": "copy"}
        assert torch.equal(pulled.codes("other"), whole.codes("alpha"))

    def test_are_pushed_with_codes_of_their_own(self, online, hub, references):
        def call():
            ex.Pack.open(references).push_to_hub("org/new", adapters=["copy", "beta"], token=WRITER)
            pack = ex.Pack.from_pretrained("org/new")
            say([pack.names, pack.references, pack.adapter("copy").modules[QUERY].down.tolist()])

        expected = ex.Pack.open(references).adapter("alpha").modules[QUERY].down.tolist()
        assert json_of(online(call=call)) == [["beta", "copy"], {}, expected]

    def test_are_loaded_by_peft(self, online, hub, references):
        """The parent is fetched from the pack that the adapter is in."""

        def call():
            import huggingface_hub
            import peft.config

            from eigenlorax.tuner import EigenLoraxConfig, parents, resolve

            # if another test has imported PEFT before the fork, it uses the client of that time
            peft.config.hf_hub_download = huggingface_hub.hf_hub_download
            config = EigenLoraxConfig.from_pretrained("org/references", subfolder="adapters/copy")
            pack = resolve.resolve_subspace(config).pack
            codes = parents.Parent.of(config).with_codes({}, pack)["eigenlorax_coded"]
            say([pack.names, codes.tolist()])

        assert json_of(online(call=call)) == [["alpha"], ex.Pack.open(references).codes("alpha").tolist()]


class TestPush:
    @pytest.fixture
    def push(self, online, local):
        """Push the pack `local`, or what `pack` gives."""

        def run(repo="org/new", *, pack=None, env=None, **options):
            def call():
                made = (pack or (lambda: ex.Pack.open(local)))().push_to_hub(repo, **{"token": WRITER, **options})
                say([str(made), made.oid, made.pr_url])

            return online(call=call, **(env or {}))

        return run

    def test_makes_a_repository_that_is_this_pack(self, push, online, hub, local):
        url, oid, pull_request = json_of(push())
        assert (url, pull_request) == (f"{hub.url}/org/new/commit/{oid}", None)
        pushed = contents_of(hub.repos["org/new"]["main"])
        wanted = contents_of(local)
        assert pushed.keys() == wanted.keys() - {".lock"} | {".gitattributes"}
        assert all(pushed[file] == data for file, data in wanted.items() if file not in (".lock", CARD))
        assert hub.log == [{"repo": "org/new", "revision": "main", "message": "Upload a pack of 3 adapters"}]
        assert json_of(online(call=lambda: say(ex.Pack.from_pretrained("org/new").names))) == ["alpha", "beta", "gamma"]

    def test_integers_to_the_byte(self, push, online, hub, made, tmp_path):
        pack = ex.fit(made / "in", n_components=4, dtype="int4")
        place = pack.save(tmp_path / "integers")
        succeeded(push(pack=lambda: ex.Pack.open(place)))
        pushed, wanted = contents_of(hub.repos["org/new"]["main"]), contents_of(place)
        assert all(pushed[file] == data for file, data in wanted.items() if file not in (".lock", CARD))
        done = online(call=lambda: say(ex.Pack.from_pretrained("org/new").adapter("beta").modules[QUERY].down.tolist()))
        assert torch.equal(torch.tensor(json_of(done)), pack.adapter("beta").modules[QUERY].down)

    def test_a_basis_stays_where_it_is(self, online, hub, made, tmp_path):
        place = ex.fit(made / "in", max_error=0.1, basis=4).save(tmp_path / "based")

        def call():
            pack = ex.Pack.open(place)
            pack.push_to_hub("org/new", token=WRITER)
            pack.basis.verify()
            say(str(pack.basis.path))

        assert json_of(online(call=call)) == str(place)

    def test_a_basis_for_training_to_the_byte(self, push, online, hub, made, tmp_path):
        place = ex.fit(made / "in", max_error=0.1, basis=4).save(tmp_path / "based")
        succeeded(push("org/pack", pack=lambda: ex.Pack.open(place)))
        pushed, wanted = contents_of(hub.repos["org/pack"]["main"]), contents_of(place)
        assert all(pushed[file] == data for file, data in wanted.items() if file not in (".lock", CARD))
        assert len([file for file in pushed if str(file).startswith("subspace-")]) == 2

        def call():
            pack = ex.Pack.from_pretrained("org/pack", adapters=["beta"])
            pack.verify()
            say([pack.names, pack.basis.subspace.fingerprint, pack.on_basis(0.999).names])

        assert json_of(online(call=call)) == [["beta"], ex.Pack.open(place).basis.info.fingerprint, ["beta"]]
        # without a basis, the next pack leaves none there
        succeeded(push("org/pack", pack=lambda: ex.fit(made / "in", max_error=0.1)))
        assert len([file for file in files_of(hub, "org/pack") if file.startswith("subspace-")]) == 1

    def test_the_card_says_where_it_is(self, push, hub, local):
        succeeded(push())
        card = (hub.repos["org/new"]["main"] / CARD).read_text()
        assert 'ex.Pack.from_pretrained("org/new")' in card
        assert "eigenlorax export org/new alpha" in card
        assert 'base_model: "org/base"' in card
        assert 'ex.Pack.open(".")' in (local / CARD).read_text()

    def test_the_card_states_a_licence(self, push, hub):
        succeeded(push(license="cc-by-4.0"))
        assert '\nlicense: "cc-by-4.0"\n' in (hub.repos["org/new"]["main"] / CARD).read_text().partition("---\n\n")[0]
        assert "OptionError: license (--license) is 'MIT licence'" in push(license="MIT licence").err

    @pytest.mark.parametrize("base", ["/home/me/base", "./base", "~/base", "a/b/c", "größe des modells"])
    def test_a_base_model_that_the_hub_has_no_page_for(self, push, hub, tmp_path, base):
        adapter = make_adapter(tmp_path / "one", seed=1, base=base)
        succeeded(push(pack=lambda: ex.fit(adapter, n_components=2)))
        assert "base_model:" not in (hub.repos["org/new"]["main"] / CARD).read_text()
        assert ex.Pack.open(hub.repos["org/new"]["main"]).base_model == base

    @pytest.mark.parametrize("names", [["beta"], "beta", ["gamma", "beta", "beta"], []])
    def test_the_basis_and_some_adapters(self, push, hub, local, names):
        before = contents(local)
        succeeded(push(adapters=names))
        names = [names] if isinstance(names, str) else names
        files = [".gitattributes", CARD, MANIFEST, subspace_of(local), *of(*set(names))]
        assert files_of(hub, "org/new") == sorted(files)
        pack = ex.Pack.open(hub.repos["org/new"]["main"])
        pack.verify()
        assert pack.names == sorted(set(names))
        assert contents(local) == before

    def test_takes_the_place_of_the_pack_that_was_there(self, push, hub, made, local):
        succeeded(push("org/pack", pack=lambda: ex.Pack.open(made / "other"), commit_message="another one"))
        assert hub.log == [{"repo": "org/pack", "revision": "main", "message": "another one"}]
        files = [CARD, MANIFEST, "notes.txt", ".lock", subspace_of(made / "other"), *of("alpha", "delta")]
        assert files_of(hub, "org/pack") == sorted(files)
        pack = ex.Pack.open(hub.repos["org/pack"]["main"])
        pack.verify()
        assert pack.info == ex.Pack.open(made / "other").info

    def test_an_adapter_no_longer_carries_what_it_did(self, push, hub, tmp_path, local):
        dora = {"base_model.model.encoder.layer.0.query.lora_magnitude_vector": torch.ones(17)}
        plain, heavy = make_adapter(tmp_path / "a", seed=1), make_adapter(tmp_path / "b" / "a", seed=1, tensors=dora)
        succeeded(push(pack=lambda: ex.fit(heavy, n_components=2)))
        assert "adapters/a/carried.safetensors" in files_of(hub, "org/new")
        succeeded(push(pack=lambda: ex.fit(plain, n_components=2)))
        assert "adapters/a/carried.safetensors" not in files_of(hub, "org/new")
        ex.Pack.open(hub.repos["org/new"]["main"]).verify()

    def test_what_is_not_of_a_pack_stays(self, push, hub):
        before = contents_of(hub.repos["org/mixed"]["main"])
        succeeded(push("org/mixed"))
        after = contents_of(hub.repos["org/mixed"]["main"])
        assert before.items() <= after.items()
        ex.Pack.open(hub.repos["org/mixed"]["main"]).verify()

    def test_changes_that_are_not_saved_are_pushed(self, push, hub, local, tmp_path):
        before, new = contents(local), make_adapter(tmp_path / "new", seed=5)

        def changed():
            pack = ex.Pack.open(local)
            pack.remove("alpha")
            pack.add(new)
            return pack

        succeeded(push(pack=changed))
        assert ex.Pack.open(hub.repos["org/new"]["main"]).names == ["beta", "gamma", "new"]
        assert contents(local) == before

    def test_augmented_directions_are_rebuilt_from_their_seed(self, push, online, hub, local):
        succeeded(push(pack=lambda: ex.Pack.open(local).augment(3, seed=7)))
        pack = ex.Pack.open(hub.repos["org/new"]["main"])
        assert pack.subspace.fingerprint == ex.Pack.open(local).augment(3, seed=7).subspace.fingerprint

    def test_a_pack_that_has_grown(self, push, online, hub, local, tmp_path):
        late = make_adapter(tmp_path / "late", seed=5)
        with ex.Pack.edit(local) as pack:
            assert pack.add(late, extend=3).delta_error < 1e-6
        succeeded(push(pack=lambda: ex.Pack.open(local)))
        pushed = hub.repos["org/new"]["main"]
        files = {name: data for name, data in contents(local).items() if name not in (CARD, ".lock")}
        assert {name: contents(pushed)[name] for name in files} == files

        def pulled():
            pack = ex.Pack.from_pretrained("org/new", adapters=["alpha", "late"])
            pack.verify()
            errors = {name: pack.records[name].delta_error for name in pack.names}
            say([errors, pack.info.fingerprint, {name: pack.packed(name).subspace for name in pack.names}])

        errors, fingerprint, subspaces = json_of(online(call=pulled))
        opened = ex.Pack.open(local)
        assert errors == {name: opened.records[name].delta_error for name in ("alpha", "late")}
        assert fingerprint == opened.info.fingerprint == subspaces["late"]
        assert subspaces["alpha"] == opened.info.growth[0].fingerprint

    def test_from_one_repository_to_another(self, push, hub):
        succeeded(push("org/copy", pack=lambda: ex.Pack.from_pretrained("org/pack", adapters=["beta"])))
        assert ex.Pack.open(hub.repos["org/copy"]["main"]).names == ["beta"]

    def test_a_branch(self, push, hub):
        succeeded(push("org/pack", revision="smaller", adapters=["beta"]))
        assert ex.Pack.open(hub.repos["org/pack"]["smaller"]).names == ["beta"]
        assert ex.Pack.open(hub.repos["org/pack"]["main"]).names == ["alpha", "beta", "gamma"]
        succeeded(push("org/pack", revision="smaller", adapters=["gamma"]))
        assert ex.Pack.open(hub.repos["org/pack"]["smaller"]).names == ["gamma"]

    @pytest.mark.parametrize("token", [WRITER, "hf_reader"])
    def test_a_pull_request(self, push, hub, token):
        _, _, pull_request = json_of(push("org/pack", create_pr=True, adapters=["beta"], token=token))
        assert pull_request == f"{hub.url}/org/pack/discussions/1"
        assert ex.Pack.open(hub.repos["org/pack"]["refs/pr/1"]).names == ["beta"]
        assert ex.Pack.open(hub.repos["org/pack"]["main"]).names == ["alpha", "beta", "gamma"]

    def test_a_pull_request_to_a_branch(self, push, hub):
        done = push(create_pr=True, revision="v2")
        assert "OptionError: a pull request goes to main: remove the revision (v2), or create_pr." in done.err
        assert hub.requests == []

    def test_a_private_repository(self, push, hub):
        succeeded(push(private=True))
        assert hub.private["org/new"] == WRITER
        succeeded(push(private=True))

    def test_a_public_one_is_not_taken_for_private(self, push, hub):
        done = push("org/pack", private=True)
        assert "HubError: org/pack already exists and is public. Nothing was pushed" in done.err
        assert hub.log == []

    def test_the_name_alone_is_the_users_own(self, push, hub):
        succeeded(push("mine"))
        assert "me/mine" in hub.repos
        assert 'from_pretrained("me/mine")' in (hub.repos["me/mine"]["main"] / CARD).read_text()

    def test_the_token_of_the_environment(self, push, hub):
        succeeded(push(token=None, env={"HF_TOKEN": WRITER}))
        assert hub.tokens == {f"Bearer {WRITER}"}


@pytest.fixture(scope="module")
def _saved_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pack = ex.fit([make_adapter(folder / "alpha", seed=1)], n_components=3)
    for name in ("first", "second"):
        for checkpoint in make_run(folder / name, (10, 20, 30), seed=len(name)):
            pack.append(checkpoint)
    return pack.save(folder / "pack")


class TestHistories:
    """Versions of a history are fetched and pushed with it."""

    @pytest.fixture
    def runs(self, hub, _saved_runs, tmp_path):
        """`org/runs`: a pack of an adapter and two histories of three versions each."""
        folder = shutil.copytree(_saved_runs, tmp_path / "hub" / "runs")
        hub.repos["org/runs"] = {"main": folder}
        return ex.Pack.open(folder)

    def files(self, pack, *names):
        return {record.file for name in names for record in pack.histories[name]}

    def test_are_fetched_with_the_pack(self, online, hub, runs):
        def call():
            pack = ex.Pack.from_pretrained("org/runs")
            pack.verify()
            say([pack.names, sorted(pack.histories), pack["second@latest"].name])

        assert json_of(online(call=call)) == [["alpha"], ["first", "second"], "second@30"]

    def test_some_of_them(self, online, hub, runs):
        def call():
            pack = ex.Pack.from_pretrained("org/runs", adapters=["second"])
            pack.verify()
            say([pack.names, sorted(pack.histories), pack["second@20"].name])

        assert json_of(online(call=call)) == [[], ["second"], "second@20"]
        fetched = {path for path in hub.asked if path.startswith("versions/")}
        assert fetched == self.files(runs, "second")

    def test_are_pushed(self, online, hub, runs):
        def call():
            runs.push_to_hub("org/new", token=WRITER)
            say(sorted(ex.Pack.from_pretrained("org/new").histories))

        assert json_of(online(call=call)) == ["first", "second"]
        pushed = contents_of(hub.repos["org/new"]["main"])
        assert {str(file) for file in pushed if str(file).startswith("versions/")} == self.files(
            runs, "first", "second"
        )
        assert hub.log[0]["message"] == "Upload a pack of 1 adapter and 2 histories"

    def test_take_the_place_of_those_that_were_there(self, online, hub, runs):
        def call():
            pack = ex.Pack.from_pretrained("org/runs")
            pack.prune("first", keep_last=1)
            pack.push_to_hub("org/runs", adapters=["first"], token=WRITER)
            say([record.file for record in pack.histories["first"]])

        (file,) = json_of(online(call=call))
        pushed = contents_of(hub.repos["org/runs"]["main"])
        assert [str(path) for path in pushed if str(path).startswith("versions/")] == [file]

    def test_a_file_of_a_version_that_is_missing(self, online, hub, runs):
        file = runs.histories["first"]["20"].file
        (hub.repos["org/runs"]["main"] / file).unlink()
        done = online(call=lambda: ex.Pack.from_pretrained("org/runs"))
        assert f"org/runs has no {file} on the Hub, although its {MANIFEST} lists it" in done.err


@pytest.fixture(scope="module")
def _saved_users(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    common, members = make_users(folder, ["ann", "bob", "cem"])
    return ex.fit(members, reference=common).save(folder / "pack")


class TestPopulations:
    """Members that share a file are fetched and pushed with the common adapter, and removed from the repository."""

    @pytest.fixture
    def population(self, hub, _saved_users, tmp_path):
        """`org/users`: a population of three members in one file; its folder."""
        folder = shutil.copytree(_saved_users, tmp_path / "hub" / "users")
        hub.repos["org/users"] = {"main": folder}
        return folder

    def test_are_fetched_with_the_pack(self, online, hub, population):
        def call():
            pack = ex.Pack.from_pretrained("org/users")
            pack.verify()
            say([pack.histories["members"].labels, pack.histories["members"].is_population])

        assert json_of(online(call=call)) == [["common", "ann", "bob", "cem"], True]
        files = [str(path) for path in contents_of(population) if str(path).startswith("versions/")]
        assert len(files) == 2
        assert hub.asked == sorted([MANIFEST, subspace_of(population), *files])

    def test_a_member_is_exported_from_the_hub_as_from_the_folder(self, online, population, tmp_path):
        succeeded(online("export", "org/users", "members@bob", "-o", tmp_path / "fetched"))
        expected = ex.Pack.open(population).export(tmp_path / "local", ["members@bob"])["members@bob"]
        assert contents(tmp_path / "fetched" / expected.name) == contents(expected)

    def test_are_pulled_to_the_byte(self, online, population, tmp_path):
        succeeded(online("pull", "org/users", "-o", tmp_path / "mine"))
        pulled, wanted = contents_of(tmp_path / "mine"), contents_of(population)
        assert {path: data for path, data in pulled.items() if str(path) != CARD} == {
            path: data for path, data in wanted.items() if str(path) != CARD
        }

    def test_nothing_of_a_removed_member_is_in_the_next_commit(self, online, hub, population):
        pack = ex.Pack.open(population)
        removed = [pack.history_store.read(pack.histories["members"]["bob"])]
        removed += [pack["members@bob"].heads[HEAD].numpy().tobytes(), b"bob"]

        def call():
            edited = ex.Pack.from_pretrained("org/users")
            edited.remove("members@bob")
            edited.push_to_hub("org/users", token=WRITER)
            again = ex.Pack.from_pretrained("org/users")
            again.verify()
            say(again.histories["members"].labels)

        assert any(removed[0] in data for data in contents_of(population).values())
        assert json_of(online(call=call)) == ["common", "ann", "cem"]
        pushed = contents_of(hub.repos["org/users"]["main"])
        assert not [path for path, data in pushed.items() for trace in removed if trace in data]
        assert len([path for path in pushed if str(path).startswith("versions/")]) == 2


class TestPushThatFails:
    @pytest.fixture
    def push(self, online, local):
        def run(repo="org/pack", *, env=None, **options):
            return online(
                call=lambda: ex.Pack.open(local).push_to_hub(repo, **{"token": WRITER, **options}), **(env or {})
            )

        return run

    @pytest.mark.parametrize("repo", ["org/pack", "org/new"])
    @pytest.mark.parametrize("token", [None, "hf_reader"])
    def test_without_the_right_to(self, push, hub, repo, token):
        done = push(repo, token=token)
        assert f"HubError: cannot push to {repo}: " in done.err
        assert "A token with write access is needed (HF_TOKEN, or `hf auth login`)." in done.err
        assert hub.log == []

    def test_somebody_else_pushed_meanwhile(self, push, hub, made):
        def interfere():
            hub.new("org/pack", "main", hub.repos["org/pack"]["main"], lambda folder: (folder / "x").write_text("x"))

        hub.before_commit = interfere
        done = push()
        assert "PackBusyError: org/pack was changed on the Hub by another commit during the push" in done.err
        assert hub.log == []
        succeeded(push())

    @pytest.mark.parametrize("status", [403, 500])
    def test_a_hub_that_is_down(self, push, hub, status):
        hub.down = status
        assert "HubError: cannot push to org/pack: " in (done := push()).err
        assert str(status) in done.err

    def test_no_hub_at_all(self, push):
        done = push(env={"HF_ENDPOINT": "http://127.0.0.1:1"})
        assert "HubError: cannot push to org/pack: " in done.err

    def test_offline(self, push, hub):
        done = push(env={"HF_HUB_OFFLINE": "1"})
        assert "HubError: cannot push to org/pack: " in done.err
        assert hub.requests == []

    @pytest.mark.parametrize("repo", ["org/one/two", "org/", "org /one", "org/one@v2", "org/a--b"])
    def test_what_is_no_id(self, push, hub, repo):
        assert f"HubError: cannot push to {repo}: " in push(repo).err
        assert hub.log == []

    def test_an_adapter_that_is_not_there(self, push, hub):
        done = push(adapters=["beta", "delta"])
        assert "AdapterNameError: no adapter named 'delta' in the pack." in done.err
        assert hub.requests == []

    def test_a_damaged_pack(self, push, hub, local):
        path = local / "adapters" / "beta" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert "PackDamagedError" in push().err
        assert hub.requests == []
