"""What the tests of the page share."""

import shutil
from pathlib import Path

import pytest

from adapters import make_adapter

MODULES = {"encoder.layer.0.query": (170, 110), "encoder.layer.0.value": (130, 230)}


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the adapters alpha, beta, gamma and delta, which have nothing in common."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")
    folder = tmp_path_factory.mktemp("of-the-page") / "adapters"
    for seed, name in enumerate(("alpha", "beta", "gamma", "delta")):
        make_adapter(folder / name, seed=seed, modules=MODULES)
    return folder


@pytest.fixture(scope="session")
def archive(adapters: Path) -> Path:
    """The same as a zip file."""
    return Path(shutil.make_archive(str(adapters.parent / "archive"), "zip", adapters.parent, "adapters"))
