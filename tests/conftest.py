"""Settings of every test run, and the fixtures that several packages use. CONTRIBUTING.md says how to run the tests."""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# No deadline, since a shared core may be away for longer than any. The same examples in each run, so that a commit
# that passes keeps passing.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two threads on a shared core spin. Set before torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run on all cores, unless one file is named or `-n` says otherwise.

    Not by `addopts`: with `-n` there, `-p no:xdist` would be an error. Tests of a file stay together, since they share
    fixtures that are slow to make.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        # a worker of xdist runs this hook too, and would start workers of its own
        return
    files = {argument.partition("::")[0] for argument in config.args}
    one_file = len(files) == 1 and files.pop().endswith(".py")
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not one_file:
        config.option.numprocesses = config.hook.pytest_xdist_auto_num_workers(config=config)
        config.option.dist = "loadfile"


def pytest_configure(config):
    # not in pyproject.toml: there pytest would import the package before its annotations can be checked
    config.addinivalue_line("filterwarnings", "error::eigenlorax.errors.EigenloraxWarning")
    # random collections share no subspace, so tests would warn of large errors everywhere
    config.addinivalue_line("filterwarnings", "ignore::eigenlorax.errors.LossWarning")


@pytest.fixture(scope="session")
def shared():
    """Return the folder of real data and adapters beside the checkout. It is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "zoo").is_dir():
        pytest.skip("../shared/zoo, adapters by strangers, is not beside this checkout")
    return folder


@pytest.fixture
def without_shape_checks():
    """Do not check shapes and types of the mathematics in this test.

    The checks double the time of a fit by error bound, and take four fifths of that of a version. Tests of many such
    leave them to `codec/test_encoder.py` and `codec/versions`, and what hands arrays over to `fitting/test_fit.py`,
    `pack/test_coded_packs.py` and `pack/test_histories.py`.
    """
    with _shape_checks_disabled():
        yield


@pytest.fixture(scope="module")
def module_without_shape_checks():
    """The same for all tests of a file, and for what they share."""
    with _shape_checks_disabled():
        yield


@contextmanager
def _shape_checks_disabled():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def read_version(monkeypatch):
    """Return docs/read_version.py as a module."""
    docs = Path(__file__).resolve().parents[1] / "docs"
    monkeypatch.syspath_prepend(str(docs))
    spec = importlib.util.spec_from_file_location("read_version", docs / "read_version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("read_pack", None)
    return module


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """Run commands with the fixture `hub` as the Hub, an empty cache, and an empty current folder."""
    from fake_hub import client

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return client(hub, tmp_path / "home")
