"""Registration of verbs, and their help: panels of options, no types of flags, and examples that can be copied."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from . import console

# titles of panels in help texts. The options that are used most have no panel, and come first
KEEP = "What to keep"
STORAGE = "Storage"
READING = "Reading"
TRAINED = "Adapter"
TRAINING = "Training"
ROWS = "Rows"
EXECUTION = "Execution"
OUTPUT = "Output"

FOLDERS = {
    "run/": "a Trainer of transformers or TRL whose output_dir is run/",
    "history/": "eigenlorax track run/ -o history/",
    "exact/": "eigenlorax track run/ -o exact/ --lossless",
    "demo/": "eigenlorax demo --data demo/",
    "pack/": "eigenlorax fit demo/adapters -o pack/ --for training",
}
"""Folders that examples use, and what writes them."""


class HelpWithoutTypes:
    """Mixin of typer's commands, whose help shows no Python types of arguments and flags, `--help` included."""

    def get_params(self, ctx: Any) -> Any:
        """Return the command's parameters. Called by typer before it prints help and before it parses."""
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.param_type_name == "argument":
                # the metavar replaces the type of an option, but not that of an argument
                param.display_type_rich = lambda ctx: None
        return params


class Verb(HelpWithoutTypes, TyperCommand):
    """Verb with examples below its help. typer would wrap the lines of an epilog, or separate them by empty ones."""

    def __init__(self, *arguments: Any, epilog: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.examples = epilog or ""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, and the examples below it."""
        super().format_help(ctx, formatter)
        sources = [
            f"# {folder} is written by: {command}"
            for folder, command in FOLDERS.items()
            if folder in self.examples and command not in self.examples
        ]
        for line in ("Examples:", "", *sources, *self.examples.strip().splitlines(), ""):
            console.print_command(line and f" {line}")


def register(app: typer.Typer, verb: Callable[..., None], examples: str) -> None:
    """Add a verb to the command line.

    Args:
        app: The command line.
        verb: Function whose parameters are the verb's arguments and options.
        examples: Commands that are shown below the help, one per line. They read files in `FOLDERS` only.
    """
    app.command(cls=Verb, epilog=examples)(verb)
