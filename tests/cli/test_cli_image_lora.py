"""LoRA files of image models through the command: `fit styles/*.safetensors -o pack` is the whole of it."""

import lora_files
from eigenlorax.formats import read_adapter
from lora_files import planted
from outcomes import json_of, succeeded

MODULES = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (19, 768),
    "unet.mid_block.attentions.0.proj_in": (7, 5, 1, 1),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (13, 11),
}


def test_from_files_to_files(cli, tmp_path):
    for seed, dialect in enumerate(("kohya", "diffusers")):
        truth = planted(MODULES, seed=seed)
        lora_files.write(tmp_path / f"My style, v{seed}.safetensors", truth, dialect)
    pack = tmp_path / "pack"
    succeeded(cli("fit", *sorted(tmp_path.glob("*.safetensors")), "-o", pack))
    assert "made for" in succeeded(cli("inspect", pack)).out
    assert json_of(cli("inspect", pack, "--json"))["family"] == "Stable Diffusion 1"
    card = (pack / "README.md").read_text("utf-8")
    assert "2 LoRA adapters of Stable Diffusion 1" in card
    assert 'ex.load_into(pipe, ".", ["My_style_v0"])' in card
    assert "PeftModel" not in card
    found = json_of(cli("inspect", tmp_path / "My style, v0.safetensors", "--json"))
    assert (found["format"], found["family"], found["modules"]) == ("kohya", "Stable Diffusion 1", len(MODULES))
    written = json_of(cli("export", pack, "-o", tmp_path / "out", "--format", "diffusers-old", "--json"))["written"]
    assert sorted(written) == ["My_style_v0", "My_style_v1"]
    assert all(read_adapter(path).origin.format == "diffusers-old" for path in written.values())
    as_they_came = json_of(cli("export", pack, "-o", tmp_path / "as-they-came", "--json"))["written"]
    assert [read_adapter(path).origin.format for path in as_they_came.values()] == ["kohya", "diffusers"]


def test_a_folder_of_files(cli, tmp_path):
    (tmp_path / "styles").mkdir()
    for seed in range(2):
        lora_files.write(tmp_path / "styles" / f"{seed}.safetensors", planted(MODULES, seed=seed), "kohya")
    succeeded(cli("fit", tmp_path / "styles", "-o", tmp_path / "pack"))
    assert json_of(cli("inspect", tmp_path / "pack", "--json"))["adapters"] == 2
