"""The `eigenlorax` command: its verbs, and what becomes of an error."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import EigenloraxError
from ..version import __version__
from . import add, augment, console, demo, env, export, fit, inspect, remove

IO_ERROR = 6

app = typer.Typer(
    name="eigenlorax",
    help="Recycle LoRA adapters: one shared principal subspace, and each adapter as kilobytes of coefficients in it.",
    epilog="Start with: eigenlorax demo. Or on your own: eigenlorax fit adapters/ -o pack/",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (fit, inspect, export, add, remove, augment, demo, env):
    verb.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eigenlorax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code (docs/cli.md): an error of ours is one message, not a traceback."""
    try:
        app(args=arguments)
    except EigenloraxError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # the reader of our output has left, as `head` does; Python would complain once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        console.error(
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}. Nothing was changed."
        )
        sys.exit(IO_ERROR)
