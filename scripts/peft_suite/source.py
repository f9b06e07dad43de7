"""PEFT's tests as PyPI ships them: those of the installed version, fetched once, never kept in this repository."""

import importlib
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

PACKAGE = "peft_tests"
"""The name that PEFT's folder of tests is imported under; it has no `__init__.py` of its own."""

NEVER_CALLED = {"datasets": ("load_dataset",), "diffusers": ("StableDiffusionPipeline",)}
"""What PEFT's two modules of helpers import for tests that are not run here: data sets of the Hub, diffusion."""


def fetch(cache: Path) -> Path:
    """The folder of tests of the installed PEFT, under `cache`."""
    name = f"peft-{version('peft')}"
    tests = cache / name / "tests"
    if not tests.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archive = cache / f"{name}.tar.gz"
        if not archive.is_file():
            wanted = name.replace("-", "==")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "--dest", str(cache), wanted], check=True)
        with tarfile.open(archive) as packed:
            packed.extractall(cache, filter="data")
    return tests


def make_importable(tests: Path) -> None:
    """Make PEFT's tests the package `peft_tests`, whose modules import each other as they do at home."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    # whether these are installed is asked while the stand-ins are in place, and remembered: so it is asked before
    for name in ("transformers", "accelerate.test_utils.testing", "peft"):
        importlib.import_module(name)
    from transformers.utils import import_utils

    import_utils.is_datasets_available()
    absent = [name for name in NEVER_CALLED if _is_absent(name)]
    for name in absent:
        sys.modules[name] = _stand_in(name)
    for helpers in ("testing_utils", "testing_common"):
        importlib.import_module(f"{PACKAGE}.{helpers}")
    for name in absent:
        del sys.modules[name]
    # otherwise the first use of a model's id goes online, and each test waits for five tries
    sys.modules[f"{PACKAGE}.testing_utils"]._HUB_MODEL_ACCESSES = _SeenBefore()


class _SeenBefore(Counter[str]):
    """How often PEFT's tests asked for a model of the Hub: each of them once already."""

    def __contains__(self, model_id: object) -> bool:
        return True


def _is_absent(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return True
    return False


def _stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for attribute in NEVER_CALLED[name]:
        setattr(module, attribute, type(attribute, (), {}))
    return module
