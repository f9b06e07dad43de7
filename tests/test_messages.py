"""What the library says reaches Python and the shell alike: an option is called what it is called in both."""

import ast
import re
from pathlib import Path

import eigenlorax

SOURCE = Path(eigenlorax.__file__).parent
ELSEWHERE = {
    "eval": "evaluation",
    "exclude-adapter": "exclude_adapters",
    "exclude-module": "exclude_modules",
    "for": "purpose",
    "k": "n_components",
    "label-column": "Columns.label",
    "learning-rates": "rates",
    "no-add": "add",
    "pair-column": "Columns.pair",
    "tensor-parallel-size": "gpus",
    "text-column": "Columns.text",
}
"""Options of the command that have another name in Python."""
OTHERS = {"enable-lora", "ink-", "ink-series-", "lora-target-modules", "max-lora-rank", "model-impl", "upgrade"}
"""Flags of vLLM's own command and of pip, and the starts of variables in a page's style."""
COMMANDS = re.compile(r"`(eigenlorax|hf|pip) [^`]*`|\(eigenlorax fit … [^)]*\)")
FLAG = re.compile(r"(?<![\w-])-(-[a-z][a-z-]+|k\b)")


def texts(tree):
    """Every text of a module, with {} for what is filled in; docstrings and the commands that are made for others left
    out."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in joined for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def lacking(text):
    """The flags of a text whose name in Python it does not say."""
    if FLAG.fullmatch(text):
        # a word of a command
        return
    text = COMMANDS.sub("", text)
    for flag in FLAG.findall(text):
        name = flag.removeprefix("-")
        python = re.escape(ELSEWHERE.get(name, name.replace("-", "_"))).replace(r"Columns\.", r"Columns[.(]")
        if name not in OTHERS and not re.search(rf"(?<![\w-]){python}\b\s*[=,) (]", text):
            yield f"--{name}"


def test_a_flag_stands_beside_the_argument_of_the_same_meaning():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        # the command's own texts, those of a card in the shell, and the commands that start a server
        if path.parent.name != "cli" and where not in ("vllm/commands.py", "card.py"):
            for line, text in texts(ast.parse(path.read_text("utf-8"))):
                found += [f"{where}, line {line}: {flag} alone in {text!r}" for flag in lacking(text)]
    assert found == []


def test_what_is_lacking_is_found():
    assert [*lacking("Leave it out with --skip-bad.")] == ["--skip-bad"]
    assert [*lacking("Leave it out with skip_bad=True (--skip-bad).")] == []
    assert [*lacking("the adapter named {}: choose another --name.")] == ["--name"]
    assert [*lacking("`eigenlorax add {} --extend 3` adds it.")] == []
