"""Commands of all pages are valid; those that no other test runs are run here. Python fragments use existing names."""

import ast
import glob
import inspect
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

import children
import eigenlorax as ex
import gguf_models
import image_models
import lora_files
from children import needs_fork
from eigenlorax.cli import command_line, main
from eigenlorax.train import demo
from runs import make_run, write_states

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = typer.main.get_command(command_line())
VERBS = COMMAND.commands

FRAGMENT_TYPES = {"bank": ex.AdapterBank, "router": ex.Router, "pack": ex.Pack, "eigenlorax": ex, "ex": ex}
"""What variables of fragments are."""


def by_path(path):
    return path.relative_to(ROOT).as_posix()


def blocks(page):
    """The blocks of code of a page, as pairs (language, text); that of an indented block is "indented"."""
    text = page.read_text("utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?<=\n\n)((?: {4}[^\n]*\n(?:\n(?= {4}))?)+)", rest)
    return [*fenced, *(("indented", inspect.cleandoc(block)) for block in indented)]


def commands(page):
    """The commands in the blocks of a page, each as the words after `eigenlorax`."""
    lines = "\n".join(text for language, text in blocks(page) if language != "python").replace("\\\n", " ").splitlines()
    found = [re.match(r"(?:[A-Z_]+=\S+ )*eigenlorax (.*)", line.strip()) for line in lines]
    return [shlex.split(match[1].partition(" | ")[0], comments=True) for match in found if match]


def mentioned(page):
    """Commands within lines of a page, `eigenlorax fit … --ratio 10`, each as the words after `eigenlorax`."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [match.split() for match in re.findall(r"`eigenlorax ([a-z-][^`]*)`", text)]


def options(verb):
    return {spelling for p in VERBS[verb].params for spelling in (*p.opts, *p.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_commands_have_verbs_and_options_that_exist(page):
    for words in commands(page) + mentioned(page):
        verb, *rest = words
        if verb.startswith("-"):
            assert verb in {spelling for p in COMMAND.params for spelling in p.opts} | {"--help"}, words
            continue
        assert verb in VERBS, words
        given = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= options(verb), (words, sorted(given - options(verb)))
    for words in commands(page):
        verb, *rest = words
        needed = [p for p in VERBS[verb].params if p.param_type_name == "option" and p.required]
        assert all(set(p.opts) & set(rest) for p in needed), words


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_fragments_use_names_that_exist(page):
    """Indented Python continues an example or needs a server, and is not run."""
    for language, text in blocks(page):
        if language != "indented" or not re.search(r"^(import|from) |^[\w, ]+ = \w|^\w+(\.\w+)+\(", text, re.MULTILINE):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                check_call(node)
            elif isinstance(node, ast.Attribute):
                resolve(node)


def resolve(node):
    """The object of a name such as `eigenlorax.Router.load` or `bank.mixing`; None for what the table does not have."""
    if isinstance(node, ast.Name):
        return FRAGMENT_TYPES.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolve(node.value)
    return None if owner is None else getattr(owner, node.attr)


def check_call(node):
    """Raise an error for a keyword that the function of a call does not have."""
    function = resolve(node.func)
    # `bank(…)` calls the model's forward
    if isinstance(node.func, ast.Attribute) and function is not None:
        parameters = inspect.signature(function).parameters
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert is_open or {keyword.arg for keyword in node.keywords} <= set(parameters), ast.unparse(node)


def adapters(folder, names="sms-spam-a sms-spam-b clinc-home"):
    for name in names.split():
        shutil.copytree(demo.data() / "adapters" / name, folder / name)
    return folder


def of_formats(folder):
    """Files of docs/adapter-formats.md: an adapter of a Llama, its config, and a style."""
    gguf_models.write_config(folder / "models/smollm2")
    ex.write_adapter(gguf_models.adapter(), folder / "adapters/french")
    style = lora_files.planted(image_models.stable_diffusion(), seed=3)
    lora_files.write(folder / "style.safetensors", style, "kohya")


def of_bytes(folder):
    adapters(folder / "adapters", "sms-spam-a sms-spam-b")
    adapters(folder / "runs", "acl-arc-a")
    (folder / "runs/acl-arc-a").rename(folder / "runs/new")


def of_merging(folder):
    names = ("clinc-home", "clinc-work", "sms-spam-a")
    ex.fit(adapters(folder / "adapters", " ".join(names)), n_components=16).save(folder / "pack")
    for new, name in zip("abc", names, strict=True):
        (folder / "adapters" / name).rename(folder / "adapters" / new)


def of_histories(folder):
    write_states(make_run(folder / "run", (10, 20, 500, 1000)), max_steps=1000)


PREPARED = {
    "adapter-formats.md": of_formats,
    "bytes.md": of_bytes,
    "histories.md": of_histories,
    "merging.md": of_merging,
    "report.md": lambda folder: ex.fit(adapters(folder / "adapters"), n_components=16).save(folder / "pack"),
    "scale.md": lambda folder: adapters(folder / "loras"),
}
"""Functions that make the files of a page in a folder, by its path in docs/. Commands of the README, get-started,
vllm.md, hub.md and diffusion.md are run by tests of their own, those of find.md as examples of its help."""

ELSEWHERE = r"s3://|--watch|--evaluate|^train |--reference|members@"
"""Commands that need a cloud, a second process, or rows and a model: tests of the verbs run them."""


@pytest.mark.slow
@needs_fork
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", PREPARED)
def test_commands_run(name, tmp_path):
    PREPARED[name](tmp_path)
    lines = [words for words in commands(ROOT / "docs" / name) if not re.search(ELSEWHERE, " ".join(words))]
    assert lines
    for words in lines:
        done = children.run(lambda words=words: in_folder(tmp_path, words))
        assert done.code == 0, (words, done.err)


def in_folder(folder, words):
    os.chdir(folder)
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    if "-o" in words:
        # several commands of a page write the same output, each in place of the others
        place = words.index("-o") + 1
        while Path(words[place]).exists():
            words[place] = f"another-{words[place]}"
    main(words)
