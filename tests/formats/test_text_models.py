"""Adapters of text models are of no image model, whatever their modules' names begin with."""

import pytest
import torch

import eigenlorax as ex
import text_models
from adapters import make_adapter
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import FormatError, NothingSharedWarning, OptionError
from eigenlorax.formats import checks, write_adapter
from eigenlorax.formats.image import families
from eigenlorax.formats.image import tensor_keys as formats_names
from eigenlorax.formats.safetensors_file import to_bytes

GPT2 = {f"transformer.h.{i}.{name}": (31, 21) for i in range(2) for name in ("attn.c_attn", "mlp.c_proj")}
FLUX = {f"transformer.transformer_blocks.{i}.attn.to_q": (31, 21) for i in range(2)}


@pytest.fixture(scope="module", params=text_models.NAMES)
def modules(request):
    return text_models.modules(request.param)


@pytest.mark.parametrize("width", [16, 768, 1024, 1280, 2048])
def test_have_no_family(modules, width):
    assert families.families((module, width) for module in modules) == frozenset()


@pytest.mark.parametrize("dialect", formats_names.DIALECTS)
def test_have_no_name_in_a_file_of_an_image_model(modules, dialect, tmp_path):
    factors = LoRAFactors(torch.ones(2, 5), torch.ones(7, 2), 1.0)
    adapter = from_factors("words", dict.fromkeys(modules, factors))
    with pytest.raises(
        OptionError, match="'words' does not belong to an image model: its module .* in the format 'peft'"
    ):
        write_adapter(adapter, tmp_path / "words", format=dialect)
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_with_their_names_is_refused(modules, tmp_path):
    file = tmp_path / "words.safetensors"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 5) for module in modules}
    file.write_bytes(to_bytes(tensors | {f"{module}.lora_B.weight": torch.ones(7, 2) for module in modules}, {}))
    with pytest.raises(FormatError, match="modules belong to no supported model, such as"):
        ex.read_adapter(file)


@pytest.fixture
def pack(tmp_path):
    """Of an adapter of FLUX and one of GPT-2, by the names of their modules."""
    folders = [
        make_adapter(tmp_path / name, seed=1, modules=modules) for name, modules in {"a": FLUX, "b": GPT2}.items()
    ]
    with pytest.warns(
        NothingSharedWarning, match="'a', with modules like 'transformer.transformer_blocks.0.attn.to_q'"
    ):
        ex.fit(folders, n_components=4).save(tmp_path / "pack")
    return tmp_path / "pack"


@pytest.mark.parametrize("dialect", formats_names.DIALECTS)
def test_export_writes_nothing_where_one_adapter_is_of_a_text_model(pack, tmp_path, dialect):
    with pytest.raises(
        OptionError, match="'b' does not belong to an image model: its module 'transformer.h.0.attn.c_attn'"
    ):
        ex.Pack.open(pack).export(tmp_path / "out", format=dialect)
    assert not (tmp_path / "out").exists()
    assert ex.Pack.open(pack).export(tmp_path / "out", "a", format=dialect).keys() == {"a"}


def test_inspect_and_the_card_name_no_image_model(tmp_path):
    folder = make_adapter(tmp_path / "a", seed=1, modules=GPT2)
    assert checks.family(ex.read_adapter(folder)) is None
    pack = ex.fit(folder, n_components=4)
    assert pack.summary.family is None
    pack.save(tmp_path / "pack")
    card = (tmp_path / "pack" / "README.md").read_text()
    assert "diffusers" not in card
    assert "text-to-image" not in card
