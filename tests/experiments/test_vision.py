"""The experiment on images: subsets of classes, what is drawn from them, and a run of every kind."""

import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from transformers import ViTConfig, ViTForImageClassification

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import images, vision, vit  # noqa: E402
from harness.images import Task  # noqa: E402

CONFIG = tomllib.loads((EXPERIMENTS / "configs" / "vision.toml").read_text("utf-8"))
ROLES = ("source", "development", "target")
TINY = {**CONFIG["model"], "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(__file__).resolve().parents[2].parent / "shared" / "data" / "images").is_dir(),
        reason="../shared/data/images is not beside this checkout",
    ),
]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A base model, and two sources of it, in a folder of the test's own."""
    monkeypatch.setattr(vit, "WORK", tmp_path)
    ViTForImageClassification(ViTConfig(**TINY, num_labels=7)).save_pretrained(vit.base_folder())
    for n, name in enumerate(("one", "other")):
        vit.train(job("lora", {"r": 3}, name=name, seed=n))
    return tmp_path


def job(kind, options, *, name=None, seed=5, pack=None):
    """Two steps of training."""
    recipe = {**CONFIG["recipe"], "epochs": 1.0, "evaluations": 1, "batch_size": 4}
    return {
        "name": name,
        "task": asdict(Task("mnist", ("3", "8"), 4, 6, 0)),
        "kind": kind,
        "options": options,
        "learning_rate": 0.01,
        "seed": seed,
        "pack": pack,
        "recipe": recipe,
    }


class TestTasks:
    def test_no_class_is_in_two_tasks(self):
        dealt = [
            (task.images, one) for role in ROLES for task in vision.tasks(CONFIG, role).values() for one in task.classes
        ]
        assert len(dealt) == len(set(dealt)) == 238 + 10

    def test_no_image_of_a_target_is_in_a_source(self):
        seen, of_targets = ({row["pixel_values"].tobytes() for row in rows_of(role)} for role in ("source", "target"))
        assert seen
        assert of_targets
        assert not seen & of_targets

    def test_none_is_trained_on_and_tested_on(self):
        for role in ROLES:
            for task in vision.tasks(CONFIG, role).values():
                drawn = {row["pixel_values"].tobytes() for row in images.train_rows(task, 3)}
                assert not drawn & {row["pixel_values"].tobytes() for row in images.test_rows(task)}

    def test_too_few_classes(self):
        with pytest.raises(SystemExit, match="mnist has 10 classes: too few"):
            images.dealt("mnist", {"source": [3, 3], "target": [1, 2]}, "target")

    def test_alphabets_that_are_in_both_archives_count_once(self):
        assert len(images.classes("omniglot")) == 242
        assert all(len(files) == 20 for files in images._drawings().values())


def rows_of(role):
    tasks = vision.tasks(CONFIG, role).values()
    return [row for task in tasks for row in images.train_rows(task, 1) + images.test_rows(task)]


class TestRows:
    TASK = Task("omniglot", ("Greek/character02", "Greek/character05", "Latin/character01"), 7, 10, 2)

    def test_a_seed_gives_the_same_rows(self):
        one, again, other = (images.train_rows(self.TASK, seed) for seed in (1, 1, 2))
        assert [row["labels"] for row in one] == [row["labels"] for row in again]
        assert np.array_equal(pixels(one), pixels(again))
        assert not np.array_equal(pixels(one), pixels(other))

    def test_shapes_and_ranges(self):
        rows = images.train_rows(self.TASK, 1)
        assert len(rows) == 3 * 7 * (1 + 2)
        found = images.collate(rows)
        assert found["pixel_values"].shape == (63, 1, 28, 28)
        assert found["labels"].bincount().tolist() == [21, 21, 21]
        # ground and ink
        assert float(found["pixel_values"].min()) == -1
        assert 0.9 < float(found["pixel_values"].max()) <= 1

    def test_a_distorted_image_is_another_one_of_the_same(self):
        import random

        image = images.images_of("mnist", "4")[0]
        found = images.distorted(image, random.Random(0))
        assert not np.array_equal(found, image)
        assert found.sum() == pytest.approx(image.sum(), rel=0.4)


def pixels(rows):
    return np.stack([row["pixel_values"] for row in rows])


class TestRuns:
    def test_two_steps_in_a_subspace(self, tiny):
        spec = {"sources": ["one", "other"], "k": 4, "weighting": "delta"}
        found = vit.train(job("eigenlorax", {"core": True, "r": 4, "lora_alpha": 4}, pack=spec))
        assert found["subspace"]["k"] == [4, 4]
        # 2 layers, query and value
        assert found["train_info"]["num_trainable_params"] == 4 * 16
        assert found["train_info"]["num_head_params"] == 2 * 12 + 2
        assert [one["step"] for one in found["train_info"]["metrics"]] == [2]
        assert 0 <= found["test"]["score"] <= 1
        assert found["test"]["rows"] == 12

    def test_recycled_at_full_rank_nothing_is_lost(self, tiny):
        asked = job("lora", {})
        ways = vit.recycle(
            {"name": "one", "task": asked["task"], "sources": ["one", "other"], "k": [6], "weighting": "delta"}
        )["test"]["ways"]
        errors = {(one["way"], one["bits"]): one["delta_error"] for one in ways}
        assert errors["seen", None] < 1e-5
        assert errors["left out", None] > 0.3
        assert errors["rounded", 8] < errors["rounded", 4] < 0.3
        seen = next(one for one in ways if one["way"] == "seen")
        assert seen["agreement"] == 1
        # bases of 2 layers' queries and values, both sides 12 wide, for two; and coefficients of rank 3
        assert seen["numbers_an_adapter"] == 4 * (2 * 6 * 12 / 2 + 2 * 6 * 3)
