"""`eigenlorax compare`: train a new task with several methods, and compare accuracy, size and steps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from ..train.options import DEFAULTS, METRIC, MIN_STEPS, Columns
from ..train.search_space import (
    DEFAULT_METHODS,
    LEARNING_RATES,
    QUICK_METHODS,
    QUICK_SEEDS,
    SEEDS,
    ComparisonOptions,
    quick_rates,
)
from . import arguments, console, durations, verbs

if TYPE_CHECKING:
    from ..train.comparison_duration import MethodTimes
    from ..train.comparison_summary import MethodSummary
    from ..train.method_comparison import ComparisonResult, PreparedComparison

EXAMPLES = r"""
eigenlorax compare pack/ --train demo/train.csv --eval demo/test.csv \
    --model demo/model --methods lora,core --seeds 1 --epochs 1 -o results.json
eigenlorax compare pack/ --train demo/train.csv --eval demo/test.csv --resume \
    --model demo/model --methods lora,core --seeds 2 --epochs 1 -o results.json
"""

MAX_SCORE_COLUMNS = 5
"""Maximum number of columns with scores during training."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, compare, EXAMPLES)


def compare(
    pack: arguments.PackFolder,
    rows: Annotated[
        Path,
        typer.Option(
            "--train",
            metavar="FILE",
            help="Training rows: .jsonl, .csv, or a folder saved by datasets. 20 % are held out to select "
            "the learning rate.",
            parser=arguments.path,
        ),
    ],
    evaluation: Annotated[
        Path, typer.Option("--eval", metavar="FILE", help="Test rows, used only for scores.", parser=arguments.path)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="JSON file for the results.", parser=arguments.path),
    ],
    model: arguments.Model = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help=f"Methods to compare, of {', '.join(LEARNING_RATES)} (default: {', '.join(DEFAULT_METHODS)}).",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"Train {', '.join(QUICK_METHODS)} only, once each, at the middle one of their learning rates: no "
            "choice of rates, no spread between seeds. Options that are passed have precedence.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the comparison in FILE; methods, rates and seeds may be added.")
    ] = False,
    json: arguments.Json = False,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[METHOD=]A,B,C",
            help="Learning rates to try, for one method or for all. With one rate there is no search. Can be repeated.",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Number of trainings per method, at the chosen rate (default: {SEEDS}, or {QUICK_SEEDS} with "
            "--quick).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    rank: Annotated[
        int,
        typer.Option(
            metavar="R",
            help="Rank of lora, init and factors. lora-small, vera, vblora and lora-xs get at most as many "
            "parameters as factors.",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = 8,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help=f"Number of epochs (default: {DEFAULTS['num_train_epochs']:g}, or as many as give {MIN_STEPS} steps).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows per training step.", rich_help_panel=verbs.TRAINING)
    ] = int(DEFAULTS["per_device_train_batch_size"]),
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16",
            help="Compute in bfloat16. Trained parameters stay in float32.",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = False,
    task: Annotated[
        str,
        typer.Option(metavar="TASK", help="Task. Only text-classification is supported.", rich_help_panel=verbs.ROWS),
    ] = "text-classification",
    text_column: arguments.TextColumn = "text",
    label_column: arguments.LabelColumn = "label",
    pair_column: arguments.PairColumn = None,
    max_length: arguments.MaxLength = None,
    metric: arguments.Metric = None,
) -> None:
    """Train a new task with several methods, and compare coefficients with LoRA and others."""
    names = list(QUICK_METHODS if quick else DEFAULT_METHODS)
    if methods is not None:
        names = [name.strip() for name in methods.split(",")]
    rates = parse_rates(learning_rates or [], names)
    options = ComparisonOptions(
        train=rows,
        evaluation=evaluation,
        task=task,
        model=model,
        methods=names,
        rates={**quick_rates(names), **rates} if quick else rates,
        seeds=seeds if seeds is not None else QUICK_SEEDS if quick else SEEDS,
        rank=rank,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
        metric=metric or METRIC,
        columns=Columns(text_column, label_column, pair_column),
    )
    from ..train import comparison_duration, method_comparison

    with console.working():
        prepared = method_comparison.prepare(pack, options, output, resume=resume)
    with console.working() as progress:
        times = comparison_duration.measure(prepared, progress)
    left_out = [name for name in DEFAULT_METHODS if name not in names] if methods is None else []
    console.note(" ".join([prepared.plan, *_announcements(prepared, times, left_out, quick=quick)]))
    with console.working() as progress:
        comparison = method_comparison.run(prepared, progress)
    if json:
        console.print_json({**asdict(comparison), "file": str(output), "pack": str(pack)})
        return
    _print_scores(comparison)
    _print_curves(comparison)
    for sentence in comparison.findings:
        console.say(f"· {sentence}")


def _announcements(
    prepared: "PreparedComparison", times: "Mapping[str, MethodTimes]", other_methods: Sequence[str], *, quick: bool
) -> Iterator[str]:
    """Yield sentences on how long the comparison takes, and on what --quick leaves out, such as other methods."""
    from ..train import comparison_duration

    seconds = comparison_duration.total_seconds(prepared, times)
    if seconds >= durations.WORTH_SAYING:
        yield f"They take about {durations.in_words(seconds)}, by the first steps of each method."
    left_out = "the choice of learning rates on your rows and the spread between seeds"
    if quick:
        yield f"--quick leaves out {', '.join([*other_methods, left_out])}."
    elif seconds >= durations.WORTH_SAYING and times:
        quick_seconds = sum(
            comparison_duration.run_seconds(prepared, times.get(name) or _slowest(times), is_search=False)
            for name in QUICK_METHODS
        )
        yield (
            f"--quick, with another results file, takes about {durations.in_words(quick_seconds)}: it trains "
            f"{', '.join(QUICK_METHODS)}, and leaves out the other methods, {left_out}."
        )


def _slowest(times: "Mapping[str, MethodTimes]") -> "MethodTimes":
    return max(times.values(), key=lambda method: method.step)


def parse_rates(arguments: Sequence[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """Parse the values of `--learning-rates`.

    Args:
        arguments: "METHOD=A,B,C" for one method, or "A,B,C" for all methods without a value of their own.
        methods: Names of the compared methods.

    Returns:
        Learning rates by method, without the methods that no argument applies to.

    Raises:
        OptionError: An argument is not a list of numbers, or two apply to the same method.
    """
    rates_by_method: dict[str, list[float]] = {}
    seen: list[str] = []
    # values without a method come first, so that those of single methods replace them
    for argument in sorted(arguments, key=lambda text: "=" in text):
        before, equals, after = argument.partition("=")
        method, numbers = (before, after) if equals else ("", argument)
        try:
            rates = [float(number) for number in numbers.split(",")]
        except ValueError as error:
            raise OptionError(f"{argument!r} are not learning rates. METHOD=A,B,C or A,B,C was expected.") from error
        if method in seen:
            target = f"of {method}" if equals else "of all"
            raise OptionError(f"learning rates {target} are given twice. Give them once: A,B,C.")
        seen.append(method)
        rates_by_method |= {method: rates} if equals else dict.fromkeys(methods, rates)
    return rates_by_method


def _print_scores(comparison: "ComparisonResult") -> None:
    from ..reports.numbers import plural

    majority = comparison.majority_score
    header = [
        "method",
        "parameters",
        "file bytes",
        comparison.metric,
        "±",
        "least–most",
        f"points above {comparison.yardstick} (95 %)",
        *_other_metrics(comparison).values(),
    ]
    rows = [_score_row(summary, comparison) for summary in comparison.methods]
    # with one seed there is no spread, and with one method no difference
    columns = [index for index in range(len(header)) if any(row[index] for row in rows)]
    console.print_table(
        f"{comparison.evaluated:,} rows after {plural(comparison.epochs, 'epoch')} on {comparison.rows:,}"
        + (f"; the most frequent class alone has {majority:.3f}" if majority is not None else ""),
        [header[index] for index in columns],
        [[row[index] for index in columns] for row in rows],
        numbers=range(1, len(columns)),
    )


def _other_metrics(comparison: "ComparisonResult") -> dict[str, str]:
    """Return the metrics beside the chosen one: field of `MethodSummary` → header."""
    return {
        field: header
        for field, header in (("accuracy", "accuracy"), ("f1_macro", "macro-F1"))
        if field != comparison.metric
    }


def _score_row(summary: "MethodSummary", comparison: "ComparisonResult") -> list[str]:
    from ..train.comparison_summary import format_points

    spread = f"{summary.spread:.3f}" if summary.spread is not None else ""
    score_range = f"{min(summary.scores):.3f}–{max(summary.scores):.3f}" if len(summary.scores) > 1 else ""
    difference = format_points(summary.difference) if summary.difference is not None else ""
    return [
        summary.method,
        f"{summary.numbers:,}",
        f"{summary.file_bytes:,}",
        f"{summary.mean:.3f}",
        spread,
        score_range,
        difference,
        *(f"{getattr(summary, field):.3f}" for field in _other_metrics(comparison)),
    ]


def _print_curves(comparison: "ComparisonResult") -> None:
    from ..reports.numbers import plural

    points = _shown_points(comparison.points)
    subset = (
        f" on {comparison.rows_on_the_way} of the rows" if comparison.rows_on_the_way < comparison.evaluated else ""
    )
    header = [
        "method",
        "rate",
        *[f"epoch {comparison.points[point]:g}" for point in points],
        f"steps to 98 % of {comparison.yardstick}",
        "seconds",
    ]
    rows = [
        [
            summary.method,
            f"{summary.learning_rate:g}",
            *[f"{summary.curve[point]:.3f}" for point in points],
            f"{summary.steps:,}" if summary.steps is not None else "never",
            f"{summary.seconds:.0f}",
        ]
        for summary in comparison.methods
    ]
    console.print_table(
        f"During training{subset}; a training has {plural(comparison.steps, 'step')}",
        header,
        rows,
        numbers=range(1, len(points) + 4),
    )


def _shown_points(epochs: Sequence[float]) -> list[int]:
    """Return the indices of points that get a column.

    These are whole epochs, if the last point is one, and at most `MAX_SCORE_COLUMNS` points at equal distances.
    """
    ends_on_whole_epoch = epochs[-1] == int(epochs[-1])
    indices = [index for index, epoch in enumerate(epochs) if epoch == int(epoch) or not ends_on_whole_epoch]
    last = len(indices) - 1
    if last < MAX_SCORE_COLUMNS:
        return indices
    return [indices[round(n * last / (MAX_SCORE_COLUMNS - 1))] for n in range(MAX_SCORE_COLUMNS)]
