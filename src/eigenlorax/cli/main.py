"""The `eigenlorax` command: its verbs, and what becomes of an error."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..core import printable
from ..errors import EigenloraxError
from ..version import __version__
from . import (
    add,
    augment,
    compare,
    console,
    demo,
    env,
    evaluate,
    export,
    fit,
    inspect,
    pull,
    push,
    refit,
    remove,
    report,
    serve_check,
    train,
)

IO_ERROR, INTERRUPTED = 6, 130
_OUTPUT = ": the figures could not be printed. What was asked for has been done, if that was all."


class _InterruptError(Exception):
    """A Ctrl-C, under a name that typer does not know: it would end without a word."""


# of click, or of the copy of it that newer releases of typer have
_UsageError: Any = typer.BadParameter.__base__


class _Verbs(TyperGroup):
    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_usage():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _InterruptError(*interrupt.args) from interrupt


@contextmanager
def _printable_usage() -> Iterator[None]:
    """What typer says of a command that it cannot read quotes the command, and so names of files, on one line."""
    try:
        yield
    except _UsageError as error:
        error.message = printable.one_line(error.message)
        raise


app = typer.Typer(
    name="eigenlorax",
    cls=_Verbs,
    help="Recycle LoRA adapters: one shared principal subspace, and each adapter as kilobytes of coefficients in it.",
    epilog="Start with: eigenlorax demo. Or on your own: eigenlorax fit adapters/ -o pack/",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
for verb in (
    fit,
    report,
    inspect,
    export,
    add,
    remove,
    augment,
    refit,
    train,
    evaluate,
    compare,
    push,
    pull,
    serve_check,
    demo,
    env,
):
    verb.register(app)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"eigenlorax {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code (docs/cli.md): an error of ours is one message, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a name or a path may hold what the terminal's encoding has no sign for
            stream.reconfigure(errors="backslashreplace")
    with console.only_printable():
        _leave_with_exit_code(arguments)


def _leave_with_exit_code(arguments: Sequence[str] | None) -> None:
    try:
        _run(arguments)
    except EigenloraxError as error:
        console.error(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, _InterruptError) as interrupt:
        console.interrupted(str(interrupt) or "No pack was left half-written.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # the reader of our output has left, as `head` does
        _let_go_of_stdout()
        sys.exit(1)
    except OSError as error:
        _let_go_of_stdout()
        # files have names; what has none is the output
        where = f": {error.filename}. Nothing was left half-written." if error.filename else _OUTPUT
        console.error(f"{error.strerror or error}{where}")
        sys.exit(IO_ERROR)
    except Exception:
        # a fault in eigenlorax: Python prints it when this process ends, and its message may quote what is read
        sys.excepthook = console.print_traceback
        raise


@cache
def _command() -> Callable[..., object]:
    """`app` as typer's command, built once: who calls `main` again should not wait for that again."""
    return typer.main.get_command(app)


def _run(arguments: Sequence[str] | None) -> None:
    try:
        _command()(args=arguments, prog_name="eigenlorax")
    except SystemExit:
        # what cannot be written is to be known before the exit code is
        if sys.stdout is not None:
            sys.stdout.flush()
        raise


def _let_go_of_stdout() -> None:
    """Let what is left in the buffer go nowhere: Python would try it once more, and complain, when it closes stdout."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
