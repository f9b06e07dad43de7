"""`eigenlorax demo`: fit, export, compare and train on real adapters, offline."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from ..core import keys
from ..errors import OptionError
from . import arguments, console, verbs
from .env import collect

if TYPE_CHECKING:
    from ..train.demo import Demo, Outcome

EXAMPLES = """
eigenlorax demo
eigenlorax demo --data demo/
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, demo, EXAMPLES)


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Only write the demo's adapters, base model and rows to DIR: files to try the other commands on.",
            parser=arguments.path,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the pack (DIR/pack) and the exported LoRAs (DIR/loras).",
            parser=arguments.path,
        ),
    ] = None,
    n_components: Annotated[
        int, typer.Option("--n-components", "-k", metavar="K", help="Maximum number of components per module and side.")
    ] = 32,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Train a new task too, which takes most of the time.")
    ] = True,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Fit a pack to sixteen LoRA adapters of a MiniLM, compare predictions, and train a new task in their subspace."""
    if data is not None and keep is not None:
        raise OptionError("--data only writes files, so that there is nothing to keep. Pass either --data or --keep.")
    if data is not None:
        _write_data(data, overwrite, json)
        return
    import torch

    from ..core import atomic_files
    from ..pack import writer
    from ..pack.pack import Pack
    from ..reports import extra, stored
    from ..train import demo as demonstration

    if "OMP_NUM_THREADS" not in os.environ:
        # more threads do not speed up matrices this small, and slow them down much on shared cores
        torch.set_num_threads(1)
    started = time.perf_counter()
    if keep is not None:
        writer.check_free(keep / "pack", overwrite)
        atomic_files.check_free(keep / "loras", overwrite)
    with tempfile.TemporaryDirectory() as temporary, console.working() as progress:
        demo_run = demonstration.run(
            keep or Path(temporary),
            n_components=n_components,
            training=training,
            overwrite=overwrite,
            progress=progress,
        )
        if keep is not None and extra.is_installed():
            pack = keep / "pack"
            stored.write(Pack.open(pack), demonstration.shipped(), pack, progress)
    seconds = time.perf_counter() - started
    if json:
        console.print_json(
            {
                "seconds": seconds,
                "environment": collect(),
                "kept": str(keep) if keep else None,
                "summary": asdict(demo_run.summary),
                "outcomes": [asdict(outcome) for outcome in demo_run.outcomes],
                "new_task": [asdict(attempt) for attempt in demo_run.attempts],
            }
        )
        return
    _print(demo_run, seconds)
    if keep is not None:
        page = keep / "pack" / keys.REPORT_PAGE
        console.note(
            f"kept {keep / 'pack'} and {keep / 'loras'}: try eigenlorax inspect {keep / 'pack'}"
            + (f", and open {page} in a browser." if page.exists() else ".")
        )


def _write_data(directory: Path, overwrite: bool, json: bool) -> None:
    from ..train import demo_files

    files = demo_files.write(directory, overwrite=overwrite)
    if json:
        console.print_json({name: str(path) for name, path in asdict(files).items()})
        return
    rows = [
        (str(files.adapters), "LoRA adapters, a folder each"),
        (str(files.new), "adapters to add to a pack of the others"),
        (str(files.model), "their base model"),
        (f"{files.train}, {files.test.name}", "rows of a task that no adapter was trained on"),
        (str(files.spam), "rows for the adapters sms-spam-a and sms-spam-b"),
    ]
    console.print_rows("", rows)
    console.say("Try:")
    console.print_command(f"  eigenlorax fit {files.adapters} -o small/")


def _print(result: "Demo", seconds: float) -> None:
    fitted = [outcome for outcome in result.outcomes if outcome.in_fit]
    projected = [outcome for outcome in result.outcomes if not outcome.in_fit]
    rows = [_row(outcome) for outcome in fitted]
    rows.append(_mean_row(f"mean of {len(fitted)} fitted", fitted))
    rows += [_row(outcome) for outcome in projected]
    rows.append(_mean_row(f"mean of {len(projected)} left out", projected))
    header = ("adapter", "in fit", "delta error", "original", "recycled", "agree", "no update")
    console.print_table(
        "Accuracy on sentences written for the demo: of the original adapter, of the one exported from the pack, and "
        "of its head without any update",
        header,
        rows,
        numbers=(2, 3, 4, 5, 6),
    )
    attempts = [
        (attempt.method, f"{attempt.trained_numbers:,}", f"{attempt.accuracy:.3f}", f"{attempt.seconds:.0f}")
        for attempt in result.attempts
    ]
    if attempts:
        console.print_table(
            "A new task, trained on 200 messages written for the demo: accuracy on 120 others",
            ("method", "trained parameters", "accuracy", "seconds"),
            attempts,
            numbers=(1, 2, 3),
        )
    console.print_rows("Size", [*console.cost_rows(result.summary), ("seconds", f"{seconds:.1f}")])
    console.say(
        "Delta error is the relative error of an adapter's update. An adapter that was not in the fit keeps only its "
        "part in the subspace of the others. If its error is too large, fit the pack again with it."
    )


def _row(outcome: "Outcome") -> tuple[str, ...]:
    shares = (outcome.original, outcome.recycled, outcome.agreement, outcome.without_update)
    in_fit = "yes" if outcome.in_fit else "no"
    return (outcome.name, in_fit, console.format_error(outcome.delta_error), *(f"{share:.3f}" for share in shares))


def _mean_row(label: str, outcomes: "Sequence[Outcome]") -> tuple[str, ...]:
    fields = ("original", "recycled", "agreement", "without_update")
    error = fmean(outcome.delta_error for outcome in outcomes)
    means = (fmean(getattr(outcome, field) for outcome in outcomes) for field in fields)
    return (label, "", console.format_error(error), *(f"{mean:.3f}" for mean in means))
