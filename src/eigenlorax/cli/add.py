"""`eigenlorax add`: further adapters into a pack, by projection on its subspace."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import WARN_ABOVE
from . import console

if TYPE_CHECKING:
    from ..pack.manifest import SubspaceInfo

EPILOG = """Examples:

  eigenlorax add pack/ adapters/new

  eigenlorax add pack/ adapters/new --extend 4

  eigenlorax add pack/ mine=runs/3/best org/on-the-hub --carry-missing"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(add)


def add(
    pack: console.PackFolder,
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Folders, LoRA files, a folder of some, URLs, Hub ids, NAME=PATH."),
    ],
    extend: Annotated[
        int | None,
        typer.Option(
            metavar="L",
            help="Let every side grow by at most L directions, those it misses most of the new adapters.",
        ),
    ] = None,
    carry_missing: Annotated[
        bool, typer.Option("--carry-missing", help="Keep modules that the subspace lacks as they are.")
    ] = False,
    warn_above: Annotated[
        float, typer.Option(metavar="SHARE", help="Name adapters whose delta error is above that; 1: never.")
    ] = WARN_ABOVE,
    same_base: console.SameBase = False,
    allow_pickle: console.AllowPickle = False,
    revision: console.Revision = None,
    json: console.Json = False,
) -> None:
    """Project more adapters on a pack's subspace, and say how much of each was lost."""
    from ..pack.pack import Pack

    with console.working() as progress, Pack.edit(pack) as opened:
        before = opened.info
        records = opened.add_all(
            adapters,
            extend=extend,
            carry_missing=carry_missing,
            same_base=same_base,
            warn_above=warn_above,
            progress=progress,
            allow_pickle=allow_pickle,
            revision=revision,
        )
    extended = None if extend is None else _grown(before, opened.info)
    if json:
        added = {name: asdict(record) for name, record in records.items()}
        more = {} if extended is None else {"extended": extended}
        console.print_json({"pack": str(pack), "added": added, **more})
    else:
        rows = [
            (
                name,
                "untrained" if record.untrained else console.share(record.delta_error),
                f"{record.coefficient_bytes:,}",
                f"{record.carried_bytes:,}",
            )
            for name, record in records.items()
        ]
        header = ("added", "delta error", "coefficient bytes", "carried bytes")
        console.print_table("", header, rows, numbers=(1, 2, 3))
        if extended is not None:
            console.print_rows("", [("basis extended", _in_words(extended))])


def _grown(before: "SubspaceInfo", after: "SubspaceInfo") -> dict[str, int]:
    """How many directions came to how many sides, how many to one of them at most, and what they take."""
    grown = [
        side.k - before.modules[module][name].k for module, pair in after.modules.items() for name, side in pair.items()
    ]
    return {
        "directions": sum(grown),
        "sides": sum(n > 0 for n in grown),
        "most": max(grown, default=0),
        "basis_bytes": after.stored_bytes - before.stored_bytes,
    }


def _in_words(extended: dict[str, int]) -> str:
    if not extended["directions"]:
        return "by nothing: it misses nothing of them"
    return (
        f"by {extended['directions']:,} directions on {extended['sides']:,} sides, at most {extended['most']} on one; "
        f"{extended['basis_bytes']:,} bytes more"
    )
