"""MkDocs hook: the page *Options of each command*, made from the commands themselves and from the table of goals."""

from typing import Any

import typer
from mkdocs.structure.files import File, Files

from eigenlorax.cli import command_line
from eigenlorax.cli.goals import GOALS

PAGE = "reference/commands.md"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, PAGE, content=markdown()))
    return files


def markdown() -> str:
    """Return the page in Markdown: usage, arguments, options and examples of each command."""
    verbs = typer.main.get_command(command_line()).commands
    introduction = (
        "# Options of each command\n\nThis page is made from `eigenlorax COMMAND --help`. "
        "[Output, exit codes and JSON](../cli.md) describes what the commands print.\n"
    )
    return introduction + _goals() + "".join(_section(name, verb) for name, verb in verbs.items())


def _goals() -> str:
    parts = []
    for goal in GOALS:
        commands = "".join(f"    {command}\n" for command in goal.commands)
        parts.append(f"\n**{goal.purpose}**\n\n{commands}\n{_cell(goal.cost)}\n")
    return "\n## Which command\n" + "".join(parts)


def _section(name: str, verb: Any) -> str:
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    options = [p for p in verb.params if p.param_type_name == "option"]
    usage = " ".join(["eigenlorax", name, *(p.metavar for p in arguments), "[OPTIONS]"])
    purpose, *_ = (verb.help or "").split("\n\n")
    rows = [*((f"`{_cell(p.metavar)}`", p) for p in arguments), *((_spellings(p), p) for p in options)]
    table = "".join(f"| {names} | {_meaning(p)} |\n" for names, p in rows)
    return f"\n## `eigenlorax {name}`\n\n{purpose}\n\n    {usage}\n\n| option | meaning |\n| --- | --- |\n{table}"


def _spellings(option: Any) -> str:
    metavar = "" if option.is_flag else f" {option.metavar or option.type.name.upper()}"
    return ", ".join(f"`{spelling}{_cell(metavar)}`" for spelling in [*option.opts, *option.secondary_opts])


def _meaning(parameter: Any) -> str:
    required = " Required." if parameter.required else ""
    return _cell(" ".join((getattr(parameter, "help", None) or "").split())) + required


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")
