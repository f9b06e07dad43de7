"""The picture of a difference between two adapters."""

import re

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")

import eigenlorax as ex
from eigenlorax.core.update_changes import AdapterChange, UpdateChange, compare
from eigenlorax.errors import MissingExtraError, OptionError, PackExistsError
from eigenlorax.reports import change_map


def change_of(modules, before="run@1", after="run@2"):
    return AdapterChange(before, after, UpdateChange(0.5, 1.0, 0.25, 0.125), modules, {})


GRID = change_of(
    {
        "model.layers.0.q_proj": UpdateChange(0.11, 1.0, 0.21, 0.31),
        "model.layers.1.q_proj": UpdateChange(0.12, 1.0, 0.22, 0.32),
        "model.layers.1.v_proj": UpdateChange(None, None, 1.0, 0.33),
        "model.pooler": UpdateChange(0.14, 1.0, 0.24, 0.34),
    }
)


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text("utf-8"))


def test_each_module_has_its_number_in_each_map(tmp_path):
    drawn = texts(change_map.save(GRID, tmp_path / "new/change.svg"))
    for number in (0.11, 0.12, 0.14, 0.21, 0.22, 0.24, 0.31, 0.32, 0.33, 0.34):
        assert drawn.count(f"{number:.2f}") == 1
    assert "run@1 → run@2" in drawn
    assert "relative change ‖D′ − D‖ / ‖D‖; all modules: 0.500" in drawn
    for label in ("q_proj", "v_proj", "pooler"):
        assert drawn.count(label) == 3


def test_equal_changes_give_equal_bytes(tmp_path):
    for suffix in ("svg", "PNG"):
        first, second = (change_map.save(GRID, tmp_path / f"{name}.{suffix}") for name in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_real_checkpoints_of_many_layers(shared, tmp_path):
    run = shared / "zoo/lineages/roberta-portuguese"
    before, after = (ex.read_adapter(run / f"checkpoint-{step}") for step in (500, 1000))
    path = change_map.save(compare(before, after), tmp_path / "change.svg")
    assert path.stat().st_size < 100_000
    assert {"query", "value"} <= set(texts(path))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("change", OptionError, r"the suffix of a picture must be \.svg or \.png, such as change\.svg"),
        ("change.pdf", OptionError, "the suffix of a picture must be"),
        ("folder.svg", OptionError, "is a folder. Pass a file in it"),
        ("old.svg", PackExistsError, r"old.svg exists. Pass another path, or overwrite=True \(--overwrite\)"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, name, error, message):
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "old.svg").write_text("old")
    with pytest.raises(error, match=message):
        change_map.save(GRID, tmp_path / name)
    assert (tmp_path / "old.svg").read_text() == "old"
    change_map.save(GRID, tmp_path / "old.svg", overwrite=True)
    assert "<svg" in (tmp_path / "old.svg").read_text("utf-8")


def test_adapters_without_modules(tmp_path):
    with pytest.raises(OptionError, match="have no LoRA modules"):
        change_map.save(change_of({}), tmp_path / "change.svg")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(change_map, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eigenlorax\[report\]'"):
        change_map.save(GRID, tmp_path / "change.svg")
