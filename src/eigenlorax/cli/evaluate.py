"""`eigenlorax evaluate`: measure an adapter of a pack on a file of rows."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..train.options import EVALUATION_BATCH, METRIC, TASKS, Columns
from . import arguments, console, verbs

if TYPE_CHECKING:
    from ..train.figures import Figures

EXAMPLES = r"""
eigenlorax evaluate pack/ sms-spam-a --data demo/spam.csv --labels ham,spam \
    --model demo/model
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, evaluate, EXAMPLES)


def evaluate(
    pack: arguments.PackFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.")],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Evaluation rows: .jsonl, .csv, or a folder saved by datasets.", parser=arguments.path
        ),
    ],
    model: arguments.Model = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help=f"Task: {' or '.join(TASKS)} (default: the adapter's task type)."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…|OUT",
            help="Class names in the order of the head, or the OUT folder of `train`. Needed if labels are texts.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows per batch.", rich_help_panel=verbs.ROWS)
    ] = EVALUATION_BATCH,
    max_length: arguments.MaxLength = None,
    metric: arguments.Metric = None,
    text_column: arguments.TextColumn = "text",
    label_column: arguments.LabelColumn = "label",
    pair_column: arguments.PairColumn = None,
    json: arguments.Json = False,
) -> None:
    """Load an adapter of a pack with PEFT, and measure its accuracy, macro-F1 or perplexity on a file of rows."""
    from ..train import evaluate as evaluation

    names = class_names(labels) if labels is not None else None
    with console.working() as progress:
        evaluated = evaluation.evaluate(
            pack,
            name,
            data,
            model=model,
            task=task,
            labels=names,
            columns=Columns(text_column, label_column, pair_column),
            batch_size=batch_size,
            max_length=max_length,
            metric=metric,
            progress=progress,
        )
    if json:
        console.print_json({**asdict(evaluated), "data": str(data), "pack": str(pack)})
        return
    rows = [
        ("task", evaluated.task),
        ("base model", evaluated.model),
        *figure_rows(evaluated.figures),
        ("seconds", f"{evaluated.seconds:.1f}"),
    ]
    console.print_rows(f"adapter {name} on {data}", rows)
    print_confusion(evaluated.figures)


def class_names(argument: str) -> Sequence[str]:
    """Parse the value of --labels: "A,B,…", or a folder written by `train`, whose record has the names."""
    from ..errors import OptionError
    from ..train import training_record

    if "," in argument:
        return argument.split(",")
    if not Path(argument).exists():
        raise OptionError(
            f"--labels {argument!r}: expected two or more class names with commas between them, such as ham,spam, or "
            "the OUT folder of `train`, and there is no such folder."
        )
    names: Sequence[str] | None = training_record.read(Path(argument)).get("labels")
    if names is None:
        raise OptionError(f"{argument} is a training without classes. Remove --labels.")
    return names


def figure_rows(figures: "Figures") -> list[tuple[str, str]]:
    """Return the table rows of an adapter's figures."""
    from ..train.figures import ClassificationFigures

    if isinstance(figures, ClassificationFigures):
        chosen = []
        if figures.metric != METRIC:
            chosen.append((figures.metric, f"{figures.score:.4f}"))
            if figures.majority_score is not None:
                chosen.append(("  most frequent class alone", f"{figures.majority_score:.4f}"))
        return [
            ("evaluated rows", f"{figures.rows:,}"),
            *chosen,
            ("accuracy", f"{figures.accuracy:.4f}"),
            ("  most frequent class alone", f"{figures.majority:.4f}"),
            *[("macro-F1", f"{figures.f1_macro:.4f}")] * (figures.metric != "f1_macro"),
            ("loss", f"{figures.loss:.4f}"),
        ]
    return [
        ("evaluated rows", f"{figures.rows:,}"),
        ("predicted tokens", f"{figures.tokens:,}"),
        ("loss", f"{figures.loss:.4f}"),
        ("perplexity", f"{figures.perplexity:,.4g}" if figures.perplexity is not None else "too large"),
    ]


def print_confusion(figures: "Figures") -> None:
    """Print the confusion matrix of a classification with few classes."""
    from ..train.figures import ClassificationFigures

    if isinstance(figures, ClassificationFigures) and figures.confusion is not None:
        rows = [[label, *map(str, row)] for label, row in zip(figures.labels, figures.confusion, strict=True)]
        console.print_table("", ["class \\ prediction", *figures.labels], rows, numbers=range(1, len(rows) + 1))
