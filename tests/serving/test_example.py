"""The example of docs/vllm.md as it stands there, as a script: with the processes that vLLM starts for it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, made_adapters
from offline import ENVIRONMENT

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
SECONDS = 300


def test_the_example_runs_as_a_script(tmp_path):
    FAMILIES["llama"].made(tmp_path / "base")
    made_adapters(FAMILIES["llama"], tmp_path / "base", tmp_path / "adapters", n=2)
    named = [f"{name}={tmp_path}/adapters/a{i}" for i, name in enumerate(("sst2", "letters"))]
    eigenlorax.fit(named, n_components=10).save(tmp_path / "pack")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(block)
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **ENVIRONMENT, **several}
    ran = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    said = ast.literal_eval(line)
    assert list(said) == ["sst2", "letters"]
    assert said["sst2"] != said["letters"]
