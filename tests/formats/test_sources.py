"""From what a caller points at to adapters: the calls of Python, and corners that no shell reaches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.errors import AdapterNameError, FormatError, OptionError, SkippedAdapterWarning
from eigenlorax.formats.sources import AdapterSource, default_name, find_adapters
from planted import random_adapter


@pytest.fixture
def parent(tmp_path):
    make_adapters(tmp_path / "parent", "beta alpha")
    return tmp_path / "parent"


class TestFind:
    def test_one_folder_as_text_or_path_or_in_a_list(self, parent):
        folder = parent / "alpha"
        assert (
            find_adapters(folder)
            == find_adapters([folder])
            == find_adapters((folder,))
            == find_adapters(iter([folder]))
            == [AdapterSource(None, folder)]
        )
        assert find_adapters(str(folder)) == [AdapterSource(None, str(folder))]

    def test_a_parent_gives_its_children_by_name(self, parent):
        assert find_adapters(parent) == [AdapterSource(None, parent / "alpha"), AdapterSource(None, parent / "beta")]

    def test_several_keep_their_order(self, parent):
        found = find_adapters([parent / "beta", parent, "org/one"])
        assert [str(one.source) for one in found] == [
            *(str(parent / name) for name in ("beta", "alpha", "beta")),
            "org/one",
        ]

    def test_an_adapter_in_memory(self):
        adapter = random_adapter("mine", 1)
        assert find_adapters(adapter) == find_adapters([adapter]) == [AdapterSource(None, adapter)]

    def test_a_mapping_names_each(self, parent):
        adapter = random_adapter("mine", 1)
        found = find_adapters({"one": parent / "alpha", "two": adapter, "three": "org/x"})
        assert found == [
            AdapterSource("one", parent / "alpha"),
            AdapterSource("two", adapter),
            AdapterSource("three", "org/x"),
        ]

    def test_a_mapping_s_value_is_not_read_as_name_and_path(self, parent):
        assert find_adapters({"one": "two=org/x"}) == [AdapterSource("one", "two=org/x")]

    def test_a_path_is_never_read_as_name_and_path(self):
        assert find_adapters(Path("one=two")) == [AdapterSource(None, Path("one=two"))]

    @pytest.mark.parametrize(
        ("text", "name", "source"),
        [("a=org/x", "a", "org/x"), ("a=org/x@v=2", "a", "org/x@v=2"), ("A.b-c_9=./x", "A.b-c_9", "./x")],
    )
    def test_a_text_may_be_name_and_path(self, text, name, source):
        assert find_adapters(text) == [AdapterSource(name, source)]

    def test_a_folder_with_an_equals_sign_is_a_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_adapter(tmp_path / "lr=3", seed=1)
        assert find_adapters("lr=3") == [AdapterSource(None, "lr=3")]

    @pytest.mark.parametrize("nothing", [[], {}, (), iter([])])
    def test_nothing(self, nothing):
        with pytest.raises(OptionError, match="no adapter was passed"):
            find_adapters(nothing)

    @pytest.mark.parametrize("sources", ["", "  ", ["org/x", ""], {"a": ""}])
    def test_an_empty_text_is_not_the_current_folder(self, parent, monkeypatch, sources):
        monkeypatch.chdir(parent)
        with pytest.raises(OptionError, match="empty string"):
            find_adapters(sources)

    def test_no_folder_after_the_sign(self):
        with pytest.raises(OptionError, match="has no path after the '='"):
            find_adapters("a=")

    def test_a_name_that_is_none(self):
        with pytest.raises(
            AdapterNameError, match="x/y=z does not exist, and cannot be read as NAME=PATH.*not allowed"
        ):
            find_adapters("x/y=z")

    @pytest.mark.parametrize("name", ["one", "../one"])
    def test_one_name_for_many(self, parent, name):
        with pytest.raises(OptionError, match="names one adapter, but .* has 2"):
            find_adapters({name: parent})

    def test_a_mapping_s_names_are_checked_too(self, parent):
        with pytest.raises(AdapterNameError, match="'../one' is not allowed"):
            ex.fit({"../one": parent / "alpha"}, n_components=2)


class TestInAParentFolder:
    def test_hidden_folders_and_files_are_none(self, parent):
        make_adapter(parent / ".cache", seed=3)
        (parent / "notes.txt").write_text("mine")
        (parent / "logs").mkdir()
        assert [one.source.name for one in find_adapters(parent)] == ["alpha", "beta"]

    def test_links_are_followed(self, parent, tmp_path):
        (parent / "gamma").symlink_to(make_adapter(tmp_path / "elsewhere", seed=3))
        (parent / "loop").symlink_to(parent)
        (parent / "gone").symlink_to(tmp_path / "nowhere")
        assert [one.source.name for one in find_adapters(parent)] == ["alpha", "beta", "gamma"]

    def test_a_whole_model_is_passed_over_by_name(self, parent):
        (parent / "model").mkdir()
        (parent / "model/model.safetensors").write_bytes(b"")
        with pytest.warns(
            SkippedAdapterWarning, match="model was passed over: it holds model.safetensors but no adapt"
        ):
            assert len(find_adapters(parent)) == 2

    @pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
    def test_an_adapter_without_its_config_is_an_error_that_can_be_skipped(self, parent, file):
        (parent / "almost").mkdir()
        (parent / "almost" / file).write_bytes(b"")
        assert [one.source.name for one in find_adapters(parent)] == ["almost", "alpha", "beta"]
        with pytest.raises(FormatError, match=f"almost has no adapter_config.json beside {file}"):
            ex.fit(parent, n_components=2)
        with pytest.warns(SkippedAdapterWarning, match="left out almost"):
            assert ex.fit(parent, n_components=2, skip_bad=True).names == ["alpha", "beta"]

    def test_a_whole_model_alone_is_said_to_be_one(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match="It looks like the folder of a whole model"):
            find_adapters(tmp_path)

    def test_a_pack_is_passed_over_by_name(self, parent):
        ex.fit(parent, n_components=2).save(parent / "pack")
        with pytest.warns(SkippedAdapterWarning, match="pack was passed over: it is a pack"):
            # its adapters lie one level deeper, and are not looked for
            assert len(find_adapters(parent)) == 2

    def test_none_there_says_where_some_are(self, parent, tmp_path):
        with pytest.raises(
            FormatError, match=f"no adapter was found. There are adapters one level deeper: try {parent}"
        ):
            find_adapters(tmp_path)

    def test_none_anywhere(self, tmp_path):
        wanted = (
            r"and the folders in it have neither adapter_config.json nor .* \(.safetensors, .*no adapter was found.$"
        )
        with pytest.raises(FormatError, match=wanted):
            find_adapters(tmp_path)

    def test_what_is_an_adapter_itself_is_no_parent(self, parent):
        # PEFT saves several adapters of one model in a folder of the first
        make_adapter(parent / "alpha" / "second", seed=3)
        assert find_adapters(parent / "alpha") == [AdapterSource(None, parent / "alpha")]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (AdapterSource("given", "org/one"), "given"),
        (AdapterSource(None, "org/one@v2"), "org--one"),
        (AdapterSource(None, random_adapter("mine", 1)), "mine"),
        (AdapterSource("given", random_adapter("mine", 1)), "given"),
        (AdapterSource(None, Path("no/where")), "no--where"),
    ],
)
def test_the_name_before_it_is_read(tmp_path, monkeypatch, found, name):
    monkeypatch.chdir(tmp_path)
    assert default_name(found) == name


@pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning")
def test_fit_takes_all_of_them(parent):
    pack = ex.fit({"one": parent / "alpha", "two": random_adapter("x", 5, modules={"other": (19, 23)})}, n_components=2)
    assert pack.names == ["one", "two"]
