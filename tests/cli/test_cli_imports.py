"""Packages that the command imports: help, errors of usage and `inspect` come without torch, so they come at once."""

import json
import os
import shutil

import pytest

import eigenlorax as ex
from adapters import make_adapters
from children import python
from eigenlorax.cli.main import VERBS

HEAVY = ("torch", "numpy", "peft", "transformers", "huggingface_hub", "jaxtyping", "matplotlib")
VERB_MODULES = [f"eigenlorax.cli.{verb.replace('-', '_')}" for verb in VERBS]

RUN = f"""
import contextlib, io, json, sys
from eigenlorax.cli import main

def run(arguments):
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
    except SystemExit as exit:
        code = exit.code or 0
    loaded = [name for name in {(*HEAVY, *VERB_MODULES)!r} if name in sys.modules]
    return {{"code": code, "out": out.getvalue(), "err": err.getvalue(), "loaded": loaded}}

print(json.dumps([run(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def run(*command_lines, cwd=None):
    """Run command lines one after the other in a new interpreter; return what each printed, and what is loaded."""
    done = python("-c", RUN, json.dumps(command_lines), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def heavy(process):
    return [name for name in process["loaded"] if name in HEAVY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with adapters `in/alpha` and `in/beta`, and packs of them of both kinds."""
    folder = tmp_path_factory.mktemp("imports")
    make_adapters(folder / "in", "alpha beta")
    ex.fit(folder / "in", n_components=2).save(folder / "components")
    ex.fit(folder / "in", max_error=0.1).save(folder / "coded")
    return folder


@pytest.mark.parametrize(
    "code",
    [
        "import eigenlorax",
        "import eigenlorax; dir(eigenlorax), eigenlorax.__version__",
        "import eigenlorax.cli, eigenlorax.errors",
        "import eigenlorax.formats, eigenlorax.formats.hub_client, eigenlorax.pack.hub",
    ],
)
def test_packages_load_nothing_heavy(code):
    done = python("-c", f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_help_loads_nothing_heavy():
    for process in run(["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)):
        assert process["code"] == 0
        assert heavy(process) == []


def test_a_verb_is_loaded_alone():
    (process,) = run(["fit", "--help"])
    assert process["loaded"] == ["eigenlorax.cli.fit"]


def test_an_unknown_verb_is_compared_with_all():
    misspelt, unknown = run(["exprot", "pack"], ["frobnicate"])
    assert "Did you mean 'export'?" in misspelt["err"]
    assert (misspelt["code"], unknown["code"]) == (2, 2)
    assert heavy(unknown) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("fit --nosuch", "No such option"),
        ("fit in", "Missing option"),
        ("fit in -o new -k many", "neither an integer nor 'auto'"),
        ("export '' -o out", "it is empty"),
        ("fit nowhere -o new", "nowhere does not exist"),
        ("fit in nowhere/a.safetensors -o new", "nowhere/a.safetensors does not exist"),
        ("add components nowhere", "nowhere does not exist"),
        ("inspect nowhere", "nowhere does not exist"),
        *((f"{verb} nowhere", "nowhere is not a pack") for verb in ("push", "log", "report", "prune")),
        ("export nowhere -o out", "nowhere is not a pack"),
        ("export in/alpha -o out", "It is an adapter"),
        ("remove in/alpha alpha", "It is an adapter"),
        ("train nowhere --task text-classification --train rows.csv -o new", "nowhere is not a pack"),
        ("compare nowhere --task text-classification --train rows.csv", "nowhere is not a pack"),
        ("restore damaged run@1 -o out", "damaged/subspace_config.json is not valid JSON"),
        ("export newer -o out", "pip install --upgrade eigenlorax"),
    ],
)
def test_errors_of_usage_load_nothing_heavy(folder, line, message):
    for name, manifest in (("damaged", "{"), ("newer", '{"format_version": 99}')):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "subspace_config.json").write_text(manifest)
    (process,) = run([word.strip("'") for word in line.split()], cwd=folder)
    assert process["code"] not in (0, 1)
    assert message in " ".join(process["err"].replace("│", " ").split())
    assert heavy(process) == []


@pytest.mark.parametrize("pack", ["components", "coded"])
def test_inspect_loads_nothing_heavy(folder, pack):
    table, document = run(["inspect", pack], ["inspect", pack, "--json"], cwd=folder)
    assert "alpha" in table["out"]
    opened = ex.Pack.open(folder / pack)
    summary = json.loads(document["out"])
    assert summary["adapter_records"]["beta"]["delta_error"] == opened.records["beta"].delta_error
    assert summary["files"]["pack"] == opened.summary.files.pack
    assert heavy(document) == []


def test_inspect_without_torch_reads_every_byte(folder, tmp_path):
    shutil.copytree(folder / "components", tmp_path / "pack")
    weights = tmp_path / "pack/adapters/beta/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (process,) = run(["inspect", os.fspath(tmp_path / "pack")])
    assert process["code"] not in (0, 1, 2)
    assert "adapter_model.safetensors was changed after it was written" in " ".join(process["err"].split())
    assert heavy(process) == []
