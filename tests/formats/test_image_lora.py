"""LoRA files of image models go through a pack and come back, in any dialect, as diffusers loads them."""

import json
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eigenlorax as ex
import lora_files
from eigenlorax.errors import DuplicateAdapterWarning, SourceWarning
from eigenlorax.formats import FORMATS, read_adapter, write_adapter
from lora_files import deltas, planted

pytest.importorskip("diffusers")
import image_models

# kohya files of many alphas, which diffusers misreads
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*alphas are written unchanged", "ignore:.*DoRA magnitudes are written as kohya"
)
OUT = ("kohya", "diffusers", "diffusers-old", "diffusion-model")


def modules_of(pipe):
    found = {}
    for component, model in image_models.components(pipe).items():
        found |= image_models.shapes(model, component)
    return found


@pytest.fixture(scope="module")
def sd():
    return image_models.tiny_pipeline("sd")


@pytest.fixture(scope="module")
def truth(sd):
    return planted(modules_of(sd), seed=1)


@pytest.fixture(scope="module")
def wanted(truth):
    """What the models give with the updates in their weights."""
    return image_models.outputs(image_models.merged(image_models.tiny_pipeline("sd"), deltas(truth)))


def assert_same_updates(found, wanted, rtol=1e-5):
    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        assert torch.linalg.norm(found[module] - delta) <= rtol * torch.linalg.norm(delta), module


def loaded(pipe, path):
    """Outputs and updates of a pipeline with a file loaded by diffusers, which is then taken out again."""
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    try:
        return image_models.outputs(pipe), image_models.deltas(pipe)
    finally:
        pipe.unload_lora_weights()


def assert_same_outputs(found, wanted, rtol=1e-5):
    assert found.keys() == wanted.keys()
    for component, output in wanted.items():
        scale = output.abs().max()
        assert (found[component] - output).abs().max() <= rtol * scale, component


@pytest.fixture(scope="module")
def folder(truth, tmp_path_factory):
    """A file in each dialect, ranks and alphas mixed, and the pack of them all at full rank."""
    folder = tmp_path_factory.mktemp("folder")
    for dialect in lora_files.DIALECTS:
        lora_files.write(folder / f"{dialect}.safetensors", truth, dialect, metadata={"ss_note": dialect})
    with pytest.warns(DuplicateAdapterWarning):
        pack = ex.fit(folder, energy=1.0, dtype="float32")
    pack.save(folder / "pack")
    return folder


@pytest.mark.slow
class TestThroughAPack:
    @pytest.mark.parametrize("dialect", lora_files.DIALECTS)
    def test_read_as_they_were_written(self, folder, truth, dialect):
        found = read_adapter(folder / f"{dialect}.safetensors")
        assert_same_updates(deltas(found), deltas(truth), 1e-6)
        assert found.origin.format == ("diffusers-old" if dialect in ("lora.down", "processor") else dialect)

    # of "lora.down", which "processor" spells otherwise, one is enough
    @pytest.mark.parametrize(
        ("dialect", "out"),
        [(dialect, out) for dialect in lora_files.DIALECTS for out in OUT if dialect != "lora.down" or out == OUT[1]],
    )
    def test_every_dialect_in_every_dialect_out(self, folder, sd, truth, wanted, tmp_path, dialect, out):
        path = ex.Pack.open(folder / "pack").export(tmp_path, dialect, format=out)[dialect]
        assert path == tmp_path / f"{dialect}.safetensors"
        found = read_adapter(path)
        assert found.origin.format == out
        assert_same_updates(deltas(found), deltas(truth))
        if out == "diffusion-model":
            return  # diffusers reads no such files of Stable Diffusion
        outputs, updates = loaded(sd, path)
        if dialect == out == "kohya":
            # diffusers gives all attention layers of such a file one alpha, of this as of the original
            assert_same_outputs(outputs, loaded(sd, folder / f"{dialect}.safetensors")[0])
        else:
            assert_same_updates(updates, deltas(truth))
            assert_same_outputs(outputs, wanted)

    def test_alphas_that_diffusers_reads_otherwise_are_said(self, folder, tmp_path):
        pack = ex.Pack.open(folder / "pack")
        with pytest.warns(SourceWarning, match="kohya: its alphas .*export with format='diffusers'"):
            pack.export(tmp_path, "kohya")
        with warnings.catch_warnings():
            warnings.simplefilter("error", SourceWarning)
            pack.export(tmp_path, "diffusers", format="kohya")

    def test_a_convolution_s_own_alpha_is_read_by_diffusers_too(self, tmp_path):
        block = "unet.down_blocks.0"
        shapes = {f"{block}.attentions.0.transformer_blocks.0.attn1.to_{one}": (19, 19) for one in "qkv"}
        attention = planted(shapes, seed=1, mixed=False)
        convolution = planted({f"{block}.resnets.0.conv1": (7, 5, 3, 3)}, seed=2)
        adapter = ex.from_factors("a", {**attention.modules, **convolution.modules})
        adapter = read_adapter(lora_files.write(tmp_path / "a.safetensors", adapter, "kohya"))
        with warnings.catch_warnings():
            warnings.simplefilter("error", SourceWarning)
            write_adapter(adapter, tmp_path / "b.safetensors")

    @pytest.mark.parametrize("dialect", lora_files.DIALECTS)
    def test_back_as_it_came_by_default(self, folder, tmp_path, dialect):
        path = ex.Pack.open(folder / "pack").export(tmp_path, dialect)[dialect]
        before, after = load_file(folder / f"{dialect}.safetensors"), load_file(path)
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
        for key, tensor in before.items():
            if key.endswith(".alpha"):
                assert torch.equal(after[key], tensor)

    @pytest.mark.parametrize("dialect", ["lora.down", "processor"])
    def test_without_a_component_s_name_a_file_is_of_the_unet_and_gets_it(self, sd, truth, wanted, tmp_path, dialect):
        of_unet = {name: one for name, one in truth.modules.items() if name.startswith("unet.")}
        file = lora_files.write(tmp_path / "a.safetensors", ex.from_factors("a", of_unet), dialect)
        save_file({key.removeprefix("unet."): tensor for key, tensor in load_file(file).items()}, file)
        adapter = read_adapter(file)
        outputs, updates = loaded(
            sd, write_adapter(adapter, tmp_path / "again.safetensors", format=adapter.origin.format)
        )
        assert set(updates) == set(of_unet)
        assert_same_outputs({"unet": outputs["unet"]}, {"unet": wanted["unet"]})

    @pytest.mark.parametrize("dialect", lora_files.DIALECTS)
    def test_metadata_come_back(self, folder, tmp_path, dialect):
        path = ex.Pack.open(folder / "pack").export(tmp_path, dialect)[dialect]
        with safe_open(folder / f"{dialect}.safetensors", "pt") as before, safe_open(path, "pt") as after:
            assert after.metadata() == {"format": "pt", **before.metadata()}

    def test_other_processes_read_it(self, folder, truth):
        found = pickle.loads(pickle.dumps(read_adapter(folder / "kohya.safetensors")))
        assert_same_updates(deltas(found), deltas(truth), 1e-6)

    def test_the_same_bytes_each_time(self, folder, tmp_path):
        pack = ex.Pack.open(folder / "pack")
        first, second = (pack.export(tmp_path / name, "kohya")["kohya"].read_bytes() for name in "ab")
        assert first == second

    def test_peft_loads_what_is_of_one_component(self, truth, tmp_path, wanted):
        from peft import PeftModel

        of_unet = {name: one for name, one in truth.modules.items() if name.startswith("unet.")}
        file = lora_files.write(tmp_path / "u.safetensors", ex.from_factors("u", of_unet), "kohya")
        written = write_adapter(read_adapter(file), tmp_path / "peft", format="peft")
        pipe = image_models.tiny_pipeline("sd")
        PeftModel.from_pretrained(pipe.unet, written)
        assert_same_outputs({"unet": image_models.outputs(pipe)["unet"]}, {"unet": wanted["unet"]})

    def test_peft_s_folder_of_several_components_comes_back(self, folder, truth, tmp_path):
        path = ex.Pack.open(folder / "pack").export(tmp_path, "kohya", format="peft")["kohya"]
        assert path.is_dir()
        assert_same_updates(deltas(read_adapter(path)), deltas(truth))

    def test_mixed_dialects_share_one_subspace(self, truth, tmp_path):
        some = {name: truth.modules[name] for name in list(truth.modules)[::13]}
        for dialect in lora_files.DIALECTS:
            lora_files.write(tmp_path / f"{dialect}.safetensors", ex.from_factors("some", some), dialect)
        with pytest.warns(DuplicateAdapterWarning):
            pack = ex.fit(tmp_path, n_components=4)
        assert list(pack.info.modules) == sorted(some)
        # all four are one adapter, so that what one needs is enough
        assert pack.summary.in_fit.worst < 1e-5

    def test_each_comes_back_in_its_own(self, folder, tmp_path):
        written = ex.Pack.open(folder / "pack").export(tmp_path)
        assert {name: read_adapter(path).origin.format for name, path in written.items()} == {
            "diffusers": "diffusers",
            "kohya": "kohya",
            "lora.down": "diffusers-old",
            "processor": "diffusers-old",
        }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "out"), [*(("xl", one) for one in OUT[:3]), *(("flux", one) for one in OUT[1:3])])
def test_other_models_as_diffusers_loads_them(tmp_path, kind, out):
    pipe = image_models.tiny_pipeline(kind)
    truth = planted(modules_of(pipe), seed=1)
    path = write_adapter(truth, tmp_path / kind, format=out)
    outputs, updates = loaded(pipe, path)
    assert_same_updates(updates, deltas(truth))
    assert_same_outputs(outputs, image_models.outputs(image_models.merged(pipe, deltas(truth))))


@pytest.fixture(scope="module")
def flux_modules():
    return modules_of(image_models.tiny_pipeline("flux"))


class TestFlux:
    """One layer of the authors' for several modules of diffusers'."""

    @pytest.mark.parametrize("out", ["kohya", "diffusion-model"])
    def test_fused_and_back(self, flux_modules, tmp_path, out):
        truth = planted(flux_modules, seed=3)
        path = write_adapter(truth, tmp_path / "f", format=out)
        assert_same_updates(deltas(read_adapter(path)), deltas(truth))

    def test_inputs_that_are_weighed_alike_keep_the_rank(self, tmp_path):
        n, r = 32, 3
        generator = torch.Generator().manual_seed(0)
        stems = {
            "double_blocks_0_img_attn_qkv": 3 * n,
            "single_blocks_0_linear1": 7 * n,
            "final_layer_adaLN_modulation_1": 2 * n,
        }
        tensors = {}
        for stem, n_out in stems.items():
            tensors[f"lora_unet_{stem}.lora_down.weight"] = torch.randn(r, n, generator=generator)
            tensors[f"lora_unet_{stem}.lora_up.weight"] = torch.randn(n_out, r, generator=generator)
            tensors[f"lora_unet_{stem}.alpha"] = torch.tensor(1.5)
        save_file(tensors, tmp_path / "f.safetensors")
        pack = ex.fit([tmp_path / "f.safetensors"], energy=1.0, dtype="float32")
        assert len(pack.info.modules) == 3 + 4 + 1
        # a factor that several modules have in common is counted once
        numbers = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".alpha"))
        assert pack.records["f"].lora_numbers == numbers
        (path,) = pack.export(tmp_path / "out").values()
        back = load_file(path)
        assert back.keys() == tensors.keys()
        for stem in stems:
            before, after = (
                t[f"lora_unet_{stem}.lora_up.weight"].double() @ t[f"lora_unet_{stem}.lora_down.weight"].double()
                for t in (tensors, back)
            )
            assert torch.linalg.norm(before - after) < 1e-5 * torch.linalg.norm(before)

    def test_sizes_as_diffusers_own_converter_reads_them(self, tmp_path):
        # it knows the sizes of FLUX.1 alone
        from diffusers.loaders import FluxLoraLoaderMixin

        n = 3072
        place = "transformer.single_transformer_blocks.0"
        modules = {
            **{f"{place}.attn.to_{one}": (n, n) for one in "qkv"},
            f"{place}.proj_mlp": (4 * n, n),
            "transformer.transformer_blocks.0.attn.to_q": (n, n),
            "transformer.transformer_blocks.0.attn.to_v": (n, n),
            "transformer.transformer_blocks.0.attn.to_k": (n, n),
        }
        truth = planted(modules, seed=3)
        path = write_adapter(truth, tmp_path / "f", format="kohya")
        found = FluxLoraLoaderMixin.lora_state_dict(path.parent, weight_name=path.name)
        x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for module, factors in truth.modules.items():
            wanted = factors.scaling * factors.up.double() @ (factors.down.double() @ x)
            down, up = (found[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
            assert torch.linalg.norm(up @ (down @ x) - wanted) < 1e-5 * torch.linalg.norm(wanted)

    def test_parts_that_an_adapter_lacks_change_nothing(self, tmp_path):
        truth = planted({"transformer.single_transformer_blocks.1.attn.to_k": (32, 32)}, seed=1)
        path = write_adapter(truth, tmp_path / "f", format="kohya")
        assert load_file(path)["lora_unet_single_blocks_1_linear1.lora_up.weight"].shape == (7 * 32, 2)
        found = deltas(read_adapter(path))
        for module, delta in found.items():
            wanted = deltas(truth).get(module, torch.zeros_like(delta))
            assert torch.allclose(delta, wanted, atol=1e-7)


class TestWhatAFileSays:
    def test_a_hash_is_that_of_the_new_tensors(self, truth, tmp_path):
        from hashlib import sha256

        metadata = {"sshs_model_hash": "old", "sshs_legacy_hash": "old", "ss_base_model_version": "sd_v1"}
        file = lora_files.write(tmp_path / "a.safetensors", truth, "kohya", metadata=metadata)
        path = write_adapter(read_adapter(file), tmp_path / "b.safetensors")
        data = path.read_bytes()
        with safe_open(path, "pt") as found:
            assert found.metadata() == {
                "format": "pt",
                "ss_base_model_version": "sd_v1",
                # as kohya's trainer finds it: of all that is behind the header
                "sshs_model_hash": sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest(),
            }

    def test_alphas_beside_a_config_that_says_others(self, tmp_path):
        truth = planted({"unet.conv_in": (11, 4, 3, 3), "unet.time_embedding.linear_1": (9, 6)}, seed=1)
        file = lora_files.write(tmp_path / "a.safetensors", truth, "diffusers")
        with safe_open(file, "pt") as found:
            metadata = found.metadata()
        # of tensors and texts, the tensors count
        save_file({**load_file(file), "unet.conv_in.alpha": torch.tensor(14.0)}, file, metadata=metadata)
        one = read_adapter(file)
        assert one.specs["unet.conv_in"].scaling == 14.0 / 2
        back = read_adapter(write_adapter(one, tmp_path / "b"))
        assert {name: spec.scaling for name, spec in back.specs.items()} == {
            name: spec.scaling for name, spec in one.specs.items()
        }

    def test_no_alpha_is_a_scaling_of_one(self, tmp_path):
        stem = "lora_unet_mid_block_attentions_0_proj_in"
        save_file(
            {f"{stem}.lora_down.weight": torch.ones(2, 5, 1, 1), f"{stem}.lora_up.weight": torch.ones(7, 2, 1, 1)},
            tmp_path / "a.safetensors",
        )
        with pytest.warns(SourceWarning, match="1 of 1 modules have no alpha"):
            spec = read_adapter(tmp_path / "a.safetensors").specs["unet.mid_block.attentions.0.proj_in"]
        assert (spec.scaling, spec.kernel) == (1.0, (1, 1))

    def test_an_alpha_that_is_missing_among_others_is_said(self, truth, tmp_path):
        file = lora_files.write(tmp_path / "a.safetensors", truth, "kohya")
        tensors = load_file(file)
        first = next(key for key in tensors if key.endswith("conv_in.alpha"))
        save_file({key: value for key, value in tensors.items() if key != first}, file)
        with pytest.warns(
            SourceWarning, match=f"1 of {len(truth.specs)} modules have no alpha, such as 'unet.conv_in'"
        ):
            found = read_adapter(file)
        assert found.specs["unet.conv_in"].scaling == 1.0
        assert found.specs["unet.conv_out"].scaling == truth.specs["unet.conv_out"].scaling

    def test_three_factors_are_folded_into_two(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        stem = "lora_unet_up_blocks_0_resnets_0_conv1"
        down, mid, up = (
            torch.randn(*shape, generator=generator) for shape in ((3, 5, 1, 1), (3, 3, 3, 3), (7, 3, 1, 1))
        )
        parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(6.0)}
        save_file({f"{stem}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
        with pytest.warns(SourceWarning, match="1 convolutions of three factors"):
            found = read_adapter(tmp_path / "a.safetensors").modules["unet.up_blocks.0.resnets.0.conv1"]
        image = torch.randn(1, 5, 6, 6, generator=generator)
        conv = torch.nn.functional.conv2d
        wanted = 2.0 * conv(conv(conv(image, down), mid, padding=1), up)
        found_down, found_up = found.weights
        assert torch.allclose(found.scaling * conv(conv(image, found_down, padding=1), found_up), wanted, atol=1e-4)

    def test_a_convolution_outside_the_subspace_is_one_still(self, tmp_path):
        modules = {"unet.conv_in": (11, 4, 3, 3), "unet.time_embedding.linear_1": (9, 6)}
        file = lora_files.write(tmp_path / "a.safetensors", planted(modules, seed=1), "kohya")
        ex.fit([file], energy=1.0, exclude_modules=["conv_in"]).save(tmp_path / "pack")
        (path,) = ex.Pack.open(tmp_path / "pack").export(tmp_path / "out").values()
        before, after = load_file(file), load_file(path)
        assert {k: t.shape for k, t in after.items()} == {k: t.shape for k, t in before.items()}
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if "conv_in" in key)

    @pytest.mark.parametrize("out", ["diffusers", "diffusers-old"])
    def test_dora_as_diffusers_computes_it(self, tmp_path, out):
        pipe, other = (image_models.tiny_pipeline("sd") for _ in range(2))
        shapes = modules_of(pipe)
        text = [name for name in shapes if name.startswith("text_encoder.") and ".self_attn." in name]
        # diffusers before 0.40 scales a file without alphas wrongly if ranks differ
        wanted = {name: shapes[name] for name in [*list(shapes)[::9], *text[:3]]}
        truth = planted(wanted, seed=2, mixed=out == "diffusers")
        magnitudes = {}
        for component, model in image_models.components(other).items():
            for name, module in model.named_modules():
                in_file = name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                if (factors := truth.modules.get(f"{component}.{in_file}")) is not None:
                    magnitude = 1.3 * module.weight.detach().double().flatten(1).norm(dim=1)
                    key = f"base_model.model.{component}.{in_file}.lora_magnitude_vector"
                    magnitudes[key] = magnitude.float()
                    update = factors.scaling * factors.up.double() @ factors.down.double()
                    changed = module.weight.double().flatten(1) + update
                    whole = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
                    module.weight.data = whole.reshape(module.weight.shape).float()
        with pytest.warns(SourceWarning, match="a: its DoRA magnitudes .* export with format='diffusers'"):
            file = write_adapter(
                replace(truth, name="a", carried=magnitudes), tmp_path / "a.safetensors", format="kohya"
            )
        path = write_adapter(read_adapter(file), tmp_path / "b", format=out)
        assert_same_outputs(loaded(pipe, path)[0], image_models.outputs(other))

    @pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
    def test_dora_s_magnitudes_are_carried(self, tmp_path, dialect):
        truth = planted({"unet.mid_block.attentions.0.proj_in": (7, 5), "unet.conv_in": (11, 4, 3, 3)}, seed=1)
        file = write_adapter(truth, tmp_path / "a", format=dialect)
        tensors = load_file(file)
        kohya = {"lora_unet_mid_block_attentions_0_proj_in": (7, 1), "lora_unet_conv_in": (11, 1, 1, 1)}
        peft = {"unet.mid_block.attentions.0.proj_in": (7,), "unet.conv_in": (1, 11, 1, 1)}
        shapes, tail = (kohya, "dora_scale") if dialect == "kohya" else (peft, "lora_magnitude_vector")
        tensors |= {f"{stem}.{tail}": torch.rand(shape) for stem, shape in shapes.items()}
        save_file(tensors, file)
        pack = ex.fit([file], energy=1.0)
        back = {name: load_file(*pack.export(tmp_path / name, format=name).values()) for name in ("kohya", "diffusers")}
        for (first, shape), (second, other) in zip(kohya.items(), peft.items(), strict=True):
            assert back["kohya"][f"{first}.dora_scale"].shape == shape
            assert back["diffusers"][f"{second}.lora_magnitude_vector"].shape == other
            stem = first if dialect == "kohya" else second
            for found in (back["kohya"][f"{first}.dora_scale"], back["diffusers"][f"{second}.lora_magnitude_vector"]):
                assert torch.equal(found.flatten(), tensors[f"{stem}.{tail}"].flatten())
        config = json.loads((pack.export(tmp_path / "p", format="peft")["a"] / "adapter_config.json").read_text())
        assert config["use_dora"] is True


def test_formats_of_single_files_are_those_that_are_tested():
    assert tuple(name for name, one in FORMATS.items() if one.dialect) == OUT
