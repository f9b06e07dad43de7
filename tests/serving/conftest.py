import os
from importlib.util import find_spec

import jaxtyping
import pytest

if find_spec("vllm") is not None:
    from offline import ENVIRONMENT

    # read when vLLM is imported
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def unchecked_shapes(monkeypatch):
    """Check no shapes here: Dynamo cannot trace jaxtyping's checks. The tests of core and codec make them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")
