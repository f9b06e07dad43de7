"""`eigenlorax track`: append the checkpoints of a training run to a history."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import arguments, console, verbs, version_rows

if TYPE_CHECKING:
    from ..pack.track import Tracked

EXAMPLES = """
eigenlorax track run/ -o history/
eigenlorax track run/ -o exact/ --lossless
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, track, EXAMPLES)


def track(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder of the run: output_dir of the Trainer of transformers or TRL, with folders checkpoint-STEP, "
            "or the folder of an mlx-lm run.",
            parser=arguments.path,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PACK",
            help="Folder of the pack with the history, which is created if it does not exist.",
            parser=arguments.path,
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the history (default: the name of the run's folder).")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Error bound of each version's update, above 0 and below 1 (default: 0.05)."),
    ] = None,
    head_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Error bound of task heads (default: that of the updates, from 0.1 to 0.3)."),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Store every tensor bit for bit, so that `restore` can resume training.")
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Adapter to take from a run that saves several in subfolders of its checkpoints.",
            rich_help_panel=verbs.READING,
        ),
    ] = None,
    same_base: arguments.SameBase = False,
    allow_pickle: arguments.AllowPickle = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace versions of steps that were trained again, and all versions after them."
        ),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Wait for further checkpoints until the last step of the run is saved. Stop with Ctrl-C.",
            rich_help_panel=verbs.EXECUTION,
        ),
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time between two looks at the run with --watch (default: 30).",
            rich_help_panel=verbs.EXECUTION,
        ),
    ] = None,
    json: arguments.Json = False,
) -> None:
    """Append the new checkpoints of a training run to a history, also while the run goes on."""
    from ..errors import OptionError
    from ..formats import run_folders
    from ..pack import track as tracking

    if watch and json:
        raise OptionError("--watch prints each version when it is there, and --json prints one document: pass one.")
    if interval is not None and not watch:
        raise OptionError("--interval has no effect without --watch. Remove it, or add --watch.")
    options: dict[str, Any] = {
        "name": name,
        "adapter": adapter,
        "max_error": max_error,
        "head_error": head_error,
        "lossless": lossless,
        "same_base": same_base,
        "allow_pickle": allow_pickle,
        "overwrite": overwrite,
    }
    if not watch:
        with console.working("The tracking") as progress:
            tracked = tracking.track(run, output, **options, progress=progress)
        if json:
            console.print_json(_document(output, tracked))
        else:
            _print_versions(output, tracked)
        _print_earlier(tracked)
        _print_unfinished(tracked)
        return
    if not run_folders.has_checkpoints(run):
        console.note(f"{run} has no folder checkpoint-STEP yet, and is waited for. Stop with Ctrl-C.")
    with console.explain_interrupt(lambda: f"All versions above are in {output}."):
        for tracked in tracking.watch(
            run,
            output,
            interval=30.0 if interval is None else interval,
            on_busy=lambda: console.note(f"another process is writing to {output}, and is waited for."),
            **options,
        ):
            for record in tracked.appended:
                console.say(version_rows.sentence(tracked.name, record))
            _print_earlier(tracked)
            for folder, error in tracked.not_finite.items():
                console.note(f"{folder.name} was left out: {error}")


def _document(output: Path, tracked: "Tracked") -> dict[str, Any]:
    return {
        "pack": str(output),
        "name": tracked.name,
        "appended": [version_rows.record_json(record) for record in tracked.appended],
        "known_steps": sorted(tracked.known_steps),
        "earlier_steps": list(tracked.earlier_steps),
        "unfinished": {str(folder): reason for folder, reason in tracked.unfinished.items()},
        "not_finite": {str(folder): error for folder, error in tracked.not_finite.items()},
        "is_finished": tracked.is_finished,
    }


def _print_versions(output: Path, tracked: "Tracked") -> None:
    title = f"history {tracked.name} in {output}"
    if not tracked.appended:
        console.print_rows(title, [("appended", "no checkpoint is new")])
        return
    columns = {
        "step": [record.version for record in tracked.appended],
        "delta error": [version_rows.error(record) for record in tracked.appended],
        "bytes": [f"{record.file_bytes:,}" for record in tracked.appended],
        "times smaller": [version_rows.times_smaller(record) for record in tracked.appended],
        **version_rows.metric_columns(tracked.appended),
    }
    console.print_table(
        title, list(columns), list(zip(*columns.values(), strict=True)), numbers=list(range(len(columns)))
    )


def _print_earlier(tracked: "Tracked") -> None:
    if steps := tracked.earlier_steps:
        shown = ", ".join(map(str, steps[:6])) + ", …" * (len(steps) > 6)
        console.note(
            f"left out, because the history continues after them: steps {shown}. They were pruned, or not there when "
            "later ones were appended. To append one, remove the later versions (eigenlorax remove), and run this "
            "again."
        )


def _print_unfinished(tracked: "Tracked") -> None:
    from ..formats import run_folders

    for folder, reason in tracked.unfinished.items():
        note = f"{folder.name} was left out: {reason}. Run the command again once it is complete."
        step = run_folders.checkpoint_step(folder)
        if step is not None and any(record.step is not None and record.step > step for record in tracked.appended):
            note += " Since later steps were appended, remove those versions first (eigenlorax remove)."
        console.note(note)
    for folder, error in tracked.not_finite.items():
        console.note(f"{folder.name} was left out: {error}")
