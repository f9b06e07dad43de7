"""`eigenlorax report`: does a collection share a subspace, and what did recycling cost?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tasks.options import EVALUATION_BATCH, TASKS, Columns
from . import console

if TYPE_CHECKING:
    from ..fitting import Progress
    from ..pack import Pack
    from ..reports.data import Evaluation, Report
    from ..reports.originals import Originals

EPILOG = """Examples:

  eigenlorax report pack/ --adapters adapters/ -o report.html

  eigenlorax report pack/ --adapters adapters/ -o report.md -o report.json

  eigenlorax report pack/ -a adapters/ --evaluate sst2=rows.csv -o report.html"""

NAMED = 6
"""Adapters that a finding names in the terminal."""
MARKS = {True: "✓", False: "!", None: "·"}


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(report)


def report(
    pack: console.PackSource,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write it: .html (a page), .md, .json. Once or more.",
            parser=console.path,
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters", "-a", metavar="ADAPTER", help="What the pack was made of, as for `fit`. Once or more."
        ),
    ] = None,
    left_out: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Adapters to leave out of the fit in turn (default: up to 32)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples and of random bases.")] = 0,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Rows to run originals and recycled adapters on. Once or more."),
    ] = None,
    model: console.Model = None,
    task: Annotated[str | None, typer.Option(help=f"{' or '.join(TASKS)} (default: what an adapter says).")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]A,B,…", help="Names of the classes in the head's order, of an adapter or all."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = EVALUATION_BATCH,
    max_length: console.MaxLength = None,
    text_column: console.TextColumn = "text",
    label_column: console.LabelColumn = "label",
    pair_column: console.PairColumn = None,
    pack_revision: console.PackRevision = None,
    allow_pickle: console.AllowPickle = False,
    revision: console.Revision = None,
    json: console.Json = False,
) -> None:
    """Say whether a pack's adapters share a subspace, what recycling cost them, and what to do about it."""
    from ..errors import OptionError
    from ..pack import Pack
    from ..reports import files, originals, stored, with_evaluations
    from ..reports import report as report_of

    for path in output or ():
        files.check(path)
    count = _count(left_out)
    if evaluate and not adapters:
        raise OptionError("--evaluate compares with the original adapters: name them with --adapters.")
    with console.working() as progress:
        opened = Pack.from_pretrained(pack, revision=pack_revision)
        if adapters:
            reading = {"allow_pickle": allow_pickle, "revision": revision}
            found = originals.find(opened, adapters, progress, **reading)
            made = report_of(opened, found, left_out=count, seed=seed, progress=progress)
            if evaluate:
                rows = [_target(one, opened) for one in evaluate]
                columns = Columns(text_column, label_column, pair_column)
                options = model, task, _labels(labels or (), opened), columns, batch_size, max_length
                made = with_evaluations(made, _evaluations(opened, found, rows, *options, progress))
        else:
            made = stored.of(opened) or report_of(opened, seed=seed, progress=progress)
        for path in output or ():
            files.write(made, path)
    if json:
        typer.echo(files.to_json(made), nl=False)
        return
    show(made)
    for path in output or ():
        console.note(f"{path} was written.")


def show(made: "Report") -> None:
    """The verdict, on stdout."""
    typer.echo(made.verdict.headline)
    for finding in made.verdict.findings:
        names = ", ".join(finding.adapters[:NAMED]) + ", …" * (len(finding.adapters) > NAMED)
        typer.echo(f"\n{MARKS[finding.good]} {finding.text}" + f" ({names})" * bool(names))
        if finding.advice:
            typer.echo(f"  → {finding.advice}")
    for note in made.notes:
        console.note(note)


def _count(left_out: str | None) -> int | None:
    from ..errors import OptionError

    if left_out is None:
        return None
    if left_out == "all":
        # more than any collection has
        return 2**62
    if not left_out.isdecimal() or int(left_out) < 1:
        raise OptionError(f"--left-out must be a number from 1 on, or `all`, got {left_out!r}.")
    return int(left_out)


def _target(given: str, pack: "Pack") -> tuple[str | None, Path]:
    """`NAME=FILE` in its parts where NAME is an adapter; else a file for all."""
    name, equals, rest = given.partition("=")
    if equals and name in pack.names and rest:
        return name, console.path(rest)
    return None, console.path(given)


def _labels(given: Sequence[str], pack: "Pack") -> Mapping[str, Sequence[str]] | Sequence[str] | None:
    if not given:
        return None
    named = {name: rest.split(",") for name, equals, rest in (one.partition("=") for one in given) if equals}
    unknown = sorted(named.keys() - set(pack.names))
    if not named and len(given) == 1:
        return given[0].split(",")
    if len(named) != len(given) or unknown:
        from ..errors import OptionError

        raise OptionError(
            f"--labels {', '.join(given)}: give A,B,… once, for all adapters, or NAME=A,B,… for each"
            + (f"; the pack has no {', '.join(unknown)}." if unknown else ".")
        )
    return named


def _evaluations(
    pack: "Pack",
    found: "Originals",
    rows: Sequence[tuple[str | None, Path]],
    model: str | None,
    task: str | None,
    labels: Mapping[str, Sequence[str]] | Sequence[str] | None,
    columns: Columns,
    batch_size: int,
    max_length: int | None,
    progress: "Progress",
) -> "list[Evaluation]":
    from ..tasks.compare import compare

    return compare(
        pack,
        found.adapters,
        rows,
        model=model,
        task=task,
        labels=labels,
        columns=columns,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )
