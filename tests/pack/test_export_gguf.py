"""Export of packs in llama.cpp's format, from Python and from the command line."""

import json

import gguf
import pytest
import torch

import eigenlorax as ex
import gguf_models as models
from eigenlorax.cli import main
from eigenlorax.errors import FormatError, OptionError, PackExistsError


@pytest.fixture
def pack(tmp_path):
    """A pack of two adapters in float32, which represents both, and their base model's config."""
    adapters = [models.adapter(name=name, rank=rank) for name, rank in (("french", 4), ("german", 3))]
    models.write_config(tmp_path / "base")
    pack = ex.fit(adapters, n_components=7, dtype="float32")
    pack.save(tmp_path / "pack")
    return pack


def run(*arguments):
    """Run `eigenlorax …` in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def test_files_are_those_of_the_adapters(pack, tmp_path):
    written = pack.export(tmp_path / "loras", format="gguf", base_config=tmp_path / "base")
    assert {name: path.name for name, path in written.items()} == {"french": "french.gguf", "german": "german.gguf"}
    for name, path in written.items():
        alone = ex.write_adapter(
            pack.adapter(name), tmp_path / "alone" / name, format="gguf", base_config=tmp_path / "base"
        )
        assert path.read_bytes() == alone.read_bytes()
        back = ex.read_adapter(path, base_config=tmp_path / "base")
        exact = models.adapter(name=name, rank=4 if name == "french" else 3)
        for module, factors in exact.modules.items():
            found = back.modules[module]
            update = factors.scaling * factors.up @ factors.down
            torch.testing.assert_close(found.scaling * found.up @ found.down, update, rtol=1e-4, atol=1e-3)


def test_the_command_line_writes_a_modelfile_and_eight_bits(pack, tmp_path, capsys):
    options = ["--format", "gguf", "--base-config", tmp_path / "base", "--dtype", "q8_0", "--modelfile", "smollm2:135m"]
    run("export", tmp_path / "pack", "german", "-o", tmp_path / "loras", *options, "--json")
    assert "german" in json.loads(capsys.readouterr().out)["written"]
    assert (tmp_path / "loras/german.Modelfile").read_text() == "FROM smollm2:135m\nADAPTER ./german.gguf\n"
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "loras/german.gguf").tensors}
    # rows of 48 and of 3 numbers are no multiples of 32, which Q8_0 needs; those of down_proj have 64
    assert "Q8_0" in types


def test_the_error_of_eight_bits_is_that_of_the_file(tmp_path):
    # most modules have another scaling than the file, so that their up factors are multiplied before they are rounded
    adapter = models.adapter(rank=32, scaling=lambda n: 0.75 if n % 3 else 4 / 32**0.5)
    pack = ex.fit([adapter], energy=1.0, dtype="float32")
    (path,) = pack.export(tmp_path / "loras", format="gguf", dtype="q8_0", base_config=models.config()).values()
    back, exact = ex.read_adapter(path, base_config=models.config()), pack.adapter("french")
    square = error = 0.0
    for module, factors in exact.modules.items():
        update, found = (f.scaling * f.up.double() @ f.down.double() for f in (factors, back.modules[module]))
        square, error = square + float(update.square().sum()), error + float((found - update).square().sum())
    assert pack.export_errors("french", "q8_0").rounding == pytest.approx((error / square) ** 0.5, rel=1e-6)


def test_convert_writes_it_and_reads_it_back(pack, tmp_path, capsys):
    base = ["--base-config", tmp_path / "base"]
    pack.export(tmp_path / "loras", ["french"])
    run("convert", tmp_path / "loras/french", tmp_path / "f.gguf", "--to", "gguf", *base)
    capsys.readouterr()
    run("convert", tmp_path / "f.gguf", tmp_path / "again", "--to", "peft", *base, "--json")
    assert json.loads(capsys.readouterr().out)["from"] == "gguf"
    first, again = (ex.read_adapter(tmp_path / path) for path in ("loras/french", "again"))
    for module, factors in first.modules.items():
        assert torch.equal(again.modules[module].down, factors.down)
        assert torch.equal(again.modules[module].up, factors.up)


def test_convert_with_a_stated_format(pack, tmp_path):
    base = ["--base-config", tmp_path / "base"]
    pack.export(tmp_path / "loras", ["french"])
    run("convert", tmp_path / "loras/french", tmp_path / "f", "--from", "peft", "--to", "gguf", *base)
    run("convert", tmp_path / "f.gguf", tmp_path / "again", "--from", "gguf", "--to", "peft", *base)
    assert ex.read_adapter(tmp_path / "again").specs == ex.read_adapter(tmp_path / "loras/french").specs


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "gguf"}, OptionError, "--base-config"),
        ({"base_config": "base"}, OptionError, "need format='gguf'"),
        ({"modelfile": "llama3"}, OptionError, "need format='gguf'"),
        ({"format": "gguf", "base_config": "nowhere"}, FormatError, "does not exist"),
        ({"format": "gguf", "base_config": "base", "modelfile": "two words"}, OptionError, "modelfile is 'two words'"),
        ({"format": "gguf", "base_config": "base", "dtype": "q4_0"}, OptionError, "q4_0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(pack, tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        pack.export("loras", **options)
    assert not (tmp_path / "loras").exists()


def test_an_existing_file_stays(pack, tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/french.Modelfile").write_text("mine")
    with pytest.raises(PackExistsError):
        pack.export(tmp_path / "loras", format="gguf", base_config=tmp_path / "base", modelfile="llama3")
    assert not (tmp_path / "loras/french.gguf").exists()
