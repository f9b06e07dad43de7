"""`eigenlorax diff`: compare two versions or adapters of a pack."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments, console, verbs, version_rows

if TYPE_CHECKING:
    from ..core.update_changes import AdapterChange, UpdateChange

EXAMPLES = """
eigenlorax diff history/ run@10 run@latest
eigenlorax diff history/ run@10 run@latest --plot change.svg
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, diff, EXAMPLES)


def diff(
    pack: arguments.PackSource,
    before: Annotated[
        str, typer.Argument(metavar="A", help="Version, such as run@500 or run@latest, or adapter of the pack.")
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="Version or adapter that is compared with A.")],
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the changes by layer and kind of module into a .svg or .png file.",
            parser=arguments.path,
        ),
    ] = None,
    overwrite: arguments.Overwrite = False,
    revision: arguments.PackRevision = None,
    json: arguments.Json = False,
) -> None:
    """Compare two versions or adapters of a pack: relative changes of modules, of each side, and of heads."""
    from ..pack.pack import Pack
    from ..reports import change_map

    if plot is not None:
        change_map.check(plot, overwrite=overwrite)
    opened = Pack.from_pretrained(pack, adapters=[before, after], revision=revision)
    with console.working("The comparison"):
        change = opened.diff(before, after)
        if plot is not None:
            change_map.save(change, plot, overwrite=overwrite)
    if json:
        console.print_json({"pack": pack, "plot": None if plot is None else str(plot), **asdict(change)})
    else:
        _print_change(pack, change)
        if plot is not None:
            console.print_rows("", [("picture", str(plot))])


def _print_change(pack: str, change: "AdapterChange") -> None:
    rows = [_row("all modules", change.total), *(_row(module, each) for module, each in change.modules.items())]
    header = ("module", "change", "norm ratio", "new inputs", "new outputs")
    console.print_table(f"{change.before} → {change.after} in {pack}", header, rows, numbers=(1, 2, 3, 4))
    console.say(
        f"change: norm of the difference ÷ norm of {change.before}. norm ratio: norm of {change.after} ÷ that norm. "
        f"new inputs, new outputs: part of {change.after} outside the input and output directions of {change.before}."
    )
    if change.tensors:
        tensors = [(key, version_rows.distance(each)) for key, each in change.tensors.items()]
        console.print_table("", ("head or other tensor", "change"), tensors, numbers=(1,))


def _row(name: str, change: "UpdateChange") -> tuple[str, ...]:
    ratio = "" if change.norm_ratio is None else f"{change.norm_ratio:.3f}"
    return (name, version_rows.distance(change.change), ratio, f"{change.down:.4f}", f"{change.up:.4f}")
