"""`eigenlorax evaluate`: an adapter of a pack on rows that are labelled, or read."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..train.options import EVALUATION_BATCH, TASKS, Columns
from . import console

if TYPE_CHECKING:
    from ..train.evaluate import Figures

EPILOG = """Examples:

  eigenlorax evaluate pack/ sst2 --data test.jsonl

  eigenlorax evaluate pack/ sst2 --data reviews.csv --labels negative,positive"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(evaluate)


def evaluate(
    pack: console.PackFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The adapter.")],
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Rows: .jsonl, .csv, or a folder saved by datasets.", parser=console.path),
    ],
    model: console.Model = None,
    task: Annotated[str | None, typer.Option(help=f"{' or '.join(TASKS)} (default: what the adapter says).")] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,…|OUT", help="Names of the classes in the head's order, or a folder of `train`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = EVALUATION_BATCH,
    max_length: console.MaxLength = None,
    text_column: console.TextColumn = "text",
    label_column: console.LabelColumn = "label",
    pair_column: console.PairColumn = None,
    json: console.Json = False,
) -> None:
    """Load an adapter of a pack with PEFT, and say how good it is on a file of rows."""
    from ..train import evaluate as task_of

    names = class_names(labels) if labels is not None else None
    with console.working() as progress:
        found = task_of.evaluate(
            pack,
            name,
            data,
            model=model,
            task=task,
            labels=names,
            columns=Columns(text_column, label_column, pair_column),
            batch_size=batch_size,
            max_length=max_length,
            progress=progress,
        )
    if json:
        console.print_json({**asdict(found), "data": str(data), "pack": str(pack)})
        return
    rows = [
        ("task", found.task),
        ("base model", found.model),
        *figure_rows(found.figures),
        ("seconds", f"{found.seconds:.1f}"),
    ]
    console.print_rows(f"adapter {name} on {data}", rows)
    show_confusion(found.figures)


def class_names(given: str) -> Sequence[str]:
    """`A,B,…`, or what a folder of `train` says."""
    from ..errors import OptionError
    from ..train import train

    if "," in given:
        return given.split(",")
    found: Sequence[str] | None = train.read_record(Path(given)).get("labels")
    if found is None:
        raise OptionError(f"{given} is of a training without classes: leave --labels out.")
    return found


def figure_rows(figures: "Figures") -> list[tuple[str, str]]:
    """The rows that say how good an adapter is."""
    from ..train.evaluate import Classified

    if isinstance(figures, Classified):
        return [
            ("evaluated rows", f"{figures.rows:,}"),
            ("accuracy", f"{figures.accuracy:.4f}"),
            ("  most frequent class alone", f"{figures.majority:.4f}"),
            ("loss", f"{figures.loss:.4f}"),
        ]
    return [
        ("evaluated rows", f"{figures.rows:,}"),
        ("predicted tokens", f"{figures.tokens:,}"),
        ("loss", f"{figures.loss:.4f}"),
        ("perplexity", f"{figures.perplexity:,.4g}" if figures.perplexity is not None else "too large"),
    ]


def show_confusion(figures: "Figures") -> None:
    """What was taken for what, where classes are few."""
    from ..train.evaluate import Classified

    if isinstance(figures, Classified) and figures.confusion is not None:
        rows = [[label, *map(str, row)] for label, row in zip(figures.labels, figures.confusion, strict=True)]
        console.print_table("", ["class \\ answer", *figures.labels], rows, numbers=range(1, len(rows) + 1))
