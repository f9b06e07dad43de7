"""The experiment on pictures: styles, the model's own loss and drawing, and a run of every kind."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import diffusion, drawing, easel, judges, styles  # noqa: E402

import eigenlorax as ex  # noqa: E402

CONFIG = tomllib.loads((EXPERIMENTS / "configs" / "diffusion.toml").read_text("utf-8"))
TINY = {
    **CONFIG["model"],
    "block_out_channels": [8, 16],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
NAMES = ["outline", "two-tone"]
SMALL = {
    "model": TINY,
    "data": CONFIG["data"],
    "base": {**CONFIG["base"], "steps": 3, "batch_size": 5},
    "judges": {**CONFIG["judges"], "rows": 60, "epochs": 1},
    "styles": {"fitted": NAMES, "left_out": ["tilted"], "development": "hatched", "known": ["plain", *NAMES, "tilted"]},
    "drawing": {**CONFIG["drawing"], "per_class": 1, "steps": 2},
    "pack": {"k": [3, 5], "weighting": "delta", "rival": 5},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(__file__).resolve().parents[2].parent / "shared" / "data" / "images").is_dir(),
        reason="../shared/data/images is not beside this checkout",
    ),
]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A base model, and all that is made, in a folder of the test's own."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(easel, "WORK", tmp_path)
    for module in (easel, drawing):
        monkeypatch.setattr(module, "BASE", tmp_path / "base")
    every = diffusion.glyphs

    def few(data, part):
        found = every(data, part)
        return diffusion.Glyphs(found.pixels[::20], found.labels[::20])

    monkeypatch.setattr(diffusion, "glyphs", few)
    drawing.pretrained(SMALL)
    return tmp_path


def lora(name, style, seed):
    recipe = {"steps": 8, "batch_size": 3, "warmup": 2, "learning_rate": 1e-2}
    options = {**CONFIG["lora"]["options"], "r": 3}
    drawing.styled(
        {"name": name, "style": style, "seed": seed, "data": CONFIG["data"], "options": options, "recipe": recipe}
    )


class TestStyles:
    def test_every_style_keeps_the_range_and_changes_the_picture(self):
        plain = diffusion.glyphs(CONFIG["data"], "held out").pixels[::97].numpy()
        for name in styles.STYLES:
            found = styles.styled(plain, name)
            assert (found.shape, found.dtype) == (plain.shape, np.float32)
            assert found.min() >= 0
            assert found.max() <= 1
            assert np.abs(found - plain).mean() > 0.01, name

    def test_no_two_styles_of_the_experiment_are_the_same(self):
        names = CONFIG["styles"]["known"]
        plain = diffusion.glyphs(CONFIG["data"], "held out").pixels[::97].numpy()
        drawn = [styles.styled(plain, name) for name in names]
        assert len(set(names)) == len(names)
        assert min(np.abs(a - b).mean() for n, a in enumerate(drawn) for b in drawn[:n]) > 0.01

    def test_what_is_left_out_is_in_no_fit(self):
        asked = CONFIG["styles"]
        assert not {*asked["left_out"], asked["development"]} & set(asked["fitted"])


class TestModel:
    def test_packing_is_undone(self):
        pixels = torch.rand(5, 28, 28)
        torch.testing.assert_close(diffusion.unpacked(diffusion.packed(pixels)), pixels)

    def test_no_picture_is_held_out_and_trained_on(self):
        held, rows = (diffusion.glyphs(CONFIG["data"], part) for part in ("held out", "train"))
        assert (len(held), len(rows)) == (2000, 18000)
        assert set(rows.labels.tolist()) == set(range(20))

    def test_an_interrupted_training_goes_on(self, tmp_path, monkeypatch):
        pytest.importorskip("diffusers")
        config = {**SMALL, "base": {**SMALL["base"], "steps": 4}}
        monkeypatch.setattr(diffusion, "KEPT_EVERY", 2)
        whole = diffusion.pretrained(config, tmp_path / "whole")

        losses, step = diffusion.loss, []

        def third_fails(*asked):
            step.append(asked)
            if len(step) == 3:
                raise InterruptedError("third")
            return losses(*asked)

        monkeypatch.setattr(diffusion, "loss", third_fails)
        with pytest.raises(InterruptedError, match="third"):
            diffusion.pretrained(config, tmp_path / "parts")
        assert diffusion.pretrained(config, tmp_path / "parts") == whole
        assert len(step) == 2 + 1 + 2


class TestRuns:
    def test_a_style_from_its_lora_to_what_a_pack_keeps_of_it(self, workshop):
        for n, name in enumerate([*NAMES, "tilted"]):
            lora(name, name, n)
        lora("outline-twin", "outline", 9)
        for job in drawing.judging(SMALL):
            found = judges.train(job.config, easel.judge_file(job.config["what"]))
            assert 0 <= found["test"]["accuracy"] <= 1
        config = {**CONFIG, **SMALL, "lora": {**CONFIG["lora"], "twins": ["outline"]}}
        for job in drawing.packs(config):
            found = drawing.packed(job.config)
            assert set(found["delta_errors"]) == set(NAMES)
        [job] = drawing.plain(config)
        assert easel.plain(job.config)["test"]["pictures"] == 20
        found = {job.config["name"]: easel.recycle(job.config)["test"]["ways"] for job in drawing.recycled(config)}
        ways = {(row["way"], row["k"]): row for row in found["outline"]}
        assert set(ways) == {
            ("original", None),
            ("another seed", None),
            ("seen", 3),
            ("seen", 5),
            ("truncated", 5),
            ("random", 5),
            ("base", None),
        }
        assert ways["original", None]["rmse"] == 0
        assert ways["original", None]["style"]["same"] == 1
        assert ways["seen", 5]["delta_error"] < ways["random", 5]["delta_error"]
        assert {row["way"] for row in found["tilted"]} == {"original", "left out", "base"}

    def test_a_lora_draws_as_peft_does(self, workshop):
        from peft import PeftModel

        lora("outline", "outline", 1)
        bench = easel.Easel(TINY, SMALL["drawing"])
        drawn = bench.draw(dict(ex.read_adapter(easel.adapter_folder("outline")).modules))
        unet, classes = diffusion.saved_model(easel.BASE)
        asked = SMALL["drawing"]
        model = PeftModel.from_pretrained(unet, easel.adapter_folder("outline")).merge_and_unload()
        same = diffusion.draw(model, classes, bench.labels, bench.start, asked["steps"], asked["guidance"])
        torch.testing.assert_close(drawn, same, atol=0.02, rtol=0)
        assert (drawn - bench.draw({})).abs().max() > 0.02

    @pytest.mark.parametrize("basis", ["core"])
    def test_a_new_style_on_coefficients_and_by_its_lora(self, workshop, basis):
        for n, name in enumerate([*NAMES, "tilted"]):
            lora(name, name, n)
        for job in drawing.judging(SMALL):
            judges.train(job.config, easel.judge_file(job.config["what"]))
        config = {**CONFIG, **SMALL, "check": {"rows": 30, "seed": 1}}
        for job in drawing.packs(config):
            drawing.packed(job.config)
        job = drawing.new_style(config, "targets", basis, "tilted", 1e-2)
        job.config["recipe"] = {**job.config["recipe"], "steps": 8, "batch_size": 3}
        found = drawing.learned(job.config)
        other = {"name": "tilted", "style": "tilted", **drawing.checked(config, "held out")}
        assert found["test"]["loss"] > 0
        assert found["train"]["num_trainable"] < drawing.known(other)["train"]["num_trainable"]
