"""The example of docs/vllm.md as it stands there, as a script: with the processes that vLLM starts for it."""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/vllm-suite installs it")

import eigenlorax
from families import FAMILIES, made_adapters
from offline import printed_by

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"


def test_the_example_runs_as_a_script(tmp_path):
    FAMILIES["llama"].made(tmp_path / "base")
    made_adapters(FAMILIES["llama"], tmp_path / "base", tmp_path / "adapters", n=2)
    named = [f"{name}={tmp_path}/adapters/a{i}" for i, name in enumerate(("sst2", "letters"))]
    eigenlorax.fit(named, n_components=10).save(tmp_path / "pack")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(block)
    said = printed_by("example.py", cwd=tmp_path)
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    answers = ast.literal_eval(line)
    assert list(answers) == ["sst2", "letters"]
    assert answers["sst2"] != answers["letters"]
