"""`eigenlorax demo`: the whole story in one command, on real weights, offline."""

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
from . import console
from .env import collect

if TYPE_CHECKING:
    from ..train.demo import Demo, Outcome

EPILOG = """Examples:

  eigenlorax demo

  eigenlorax demo --keep demo/ --n-components 16 --no-training"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(demo)


def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Leave the pack (DIR/pack) and the exported LoRAs (DIR/loras).")
    ] = None,
    n_components: Annotated[
        int, typer.Option("--n-components", "-k", metavar="K", help="Directions a side of a module, at most.")
    ] = 32,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Train the new task too, which takes most of the time.")
    ] = True,
    overwrite: console.Overwrite = False,
    json: console.Json = False,
) -> None:
    """Recycle sixteen LoRA adapters of a MiniLM, compare what they predict, and train a new task on their basis."""
    import torch

    from ..core import atomic_files
    from ..pack import folder
    from ..pack.pack import Pack
    from ..reports import extra, stored
    from ..train import demo as task

    if "OMP_NUM_THREADS" not in os.environ:
        # matrices as small as these gain nothing from more threads, which lose much on cores that are shared
        torch.set_num_threads(1)
    started = time.perf_counter()
    if keep is not None:
        folder.check_free(keep / "pack", overwrite)
        atomic_files.check_free(keep / "loras", overwrite)
    with tempfile.TemporaryDirectory() as temporary, console.working() as progress:
        found = task.run(
            keep or Path(temporary),
            n_components=n_components,
            training=training,
            overwrite=overwrite,
            progress=progress,
        )
        if keep is not None and extra.is_installed():
            pack = keep / "pack"
            stored.leave(Pack.open(pack), task.shipped(), pack, progress)
    seconds = time.perf_counter() - started
    if json:
        console.print_json(
            {
                "seconds": seconds,
                "environment": collect(),
                "kept": str(keep) if keep else None,
                "summary": asdict(found.summary),
                "outcomes": [asdict(outcome) for outcome in found.outcomes],
                "new_task": [asdict(attempt) for attempt in found.attempts],
            }
        )
        return
    _show(found, seconds)
    if keep is not None:
        page = keep / "pack" / keys.REPORT_PAGE
        console.note(
            f"kept {keep / 'pack'} and {keep / 'loras'}: try eigenlorax inspect {keep / 'pack'}"
            + (f", and open {page} in a browser." if page.exists() else ".")
        )


def _show(found: "Demo", seconds: float) -> None:
    fitted = [outcome for outcome in found.outcomes if outcome.in_fit]
    projected = [outcome for outcome in found.outcomes if not outcome.in_fit]
    rows = [_row(outcome) for outcome in fitted]
    rows.append(_mean_row(f"mean of {len(fitted)} fitted", fitted))
    rows += [_row(outcome) for outcome in projected]
    rows.append(_mean_row(f"mean of {len(projected)} left out", projected))
    header = ("adapter", "in fit", "delta error", "original", "recycled", "agree", "no update")
    console.print_table(
        "Accuracy on sentences written for the demo: the original adapter, the one that came back from the pack, and "
        "its head without any update",
        header,
        rows,
        numbers=(2, 3, 4, 5, 6),
    )
    attempts = [
        (attempt.method, f"{attempt.trained_numbers:,}", f"{attempt.accuracy:.3f}", f"{attempt.seconds:.0f}")
        for attempt in found.attempts
    ]
    if attempts:
        console.print_table(
            "A new task, learned from 200 messages written for the demo: accuracy on 120 others",
            ("method", "trained numbers", "accuracy", "seconds"),
            attempts,
            numbers=(1, 2, 3),
        )
    console.print_rows("What it cost", [*console.cost_rows(found.summary), ("seconds", f"{seconds:.1f}")])
    console.say(
        "Delta error is the share of an update's norm that is lost. An adapter that was not in the fit keeps only what "
        "lies in the subspace of the others: where that is too little, fit the pack again with it."
    )


def _row(outcome: "Outcome") -> tuple[str, ...]:
    shares = (outcome.original, outcome.recycled, outcome.agreement, outcome.without_update)
    in_fit = "yes" if outcome.in_fit else "no"
    return (outcome.name, in_fit, console.share(outcome.delta_error), *(f"{share:.3f}" for share in shares))


def _mean_row(label: str, outcomes: "Sequence[Outcome]") -> tuple[str, ...]:
    fields = ("original", "recycled", "agreement", "without_update")
    error = fmean(outcome.delta_error for outcome in outcomes)
    means = (fmean(getattr(outcome, field) for outcome in outcomes) for field in fields)
    return (label, "", console.share(error), *(f"{mean:.3f}" for mean in means))
