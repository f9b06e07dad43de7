"""The experiment on pictures: styles, the model's own loss and drawing, and a run of every kind."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import diffusion, drawing, judges, sampler, styles  # noqa: E402

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
    "bytes": {"ratios": [4.0]},
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
    """A base model, and every file of the runs, in a folder of the test's own."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sampler, "WORK", tmp_path)
    read_all = diffusion.read_pictures
    monkeypatch.setattr(diffusion, "read_pictures", lambda data, split: read_all(data, split)[::20])
    drawing.pretrain(SMALL)
    return tmp_path


def train_lora(name, style, seed):
    recipe = {"steps": 8, "batch_size": 3, "warmup": 2, "learning_rate": 1e-2}
    options = {**CONFIG["lora"]["options"], "r": 3}
    drawing.train_lora(
        {"name": name, "style": style, "seed": seed, "data": CONFIG["data"], "options": options, "recipe": recipe}
    )


class TestStyles:
    def test_every_style_keeps_the_range_and_changes_the_picture(self):
        plain = diffusion.read_pictures(CONFIG["data"], "held out").pixels[::97].numpy()
        for name in styles.STYLES:
            styled = styles.apply(name, plain)
            assert (styled.shape, styled.dtype) == (plain.shape, np.float32)
            assert styled.min() >= 0
            assert styled.max() <= 1
            assert np.abs(styled - plain).mean() > 0.01, name

    def test_the_styles_are_those_of_the_experiment_and_no_two_are_the_same(self):
        names = CONFIG["styles"]["known"]
        plain = diffusion.read_pictures(CONFIG["data"], "held out").pixels[::97].numpy()
        styled = [styles.apply(name, plain) for name in names]
        assert sorted(names) == sorted(["plain", *styles.STYLES])
        assert min(np.abs(a - b).mean() for n, a in enumerate(styled) for b in styled[:n]) > 0.01

    def test_left_out_styles_are_in_no_fit(self):
        names = CONFIG["styles"]
        assert not {*names["left_out"], names["development"]} & set(names["fitted"])


class TestModel:
    def test_packing_pixels_is_undone(self):
        pixels = torch.rand(5, 28, 28)
        torch.testing.assert_close(diffusion.unpack_pixels(diffusion.pack_pixels(pixels)), pixels)

    def test_no_picture_is_held_out_and_trained_on(self):
        held_out, train = (diffusion.read_pictures(CONFIG["data"], split) for split in ("held out", "train"))
        assert (len(held_out), len(train)) == (2000, 18000)
        assert set(train.labels.tolist()) == set(range(20))


class TestRuns:
    def test_the_base_draws_before_drawings_are_compared_with_its_own(self):
        order = list(drawing.STAGES)
        assert order.index("plain") < min(order.index("bytes"), order.index("recycled"))

    def test_a_style_from_its_lora_to_what_packs_keep_of_it(self, workshop):
        for n, name in enumerate([*NAMES, "tilted"]):
            train_lora(name, name, n)
        train_lora("outline-twin", "outline", 9)
        for job in drawing.judging(SMALL):
            assert 0 <= drawing.train_judge(job.config)["test"]["accuracy"] <= 1
        config = {**CONFIG, **SMALL, "lora": {**CONFIG["lora"], "twins": ["outline"]}}
        for job in [*drawing.packs(config), *drawing.ratio_packs(config)]:
            assert set(drawing.fit_pack(job.config)["delta_errors"]) == set(NAMES)
        [job] = drawing.base_drawings(config)
        assert sampler.draw_base(job.config)["test"]["pictures"] == 20
        runs = {job.config["name"]: sampler.recycle(job.config) for job in drawing.recycled(config)}
        rows = {(row["way"], row["k"]): row for row in runs["outline"]["test"]["ways"]}
        assert set(rows) == {
            ("original", None),
            ("another seed", None),
            ("seen", 3),
            ("seen", 5),
            ("truncated", 5),
            ("random", 5),
            ("base", None),
        }
        assert rows["original", None]["rmse"] == 0
        assert rows["original", None]["style"]["same"] == 1
        assert rows["seen", 5]["delta_error"] < rows["random", 5]["delta_error"]
        assert {row["way"] for row in runs["tilted"]["test"]["ways"]} == {"original", "left out", "base"}
        [by_ratio, base] = sampler.recycle_by_bytes(next(drawing.by_bytes(config)).config)["test"]["ways"]
        assert (by_ratio["way"], by_ratio["k"], base["way"]) == ("bytes", 4.0, "base")
        assert by_ratio["rmse"] < base["rmse"]

    def test_a_lora_draws_as_in_peft(self, workshop):
        from peft import PeftModel

        train_lora("outline", "outline", 1)
        bench = sampler.Sampler(SMALL)
        drawn = bench.draw(dict(ex.read_adapter(sampler.adapter_folder("outline")).modules))
        unet, classes = diffusion.load_base(sampler.base_folder())
        steps, guidance = SMALL["drawing"]["steps"], SMALL["drawing"]["guidance"]
        model = PeftModel.from_pretrained(unet, sampler.adapter_folder("outline")).merge_and_unload()
        same = diffusion.draw(model, classes, bench.labels, bench.start, steps, guidance)
        torch.testing.assert_close(drawn, same, atol=0.02, rtol=0)
        assert (drawn - bench.draw({})).abs().max() > 0.02

    def test_a_new_style_by_coefficients_and_by_its_lora(self, workshop):
        for n, name in enumerate([*NAMES, "tilted"]):
            train_lora(name, name, n)
        for job in drawing.judging(SMALL):
            judges.train(job.config, sampler.judge_file(job.config["what"]))
        config = {**CONFIG, **SMALL, "check": {"rows": 30, "seed": 1}}
        for job in drawing.packs(config):
            drawing.fit_pack(job.config)
        job = drawing.new_style(config, "targets/core", "tilted", 1e-2, "held out")
        job.config["recipe"] = {**job.config["recipe"], "steps": 8, "batch_size": 3}
        trained = drawing.train_coefficients(job.config)
        lora = {"name": "tilted", "style": "tilted", **drawing.checked(config, "held out")}
        assert trained["test"]["loss"] > 0
        assert trained["train"]["num_trainable"] < drawing.score_lora(lora)["train"]["num_trainable"]
