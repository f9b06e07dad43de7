"""`eigenlorax compare`: a new task by several methods alike, on a user's own rows."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..train.options import DEFAULTS, Columns
from ..train.search_space import DEFAULT_METHODS, LEARNING_RATES, SEEDS, ComparisonOptions, parse_rates
from . import console

if TYPE_CHECKING:
    from ..train.comparison_summary import MethodSummary
    from ..train.method_comparison import ComparisonResult

EPILOG = """Examples:

  eigenlorax compare pack/ --train a.csv --eval b.csv -o results.json

  eigenlorax compare pack/ --train a.csv --eval b.csv -o results.json --resume"""

POINTS = 5
"""The most columns of scores on the way."""

_ASIDE = ", ".join(name for name in LEARNING_RATES if name not in DEFAULT_METHODS)


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(compare)


def compare(
    pack: console.PackFolder,
    rows: Annotated[
        Path,
        typer.Option(
            "--train", metavar="FILE", help="Rows: .jsonl, .csv, or a folder saved by datasets.", parser=console.path
        ),
    ],
    evaluation: Annotated[
        Path, typer.Option("--eval", metavar="FILE", help="Rows to test on, and for nothing else.", parser=console.path)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The file for the results (JSON).", parser=console.path),
    ],
    task: Annotated[str, typer.Option(help="text-classification.")] = "text-classification",
    model: console.Model = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            help=f"Some of {', '.join(LEARNING_RATES)}. Unless named, {_ASIDE} take no part.",
            show_default=False,
        ),
    ] = ",".join(DEFAULT_METHODS),
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(metavar="[METHOD=]A,B,C", help="The rates to choose from, of a method or all. Once or more."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Trainings of each method, at the rate chosen.")] = SEEDS,
    rank: Annotated[int, typer.Option(help="Rank of LoRA and of factors.")] = 8,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = float(DEFAULTS["num_train_epochs"]),
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = int(DEFAULTS["per_device_train_batch_size"]),
    max_length: console.MaxLength = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; what is trained stays float32.")] = False,
    text_column: console.TextColumn = "text",
    label_column: console.LabelColumn = "label",
    pair_column: console.PairColumn = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the file has.")] = False,
    json: console.Json = False,
) -> None:
    """Train a new task by several methods alike, and say how coefficients do beside LoRA and others."""
    names = [name.strip() for name in methods.split(",")]
    options = ComparisonOptions(
        train=rows,
        evaluation=evaluation,
        task=task,
        model=model,
        methods=names,
        rates=parse_rates(learning_rates or [], names),
        seeds=seeds,
        rank=rank,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
        columns=Columns(text_column, label_column, pair_column),
    )
    from ..train import method_comparison

    with console.working():
        prepared = method_comparison.prepare(pack, options, output, resume=resume)
    console.note(prepared.plan)
    with console.working() as progress:
        found = method_comparison.run(prepared, progress)
    if json:
        console.print_json({**asdict(found), "file": str(output), "pack": str(pack)})
        return
    _show(found)


def _show(found: "ComparisonResult") -> None:
    from ..train.comparison_summary import plural

    yardstick = found.yardstick
    header = ["method", "numbers", "file bytes", "accuracy", "±", "least–most", f"points above {yardstick} (95 %)"]
    scores = [_scores(line) for line in found.methods]
    # of one seed there is no spread, and of one method no difference
    filled = [place for place in range(len(header)) if any(row[place] for row in scores)]
    console.print_table(
        f"{found.evaluated:,} rows after {plural(found.epochs, 'epoch')} on {found.rows:,}; the most frequent class "
        f"alone has {found.majority:.3f}",
        [header[place] for place in filled],
        [[row[place] for place in filled] for row in scores],
        numbers=range(1, len(filled)),
    )
    shown = _shown(found.points)
    part = f" on {found.rows_on_the_way} of the rows" if found.rows_on_the_way < found.evaluated else ""
    console.print_table(
        f"On the way{part}; a training has {plural(found.steps, 'step')}",
        [
            "method",
            "rate",
            *[f"epoch {found.points[place]:g}" for place in shown],
            f"steps to 98 % of {yardstick}",
            "seconds",
        ],
        [
            [
                line.method,
                f"{line.learning_rate:g}",
                *[f"{line.curve[place]:.3f}" for place in shown],
                f"{line.steps:,}" if line.steps is not None else "never",
                f"{line.seconds:.0f}",
            ]
            for line in found.methods
        ],
        numbers=range(1, len(shown) + 4),
    )
    for sentence in found.findings:
        console.say(f"· {sentence}")


def _shown(points: Sequence[float]) -> list[int]:
    """Which points have a column: whole epochs, if the last one is; of many, some in equal steps."""
    places = [place for place, epoch in enumerate(points) if epoch == int(epoch) or points[-1] != int(points[-1])]
    last = len(places) - 1
    if last < POINTS:
        return places
    return [places[round(part * last / (POINTS - 1))] for part in range(POINTS)]


def _scores(line: "MethodSummary") -> list[str]:
    from ..train.comparison_summary import format_points

    spread = f"{line.spread:.3f}" if line.spread is not None else ""
    least = f"{min(line.scores):.3f}–{max(line.scores):.3f}" if len(line.scores) > 1 else ""
    against = format_points(line.difference) if line.difference is not None else ""
    return [line.method, f"{line.numbers:,}", f"{line.file_bytes:,}", f"{line.mean:.3f}", spread, least, against]
