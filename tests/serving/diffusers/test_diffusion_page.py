"""The commands and the Python of docs/diffusion.md run as they stand, with a tiny pipeline and random styles."""

import glob
import re
import shlex
from pathlib import Path

import pytest

import lora_files
from eigenlorax.cli import main
from tinypipes import style

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[3] / "docs" / "diffusion.md"


def test_the_page_on_pipelines(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = make("sd")
    Path("styles").mkdir()
    for seed, name in enumerate(("toy", "sketch"), start=1):
        lora_files.write(Path("styles") / f"{name}.safetensors", style(pipe, name, seed), "kohya")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for language, text in blocks:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {"__name__": "page", "pipe": pipe})
        else:
            run_commands(text)
    assert pipe.get_list_adapters()["unet"] == ["toy", "sketch"]
    for folder in ("loras", "kohya", "diffusers"):
        assert Path(folder, "toy.safetensors").is_file()


def run_commands(text):
    for line in text.splitlines():
        program, *words = shlex.split(line)
        if program == "eigenlorax":
            # as the shell expands them
            words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code == 0, line
