"""`eigenlorax train`: coefficients for a new task, into a pack."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BaselineError
from ..train.options import DEFAULTS, HEAD_LEARNING_RATE, MIN_STEPS, TASKS, Columns, Training
from . import console
from .evaluate import figure_rows, show_confusion

if TYPE_CHECKING:
    from ..train.train import Trained

EPILOG = """Examples:

  eigenlorax train pack/ --task text-classification --train a.csv -o runs/new

  eigenlorax train pack/ --task causal-lm --train a.jsonl -o runs/lm --no-add"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(train)


def train(
    pack: console.PackFolder,
    task: Annotated[str, typer.Option(help=f"{' or '.join(TASKS)}.")],
    rows: Annotated[
        Path,
        typer.Option(
            "--train", metavar="FILE", help="Rows: .jsonl, .csv, or a folder saved by datasets.", parser=console.path
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The folder for the adapter and its checkpoints.", parser=console.path
        ),
    ],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Rows for evaluation.", parser=console.path)
    ] = None,
    model: console.Model = None,
    name: Annotated[str | None, typer.Option(help="The adapter's name in the pack (default: that of OUT).")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the update.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by alpha / rank (default: 2 × the rank).")
    ] = None,
    core: Annotated[
        bool, typer.Option("--core", help="Train one k × k matrix a module instead of two factors.")
    ] = False,
    start: Annotated[
        str, typer.Option(metavar="zero|mean|NAME|PATH", help="Where training starts: see docs/cli.md.")
    ] = "zero",
    n_extra: Annotated[
        int, typer.Option("--n-extra", metavar="L", help="Further directions on every side; needs --no-add.")
    ] = 0,
    extra_seed: Annotated[int, typer.Option("--extra-seed", metavar="S", help="The seed that gives them.")] = 0,
    epochs: Annotated[
        float | None,
        typer.Option(
            help=f"Passes over the rows (default {DEFAULTS['num_train_epochs']:g}, {MIN_STEPS} steps or more)."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Of coefficients (default {DEFAULTS['learning_rate']:g}).")
    ] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help=f"Of a head, which is trained beside (default {HEAD_LEARNING_RATE:g}).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Rows a step (default {DEFAULTS['per_device_train_batch_size']}).")
    ] = None,
    max_length: console.MaxLength = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Of the head's start, dropout and order (default {DEFAULTS['seed']}).")
    ] = None,
    text_column: console.TextColumn = "text",
    label_column: console.LabelColumn = "label",
    pair_column: console.PairColumn = None,
    trainer_options: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Any other fields of transformers' TrainingArguments.", parser=console.path),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Add the adapter even if it is no better than its baseline.")
    ] = False,
    no_add: Annotated[bool, typer.Option("--no-add", help="Leave the pack as it is.")] = False,
    json: console.Json = False,
) -> None:
    """Train coefficients for a new task over a pack's subspace, and add the adapter to the pack."""
    from ..train import train as task_of
    from ..train import trainer

    with console.working() as progress:
        found = task_of.train(
            pack,
            Training(
                task=task,
                train=rows,
                evaluation=evaluation,
                model=model,
                rank=rank,
                alpha=alpha,
                core=core,
                start=start,
                n_extra=n_extra,
                extra_seed=extra_seed,
                epochs=epochs,
                learning_rate=learning_rate,
                head_learning_rate=head_learning_rate,
                batch_size=batch_size,
                seed=seed,
                max_length=max_length,
                columns=Columns(text_column, label_column, pair_column),
                trainer_options=trainer.read_options(trainer_options) if trainer_options else {},
            ),
            output,
            name=name,
            add=not no_add,
            force=force,
            resume=resume,
            progress=progress,
        )
    if json:
        console.print_json({**asdict(found), "folder": str(output), "pack": str(pack)})
    else:
        console.print_rows(f"adapter {found.name}", _rows(found))
        if len(found.history) > 1:
            _show_history(found.history)
        if found.figures is not None:
            show_confusion(found.figures)
    if not no_add and not found.added:
        raise BaselineError(
            f"the adapter was not added to {pack}, since it is no better than its baseline. It is in {output}: "
            f"`eigenlorax add {pack} {found.name}={output}` adds it even so, as --force would have."
        )


def _rows(found: "Trained") -> list[tuple[str, str]]:
    added = "not added to the pack"
    if found.delta_error is not None:
        added = f"added to the pack; delta error {console.share(found.delta_error)}"
    return [
        ("task", found.task),
        ("base model", found.model),
        ("rows, steps, epochs", f"{found.rows:,}, {found.steps:,}, {found.epochs:g}"),
        ("trained coefficients", f"{found.numbers:,} in {found.modules} modules"),
        *[("trained numbers besides (head)", f"{found.head_numbers:,}")] * bool(found.head_numbers),
        *(figure_rows(found.figures) if found.figures else []),
        *_baseline_rows(found),
        ("folder", str(found.folder)),
        ("pack", added),
        ("seconds", f"{found.seconds:.1f}"),
    ]


def _baseline_rows(found: "Trained") -> list[tuple[str, str]]:
    """The result beside its baseline, as far as the rows of the evaluation do not say it."""
    baseline = found.baseline
    whose = "most frequent class alone" if baseline.metric == "accuracy" else "base model without it"
    values = [
        "too large" if one is None else f"{one:.4f}" if baseline.metric == "accuracy" else f"{one:,.4g}"
        for one in (baseline.score, baseline.baseline)
    ]
    result = (f"{baseline.metric} on {baseline.rows:,} rows of the training", values[0])
    beside = (f"  {whose}", values[1])
    if baseline.trained_on:
        return [result, beside]
    return [] if baseline.metric == "accuracy" else [beside]


def _show_history(history: list[dict[str, Any]]) -> None:
    """One line an entry; the Trainer notes the loss and an evaluation at the end of one epoch as two."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        by_step.setdefault(entry["step"], {}).update(entry)
    columns = ["epoch", *[name for name in ("loss", "eval_loss", "eval_accuracy") if any(name in e for e in history)]]
    rows = [[f"{entry[name]:.4g}" if name in entry else "" for name in columns] for entry in by_step.values()]
    header = ["epoch", *[name.replace("eval_", "evaluation: ") for name in columns[1:]]]
    console.print_table("On the way", header, rows, numbers=range(len(columns)))
