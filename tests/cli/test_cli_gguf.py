"""GGUF files of Llama on the command line: `--base-config` says how llama.cpp has reordered their rows."""

import json

import pytest
import torch

import eigenlorax as ex
import gguf_models as models
from eigenlorax.cli import main

NAMES = ("french", "german", "greek")


def run(*arguments, code=0):
    """Run `eigenlorax …` in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == code


def update(factors):
    return factors.scaling * factors.up.double() @ factors.down.double()


@pytest.fixture
def adapters(tmp_path):
    """Adapters of one Llama: the first two in GGUF, the third as PEFT's folder; and the base model's config."""
    models.write_config(tmp_path / "base")
    made = {name: models.adapter(name=name, rank=rank) for name, rank in zip(NAMES, (4, 3, 2), strict=True)}
    for name in NAMES[:2]:
        ex.write_adapter(made[name], tmp_path / name, format="gguf", base_config=tmp_path / "base")
    ex.write_adapter(made["greek"], tmp_path / "greek", format="peft")
    return made


def test_a_pack_of_gguf_files_has_their_updates(adapters, tmp_path, capsys):
    french, german = tmp_path / "french.gguf", tmp_path / "german.gguf"
    base, pack = ["--base-config", tmp_path / "base"], tmp_path / "pack"
    run("fit", french, tmp_path / "greek", "-o", pack, "-k", "9", "--dtype", "float32", *base)
    run("add", pack, german, "--extend", "4", *base)
    run("report", pack, "-a", french, "-a", german, "-o", tmp_path / "report.json", *base)
    run("refit", pack, "-a", french, "-a", german, "-o", tmp_path / "again", *base)
    capsys.readouterr()
    run("inspect", pack, "--verify", german, "--json", *base)
    assert json.loads(capsys.readouterr().out)["adapters"]["german"]["holds"]
    for folder in (pack, tmp_path / "again"):
        for name in NAMES:
            stored = ex.Pack.open(folder).adapter(name, torch.float32)
            for module, factors in adapters[name].modules.items():
                torch.testing.assert_close(update(stored.modules[module]), update(factors), rtol=1e-4, atol=1e-3)


def test_merged_and_inspected_files_have_peft_names(adapters, tmp_path, capsys):
    french, base = tmp_path / "french.gguf", ["--base-config", tmp_path / "base"]
    run("inspect", french, "--json", *base)
    assert json.loads(capsys.readouterr().out)["modules"] == len(adapters["french"].specs)
    run("merge", french, tmp_path / "german.gguf", "-o", tmp_path / "merged", *base)
    merged = ex.read_adapter(tmp_path / "merged")
    for module, factors in merged.modules.items():
        mean = (update(adapters["french"].modules[module]) + update(adapters["german"].modules[module])) / 2
        torch.testing.assert_close(update(factors), mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("verb", ["inspect {}", "fit {} -o pack", "merge {} {} -o merged"])
def test_without_the_config_the_message_names_the_option(verb, adapters, tmp_path, capsys):
    run(*verb.format(*[tmp_path / f"{name}.gguf" for name in NAMES]).split(), code=3)
    assert "--base-config DIR" in capsys.readouterr().err.replace("\n", " ")


def test_a_config_of_another_model_is_an_error(adapters, tmp_path, capsys):
    models.write_config(tmp_path / "other", "Qwen2ForCausalLM")
    run("fit", tmp_path / "french.gguf", "-o", tmp_path / "pack", "--base-config", tmp_path / "other", code=3)
    assert "'llama'" in capsys.readouterr().err
    assert not (tmp_path / "pack").exists()
