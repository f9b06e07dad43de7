import os
from importlib.util import find_spec

import pytest

if find_spec("vllm") is not None:
    from offline import ENVIRONMENT

    # read when vLLM is imported
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")
