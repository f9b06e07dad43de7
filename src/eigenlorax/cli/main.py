"""The `eigenlorax` command: its verbs, error messages and exit codes."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..core import printable
from ..errors import EigenloraxError
from ..version import __version__
from . import console, verbs
from .goals import GOALS

VERBS = (
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
)
"""Verbs in the order of the help. Each is a module of this package."""
IO_ERROR, INTERRUPTED = 6, 130
_PYDANTIC = re.compile("Input should be a valid (integer|number)")
_OUTPUT = ": the results could not be printed. The command itself may have succeeded."


class _InterruptError(Exception):
    """Interrupt of a verb. typer would turn a KeyboardInterrupt into an exit without a message."""


# defined by click, or by the copy of click in newer releases of typer
_UsageError: Any = typer.BadParameter.__base__


class _Verbs(verbs.HelpWithoutTypes, TyperGroup):
    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_usage():
            return super().make_context(*arguments, **options)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, and the table of goals below it."""
        super().format_help(ctx, formatter)
        for goal in GOALS:
            console.print_help(f" {goal.purpose}:")
            for command in goal.commands:
                console.print_command(f"   {command}")
            console.print_help(f"   {goal.cost}")
            console.say()
        console.print_help(" Try it on real adapters, offline: eigenlorax demo")
        console.say()

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _InterruptError(*interrupt.args) from interrupt


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Write usage errors in plain words, and escape control characters: they quote the command line."""
    try:
        yield
    except _UsageError as error:
        error.message = printable.one_line(_usage_message(error))
        raise


def _usage_message(error: Any) -> str:
    """Return the message of a usage error, in click's words for a text that is not a number."""
    match = _PYDANTIC.match(error.message)
    if match is None:
        return str(error.message)
    # newer releases of typer parse numbers with pydantic, whose message does not say what was passed
    passed = error.__cause__.errors()[0]["input"]
    return f"{passed!r} is not a valid {match[1]}."


def _print_version(is_requested: bool) -> bool:
    if is_requested:
        typer.echo(f"eigenlorax {__version__}")
        raise typer.Exit
    return is_requested


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def command_line(names: Sequence[str] = VERBS) -> typer.Typer:
    """Return the command line with some of its verbs. Only their modules are imported."""
    app = typer.Typer(
        name="eigenlorax",
        cls=_Verbs,
        help="Store, train and serve LoRA adapters as coefficients in one shared principal subspace.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_options)
    for name in names:
        import_module(f".{name.replace('-', '_')}", __package__).register(app)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, and exit with a code of docs/cli.md. Expected errors are printed as one message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names and paths may contain characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    with console.only_printable():
        _exit_with_code(arguments)


def _exit_with_code(arguments: Sequence[str] | None) -> None:
    try:
        _run(arguments)
    except EigenloraxError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, _InterruptError) as interrupt:
        console.interrupted(str(interrupt) or "No pack was left half-written.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # the reader of the output closed it, as `head` does
        _discard_stdout()
        sys.exit(1)
    except OSError as error:
        _discard_stdout()
        # an error without a file name is one of stdout
        context = f": {error.filename}. Nothing was left half-written." if error.filename else _OUTPUT
        console.error(f"{error.strerror or error}{context}")
        sys.exit(IO_ERROR)
    except Exception:
        # a bug in eigenlorax: Python prints the traceback at exit, and its message may contain control characters
        sys.excepthook = console.print_traceback
        raise


@cache
def _command(names: tuple[str, ...]) -> Callable[..., object]:
    """Return `command_line` as a click command. Cached, because building it takes long and tests call `main` often."""
    return typer.main.get_command(command_line(names))


def _run(arguments: Sequence[str] | None) -> None:
    passed = list(sys.argv[1:] if arguments is None else arguments)
    # a verb is built alone; the help lists all of them, and so does the error about an unknown one
    names = tuple(passed[:1]) if passed and passed[0] in VERBS else VERBS
    try:
        # click expands wildcards on Windows, but only in the arguments that it reads by itself
        _command(names)(args=None if arguments is None else passed, prog_name="eigenlorax")
    except SystemExit:
        # a failure to write must change the exit code, so flush before exiting
        if sys.stdout is not None:
            sys.stdout.flush()
        raise


def _discard_stdout() -> None:
    """Discard buffered output: Python would fail on it again, with a message, when it closes stdout."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
