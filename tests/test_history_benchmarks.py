"""Benchmarks of histories: the errors that they compute from files, and what their baselines keep."""

from pathlib import Path

import history_baselines as baselines
import history_files
import numpy as np
import pytest
import torch
from history_files import SavedVersion
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.slow


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 17))


def saved(folder: Path, config) -> tuple[SavedVersion, dict[str, np.ndarray]]:
    """A saved adapter of random factors, and PEFT's own updates by module."""
    model = get_peft_model(network(), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    updates = {name: layer.get_delta_weight("default").detach().double().numpy() for name, layer in layers.items()}
    return history_files.read_version(folder), updates


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"]),
        LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["0", "1"]),
        LoraConfig(r=3, lora_alpha=5, rank_pattern={"1": 7}, alpha_pattern={"1": 2}, target_modules=["0", "1"]),
        LoraConfig(r=3, lora_alpha=5, rank_pattern={"^1$": 7}, alpha_pattern={"^1$": 2}, target_modules=["0", "1"]),
        AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, total_step=9, target_modules=["0", "1"]),
    ],
)
def test_updates_are_those_of_peft(config, tmp_path):
    version, updates = saved(tmp_path, config)
    assert version.updates.keys() == updates.keys()
    for module, (up, down) in version.updates.items():
        np.testing.assert_allclose(up @ down, updates[module], rtol=1e-5, atol=1e-5)


def version(seed: int, *, strengths: np.ndarray | None = None) -> SavedVersion:
    """A version whose updates have these singular values, or ones; its factors are mixed."""
    random = np.random.default_rng(seed)
    updates = {}
    for module, (n_out, n_in) in {"a": (40, 24), "b": (17, 40)}.items():
        up, down = (np.linalg.qr(random.normal(size=(n, 8)))[0] for n in (n_out, n_in))
        mixing = np.linalg.qr(random.normal(size=(8, 8)))[0]
        updates[module] = ((up * (strengths if strengths is not None else 1.0)) @ mixing, mixing.T @ down.T)
    return SavedVersion(updates, {"head": random.normal(size=(3, 40)), "bias": random.normal(size=3)}, {}, 0)


def test_errors_are_relative_to_the_whole_update():
    original = version(0)
    up, down = original.updates["a"]
    other = SavedVersion({**original.updates, "a": (up * 1.1, down)}, original.tensors, {}, 0)
    # both modules have the same norm
    assert history_files.update_error(original, other) == pytest.approx(0.1 / 2**0.5)
    changed = SavedVersion(original.updates, {**original.tensors, "bias": original.tensors["bias"] * 0.75}, {}, 0)
    assert dict(history_files.tensor_errors(original, changed)) == pytest.approx({"head": 0, "bias": 0.25})


def test_versions_of_other_modules_are_errors():
    original = version(0)
    other = SavedVersion({"a": original.updates["a"]}, {}, {}, 0)
    with pytest.raises(ValueError, match="different modules"):
        history_files.update_error(original, other)
    with pytest.raises(ValueError, match="different tensors"):
        list(history_files.tensor_errors(original, other))


def test_rounding_takes_the_bits_that_the_bound_needs():
    # an octave of the error is a bit of each number
    sizes = [baselines.rounded(version(1), bound) for bound in (0.025, 0.05, 0.1)]
    n_numbers = 8 * (40 + 24 + 17 + 40)
    differences = np.diff(sizes) * 8 / n_numbers
    np.testing.assert_allclose(differences, -1, atol=0.1)


def test_truncation_pays_where_singular_values_fall():
    falling = version(1, strengths=0.3 ** np.arange(8))
    assert baselines.truncated(falling, 0.1) < 0.6 * baselines.rounded(falling, 0.1)
    flat = version(1)
    assert baselines.truncated(flat, 0.1) <= 1.02 * baselines.rounded(flat, 0.1)


def test_differences_of_equal_versions_take_nothing():
    raw = {"base_model.model.a.lora_A.weight": np.random.default_rng(0).normal(size=(8, 400)).astype(np.float32)}
    series = [SavedVersion({}, {}, raw, 0)] * 3
    first, *later = baselines.xz_float16(series, differences=True)
    assert first["lora"] > 5000
    assert all(size["lora"] < 200 for size in later)
