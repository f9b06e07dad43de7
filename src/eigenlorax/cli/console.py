"""What the verbs print with: tables, JSON, progress, warnings. Figures go to stdout, everything else to stderr."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import urls
from ..tasks.options import MAX_LENGTH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..pack import Pack
    from ..summary import Components, Errors, Summary


def path(text: str) -> Path:
    """A path of the command line. An empty one would be the current folder, which nobody means by it."""
    if not text.strip():
        raise typer.BadParameter("it is empty; was a variable of the shell not set?")
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


_SHORT = 32


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # a pipe has no width: let every line be as long as it is, so that grep finds it whole
        console.width = 10_000
    return console


def error(message: str) -> None:
    """One message on stderr."""
    _console(stderr=True).print("[bold red]error:[/]", _plain(message))


def note(message: str) -> None:
    """One remark on stderr."""
    _console(stderr=True).print("[yellow]note:[/]", _plain(message))


def interrupted(message: str) -> None:
    """What is left behind by a verb that was interrupted, on stderr."""
    _console(stderr=True).print("[bold red]Interrupted.[/]", _plain(message))


@contextmanager
def interrupts_say(left_behind: Callable[[], str]) -> Iterator[None]:
    """A Ctrl-C in the block says what is left behind then."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(left_behind()) from interrupt


def _plain(message: str) -> "Text":
    from rich.text import Text

    return Text(message)


def print_json(value: Any) -> None:
    """A JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A two-column table on stdout."""
    print_table(title, ("", ""), rows)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
    """A table on stdout; `numbers` are the columns aligned to the right. Long cells fold, none is cut."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=any(header),
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(header):
        number = index in numbers
        # half a name is none; but a long one must not take the room of the figures
        short = max((len(row[index]) for row in rows), default=0) <= _SHORT
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=short)
    for row in rows:
        table.add_row(*[_plain(cell) for cell in row])
    _console().print(table, soft_wrap=False)


@contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, where that is a terminal; warnings become notes below it, before an error if any."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..errors import EigenloraxWarning

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = _console(stderr=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EigenloraxWarning)
        try:
            with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
                tasks: dict[str, Any] = {}

                def report(stage: str, done: int, total: int) -> None:
                    if stage not in tasks:
                        tasks[stage] = bar.add_task(stage, total=total)
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
