"""Files that are no LoRA, or none that can be used: each is refused by its name, by what was found and what helps."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax as ex
import lora_files
from adapters import make_adapter
from eigenlorax.errors import (
    BaseModelError,
    FormatError,
    NonFiniteError,
    OptionError,
    PackExistsError,
    ShapeError,
    SkippedAdapterWarning,
)
from eigenlorax.formats import read_adapter, write_adapter
from lora_files import planted

# kohya files of many alphas, which diffusers misreads
pytestmark = pytest.mark.filterwarnings("ignore:.*alphas are written unchanged")
TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
MODULES = {TO_K: (19, 768), "unet.mid_block.attentions.0.proj_in": (7, 5, 1, 1)}
STEM = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.fixture
def file(tmp_path):
    return lora_files.write(tmp_path / "style.safetensors", planted(MODULES, seed=1), "kohya")


def changed(file, **tensors):
    """The file with tensors of one layer added or changed; None takes one away. `__` stands for a dot."""
    found = load_file(file)
    for name, tensor in tensors.items():
        key = f"{STEM}.{name.replace('__', '.')}"
        found.pop(key, None)
        if tensor is not None:
            found[key] = tensor
    save_file(found, file)
    return file


class TestBroken:
    @pytest.mark.parametrize("end", [3, 100, -1])
    def test_half_downloaded(self, file, end):
        file.write_bytes(file.read_bytes()[:end])
        with pytest.raises(FormatError, match="style.safetensors is not a valid safetensors file"):
            read_adapter(file)

    def test_a_page_in_the_place_of_a_file(self, file):
        file.write_text("<!DOCTYPE html><html>Sign in</html>")
        with pytest.raises(FormatError, match="style.safetensors is not a valid safetensors file"):
            read_adapter(file)

    def test_nan(self, file):
        changed(file, lora_up__weight=torch.full((7, 3, 1, 1), math.nan))
        with pytest.raises(
            NonFiniteError, match=r"adapter 'style': 21 of 21 numbers of unet.mid_block.*proj_in \(up\)"
        ):
            ex.fit([file], n_components=2)

    def test_an_alpha_that_is_nan(self, file):
        with pytest.raises(NonFiniteError, match=f"style.safetensors: '{STEM}.alpha' is nan"):
            read_adapter(changed(file, alpha=torch.tensor(math.nan)))

    def test_an_alpha_that_is_nan_is_left_out_on_request(self, file, tmp_path):
        changed(file, alpha=torch.tensor(math.nan))
        lora_files.write(tmp_path / "sound.safetensors", planted(MODULES, seed=1), "kohya")
        with pytest.warns(SkippedAdapterWarning, match="left out style"):
            assert ex.fit(tmp_path, n_components=2, skip_bad=True).names == ["sound"]

    def test_an_alpha_that_is_no_number(self, file):
        with pytest.raises(ShapeError, match=f"'{STEM}.alpha' has shape .2,.; an alpha is one number"):
            read_adapter(changed(file, alpha=torch.ones(2)))

    def test_an_alpha_of_nothing(self, file):
        with pytest.raises(FormatError, match=f"'{STEM}.alpha' is the alpha of a layer that has no factors"):
            read_adapter(changed(file, lora_down__weight=None, lora_up__weight=None))

    def test_rank_0(self, file):
        changed(file, lora_down__weight=torch.zeros(0, 5, 1, 1), lora_up__weight=torch.zeros(7, 0, 1, 1))
        with pytest.raises(ShapeError, match=r"style.safetensors: .* must share one rank of at least 1"):
            read_adapter(file)

    def test_ranks_that_differ(self, file):
        with pytest.raises(ShapeError, match=r"is \(4, 5, 1, 1\) and .* is \(7, 3, 1, 1\).* must share one rank"):
            read_adapter(changed(file, lora_down__weight=torch.zeros(4, 5, 1, 1)))

    @pytest.mark.parametrize(("part", "other"), [("lora_down", "up"), ("lora_up", "down")])
    def test_a_factor_alone(self, file, part, other):
        with pytest.raises(FormatError, match=f"style.safetensors: tensor '{STEM}.* has no partner .{part[5:]}."):
            read_adapter(changed(file, **{f"{part}__weight": None}))

    def test_integers(self, file):
        with pytest.raises(FormatError, match=r"lora_down.weight' is not float64, float32, float16 or bfloat16"):
            read_adapter(changed(file, lora_down__weight=torch.zeros(3, 5, 1, 1, dtype=torch.int8)))

    def test_one_module_twice(self, file):
        twice = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 5, 1, 1)}
        twice["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.zeros(7, 2, 1, 1)
        save_file(load_file(file) | twice, file)
        with pytest.raises(FormatError, match=f"layers '{STEM}' and 'unet.mid.*are the same module"):
            read_adapter(file)

    def test_what_is_broken_is_left_out_on_request(self, file, tmp_path):
        (tmp_path / "broken.safetensors").write_bytes(b"x")
        with pytest.raises(FormatError, match=r"broken.safetensors .*--skip-bad"):
            ex.fit(tmp_path, n_components=2)
        with pytest.warns(SkippedAdapterWarning, match="left out broken"):
            assert ex.fit(tmp_path, n_components=2, skip_bad=True).names == ["style"]


class TestOtherKinds:
    @pytest.mark.parametrize(
        ("key", "what"),
        [
            ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LoHa"),
            ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "a LoKr"),
            ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "a GLoRA"),
            ("lora_unet_mid_block_attentions_0_proj_in.on_input", "an .IA.³"),
            ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "an OFT"),
            ("lora_unet_mid_block_attentions_0_proj_in.diff", "whole differences of weights"),
            ("lora_unet_mid_block_attentions_0_proj_in.diff_b", "whole differences of weights"),
            ("lora_unet_mid_block_attentions_0_norm.w_norm", "trained norms"),
            ("transformer.transformer_blocks.0.attn.query_norm.scale", "a ControlLoRA"),
            ("lora_controlnet", "a ControlLoRA"),
            ("unet:0:up", "a file of the first `lora` package"),
            ("emb_params", "embeddings of new words"),
            ("clip_g", "embeddings of new words"),
            ("string_to_param.*", "embeddings of new words"),
            ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint, not a LoRA"),
        ],
    )
    @pytest.mark.parametrize("alone", [True, False])
    def test_is_named(self, file, key, what, alone):
        tensors = {} if alone else load_file(file)
        save_file({**tensors, key: torch.ones(3, 3)}, file)
        with pytest.raises(
            FormatError, match=f"style.safetensors is .*{what}.*{key.replace('*', '.')}.*Remove the file"
        ):
            read_adapter(file)

    def test_tensors_that_are_no_part_of_a_lora(self, file):
        save_file({**load_file(file), "unet.conv_in.bias": torch.ones(3)}, file)
        with pytest.raises(FormatError, match="1 of 7 tensors do not belong to a LoRA, such as 'unet.conv_in.bias'"):
            read_adapter(file)

    def test_a_file_of_something_else(self, file):
        save_file({f"encoder.{i}.weight": torch.ones(1) for i in range(30_000)}, file)
        with pytest.raises(FormatError, match=r"is not a LoRA: none of its 30,000 tensors, such as 'encoder.0.weight'"):
            read_adapter(file)

    def test_no_tensors(self, file):
        save_file({}, file)
        with pytest.raises(FormatError, match="style.safetensors has no tensors"):
            read_adapter(file)

    def test_modules_of_no_model(self, file):
        save_file(
            {
                "lora_unet_layer_thing.lora_down.weight": torch.ones(1, 2),
                "lora_unet_layer_thing.lora_up.weight": torch.ones(2, 1),
            },
            file,
        )
        with pytest.raises(FormatError, match="1 of 1 modules belong to no supported model.*'lora_unet_layer_thing'"):
            read_adapter(file)

    def test_peft_s_file_without_its_config(self, tmp_path):
        folder = make_adapter(tmp_path / "a", seed=1)
        with pytest.raises(FormatError, match="adapter_model.safetensors is not a folder: an adapter as PEFT saves it"):
            read_adapter(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
        with pytest.raises(
            FormatError, match="other.safetensors is a LoRA as PEFT saves it, but its folder has no adapter_c"
        ):
            read_adapter(tmp_path / "other.safetensors")

    def test_files_that_are_called_otherwise(self, file, tmp_path):
        renamed = file.rename(tmp_path / "style")
        with pytest.raises(
            FormatError, match=r"a safetensors file with another suffix. Rename it to style.safetensors"
        ):
            read_adapter(renamed)
        (tmp_path / "style.ckpt").write_bytes(b"PK")
        with pytest.raises(FormatError, match=r"style.ckpt is not a folder.*This is a pickle"):
            read_adapter(tmp_path / "style.ckpt")

    def test_another_dialect_than_was_asked_for(self, file):
        with pytest.raises(FormatError, match="is a file in the dialect 'kohya', not 'diffusers'"):
            read_adapter(file, format="diffusers")
        with pytest.raises(FormatError, match="is a single file, not a folder"):
            read_adapter(file, format="peft")


XL = {TO_K: (19, 2048)}
FLUX = {"transformer.single_transformer_blocks.0.proj_out": (32, 160)}
# no module of another one
XL_ELSEWHERE = {"unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (640, 640)}


class TestOtherModels:
    @pytest.mark.parametrize(
        ("other", "called"), [(XL, "Stable Diffusion XL"), (XL_ELSEWHERE, "Stable Diffusion XL"), (FLUX, "FLUX")]
    )
    def test_two_families_in_one_fit(self, file, tmp_path, other, called):
        path = lora_files.write(tmp_path / "other.safetensors", planted(other, seed=2), "diffusers")
        with pytest.raises(BaseModelError, match=f"'style' is for Stable Diffusion 1, and 'other' is for {called}"):
            ex.fit([file, path], n_components=2)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning")
    def test_a_unet_of_one_s_own_is_one_family_however_deep(self, tmp_path):
        block = "unet.mid_block.attentions.0.transformer_blocks"
        shallow = {f"{block}.0.attn2.to_k": (19, 64), f"{block}.0.attn1.to_q": (19, 19)}
        without = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (19, 19)}
        deep = {f"{block}.{i}.attn{which}.to_k": (19, 64 if which == 2 else 19) for i in range(2) for which in (1, 2)}
        files = [
            lora_files.write(tmp_path / f"{i}.safetensors", planted(one, seed=i), "kohya")
            for i, one in enumerate((shallow, deep, without))
        ]
        assert ex.fit(files, n_components=2).summary.family == "another UNet"

    def test_all_of_the_fewer_are_named_to_be_left_out(self, file, tmp_path):
        files = [file, lora_files.write(tmp_path / "same.safetensors", planted(MODULES, seed=3), "kohya")]
        files += [lora_files.write(tmp_path / "flux.safetensors", planted(FLUX, seed=4), "diffusers")]
        with pytest.raises(
            BaseModelError, match=r"exclude the 1 of the smaller group: .*'flux'.* .--exclude-adapter flux.\.$"
        ):
            ex.fit(files, n_components=2)
        files += [lora_files.write(tmp_path / f"xl{i}.safetensors", planted(XL, seed=i), "kohya") for i in range(3)]
        with pytest.raises(BaseModelError, match="--exclude-adapter style --exclude-adapter same") as error:
            ex.fit([*files[:2], *files[3:]], n_components=2)
        assert "xl0" in str(error.value)

    @pytest.mark.parametrize("other", [XL, XL_ELSEWHERE, FLUX])
    def test_nor_in_one_pack(self, file, tmp_path, other):
        pack = ex.fit([file], n_components=2)
        path = lora_files.write(tmp_path / "other.safetensors", planted(other, seed=2), "diffusers")
        with pytest.raises(BaseModelError, match="adapter 'other' is for .*, and the pack is for Stable Diffusion 1"):
            pack.add(path, carry_missing=True)

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.NothingSharedWarning")
    def test_a_text_encoder_of_one_width_may_be_of_either(self, file, tmp_path):
        encoder = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (13, 768)}
        path = lora_files.write(tmp_path / "other.safetensors", planted(encoder, seed=2), "diffusers")
        assert len(ex.fit([file, path], n_components=2)) == 2


class TestWriting:
    def test_what_is_of_no_image_model(self, tmp_path):
        adapter = read_adapter(make_adapter(tmp_path / "a", seed=1))
        with pytest.raises(OptionError, match="'a' does not belong to an image model.*in the format 'peft'"):
            write_adapter(adapter, tmp_path / "b", format="kohya")

    def test_a_module_without_a_name_there(self, tmp_path):
        odd = planted({"unet.down_blocks.0.motion_modules.0.proj_in": (7, 5)}, seed=1)
        with pytest.raises(OptionError, match="'unet.down_blocks.0.motion.* has no name in the dialect 'kohya'"):
            write_adapter(odd, tmp_path / "b", format="kohya")

    def test_a_file_in_the_way(self, file, tmp_path):
        pack = ex.fit([file], n_components=2)
        pack.export(tmp_path / "out")
        with pytest.raises(PackExistsError, match=r"style.safetensors exists.*--overwrite"):
            pack.export(tmp_path / "out")
        pack.export(tmp_path / "out", overwrite=True)

    def test_a_format_that_is_none(self, file, tmp_path):
        pack = ex.fit([file], n_components=2)
        with pytest.raises(
            OptionError, match="format 'comfy' is not known. Formats that can be written: peft, kohya, diffusers"
        ):
            pack.export(tmp_path / "out", format="comfy")
        with pytest.raises(OptionError, match="'official' is read, not written"):
            pack.export(tmp_path / "out", format="official")
