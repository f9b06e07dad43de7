"""Convolutions in a subspace: rows of channels · height · width numbers, which come back in their shape."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import eigenlorax as ex
import planted
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.errors import ShapeError

KERNELS = {"conv": (3, 5), "deep": (2, 3, 2), "line": (4,), "point": (1, 1)}


def convolutional(name, seed, kernels=KERNELS, rank=3):
    """An adapter of convolutions of 7 channels in and 11 out, its factors in the shapes of their weights."""
    modules = {}
    for i, (module, kernel) in enumerate(kernels.items()):
        down = planted.normal(rank, 7, *kernel, seed=seed + i, dtype=torch.float32)
        up = planted.normal(11, rank, *[1] * len(kernel), seed=seed + i + 500, dtype=torch.float32)
        modules[module] = LoRAFactors.from_weights(down, up, 0.5)
    return ex.from_factors(name, modules, base_model="org/base")


@pytest.fixture
def adapters():
    return [convolutional(f"a{i}", 1000 * i) for i in range(3)]


def test_the_update_is_that_of_one_convolution_after_the_other(adapters):
    factors = adapters[0].modules["conv"]
    down, up = factors.weights
    images = planted.normal(2, 7, 9, 10, seed=1, dtype=torch.float32)
    two = torch.nn.functional.conv2d(torch.nn.functional.conv2d(images, down, padding=1, stride=2), up)
    delta = (factors.up @ factors.down).view(11, 7, 3, 5)
    torch.testing.assert_close(torch.nn.functional.conv2d(images, delta, padding=1, stride=2), two)


def test_through_a_pack_on_disk_and_a_folder_of_peft(adapters, tmp_path):
    pack = ex.fit(adapters, energy=1.0)
    pack.save(tmp_path / "pack")
    opened = ex.Pack.open(tmp_path / "pack")
    assert opened.info.modules["conv"]["down"].dimension == 7 * 3 * 5
    opened.export(tmp_path / "out")
    for adapter in adapters:
        assert opened.records[adapter.name].delta_error < 1e-5
        assert opened.records[adapter.name].carried_bytes == 0
        stored = load_file(tmp_path / "out" / adapter.name / "adapter_model.safetensors")
        again = ex.read_adapter(tmp_path / "out" / adapter.name)
        for module, kernel in KERNELS.items():
            assert stored[f"base_model.model.{module}.lora_A.weight"].shape == (3, 7, *kernel)
            assert stored[f"base_model.model.{module}.lora_B.weight"].shape == (11, 3, *[1] * len(kernel))
            wanted, found = adapter.modules[module], again.modules[module]
            assert found.kernel == kernel == opened.adapter(adapter.name).specs[module].kernel
            torch.testing.assert_close(found.up @ found.down, wanted.up @ wanted.down, atol=1e-4, rtol=1e-4)


def test_a_linear_layer_and_a_kernel_of_one_are_one_module(tmp_path):
    conv, linear = (convolutional(name, seed, {"point": (1, 1)}) for name, seed in (("conv", 1), ("linear", 9)))
    factors = linear.modules["point"]
    linear = ex.from_factors("linear", {"point": LoRAFactors(factors.down, factors.up, 0.5)}, base_model="org/base")
    pack = ex.fit([conv, linear], energy=1.0)
    pack.save(tmp_path / "pack")
    opened = ex.Pack.open(tmp_path / "pack")
    assert opened.adapter("conv").specs["point"].kernel == (1, 1)
    assert opened.adapter("linear").specs["point"].kernel == ()


def test_two_kernels_of_as_many_numbers_are_two_base_models():
    one, other = convolutional("one", 1, {"conv": (3, 5)}), convolutional("other", 2, {"conv": (5, 3)})
    with pytest.raises(ShapeError, match=r"kernel is \(3, 5\) in adapter 'one' and \(5, 3\) in 'other'"):
        ex.fit([one, other])


def test_kernels_are_part_of_an_adapters_content():
    one, other = convolutional("one", 1, {"conv": (3, 5)}), convolutional("other", 1, {"conv": (5, 3)})
    hashes = {ex.fit([adapter]).records[adapter.name].source_sha256 for adapter in (one, other)}
    assert len(hashes) == 2


@pytest.mark.parametrize("kernel", [(2, 3), (0,), (-5,)], ids=str)
def test_a_kernel_that_does_not_fit_is_refused(kernel):
    with pytest.raises(ShapeError, match="kernel size"):
        LoRAFactors(torch.ones(2, 7 * 5), torch.ones(3, 2), 1.0, kernel)


def test_a_grouped_convolution_is_carried_to_the_bit(tmp_path):
    folder = tmp_path / "grouped"
    folder.mkdir()
    state = {
        "base_model.model.conv.lora_A.weight": torch.randn(4, 6, 3, 3),
        "base_model.model.conv.lora_B.weight": torch.randn(8, 2, 1, 1),
        "base_model.model.dense.lora_A.weight": torch.randn(4, 6),
        "base_model.model.dense.lora_B.weight": torch.randn(8, 4),
    }
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    adapter = ex.read_adapter(folder)
    assert list(adapter.specs) == ["dense"]
    ex.fit([folder], energy=1.0).export(tmp_path / "out")
    written = load_file(tmp_path / "out" / "grouped" / "adapter_model.safetensors")
    for name in ("lora_A", "lora_B"):
        key = f"base_model.model.conv.{name}.weight"
        assert torch.equal(written[key], state[key])
