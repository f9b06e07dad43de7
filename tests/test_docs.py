"""The pages in docs/ say what the code does: verbs, options, exit codes, fields, modules, links, examples."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import typer

import eigenlorax
from adapters import make_adapters
from eigenlorax import errors
from eigenlorax.cli import command_line
from eigenlorax.cli.goals import GOALS
from eigenlorax.cli.main import IO_ERROR
from eigenlorax.pack import manifest
from eigenlorax.train import search_space
from runs import make_run, write_states

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = Path(eigenlorax.__file__).parent
PAGES = sorted(DOCS.rglob("*.md"))
LINKING = [*PAGES, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md"))]

CLI = (DOCS / "cli.md").read_text("utf-8")
COMMAND = typer.main.get_command(command_line())
VERBS = COMMAND.commands


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def by_path(path):
    return path.relative_to(ROOT).as_posix()


def section(text, title):
    """What is under a heading of the second level, up to the next one."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def without_code(text):
    """A page without its blocks of code, fenced and indented, and without code in lines."""
    text = re.sub(r"^ {4,}.*$", "", without_fences(text), flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_fences(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestCommandLine:
    def test_every_verb_has_a_section(self):
        assert re.findall(r"^## `eigenlorax ([\w-]+)`$", CLI, flags=re.MULTILINE) == list(VERBS)

    @pytest.mark.parametrize("command", [command for goal in GOALS for command in goal.commands])
    def test_commands_of_the_table_of_goals_are_valid(self, command):
        _, verb, *words = command.split()
        options = {spelling for parameter in VERBS[verb].params for spelling in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options
        assert {p.opts[0] for p in VERBS[verb].params if p.param_type_name == "option" and p.required} <= {
            max(p.opts, key=len) for p in VERBS[verb].params if set(p.opts) & set(words)
        }

    def test_options_of_the_command_itself(self):
        for parameter in COMMAND.params:
            assert all(f"`eigenlorax {spelling}`" in CLI for spelling in parameter.opts)

    def test_methods_that_are_compared(self):
        text = section(CLI, "`eigenlorax compare`").partition("results file")[0]
        assert re.findall(r"^- `([a-z-]+)`:", text, flags=re.MULTILINE) == list(search_space.LEARNING_RATES)

    def test_every_error_is_beside_its_exit_code(self):
        rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", section(CLI, "Exit codes"), flags=re.MULTILINE))
        classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
        ours = [one for one in classes if issubclass(one, errors.EigenloraxError)]
        assert len(ours) > 10
        for one in ours:
            assert f"`{one.__name__}`" in rows[str(one.exit_code)]
        assert "`OSError`" in rows[str(IO_ERROR)]
        assert {"0", "1", "2"} <= rows.keys()


@pytest.mark.parametrize("of", [manifest.SubspaceInfo, manifest.SideInfo])
def test_every_field_of_the_manifest_is_specified(of):
    text = (DOCS / "pack-format.md").read_text("utf-8")
    for field in dataclasses.fields(of):
        assert f"`{field.name}`" in text, f"docs/pack-format.md: {field.name} of {of.__name__}"


class TestArchitecture:
    text = (DOCS / "architecture.md").read_text("utf-8")

    def test_every_package_is_named(self):
        packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
        assert len(packages) >= 10
        missing = [name for name in packages if f"\n| `{name}` |" not in self.text]
        assert not missing, f"docs/architecture.md does not name {missing}"

    def test_every_path_exists(self):
        paths = re.findall(r"`([\w./]+(?:\.py|/))`", self.text)
        assert len(paths) > 30
        missing = [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]
        missing = [path for path in missing if not list(PACKAGE.glob(f"*/{path}"))]
        assert not missing, f"docs/architecture.md names {missing}"

    def test_it_is_two_screens(self):
        assert len(self.text.splitlines()) < 140

    def test_the_picture_has_the_layers_that_are_held(self):
        contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
        (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
        held = [[name.strip().removeprefix("eigenlorax.") for name in re.split("[|:]", layer)] for layer in layers]
        picture = self.text.partition("```text\n")[2].partition("```")[0]
        assert [line.split(" | ") for line in picture.splitlines()] == held


@pytest.mark.parametrize("page", LINKING, ids=by_path)
def test_links_lead_somewhere(page):
    text = without_code(page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{by_path(page)}: {target}"
        assert found.is_relative_to(ROOT), f"{by_path(page)}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(found.read_text("utf-8")), f"{by_path(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page != DOCS / "README.md"], ids=by_path)
def test_the_index_has_every_page(page):
    assert f"({page.relative_to(DOCS).as_posix()})" in (DOCS / "README.md").read_text("utf-8")


BLOCKS = [
    (page, block)
    # others run elsewhere: tests/serving/test_example.py (vLLM, where it is installed), tests/test_readme.py,
    # tests/test_get_started.py (quickstart), tests/cli/test_hub_page.py, tests/serving/diffusers/test_diffusion_page.py
    for page in PAGES
    if page.name not in ("diffusion.md", "hub.md", "quickstart.md", "vllm.md")
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
]


def training(folder):
    """A run of three checkpoints in `run`, and the variables of a page on trainings: a model with a LoRA, and rows."""
    import peft
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    write_states(make_run(folder / "run", (10, 20, 30)), max_steps=30)
    make_adapters(folder / "adapters", "a b c")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes))
    rows = [{"input_ids": [n, n + 1], "labels": n % 2} for n in range(16)]
    return {
        "model": peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")),
        "rows": rows,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[by_path(page) for page, _ in BLOCKS])
def test_examples_run(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = training(tmp_path) if page.name == "histories.md" else {}
    exec(compile(block, str(page), "exec"), {"__name__": "example", **given})
    assert any(tmp_path.iterdir()), "an example leaves something in its folder"


def test_the_pages_have_at_most_30000_words():
    """Tables that are made from result files are not counted."""
    made = re.compile(r"<!-- ([\w:-]+?)(?::begin)? -->.*?<!-- (?:\1:end|/experiment) -->", re.DOTALL)
    words = {by_path(page): len(made.sub("", page.read_text("utf-8")).split()) for page in PAGES}
    assert sum(words.values()) <= 30_000, words


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_lines_are_short(page):
    # what benchmarks/table.py and experiments/tables.py write is not wrapped
    written = r"<!-- (?:[a-z-]+:begin|experiment:[a-z-]+) -->.*?<!-- (?:[a-z-]+:end|/experiment) -->"
    text = without_fences(re.sub(written, "", page.read_text("utf-8"), flags=re.DOTALL))
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "$$"))]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_tables_have_a_line_for_each_row(page):
    text = without_code(page.read_text("utf-8"))
    assert all(line.startswith("|") for line in text.splitlines() if re.search(r"\|\s*-{3,}", line))
