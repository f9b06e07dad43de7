"""`eigenlorax report`: does a collection share a subspace, and what did recycling cost?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.options import suggestion
from ..train.options import EVALUATION_BATCH, TASKS, Columns
from . import console
from .evaluate import class_names

if TYPE_CHECKING:
    from ..pack.pack import Pack
    from ..reports import Report

EPILOG = """Examples:

  eigenlorax report pack/ --adapters adapters/ -o report.html

  eigenlorax report pack/ --adapters adapters/ -o report.md -o report.json

  eigenlorax report pack/ -a adapters/ --evaluate sst2=rows.csv -o report.html

  eigenlorax report pack/ -a adapters/ --evaluate r.csv --frontier 5,20 -o r.md"""

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
    seed: Annotated[int, typer.Option(help="Of samples and of random directions.")] = 0,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Rows to run originals and recycled adapters on. Once or more."),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,…",
            help="Beside --evaluate: fits anew at these ratios, and each LoRA cut and rounded to their bytes.",
        ),
    ] = None,
    model: console.Model = None,
    task: Annotated[str | None, typer.Option(help=f"{' or '.join(TASKS)} (default: what an adapter says).")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]A,B,…|OUT",
            help="Names of the classes in the head's order, or a folder of `train`; of an adapter or all.",
        ),
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
    from ..pack.pack import Pack
    from ..reports import files, originals, stored, with_evaluations
    from ..reports import report as report_of

    columns = Columns(text_column, label_column, pair_column)
    of_evaluation = {
        "--frontier": frontier is not None,
        "--model": model is not None,
        "--task": task is not None,
        "--labels": bool(labels),
        "--batch-size": batch_size != EVALUATION_BATCH,
        "--max-length": max_length is not None,
        "--text-column": columns.text != Columns().text,
        "--label-column": columns.label != Columns().label,
        "--pair-column": columns.pair is not None,
    }
    of_adapters = {
        "--left-out": left_out is not None,
        "--seed": seed != 0,
        "--evaluate": bool(evaluate),
        "--allow-pickle": allow_pickle,
        "--revision": revision is not None,
    }
    if not adapters:
        _refuse(of_adapters | of_evaluation, "--adapters, which names the original ones")
    if not evaluate:
        _refuse(of_evaluation, "--evaluate, which names rows")
    for path in output or ():
        files.check(path)
    count = _count(left_out)
    ratios = _ratios(frontier)
    with console.working() as progress:
        opened = Pack.from_pretrained(pack, revision=pack_revision)
        if adapters:
            reading = {"allow_pickle": allow_pickle, "revision": revision}
            found = originals.find(opened, adapters, progress, **reading)
            comparison = versions = None
            if evaluate:
                from ..train import ratios as anew
                from ..train import recycled_evaluation

                # what is wrong with it is to be known before hours of measuring
                comparison = recycled_evaluation.prepare(
                    opened,
                    found.adapters,
                    [_target(one, opened) for one in evaluate],
                    model=model,
                    task=task,
                    labels=_labels(labels or (), opened),
                    columns=columns,
                    batch_size=batch_size,
                    max_length=max_length,
                )
                if ratios:
                    versions = anew.prepare(opened, found.adapters, comparison, ratios, progress)
            made = report_of(opened, found, left_out=count, seed=seed, progress=progress)
            if comparison is not None and versions is not None:
                made = with_evaluations(made, *anew.run(found.adapters, comparison, versions, progress))
            elif comparison is not None:
                made = with_evaluations(made, recycled_evaluation.run(opened, found.adapters, comparison, progress))
        else:
            made = stored.of(opened) or report_of(opened, seed=seed, progress=progress)
        for path in output or ():
            files.write(made, path)
    if json:
        console.print_document(files.to_json(made))
        return
    show(made)
    for path in output or ():
        console.note(f"{path} was written.")


def show(made: "Report") -> None:
    """The verdict, on stdout."""
    console.say(made.verdict.headline)
    for finding in made.verdict.findings:
        names = ", ".join(finding.adapters[:NAMED]) + ", …" * (len(finding.adapters) > NAMED)
        console.say()
        console.say(f"{MARKS[finding.good]} {finding.text}" + f" ({names})" * bool(names))
        if finding.advice:
            console.say(f"  → {finding.advice}")
    for note in made.notes:
        console.note(note)


def _refuse(given: Mapping[str, bool], needed: str) -> None:
    """`OptionError` if one of these options was given, which mean nothing without another one."""
    from ..errors import OptionError

    option = next((option for option, there in given.items() if there), None)
    if option is not None:
        raise OptionError(f"{option} needs {needed}. Give that too, or leave {option} out.")


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


def _ratios(given: str | None) -> list[float]:
    from ..errors import OptionError

    if given is None:
        return []
    try:
        found = [float(one) for one in given.split(",")]
    except ValueError:
        raise OptionError(
            f"--frontier takes ratios with commas between them, such as 5,20,50; got {given!r}."
        ) from None
    from ..train import ratios

    return ratios.check(found)


def _target(given: str, pack: "Pack") -> tuple[str | None, Path]:
    """`NAME=FILE` in its parts where NAME is an adapter; else a file for all."""
    name, equals, rest = given.partition("=")
    if equals and name in pack.names and rest:
        return name, console.path(rest)
    if equals and not Path(given).exists() and Path(rest).exists():
        from ..core import keys

        keys.check_known(name, pack.names)
    return None, console.path(given)


def _labels(given: Sequence[str], pack: "Pack") -> Mapping[str, Sequence[str]] | Sequence[str] | None:
    if not given:
        return None
    named = {name: rest for name, equals, rest in (one.partition("=") for one in given) if equals}
    unknown = sorted(named.keys() - set(pack.names))
    if not named and len(given) == 1:
        return class_names(given[0])
    if len(named) != len(given) or unknown:
        from ..errors import OptionError

        raise OptionError(
            f"--labels {', '.join(given)}: give A,B,… once, for all adapters, or NAME=A,B,… for each"
            + (f"; the pack has no {', '.join(unknown)}.{suggestion(unknown[0], pack.names)}" if unknown else ".")
        )
    return {name: class_names(rest) for name, rest in named.items()}
