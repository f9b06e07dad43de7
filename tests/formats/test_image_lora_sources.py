"""Where LoRA files of image models are found: folders, URLs and repositories, as the programs that write them leave
them."""

import importlib
import shutil

import pytest
from safetensors.torch import save_file
from torch import ones

import eigenlorax as ex
import lora_files
from adapters import make_adapter
from children import load_command, needs_fork
from eigenlorax.errors import AdapterNameError, FormatError, OptionError, SkippedAdapterWarning, UrlError
from eigenlorax.formats import read_adapter
from eigenlorax.formats.sources import default_name, find_adapters
from fake_hub import FakeHub, running
from lora_files import planted
from outcomes import assert_refused, json_of

# kohya files of many alphas, which diffusers misreads
pytestmark = pytest.mark.filterwarnings("ignore:.*alphas are written unchanged")
FILE = "pytorch_lora_weights.safetensors"
MODULES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (19, 768),
    "unet.mid_block.attentions.0.proj_in": (7, 5, 1, 1),
}


def make(path, seed=1, dialect="kohya"):
    path.parent.mkdir(parents=True, exist_ok=True)
    return lora_files.write(path, planted(MODULES, seed=seed), dialect)


@pytest.fixture
def styles(tmp_path):
    """A folder of files, with a folder as diffusers saves it, and one of PEFT's."""
    make(tmp_path / "styles" / "ink.safetensors", 1)
    make(tmp_path / "styles" / "Oil, v2 (final).safetensors", 2, "diffusers")
    make(tmp_path / "styles" / "pixel" / FILE, 3, "processor")
    return tmp_path / "styles"


class TestOnDisk:
    def test_a_folder_gives_its_files_and_its_folders(self, styles):
        pack = ex.fit(styles, n_components=4)
        assert pack.names == ["Oil_v2_final", "ink", "pixel"]

    def test_files_one_by_one(self, styles):
        assert [default_name(one) for one in find_adapters(sorted(styles.glob("*.safetensors")))] == [
            "Oil_v2_final",
            "ink",
        ]
        assert read_adapter(styles / "pixel").name == "pixel"
        # what all are called says nothing
        assert read_adapter(styles / "pixel" / FILE).name == "pixel"

    def test_a_folder_s_name_is_mended_as_a_file_s_is(self, tmp_path):
        make(tmp_path / "Öl (v2)" / FILE)
        assert read_adapter(tmp_path / "Öl (v2)").name == read_adapter(tmp_path / "Öl (v2)" / FILE).name == "l_v2"

    def test_capitals(self, styles):
        loud = (styles / "ink.safetensors").rename(styles / "INK.SAFETENSORS")
        assert read_adapter(loud).name == "INK"

    def test_a_name_may_be_given(self, styles):
        found = find_adapters([f"mine={styles / 'ink.safetensors'}"])
        assert [one.name for one in found] == ["mine"]
        assert ex.fit(found[0].source, n_components=2).names == ["ink"]
        assert read_adapter(styles / "ink.safetensors", name="mine").name == "mine"

    def test_one_that_is_not_there_is_not_asked_of_the_hub(self):
        with pytest.raises(FormatError, match=r"^styles/oil.safetensors does not exist\.$"):
            read_adapter("styles/oil.safetensors")

    def test_two_of_one_name(self, styles, tmp_path):
        other = make(tmp_path / "more" / "Ink.safetensors")
        with pytest.raises(AdapterNameError, match="two adapters have the same name, 'Ink'"):
            ex.fit([styles / "ink.safetensors", other], n_components=2)

    def test_one_name_for_many(self, styles):
        with pytest.raises(OptionError, match="names one adapter, but .* has 3"):
            find_adapters({"mine": styles})

    def test_what_is_no_lora_is_passed_over_by_name(self, styles):
        save_file({"decoder.weight": ones(3)}, styles / "vae.safetensors")
        with pytest.warns(SkippedAdapterWarning, match="vae.safetensors was passed over: it is not a LoRA"):
            assert len(find_adapters(styles)) == 3

    def test_none_there(self, tmp_path):
        save_file({"decoder.weight": ones(3)}, tmp_path / "vae.safetensors")
        with pytest.raises(FormatError, match="no adapter was found. None of its 1 .safetensors files is a LoRA"):
            find_adapters(tmp_path)

    def test_beside_folders_of_peft_s(self, styles):
        make_adapter(styles / "text", seed=4)
        assert [default_name(one) for one in find_adapters(styles)] == ["pixel", "text", "Oil_v2_final", "ink"]

    def test_an_adapter_of_peft_s_with_such_a_file_is_peft_s(self, tmp_path):
        folder = make_adapter(tmp_path / "a", seed=4)
        make(folder / FILE)
        assert read_adapter(folder).origin is None

    def test_what_is_added_to_a_pack(self, styles, tmp_path):
        pack = ex.fit(styles, n_components=4)
        pack.add(make(tmp_path / "new.safetensors", 9), warn_above=1.0)
        pack.save(tmp_path / "pack")
        written = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out", "new")
        assert written == {"new": tmp_path / "out" / "new.safetensors"}

    def test_a_report_finds_the_originals(self, styles):
        pytest.importorskip("matplotlib")
        pack = ex.fit(styles, n_components=2)
        assert {row.name for row in ex.report(pack, styles).adapters} == set(pack.names)


class TestBehindAUrl:
    def test_a_file_and_a_folder(self, styles):
        file = read_adapter(f"file://{styles}/ink.safetensors")
        assert (file.name, file.origin.format) == ("ink", "kohya")
        assert [default_name(one) for one in find_adapters(f"file://{styles}")] == ["pixel", "Oil_v2_final", "ink"]

    def test_in_ranges(self, styles):
        import fsspec

        driver = fsspec.filesystem("memory")
        driver.put(str(styles), "/styles", recursive=True)
        try:
            found = read_adapter("memory://styles/ink.safetensors")
            wanted = read_adapter(styles / "ink.safetensors")
            assert found.name == "ink"
            for module, factors in wanted.modules.items():
                assert found.modules[module].down.equal(factors.down)
            assert read_adapter("memory://styles/pixel").name == "pixel"
            assert len(find_adapters("memory://styles")) == 3
            with pytest.raises(UrlError, match=r"memory://styles/oil.safetensors does not exist"):
                read_adapter("memory://styles/oil.safetensors")
        finally:
            driver.rm("/styles", recursive=True)


@needs_fork
class TestOnTheHub:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _imported(cls):
        load_command()
        # what it needs in turn; itself it is imported anew in each fork
        importlib.import_module("huggingface_hub.hf_api")

    @pytest.fixture
    def hub(self, styles, tmp_path):
        make(tmp_path / "one" / "Ink v1.safetensors")
        (tmp_path / "one" / "README.md").write_text("a card")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        make(tmp_path / "two" / "Ink v2.safetensors")
        (tmp_path / "none").mkdir()
        save_file({"decoder.weight": ones(3)}, tmp_path / "none" / "vae.safetensors")
        shutil.copytree(tmp_path / "one", tmp_path / "beside")
        shutil.copy(tmp_path / "none" / "vae.safetensors", tmp_path / "beside")
        names = {"pixel": styles / "pixel", **{name: tmp_path / name for name in ("one", "two", "none", "beside")}}
        with running(FakeHub({f"org/{name}": {"main": folder} for name, folder in names.items()})) as server:
            yield server

    @pytest.mark.parametrize("name", ["pixel", "one", "beside"])
    def test_a_repository(self, online, hub, name):
        found = json_of(online("inspect", f"org/{name}", "--json"))
        assert (found["modules"], found["family"]) == (2, "Stable Diffusion 1")
        assert (FILE if name == "pixel" else "Ink%20v1.safetensors") in hub.fetched

    def test_two_files_are_two_loras(self, online, hub):
        assert_refused(online("inspect", "org/two"), 3, "org/two has 2 LoRA files", "hf://org/two/Ink v1.safetensors")
        assert json_of(online("inspect", "hf://org/two/Ink v1.safetensors", "--json"))["modules"] == 2

    def test_none(self, online, hub):
        assert_refused(online("inspect", "org/none"), 3, "none of its .safetensors files, such as vae.safetensors")
