import os
from pathlib import Path

import hypothesis
import pytest

# a shared core may be away for longer than any deadline; and main stays as green as it was
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# two threads on cores that are shared spin: set before torch is imported, here and in every process the tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    # not in pyproject.toml: there pytest would import the package before its annotations can be checked
    config.addinivalue_line("filterwarnings", "error::eigenlorax.errors.EigenloraxWarning")
    # random collections share nothing, and tests keep little of them
    config.addinivalue_line("filterwarnings", "ignore::eigenlorax.errors.LossWarning")


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and adapters beside the repository, which is no part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "zoo").is_dir():
        pytest.skip("../shared/zoo, adapters by strangers, is not beside this checkout")
    return folder


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """Run something where `hub` is the Hub, its cache is empty at first, and the current folder has nothing."""
    from fake_hub import client

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return client(hub, tmp_path / "home")
