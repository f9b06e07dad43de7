"""`eigenlorax demo`: store, export, compare and train on real adapters, and store a run's checkpoints, offline."""

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
    from ..train.demo_subspaces import Planted
    from ..train.new_task import Attempt

EXAMPLES = """
eigenlorax demo
eigenlorax demo --data demo/
"""
NEXT = (
    "eigenlorax fit demo/adapters -o small/",
    "eigenlorax inspect small/ --verify demo/adapters",
    "eigenlorax fit demo/adapters -o pack/ --for training",
    "eigenlorax track demo/run -o versions/",
    "eigenlorax log versions/",
)
"""Commands that the demo suggests at its end. They read the files that `eigenlorax demo --data demo/` writes."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, demo, EXAMPLES)


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Only write the demo's adapters, checkpoints, base model and rows to DIR: files to try the other "
            "commands on.",
            parser=arguments.path,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the pack (DIR/pack), the exported LoRAs (DIR/loras) and the history (DIR/history).",
            parser=arguments.path,
        ),
    ] = None,
    n_components: Annotated[
        int,
        typer.Option(
            "--n-components",
            "-k",
            metavar="K",
            help="Maximum number of components per module and side, in the basis for the new task.",
        ),
    ] = 32,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Train a new task too, which takes most of the time.")
    ] = True,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Store sixteen LoRA adapters and a training run, compare answers, check what they share, and train a new task."""
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
        writer.check_free(keep / "history", overwrite)
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
                "subspace": asdict(demo_run.subspace),
                "history": asdict(demo_run.history),
                "planted": asdict(demo_run.planted),
                "new_task": [asdict(attempt) for attempt in demo_run.attempts],
            }
        )
        return
    _print(demo_run, seconds)
    if keep is not None:
        page = keep / "pack" / keys.REPORT_PAGE
        console.note(
            f"kept {keep / 'pack'}, {keep / 'loras'} and {keep / 'history'}: try eigenlorax inspect {keep / 'pack'}"
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
        (str(files.run), "checkpoints of one training run, to track"),
        (str(files.model), "the base model of the adapters"),
        (f"{files.train}, {files.test.name}", "rows of a task that no adapter was trained on"),
        (str(files.spam), "rows for the adapters sms-spam-a and sms-spam-b"),
    ]
    console.print_rows("", rows)
    console.say("Try:")
    console.print_command(f"  eigenlorax fit {files.adapters} -o small/")


def _print(result: "Demo", seconds: float) -> None:
    console.say("1. Sixteen adapters in one pack, as `eigenlorax fit adapters/ -o pack/` makes it")
    console.print_sizes(result.summary)
    rows = [*(_row(outcome) for outcome in result.outcomes), _mean_row(result.outcomes)]
    header = ("adapter", "delta error", "original", "exported", "agree", "no update")
    console.print_table(
        "Accuracy on sentences written for the demo: of the original adapter, of the one exported from the pack, and "
        "of its head without any update; agree: fraction of equal answers",
        header,
        rows,
        numbers=(1, 2, 3, 4, 5),
    )
    _print_subspaces(result)
    _print_history(result)
    _print_planted(result.planted)
    if result.attempts:
        _print_new_task(result.attempts)
    console.say(f"That took {seconds:.0f} seconds. Try next, after `eigenlorax demo --data demo/`:")
    for command in NEXT:
        console.print_command(f"  {command}")


def _row(outcome: "Outcome") -> tuple[str, ...]:
    shares = (outcome.original, outcome.recycled, outcome.agreement, outcome.without_update)
    return (outcome.name, console.format_error(outcome.delta_error), *(f"{share:.3f}" for share in shares))


def _mean_row(outcomes: "Sequence[Outcome]") -> tuple[str, ...]:
    error = fmean(outcome.delta_error for outcome in outcomes)
    fields = ("original", "recycled", "agreement", "without_update")
    means = (fmean(getattr(outcome, field) for outcome in outcomes) for field in fields)
    return (f"mean of {len(outcomes)}", console.format_error(error), *(f"{mean:.3f}" for mean in means))


def _print_subspaces(result: "Demo") -> None:
    check = result.subspace
    fitted, left_out = fmean(check.fitted.values()), fmean(check.left_out.values())
    console.say(
        f"2. They share little: a basis of {check.n_components} components, fitted to {len(check.fitted)} of them, has "
        f"a mean error of {fitted:.3f} on these and {left_out:.3f} on the other {len(check.left_out)}. Recycling their "
        "subspace for a new adapter does not pay. The pack above needs no basis."
    )
    console.say()


def _print_history(result: "Demo") -> None:
    history = result.history
    versions, stored = history.versions, history.stored_bytes
    left_out = fmean(version.left_out_error for version in versions)
    console.say(
        f"3. Versions of one run share nearly everything: {len(versions)} checkpoints of a RoBERTa, one after another, "
        f"by paulohenriquecrs (MIT). A basis of {history.n_components} components, fitted to {len(versions) - 1} of "
        f"them, has an error of {left_out:.3f} on the one that is left out, on average. Here recycling pays."
    )
    header = ("version", "eval loss", "bytes", "delta error", "to latest", "left out")
    rows = [
        (
            str(version.step),
            f"{version.eval_loss:.3f}",
            f"{version.stored_bytes:,}",
            *(console.format_error(error) for error in (version.delta_error, version.to_latest)),
            console.format_error(version.left_out_error),
        )
        for version in versions
    ]
    console.print_table(
        "As a history, made as `eigenlorax track` makes it and listed as `eigenlorax log` does; left out: error in a "
        "basis fitted to the others",
        header,
        rows,
        numbers=(1, 2, 3, 4, 5),
    )
    console.say(
        f"{history.source_bytes:,} bytes of files, LoRAs in 16 bits, are {stored:,} as a history: "
        f"{history.source_bytes / stored:.1f} times smaller. The best baseline at the same error takes "
        f"{history.baseline_bytes:,} bytes ({history.baseline}): {history.baseline_bytes / stored:.1f} times as many. "
        f"Version {history.read_back_step} was read back from the saved history, with an error of "
        f"{history.read_back_error:.3f} against its original."
    )
    console.say()


def _print_planted(planted: "Planted") -> None:
    (error,) = planted.check.left_out.values()
    console.say(
        f"4. Adapters that share a subspace by construction: {planted.adapters} of the shapes of 1, not trained but "
        f"planted at random in {planted.shared} directions per side, with {planted.noise:.0%} noise. A basis fitted to "
        f"{len(planted.check.fitted)} of them gives the other one an error of {error:.3f}. The pack of all is "
        f"{planted.ratio:.1f} times smaller at a worst error of {planted.worst:.3f}."
    )
    console.say()


def _print_new_task(attempts: "Sequence[Attempt]") -> None:
    rows = [
        (attempt.method, f"{attempt.trained_numbers:,}", f"{attempt.accuracy:.3f}", f"{attempt.seconds:.0f}")
        for attempt in attempts
    ]
    console.print_table(
        "5. A new task, trained in the basis of 2 on 200 messages written for the demo, beside a LoRA: accuracy on 120 "
        "others",
        ("method", "trained parameters", "accuracy", "seconds"),
        rows,
        numbers=(1, 2, 3),
    )
