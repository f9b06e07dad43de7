"""A function that is called when another package has been imported."""

import importlib
import importlib.util
import sys

import pytest

from eigenlorax.core.import_hook import call_after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that can be imported, and is not yet."""
    name = "imported_by_test_import_hook"
    (tmp_path / f"{name}.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield name
    sys.modules.pop(name, None)


def test_it_is_called_once_after_the_import(package):
    calls = []
    for _ in range(2):
        call_after_import(package, lambda: calls.append(sys.modules[package].loaded))
    assert calls == []
    module = importlib.import_module(package)
    assert calls == [True]
    importlib.reload(module)
    assert calls == [True]
    call_after_import(package, lambda: calls.append("at once"))
    assert calls == [True, "at once"]


def test_a_search_for_the_package_changes_nothing(package):
    # transformers and diffusers search for PEFT when they are imported
    calls = []
    call_after_import(package, lambda: calls.append(package))
    for _ in range(2):
        assert importlib.util.find_spec(package) is not None
    assert calls == []
    importlib.import_module(package)
    assert calls == [package]


def test_a_package_that_fails_is_tried_again(package, tmp_path):
    calls = []
    call_after_import(package, lambda: calls.append(package))
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(package)
    (tmp_path / f"{package}.py").write_text("loaded = 'now it is'\n")
    importlib.invalidate_caches()
    importlib.import_module(package)
    assert calls == [package]
