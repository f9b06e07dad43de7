"""Adapters behind URLs: read in ranges, by fsspec's drivers; what is found there is what would be found on disk."""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

import eigenlorax as ex
from adapters import MODULES, make_adapter, make_adapters
from children import load_command, needs_fork
from eigenlorax.errors import (
    AdapterNameError,
    FormatError,
    MissingExtraError,
    OptionError,
    SkippedAdapterWarning,
    UrlError,
)
from eigenlorax.formats import files, urls
from eigenlorax.formats.sources import AdapterSource, default_name, find_adapters
from fake_hub import FakeHub, running
from outcomes import assert_refused, contents, json_of
from remote_disk import Disk

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
QUERY = "encoder.layer.0.query"


def url(path: Path) -> str:
    return f"disk://{path}"


@pytest.fixture(autouse=True)
def _fresh():
    Disk.forget()
    yield
    Disk.forget()


@pytest.fixture
def parent(tmp_path):
    make_adapters(tmp_path / "parent", "beta alpha gamma", head=(2, 31))
    return tmp_path / "parent"


@pytest.fixture
def memory(parent):
    """The same adapters as `parent`, in memory."""
    driver = fsspec.filesystem("memory")
    for path in parent.rglob("*"):
        if path.is_file():
            driver.pipe_file(f"/bucket/{path.relative_to(parent).as_posix()}", path.read_bytes())
    yield "memory://bucket"
    driver.rm("/bucket", recursive=True)


def assert_same(one: ex.Adapter, other: ex.Adapter) -> None:
    assert (one.name, one.specs, one.source_config, one.file_bytes) == (
        other.name,
        other.specs,
        other.source_config,
        other.file_bytes,
    )
    for module in other.modules:
        assert torch.equal(one.modules[module].down, other.modules[module].down)
        assert torch.equal(one.modules[module].up, other.modules[module].up)
    assert {key: value.tolist() for key, value in one.heads.items()} == {
        key: value.tolist() for key, value in other.heads.items()
    }


class TestWhatIsAUrl:
    @pytest.mark.parametrize("text", ["s3://b/a", "gs://b", "hf://org/x@v", "memory://a", "file:///a", "S3://b=c/a"])
    def test_is(self, text):
        assert urls.is_url(text)

    @pytest.mark.parametrize(
        "text",
        ["C:\\adapters", "C:/adapters", "C://adapters", "org/x", "./s3:/x", "a=s3://b/c", "s3:b", Path("s3://b")],
    )
    def test_is_none(self, text):
        assert not urls.is_url(text)

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("s3://bucket/some/a", "a"),
            ("s3://bucket/some/a/", "a"),
            ("s3://bucket", "bucket"),
            ("s3://bucket/run@3", "run@3"),
            ("hf://org/x", "x"),
            ("hf://org/x@v2", "x"),
            ("hf://org/x@refs/pr/7", "x"),
            ("hf://org/x@refs%2Fpr%2F7/deep/b", "b"),
            ("hf://org/x/deep/b", "b"),
        ],
    )
    def test_gives_a_name(self, text, name):
        assert default_name(AdapterSource(None, text)) == name

    def test_a_url_may_have_an_equals_sign(self):
        assert find_adapters("mine=memory://no/where") == [AdapterSource("mine", "memory://no/where")]
        assert find_adapters("memory://lr=3/a") == [AdapterSource(None, "memory://lr=3/a")]

    def test_a_path_made_of_a_url_is_none(self):
        with pytest.raises(FormatError, match="s3:/bucket/a does not exist.*Pass a URL as a string, not as a Path"):
            ex.read_adapter(Path("s3://bucket/a"))

    def test_a_page_of_the_hub_is_no_folder(self):
        with pytest.raises(FormatError, match="is a page of the Hub. Pass the id of the repository: org/x.$"):
            ex.read_adapter("https://huggingface.co/org/x/tree/main")


class TestReading:
    def test_is_what_the_disk_has(self, parent):
        assert_same(ex.read_adapter(url(parent / "alpha")), ex.read_adapter(parent / "alpha"))

    def test_from_memory(self, parent, memory):
        assert_same(ex.read_adapter(f"{memory}/alpha"), ex.read_adapter(parent / "alpha"))

    def test_of_a_file_url(self, parent):
        assert_same(ex.read_adapter(f"file://{parent}/alpha"), ex.read_adapter(parent / "alpha"))
        assert find_adapters(f"file://{parent}") == find_adapters(parent)

    def test_of_a_subfolder(self, parent):
        assert_same(ex.read_adapter(url(parent), subfolder="alpha/"), ex.read_adapter(parent / "alpha"))

    def test_takes_no_more_than_is_asked_for(self, tmp_path):
        wide = {f"layer.{i}.query": (1009, 1013) for i in range(12)}
        folder = make_adapter(tmp_path / "a", seed=1, modules=wide)
        weights, size = str(folder / WEIGHTS), (folder / WEIGHTS).stat().st_size
        # not an `Adapter`: the tests' check of types looks into one, at a tensor
        files.open_folder(url(folder))
        assert Disk.read[weights] == 1 << 16 < size // 4
        adapter = ex.read_adapter(url(folder))
        Disk.forget()
        factors = adapter.modules["layer.3.query"]
        assert Disk.read[weights] == 4 * (factors.down.numel() + factors.up.numel())
        # the two are neighbours in the file
        assert Disk.requests[weights] == 1

    def test_takes_two_reads_for_a_long_header(self, tmp_path):
        long = {f"{'deep.' * 60}{i}": (5, 7) for i in range(150)}
        folder = make_adapter(tmp_path / "a", seed=1, modules=long, rank=2)
        files.open_folder(url(folder))
        length = 8 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
        assert 1 << 16 < length == Disk.read[str(folder / WEIGHTS)]
        assert_same(ex.read_adapter(url(folder)), ex.read_adapter(folder))

    def test_what_lies_far_apart_is_asked_for_apart(self, tmp_path):
        folder = make_adapter(tmp_path / "a", seed=1, modules={f"l.{i}": (4001, 4003) for i in range(5)})
        weights, size = str(folder / WEIGHTS), (folder / WEIGHTS).stat().st_size
        found = files.open_folder(url(folder))
        wanted = [f"base_model.model.l.{i}.lora_A.weight" for i in (4, 0)]
        Disk.forget()
        read = found.weights.load(wanted)
        assert Disk.requests[weights] == 2
        assert Disk.read[weights] == 2 * 4 * 3 * 4003 < size // 4
        assert all(torch.equal(one, load_file(weights)[key]) for one, key in zip(read, wanted, strict=True))

    def test_by_many_threads(self, parent):
        from concurrent.futures import ThreadPoolExecutor

        adapter, wanted = ex.read_adapter(url(parent / "alpha")), ex.read_adapter(parent / "alpha")
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(adapter.modules.__getitem__, [*MODULES] * 50))
        assert all(
            torch.equal(one.up, wanted.modules[module].up) for one, module in zip(read, [*MODULES] * 50, strict=True)
        )

    def test_in_a_process_it_was_sent_to(self, parent):
        adapter = ex.read_adapter(url(parent / "alpha"))
        with multiprocessing.get_context("spawn").Pool(1, importlib.import_module, ("remote_disk",)) as pool:
            sent = pool.apply(_query, (adapter,))
        assert sent == _query(adapter)

    def test_a_token_is_in_no_repr(self):
        assert "secret" not in repr(urls.folder("hf://org/x", token="secret"))


def _query(adapter: ex.Adapter) -> list[list[float]]:
    return adapter.modules[QUERY].down.tolist()


class TestParents:
    def test_give_their_children_by_name(self, parent):
        make_adapter(parent / ".hidden", seed=9)
        (parent / "logs").mkdir()
        (parent / "notes.txt").write_text("mine")
        assert find_adapters(url(parent)) == [
            AdapterSource(None, url(parent / name)) for name in ("alpha", "beta", "gamma")
        ]
        assert find_adapters(url(parent) + "/") == find_adapters(url(parent))

    def test_in_memory(self, memory):
        assert [default_name(one) for one in find_adapters(memory)] == ["alpha", "beta", "gamma"]

    def test_one_name_for_many(self, parent):
        with pytest.raises(OptionError, match="names one adapter, but disk://.* has 3"):
            find_adapters(f"one={url(parent)}")

    def test_without_any(self, parent):
        with pytest.raises(
            FormatError, match=f"no adapter was found. There are adapters one level deeper: try disk://{parent}"
        ):
            find_adapters(url(parent.parent))

    def test_pass_over_what_is_none(self, parent):
        (parent / "alpha" / CONFIG).unlink()
        (parent / "alpha" / WEIGHTS).rename(parent / "alpha/model.safetensors")
        with pytest.warns(SkippedAdapterWarning, match="disk://.*alpha was passed over: it holds model.safetens.* but"):
            assert len(find_adapters(url(parent))) == 2

    def test_one_without_its_config_is_an_error(self, parent):
        (parent / "alpha" / CONFIG).unlink()
        assert len(find_adapters(url(parent))) == 3
        with pytest.raises(FormatError, match=f"disk://.*alpha has no {CONFIG} beside {WEIGHTS}"):
            ex.fit(url(parent), n_components=2)

    def test_are_listed_anew(self, memory, parent):
        assert len(find_adapters(memory)) == 3
        for file in (CONFIG, WEIGHTS):
            fsspec.filesystem("memory").pipe_file(f"/bucket/delta/{file}", (parent / "alpha" / file).read_bytes())
        assert len(find_adapters(memory)) == 4


class TestVerbs:
    def test_a_fit_is_byte_for_byte_the_same(self, parent, memory, tmp_path):
        ex.fit(parent, n_components=3).save(tmp_path / "one")
        ex.fit(memory, n_components=3).save(tmp_path / "two")
        ex.fit([url(parent / "alpha"), f"beta={memory}/beta", parent / "gamma"], n_components=3).save(
            tmp_path / "three"
        )
        assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")

    def test_add(self, parent, memory):
        pack = ex.fit([parent / "alpha", parent / "beta"], n_components=9)
        pack.add(f"{memory}/gamma")
        assert pack.names == ["alpha", "beta", "gamma"]

    def test_a_report_finds_its_originals(self, parent, memory):
        from eigenlorax.reports import originals

        pack = ex.fit(parent, n_components=2)
        found = originals.find(pack, memory, lambda *_: None)
        assert sorted(found.adapters) == ["alpha", "beta", "gamma"]

    def test_nothing_is_written_to_a_url(self, parent, tmp_path):
        from eigenlorax.cli.main import main

        with pytest.raises(SystemExit) as left:
            main(["fit", str(parent), "-o", "s3://bucket/pack"])
        assert left.value.code == 2
        with pytest.raises(OptionError, match="s3://bucket/a is a URL. Adapters can be read"):
            ex.write_adapter(ex.read_adapter(parent / "alpha"), "s3://bucket/a")


class TestWhatFails:
    def test_nothing_there(self, parent):
        with pytest.raises(UrlError, match="disk://.*/delta does not exist.$"):
            ex.read_adapter(url(parent / "delta"))
        with pytest.raises(UrlError, match="delta does not exist"):
            # a slip in a name is no broken adapter
            ex.fit([url(parent / "delta"), parent / "alpha"], n_components=2, skip_bad=True)

    def test_a_file(self, parent):
        with pytest.raises(FormatError, match=f"{WEIGHTS} is not a folder"):
            ex.read_adapter(url(parent / "alpha" / WEIGHTS))

    def test_no_config(self, parent):
        (parent / "alpha" / CONFIG).unlink()
        with pytest.raises(FormatError, match=f"disk://.*alpha has no {CONFIG}"):
            ex.read_adapter(url(parent / "alpha"))

    def test_a_pack(self, parent, tmp_path):
        ex.fit(parent, n_components=2).save(tmp_path / "pack")
        with pytest.raises(FormatError, match="disk://.*pack is a pack, not an adapter"):
            ex.read_adapter(url(tmp_path / "pack"))

    def test_no_weights(self, parent):
        (parent / "alpha" / WEIGHTS).unlink()
        with pytest.raises(FormatError, match=f"disk://.*alpha has neither {WEIGHTS} nor {PICKLE}"):
            ex.read_adapter(url(parent / "alpha"))

    @pytest.mark.parametrize("allow", [True, False])
    def test_a_pickle(self, tmp_path, allow):
        folder = make_adapter(tmp_path / "a", seed=1, pickled=True)
        with pytest.raises(FormatError, match="a pickle, which cannot be read from a URL. Download the folder"):
            ex.read_adapter(url(folder), allow_pickle=allow)

    def test_a_name_that_is_none(self, parent):
        (parent / "alpha").rename(parent / "al pha")
        with pytest.raises(AdapterNameError, match="'al pha' is not allowed"):
            ex.read_adapter(url(parent / "al pha"))

    @pytest.mark.parametrize("end", [0, 7, 200, -1])
    def test_a_file_that_is_not_whole(self, parent, end):
        weights = parent / "alpha" / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:end])
        with pytest.raises(FormatError, match=f"disk://.*alpha/{WEIGHTS} is not a valid safetensors file"):
            ex.read_adapter(url(parent / "alpha"))

    def test_a_file_that_shrinks(self, parent):
        adapter = ex.read_adapter(url(parent / "alpha"))
        os.truncate(parent / "alpha" / WEIGHTS, 1500)
        with pytest.raises(FormatError, match=f"disk://.*{WEIGHTS}: .* bytes from .* were requested, got"):
            list(adapter.modules.values())

    def test_a_file_that_goes(self, parent):
        adapter = ex.read_adapter(url(parent / "alpha"))
        (parent / "alpha" / WEIGHTS).unlink()
        with pytest.raises(UrlError, match=f"{WEIGHTS} no longer exists"):
            adapter.modules[QUERY]

    @pytest.mark.parametrize("skip_bad", [True, False])
    @pytest.mark.parametrize("place", [CONFIG, WEIGHTS])
    def test_a_connection_that_breaks(self, parent, place, skip_bad):
        class DriversOwnError(Exception):
            pass

        def break_(path: str) -> None:
            if path.endswith(f"beta/{place}"):
                raise DriversOwnError("reset by peer.")

        Disk.happen = break_
        # what may be well is not left out
        with pytest.raises(
            UrlError, match=f"disk://.*beta/{place} could not be read: reset by peer \\(DriversOwnError\\)"
        ):
            ex.fit(url(parent), n_components=2, skip_bad=skip_bad)

    def test_no_permission(self, parent):
        def refuse(path: str) -> None:
            raise PermissionError("Forbidden")

        Disk.happen = refuse
        with pytest.raises(UrlError, match="may not be read: Forbidden. Set the keys"):
            ex.read_adapter(url(parent / "alpha"))

    def test_no_driver(self):
        fsspec.register_implementation("absent", "absent_driver.FileSystem", errtxt="Install absent", clobber=True)
        with pytest.raises(MissingExtraError, match="absent://bucket/a.* needs a driver.*pip install absent_driver$"):
            ex.fit("absent://bucket/a", n_components=2)

    @pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
    def test_the_package_of_a_driver(self, scheme, package):
        assert urls._package(f"{scheme}://bucket/a") == package

    def test_no_such_scheme(self):
        with pytest.raises(UrlError, match="nonsense://x could not be read: Protocol not known: nonsense"):
            find_adapters("nonsense://x")

    def test_only_this_machine(self, parent):
        with pytest.raises(OptionError, match="is not on this machine, which local_files_only requires"):
            ex.read_adapter(url(parent / "alpha"), local_files_only=True)


@pytest.fixture(scope="module")
def _imported():
    load_command()


@needs_fork
@pytest.mark.usefixtures("_imported")
class TestTheHub:
    @pytest.fixture
    def hub(self, parent, tmp_path):
        wide = {f"layer.{i}.query": (1009, 1013) for i in range(12)}
        make_adapter(tmp_path / "wide", seed=1, modules=wide)
        shutil.copytree(parent / "beta", tmp_path / "v2" / "deep" / "b")
        repos = {
            "org/many": {"main": parent},
            "org/wide": {"main": tmp_path / "wide", "v2": tmp_path / "v2", "refs/pr/1": tmp_path / "v2"},
            "org/secret": {"main": parent / "alpha"},
        }
        with running(FakeHub(repos, private={"org/secret": "hf_right"})) as server:
            yield server

    def test_a_repository_is_read_in_ranges(self, online, hub, tmp_path):
        names = [f"base_model.model.layer.3.query.lora_{side}.weight" for side in "AB"]

        def read():
            found = files.open_folder("hf://org/wide")
            sys.stdout.write(json.dumps([found.name, found.weights.load(names)[1].tolist()]))

        name, up = json.loads(online(call=read).out)
        assert name == "wide"
        assert up == load_file(tmp_path / "wide" / WEIGHTS)[names[1]].tolist()
        size = (tmp_path / "wide" / WEIGHTS).stat().st_size
        assert hub.sent[WEIGHTS] == (1 << 16) + 4 * 3 * (1009 + 1013) < size // 2

    def test_a_folder_of_adapters(self, online, hub, parent, tmp_path):
        done = json_of(online("fit", "hf://org/many", "-o", tmp_path / "pack", "-k", "3", "--no-report", "--json"))
        assert sorted(done["adapter_records"]) == ["alpha", "beta", "gamma"]
        ex.fit(parent, n_components=3).save(tmp_path / "wanted")
        assert contents(tmp_path / "pack") == contents(tmp_path / "wanted")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["hf://org/wide@v2/deep/b"],
            ["hf://org/wide/deep/b", "--revision", "v2"],
            ["hf://org/wide@refs/pr/1/deep/b"],
            ["hf://org/wide/deep/b", "--revision", "refs/pr/1"],
        ],
    )
    def test_at_a_revision(self, online, hub, arguments):
        assert json_of(online("inspect", *arguments, "--json"))["modules"] is not None

    def test_two_revisions(self, online, hub):
        done = online("inspect", "hf://org/wide@v2/deep/b", "--revision", "main")
        assert_refused(done, 3, "two revisions", "'v2'", "'main'")

    def test_a_private_one_takes_a_token(self, online, hub):
        assert_refused(online("inspect", "hf://org/secret"), 3, "hf://org/secret does not exist", "HF_TOKEN")
        json_of(online("inspect", "hf://org/secret", "--json", HF_TOKEN="hf_right"))

    def test_out_of_reach(self, online, hub):
        assert_refused(
            online("inspect", "hf://org/wide", HF_ENDPOINT="http://127.0.0.1:1"), 3, "hf://org/wide", "could not"
        )

    def test_offline(self, online, hub):
        assert_refused(online("inspect", "hf://org/wide", HF_HUB_OFFLINE="1"), 3, "hf://org/wide", "could not be read")
        assert hub.requests == []
