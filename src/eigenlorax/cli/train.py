"""`eigenlorax train`: train coefficients or a LoRA on rows, and add the adapter to the pack."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BaselineError, OptionError
from ..train.options import (
    DEFAULTS,
    HEAD_LEARNING_RATE,
    MIN_REFERENCE_STEPS,
    MIN_STEPS,
    RANK,
    REFERENCE_DEFAULTS,
    REFERENCE_HEAD_LEARNING_RATE,
    TASKS,
    Columns,
    Training,
)
from . import arguments, console, verbs
from .evaluate import class_names, figure_rows, print_confusion

if TYPE_CHECKING:
    from ..train.training_record import TrainingResult

EXAMPLES = r"""
eigenlorax train pack/ --task text-classification --train demo/train.csv \
    --model demo/model -o mine/
eigenlorax train pack/ --task text-classification --train demo/train.csv \
    --model demo/model --eval demo/test.csv -o core/ --core --epochs 2 --no-add
eigenlorax train --task text-classification --train demo/spam.csv \
    --reference demo/adapters/sms-spam-a --labels ham,spam \
    --model demo/model -o alice/
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, train, EXAMPLES)


def train(
    task: Annotated[str, typer.Option(metavar="TASK", help=f"Task: {' or '.join(TASKS)}.")],
    rows: Annotated[
        Path,
        typer.Option(
            "--train",
            metavar="FILE",
            help="Training rows: .jsonl, .csv, or a folder saved by datasets.",
            parser=arguments.path,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Folder for the adapter and its checkpoints.", parser=arguments.path
        ),
    ],
    pack: Annotated[
        Path | None,
        typer.Argument(
            metavar="PACK", help="Folder of the pack. Left out with --reference FOLDER.", parser=arguments.path
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="Evaluation rows, for scores during training and for the baseline.",
            parser=arguments.path,
        ),
    ] = None,
    model: arguments.Model = None,
    json: arguments.Json = False,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the adapter in the pack (default: name of OUT).",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R",
            help=f"Rank of the update. A higher rank trains more parameters (default: {RANK}).",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            help="LoRA alpha: the update is scaled by alpha / rank (default: 2 × rank).",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = None,
    core: Annotated[
        bool,
        typer.Option(
            "--core",
            help="Train one k × k matrix per module instead of two factors: fewer parameters if k is small.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = False,
    start: Annotated[
        str,
        typer.Option(
            metavar="zero|mean|NAME|PATH",
            help="Initial update: zero, the mean of the pack's adapters, one of them, or a LoRA in a folder. "
            "Heads are new.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = "zero",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME@VERSION",
            help="Train on from a LoRA and its head, in place of coefficients: a LoRA in a folder, without PACK, or a "
            "version of the pack. The result is a LoRA for `fit --reference`, or the next version of PACK.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…|OUT",
            help="With --reference: class names in the order of its head, or the OUT folder of another training. "
            "Needed if labels are texts.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = None,
    n_extra: Annotated[
        int,
        typer.Option(
            "--n-extra",
            metavar="L",
            help="Add L random components per side during training. Needs --no-add.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = 0,
    extra_seed: Annotated[
        int,
        typer.Option("--extra-seed", metavar="S", help="Seed of --n-extra.", rich_help_panel=verbs.TRAINED),
    ] = 0,
    n_gradient: Annotated[
        int,
        typer.Option(
            "--n-gradient",
            metavar="L",
            help="Add L components per side from the first gradients of the task. They are stored with the "
            "adapter, which then takes about as many bytes as a LoRA.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = 0,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Add the adapter even if it is not better than its baseline.",
            rich_help_panel=verbs.TRAINED,
        ),
    ] = False,
    no_add: Annotated[
        bool,
        typer.Option("--no-add", help="Do not add the adapter to the pack.", rich_help_panel=verbs.TRAINED),
    ] = False,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help=f"Number of epochs (default: {DEFAULTS['num_train_epochs']:g}, or as many as give {MIN_STEPS} steps; "
            f"with --reference, {MIN_REFERENCE_STEPS} steps).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help=f"Learning rate of the coefficients (default: {DEFAULTS['learning_rate']:g}), or of the LoRA with "
            f"--reference (default: {REFERENCE_DEFAULTS['learning_rate']:g}).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help=f"Learning rate of the head (default: {HEAD_LEARNING_RATE:g}; with --reference, "
            f"{REFERENCE_HEAD_LEARNING_RATE:g}).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Rows per training step (default: {DEFAULTS['per_device_train_batch_size']}).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            help=f"Seed of initial values, dropout and the order of rows (default: {DEFAULTS['seed']}).",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    trainer_options: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            help="YAML file with other fields of transformers' TrainingArguments, one `name: value` per line. `optim` "
            "replaces the optimizer SOAP.",
            parser=arguments.path,
            rich_help_panel=verbs.TRAINING,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the last checkpoint in OUT. All other options must be equal.",
            rich_help_panel=verbs.TRAINING,
        ),
    ] = False,
    text_column: arguments.TextColumn = "text",
    label_column: arguments.LabelColumn = "label",
    pair_column: arguments.PairColumn = None,
    max_length: arguments.MaxLength = None,
    metric: arguments.Metric = None,
) -> None:
    """Train coefficients for a new task in a pack's subspace, or a LoRA from a trained one, and add it to the pack."""
    if pack is None:
        _check_without_pack(reference, name=name, no_add=no_add, force=force)
    else:
        arguments.check_pack(pack)
    from ..train import train as training
    from ..train import trainer

    if core and rank is not None:
        raise OptionError(f"--core trains one k × k matrix per module, whatever --rank says. Remove --rank {rank}.")
    with console.working() as progress:
        trained = training.train(
            pack,
            Training(
                task=task,
                train=rows,
                evaluation=evaluation,
                model=model,
                rank=RANK if rank is None else rank,
                alpha=alpha,
                core=core,
                start=start,
                reference=reference,
                labels=class_names(labels) if labels is not None else None,
                n_extra=n_extra,
                extra_seed=extra_seed,
                n_gradient=n_gradient,
                epochs=epochs,
                learning_rate=learning_rate,
                head_learning_rate=head_learning_rate,
                batch_size=batch_size,
                seed=seed,
                max_length=max_length,
                metric=metric,
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
        console.print_json({**asdict(trained), "folder": str(output), "pack": str(pack) if pack is not None else None})
    else:
        console.print_rows(f"adapter {trained.name}", _rows(trained, reference, pack))
        if len(trained.history) > 1:
            _print_history(trained.history)
        if trained.figures is not None:
            print_confusion(trained.figures)
    if pack is not None and not no_add and not trained.added:
        add = f"`eigenlorax add {pack} {trained.name}={output}`, or train with --force"
        raise BaselineError(
            f"the adapter was not added to {pack}, because it is not better than its baseline. It is in {output}; to "
            f"add it nevertheless: {add if reference is None else 'repeat the command with --resume --force'}."
        )


def _check_without_pack(reference: str | None, **options: Any) -> None:
    """Raise `OptionError` for the first option that has no effect without a pack, or if there is no reference."""
    if reference is None:
        raise OptionError("there is neither a PACK nor a --reference to train from. Pass one of them.")
    for option, passed in options.items():
        if passed:
            raise OptionError(
                f"--{option.replace('_', '-')} has no effect without PACK, because nothing is added to a pack. Remove "
                "it."
            )


def _rows(trained: "TrainingResult", reference: str | None, pack: Path | None) -> list[tuple[str, str]]:
    added = "not added to the pack"
    if trained.delta_error is not None:
        added = f"added to the pack; delta error {console.format_error(trained.delta_error)}"
    return [
        ("task", trained.task),
        ("base model", trained.model),
        ("rows, steps, epochs", f"{trained.rows:,}, {trained.steps:,}, {trained.epochs:g}"),
        *([("trained from", reference)] if reference is not None else []),
        (
            "trained coefficients" if reference is None else "trained parameters of the LoRA",
            f"{trained.numbers:,} in {trained.modules} modules",
        ),
        *[("other trained parameters (head)", f"{trained.head_numbers:,}")] * bool(trained.head_numbers),
        *(figure_rows(trained.figures) if trained.figures else []),
        *_baseline_rows(trained, reference),
        ("folder", str(trained.folder)),
        *([("pack", added)] if pack is not None else []),
        ("seconds", f"{trained.seconds:.1f}"),
    ]


def _baseline_rows(trained: "TrainingResult", reference: str | None) -> list[tuple[str, str]]:
    """Return the rows of the baseline that `figure_rows` does not contain."""
    baseline = trained.baseline
    is_score = baseline.metric != "perplexity"
    score, baseline_score = (
        ("undefined" if is_score else "too large") if number is None else f"{number:{'.4f' if is_score else ',.4g'}}"
        for number in (baseline.score, baseline.baseline)
    )
    score_row = (f"{baseline.metric} on {baseline.rows:,} training rows", score)
    if reference is not None:
        baseline_name = f"  {baseline.metric} of the reference"
    else:
        baseline_name = "  most frequent class alone" if is_score else "  base model without the adapter"
    if baseline.trained_on:
        return [score_row, (baseline_name, baseline_score)]
    # `figure_rows` has the most frequent class
    return [] if is_score and reference is None else [(baseline_name, baseline_score)]


def _print_history(history: list[dict[str, Any]]) -> None:
    """Print one line per step. The Trainer logs the loss and the evaluation of one step as two entries."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in history:
        by_step.setdefault(entry["step"], {}).update(entry)
    columns = list(dict.fromkeys(["epoch", "loss", *(name for entry in history for name in entry if name != "step")]))
    columns = [name for name in columns if any(name in entry for entry in history)]
    rows = [[f"{entry[name]:.4g}" if name in entry else "" for name in columns] for entry in by_step.values()]
    header = ["epoch", *[name.replace("eval_", "evaluation: ") for name in columns[1:]]]
    console.print_table("During training", header, rows, numbers=range(len(columns)))
