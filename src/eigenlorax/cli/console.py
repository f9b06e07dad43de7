"""Output of the verbs: results go to stdout as tables or JSON; progress, notes and errors go to stderr."""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer

from ..core import printable
from ..errors import EigenloraxWarning, shortened
from . import durations, spelling

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..pack.pack import Pack
    from ..pack.summary import Components, Errors, Summary, TrainingBasis


class _PrintableStream:
    """A text stream that escapes control characters, whoever writes to it.

    rich's consoles bypass it: they write to `rich_proxied_file`, the stream itself, because they need control
    sequences, and this module only passes them printable texts.
    """

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text with its control characters escaped."""
        self.rich_proxied_file.write(printable.multi_line(text))
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        """Write each of the texts."""
        for text in texts:
            self.write(text)

    def isatty(self) -> bool:
        """Return False, so that libraries neither move the cursor nor write colours: both would be escaped."""
        return False

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            # bytes written to the buffer would not be escaped
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


@contextmanager
def only_printable() -> Iterator[None]:
    """Escape control characters that the block prints, and print its warnings as notes."""
    streams = sys.stdout, sys.stderr
    # Python sets a stream to None if it was closed at the start
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
    """Print a traceback as `sys.excepthook` does, with the control characters of its messages escaped."""
    with only_printable():
        traceback.print_exception(kind, error, trace)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    # texts may come from adapters or the Hub: brackets in them are no markup, and `:name:` is no emoji. Lines are
    # wrapped by `layout`, before they are printed
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _width(console: "Console") -> int | None:
    """Return the width of the terminal, or None if the console writes to a file or a pipe."""
    return console.width if console.file.isatty() else None


def error(message: str) -> None:
    """Print an error of the library to stderr, with options of the command line in place of Python's keywords."""
    _print(f" {spelling.on_command_line(shortened(message))}", "error:", "bold red", stderr=True)


def note(message: str) -> None:
    """Print a note to stderr, with options of the command line in place of Python's keywords."""
    _print(f" {spelling.on_command_line(shortened(message))}", "note:", "yellow", stderr=True)


def interrupted(message: str) -> None:
    """Print to stderr that the verb was interrupted, and the state in which it left its output."""
    _print(f" {message}", "Interrupted.", "bold red", stderr=True)


@contextmanager
def explain_interrupt(describe_state: Callable[[], str]) -> Iterator[None]:
    """Add the state of the output to a KeyboardInterrupt of the block."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(describe_state()) from interrupt


def _print(text: str, label: str = "", style: str = "", *, stderr: bool = False, wrap: bool = True) -> None:
    """Print a text.

    Args:
        text: The text. Control characters are escaped.
        label: Words printed before the text, in `style`.
        style: Style of rich, such as "bold red".
        stderr: Print to stderr instead of stdout.
        wrap: Break lines at the terminal's width.
    """
    console = _console(stderr)
    console.print(_styled(text, label, style, console, wrap=wrap))


def _styled(text: str, label: str, style: str, console: "Console", *, wrap: bool = True) -> "Text":
    from rich.text import Text

    from . import layout

    label, text = printable.one_line(label), printable.one_line(text)
    styled = Text("\n".join(layout.wrapped(label + text, _width(console) if wrap else None)))
    styled.stylize(style, 0, len(label))
    return styled


def say(sentence: str = "") -> None:
    """Print a sentence, or an empty line, to stdout."""
    _print(sentence)


def print_help(paragraph: str) -> None:
    """Print a paragraph of a help text to stdout. Like typer's, it is wrapped even if stdout is not a terminal."""
    from . import layout

    console = _console()
    console.print("\n".join(layout.wrapped(paragraph, console.width)))


def print_command(command: str) -> None:
    """Print a command line to stdout, without wrapping it, so that it can be copied."""
    _print(command, wrap=False)


def print_json(document: Any) -> None:
    """Print a document as JSON to stdout."""
    print_document(json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def print_document(text: str) -> None:
    """Print a JSON document, which has to be ASCII, to stdout."""
    # JSON escapes all control characters but this one
    typer.echo(text.replace("\x7f", r"\u007f"), nl=False)


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and their values to stdout."""
    from . import layout

    pairs = [(printable.one_line(name), printable.one_line(value)) for name, value in rows]
    _print_block(title, [], layout.fields(pairs, _width(_console())))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
    """Print a table to stdout. Cells are never truncated.

    Args:
        title: Line above the table, or "".
        header: Names of the columns.
        rows: Cells of each row.
        numbers: Indices of columns that are aligned to the right.
    """
    from . import layout

    names, *cells = [[printable.one_line(cell) for cell in row] for row in (header, *rows)]
    _print_block(title, *layout.table(names, cells, numbers, _width(_console())))


def _print_block(title: str, heads: Sequence[str], body: Sequence[str]) -> None:
    """Print lines between empty ones.

    Args:
        title: Line above the block, or "".
        heads: Lines of a table's header and the rule below it, or nothing.
        body: Lines of the table's rows.
    """
    from rich.text import Text

    if title:
        _print("", title, "italic")
    header = "\n".join(heads[:-1])
    block = Text("\n".join(["", *heads, *body, ""]))
    block.stylize("bold", 1, 1 + len(header))
    _console().print(block)


@contextmanager
def working(action: str = "", seconds: float = 0.0) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on stderr if that is a terminal, and print the block's warnings as notes after it.

    An action that takes more than a minute is announced by a note: before it starts if its duration is known, else in
    the first stage that takes so long, as soon as its first steps tell.

    Args:
        action: Subject of a sentence, such as "The fit".
        seconds: Its estimated duration; 0 if it is unknown.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[steps]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    is_announced = seconds >= durations.WORTH_SAYING
    if is_announced:
        note(f"{action} takes about {durations.in_words(seconds)}.")
    stderr = _console(stderr=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EigenloraxWarning)
        try:
            # other output goes through `only_printable`; rich would interpret its escape sequences
            with Progress(
                *columns,
                console=stderr,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                disable=not stderr.is_terminal,
            ) as bar:
                # shown where no stage is under way, so that the terminal is never still
                idle = bar.add_task("working", total=None, steps="", left="")
                tasks: dict[str, Any] = {}
                times = durations.StageTimes(is_announced)

                def report(stage: str, done: int, total: int) -> None:
                    if stage not in tasks:
                        tasks[stage] = bar.add_task(printable.one_line(stage), total=total, steps="", left="")
                    seconds_left = times.remaining(stage, done, total)
                    left = f"{durations.in_words(seconds_left)} left" if seconds_left else ""
                    bar.update(tasks[stage], completed=done, total=total, steps=f"{done:,}/{total:,}", left=left)
                    is_idle = all(bar.tasks[task].finished for task in tasks.values())
                    if is_idle != bar.tasks[idle].visible:
                        bar.reset(idle, visible=is_idle, total=None)
                    if times.must_announce(seconds_left):
                        # by the console of the bar, which moves the bar down
                        announcement = f" {stage}: about {durations.in_words(seconds_left)} left."
                        stderr.print(_styled(announcement, "note:", "yellow", stderr))

                yield report
        finally:
            # a verb reads some files more than once
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                note(message)


def summary_rows(figures: "Summary") -> list[tuple[str, str]]:
    """Return the rows of a pack's table."""
    from ..codec.storage.traits import TRAITS
    from ..pack import purposes

    is_coded = TRAITS[figures.dtype].is_coded
    weighting = figures.fit.weighting
    at_most = ", at most" if figures.bounds else ""
    return [
        ("base model", (figures.base_model or "not stated") + (f" @ {figures.revision}" if figures.revision else "")),
        *[("  made for", str(figures.family))] * bool(figures.family),
        ("adapters", f"{figures.adapters} (rank {_ranks(figures.ranks)})"),
        *[("  untrained", ", ".join(figures.untrained))] * bool(figures.untrained),
        *[(f"  skipped: {name}", reason) for name, reason in figures.fit.skipped.items()],
        ("modules", str(figures.modules)),
        *[("  kept out of the subspace", ", ".join(figures.fit.excluded_modules))] * bool(figures.fit.excluded_modules),
        ("fit", purposes.choice(figures) + (f"; weighting {weighting}" if weighting != "delta" else "")),
        ("limits", spelling.on_command_line(purposes.limits(figures))),
        *_component_rows("components, down (lora_A)", figures.down, is_coded=is_coded),
        *_component_rows("components, up (lora_B)", figures.up, is_coded=is_coded),
        *[("  augmented components", f"{figures.n_extra} on each side")] * bool(figures.n_extra),
        *[("  appended components", f"{figures.n_extended:,} in all")] * bool(figures.n_extended),
        *_error_rows(f"delta error{at_most}", figures.in_fit),
        *_error_rows(f"delta error, {'added' if is_coded else 'projected'} adapters{at_most}", figures.projected),
        *[("  of which upper bounds", f"{figures.bounds}: fitted again without their originals")]
        * bool(figures.bounds),
        *cost_rows(figures),
    ]


def cost_rows(figures: "Summary") -> list[tuple[str, str]]:
    """Return the rows of a pack's sizes."""
    b, files = figures.bytes, figures.files
    by_tensors = f"{b.ratio:.2f} with the basis counted, {b.ratio_without_basis:.2f} without"
    if files is not None and files.ratio is not None:
        by_tensors = f"{files.ratio:.2f} by files; by tensors, LoRA in {b.lora_bits} bits, {by_tensors}"
    return [
        ("LoRA bytes", f"{b.lora:,} (their files: {b.lora_files:,})"),
        ("basis bytes", f"{b.basis:,}"),
        *([("basis for training", _training_basis(figures.basis, b.training_basis))] if figures.basis else []),
        ("coefficient bytes", f"{b.coefficients:,}"),
        *[("carried bytes", f"{b.carried:,} (on both sides of the ratio)")] * bool(b.carried),
        *[("head bytes", f"{b.heads:,} of {b.source_heads:,} ({_head_storage(figures)})")] * bool(b.heads),
        ("compression ratio", by_tensors),
    ]


def _training_basis(basis: "TrainingBasis", size: int) -> str:
    components = max(basis.down.max, basis.up.max)
    extra = f", {basis.n_extra} of them augmented" if basis.n_extra else ""
    return f"{size:,} bytes: at most {components} components per side{extra}, stored as {basis.dtype}"


def _head_storage(figures: "Summary") -> str:
    if figures.fit.head_error is None:
        return "exact; on neither side of the ratio"
    return f"each within {figures.fit.head_error:g} of its norm; on neither side of the ratio"


def print_sizes(figures: "Summary") -> None:
    """Print how many times smaller a pack is than its sources: their files, and the tensors in them."""
    b, files = figures.bytes, figures.files
    rows = []
    if files is not None:
        rows.append(_size_row("files", files.sources, files.pack, files.ratio, files.ratio_without_heads))
        if files.reports:
            with_reports = files.pack + files.reports
            rows.append(_size_row("files, with the report", files.sources, with_reports, files.ratio_with_reports))
    tensors = f"tensors, LoRA in {b.lora_bits} bits"
    rows.append(_size_row(tensors, b.lora + b.source_heads, b.pack + b.heads, b.ratio_with_heads, b.ratio))
    header = ("bytes of", "sources", "pack", "times smaller", "without heads")
    print_table("", header, rows, numbers=(1, 2, 3, 4))


def _size_row(
    name: str, sources: int | None, pack: int, ratio: float | None, ratio_without_heads: float | None = None
) -> tuple[str, ...]:
    ratios = ("" if value is None else f"{value:.2f}" for value in (ratio, ratio_without_heads))
    return (name, "unknown" if sources is None else f"{sources:,}", f"{pack:,}", *ratios)


def _ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"


def _component_rows(label: str, components: "Components", *, is_coded: bool) -> list[tuple[str, str]]:
    sizes = f"{components.min} / {components.median:g} / {components.max} (min / median / max)"
    if is_coded:
        # what the shared components lack, each adapter stores by itself
        return [(f"shared {label}", sizes)]
    energy = f"energy {components.energy:.4f}"
    if components.shortfall:
        energy += f", of which the iterative solver misses at most {components.shortfall:.0e}"
    rows = [(label, f"{sizes}; {energy}")]
    if components.capped:
        names = ", ".join(components.capped[:2])
        more = f" and {len(components.capped) - 2} more" if len(components.capped) > 2 else ""
        rows.append(("  capped", f"{len(components.capped)} with fewer components than K: {names}{more}"))
    return rows


def _error_rows(label: str, errors: "Errors | None") -> list[tuple[str, str]]:
    if errors is None:
        return []
    rows = [(label, f"mean {format_error(errors.mean)}, worst {format_error(errors.worst)} ({errors.worst_adapter})")]
    # if rounding is the only error, the row would repeat the one above
    if errors.rounding_worst < errors.worst:
        rounding = f"mean {format_error(errors.rounding_mean)}, worst {format_error(errors.rounding_worst)}"
        rows.append(("  of which rounding", rounding))
    return rows


def format_error(error: float) -> str:
    """Return a relative error with four decimals, or in exponential notation if it is below 0.0005."""
    return f"{error:.4f}" if error >= 5e-4 or error == 0 else f"{error:.1e}"


def print_frontier(pack: "Pack") -> None:
    """Print the sizes that other error bounds would give, and the pack's own, heads included."""
    from ..codec.encoder import is_steep

    sizes = pack.summary.bytes
    size = sizes.pack + sizes.heads
    nearest = min(pack.frontier, key=lambda point: abs(point.bytes - size))
    rows = [
        (
            "this pack" if point is nearest else "",
            f"{point.error:.3g}",
            f"{'' if point is nearest else 'about '}{point.bytes:,.0f}",
            f"{(sizes.lora + sizes.source_heads) / max(point.bytes, 1):.1f}",
        )
        for point in sorted(pack.frontier, key=lambda point: point.error)
    ]
    print_table("", ("", "delta error at most", "bytes", "ratio"), rows, numbers=(1, 2, 3))
    if is_steep(pack.frontier):
        note(
            "these estimates can be wrong by a factor of two: the bytes change fast, because adapters differ from each "
            "other by about such an error."
        )


def summary_json(figures: "Summary", records: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pack's JSON: its summary, sentences about its purpose and limits, and the record of each adapter."""
    from ..pack import purposes

    limits = spelling.on_command_line(purposes.limits(figures))
    return {
        **asdict(figures),
        "choice": purposes.choice(figures),
        "limits": limits,
        "adapter_records": {name: asdict(record) for name, record in records.items()},
    }
