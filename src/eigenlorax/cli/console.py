"""What the verbs print with: tables, JSON, progress, warnings. Figures go to stdout, everything else to stderr."""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from ..core import printable
from ..errors import EigenloraxWarning, shortened
from ..train.options import MAX_LENGTH

if TYPE_CHECKING:
    from rich.console import Console

    from ..pack.pack import Pack
    from ..pack.summary import Components, Errors, Summary


def path(text: str) -> Path:
    """A path of the command line. An empty one would be the current folder, which nobody means by it."""
    if not text.strip():
        raise typer.BadParameter("it is empty; was a variable of the shell not set?")
    # `formats` loads torch, which `--help` does not wait for
    from ..formats import urls

    if urls.is_url(text):
        raise typer.BadParameter(
            f"{text} is a URL. Adapters may be anywhere; what is written, and packs, are on this machine."
        )
    return Path(text)


def text(given: str) -> str:
    """A folder or a repository of the command line, which is not empty either."""
    path(given)
    return given


PackFolder = Annotated[Path, typer.Argument(metavar="PACK", help="The pack.", parser=path)]
PackSource = Annotated[str, typer.Argument(metavar="PACK", help="The pack: a folder, or a Hub id.", parser=text)]
PackRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a pack that comes from the Hub.")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="The repository on the Hub, ORG/NAME.", parser=text)]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, on stdout.")]
SameBase = Annotated[
    bool, typer.Option("--same-base", help="The adapters' base models are one, under several names or paths.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read adapter_model.bin where there are no safetensors (weights_only).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of adapters that come from the Hub.")]

Model = Annotated[
    str | None, typer.Option(help="The base model: a folder, or a repository (default: what the pack says).")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens taken of a row (default: " + ", ".join(f"{n} for {task}" for task, n in MAX_LENGTH.items()) + ")."
    ),
]
TextColumn = Annotated[str, typer.Option(metavar="NAME", help="The column with the text.")]
LabelColumn = Annotated[str, typer.Option(metavar="NAME", help="The column with the label.")]
PairColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="The column with a second text, for tasks on two texts.")
]


class _PrintableStream:
    """A stream to which no control characters are written, whoever writes.

    Consoles of rich write to `rich_proxied_file`, the stream itself: their escapes are their own, and the texts that
    they are given here are printable already.
    """

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write `text` with escapes for its control characters."""
        self.rich_proxied_file.write(printable.multi_line(text))
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        """Write each of the texts."""
        for text in texts:
            self.write(text)

    def isatty(self) -> bool:
        """Say no: who would move the cursor of a terminal, or colour what it writes, cannot do so here."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            # whoever writes bytes would write past this object
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


@contextmanager
def only_printable() -> Iterator[None]:
    """Let nothing in the block print a control character; its warnings become notes."""
    streams = sys.stdout, sys.stderr
    # the interpreter has None in the place of a stream that is closed
    sys.stdout, sys.stderr = (cast(TextIO, stream and _PrintableStream(stream)) for stream in streams)
    show = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        warnings.showwarning = show


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(str(message))


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does (`sys.excepthook`), without control characters of its messages."""
    with only_printable():
        traceback.print_exception(kind, error, trace)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    # what is printed may come from outside: brackets in it are no markup, and `:name:` is no emoji; lines are laid out
    # before they are printed
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _width(console: "Console") -> int | None:
    """The columns of the terminal that a console writes to; None where that is a file or a pipe."""
    return console.width if console.file.isatty() else None


def error(message: str) -> None:
    """One message on stderr."""
    _print(f" {shortened(message)}", "error:", "bold red", stderr=True)


def note(message: str) -> None:
    """One remark on stderr."""
    _print(f" {shortened(message)}", "note:", "yellow", stderr=True)


def interrupted(message: str) -> None:
    """What is left behind by a verb that was interrupted, on stderr."""
    _print(f" {message}", "Interrupted.", "bold red", stderr=True)


@contextmanager
def interrupts_say(left_behind: Callable[[], str]) -> Iterator[None]:
    """A Ctrl-C in the block says what is left behind then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(left_behind()) from interrupt


def _print(text: str, label: str = "", style: str = "", *, stderr: bool = False, wrap: bool = True) -> None:
    """Print a text on one line, or on as many as the terminal needs. label: its beginning, in another style."""
    from rich.text import Text

    from . import layout

    console = _console(stderr)
    label, text = printable.one_line(label), printable.one_line(text)
    shown = Text("\n".join(layout.wrapped(label + text, _width(console) if wrap else None)))
    shown.stylize(style, 0, len(label))
    console.print(shown)


def say(sentence: str = "") -> None:
    """A sentence on stdout, or an empty line."""
    _print(sentence)


def print_command(command: str) -> None:
    """A command line on stdout, which is not wrapped: it can be copied."""
    _print(command, wrap=False)


def print_json(value: Any) -> None:
    """A JSON document on stdout."""
    print_document(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def print_document(text: str) -> None:
    """A JSON document in ASCII on stdout."""
    # the one control character that JSON need not escape
    typer.echo(text.replace("\x7f", r"\u007f"), nl=False)


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and their values on stdout."""
    from . import layout

    pairs = [(printable.one_line(name), printable.one_line(value)) for name, value in rows]
    _print_block(title, [], layout.fields(pairs, _width(_console())))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
    """A table on stdout; `numbers` are the columns aligned to the right. No cell is cut: see `layout`."""
    from . import layout

    names, *cells = [[printable.one_line(cell) for cell in row] for row in (header, *rows)]
    _print_block(title, *layout.table(names, cells, numbers, _width(_console())))


def _print_block(title: str, heads: Sequence[str], body: Sequence[str]) -> None:
    """Lines that are laid out, between empty ones. heads: those of a table's header, and the rule below it."""
    from rich.text import Text

    if title:
        _print("", title, "italic")
    header = "\n".join(heads[:-1])
    shown = Text("\n".join(["", *heads, *body, ""]))
    shown.stylize("bold", 1, 1 + len(header))
    _console().print(shown)


@contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, where that is a terminal; warnings become notes below it, before an error if any."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = _console(stderr=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EigenloraxWarning)
        try:
            # whatever else is written meanwhile goes through `only_printable`, not through rich, which reads escapes
            with Progress(
                *columns,
                console=stderr,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                disable=not stderr.is_terminal,
            ) as bar:
                tasks: dict[str, Any] = {}

                def report(stage: str, done: int, total: int) -> None:
                    if stage not in tasks:
                        tasks[stage] = bar.add_task(printable.one_line(stage), total=total)
                    bar.update(tasks[stage], completed=done, total=total)

                yield report
        finally:
            for warning in caught:
                note(str(warning.message))


def summary_rows(figures: "Summary") -> list[tuple[str, str]]:
    """The table of a pack."""
    dtype = figures.dtype
    if figures.coefficient_dtype != dtype:
        dtype += f", coefficients {figures.coefficient_dtype}"
    at_most = ", at most" if figures.bounds else ""
    return [
        ("base model", (figures.base_model or "not stated") + (f" @ {figures.revision}" if figures.revision else "")),
        *[("  made for", str(figures.family))] * bool(figures.family),
        ("adapters", f"{figures.adapters} (rank {_ranks(figures.ranks)})"),
        *[("  untrained", ", ".join(figures.untrained))] * bool(figures.untrained),
        *[(f"  left out: {name}", reason) for name, reason in figures.fit.skipped.items()],
        ("modules", str(figures.modules)),
        *[("  kept out of the subspace", ", ".join(figures.fit.excluded_modules))] * bool(figures.fit.excluded_modules),
        ("fit", f"weighting {figures.fit.weighting}, {figures.fit.size}, stored as {dtype}"),
        *_component_rows("components, down (lora_A)", figures.down),
        *_component_rows("components, up (lora_B)", figures.up),
        *[("  augmented directions", f"{figures.n_extra} of them on each side")] * bool(figures.n_extra),
        *[("  of extensions", f"{figures.n_extended:,} of them in all")] * bool(figures.n_extended),
        *_error_rows(f"delta error{at_most}", figures.in_fit),
        *_error_rows(f"delta error, projected adapters{at_most}", figures.projected),
        *[("  of which upper bounds", f"{figures.bounds}: fitted again without their originals")]
        * bool(figures.bounds),
        *cost_rows(figures),
    ]


def cost_rows(figures: "Summary") -> list[tuple[str, str]]:
    """The rows that say what a pack costs and saves."""
    b = figures.bytes
    return [
        ("LoRA bytes", f"{b.lora:,} (their files: {b.lora_files:,})"),
        ("basis bytes", f"{b.basis:,}"),
        ("coefficient bytes", f"{b.coefficients:,}"),
        *[("carried bytes", f"{b.carried:,} (on both sides of the ratio)")] * bool(b.carried),
        *[("head bytes", f"{b.heads:,} (kept as they are; on neither side)")] * bool(b.heads),
        ("compression ratio", f"{b.ratio:.2f} with the basis counted, {b.ratio_without_basis:.2f} without"),
    ]


def _ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"


def _component_rows(label: str, found: "Components") -> list[tuple[str, str]]:
    energy = f"energy {found.energy:.4f}" + (
        f", its search at most {found.shortfall:.0e} short" if found.shortfall else ""
    )
    rows = [(label, f"{found.min} / {found.median:g} / {found.max} (min / median / max); {energy}")]
    if found.capped:
        more = f" and {len(found.capped) - 2} more" if len(found.capped) > 2 else ""
        shown = ", ".join(found.capped[:2])
        rows.append(("  capped", f"{len(found.capped)}, whose stack has no more: {shown}{more}"))
    return rows


def _error_rows(label: str, errors: "Errors | None") -> list[tuple[str, str]]:
    if errors is None:
        return []
    rows = [(label, f"mean {share(errors.mean)}, worst {share(errors.worst)} ({errors.worst_adapter})")]
    # where whatever is lost is lost by rounding, saying so twice says nothing
    if errors.rounding_worst < errors.worst:
        rows.append(
            ("  of which rounding", f"mean {share(errors.rounding_mean)}, worst {share(errors.rounding_worst)}")
        )
    return rows


def share(value: float) -> str:
    """A relative error: four decimals, or two digits where those would be zero."""
    return f"{value:.4f}" if value >= 5e-4 or value == 0 else f"{value:.1e}"


def print_frontier(pack: "Pack") -> None:
    """What other errors would take in bytes, around those of a pack."""
    bytes_ = pack.summary.bytes
    size = bytes_.basis + bytes_.coefficients + bytes_.carried
    nearest = min(pack.frontier, key=lambda point: abs(point.bytes - size))
    rows = [
        (
            "this pack" if point is nearest else "",
            f"{point.error:.3g}",
            f"{'' if point is nearest else 'about '}{point.bytes:,.0f}",
            f"{bytes_.lora / max(point.bytes, 1):.1f}",
        )
        for point in sorted(pack.frontier, key=lambda point: point.error)
    ]
    print_table("", ("", "delta error at most", "bytes", "ratio"), rows, numbers=(1, 2, 3))


def figures_json(figures: "Summary", records: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a pack: the table's figures, and each adapter's."""
    return {**asdict(figures), "adapter_records": {name: asdict(record) for name, record in records.items()}}
