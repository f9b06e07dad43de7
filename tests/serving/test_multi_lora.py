"""The benchmark of vLLM with many adapters runs, at small sizes, and its slots take the bytes that its formula says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("vllm", reason="vLLM is not installed: pip install '.[vllm]'")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "multi_lora.py"


def test_a_quick_run():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["same_tokens"] == {"4": 1.0}
    numbers = found["numbers"]
    assert found["bytes"] == {
        "base": {"slots": 0, "basis": 0},
        "lora 4": {"slots": 4 * 4 * numbers["lora"], "basis": 0},
        "shared 4": {"slots": 4 * 4 * numbers["shared"], "basis": 4 * numbers["basis"]},
    }
