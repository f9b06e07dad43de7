"""`eigenlorax add`: further adapters into a pack, by projection on its subspace."""

from dataclasses import asdict
from typing import Annotated

import typer

from ..errors import WARN_ABOVE
from . import console

EPILOG = """Examples:

  eigenlorax add pack/ adapters/new

  eigenlorax add pack/ mine=runs/3/best org/on-the-hub --carry-missing"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(add)


def add(
    pack: console.PackFolder,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders, a parent folder of some, URLs, Hub ids, NAME=PATH.")
    ],
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
    from ..formats import sources
    from ..pack import Pack, check_warn_above, warn_of_losses

    warn_above = check_warn_above(warn_above)
    with console.working() as progress, Pack.edit(pack) as opened:
        found = sources.find(adapters, revision=revision)
        records = {}
        for done, one in enumerate(found):
            progress("projecting adapters", done, len(found))
            before = set(opened.names)
            record = opened.add(
                one.source,
                name=one.name,
                carry_missing=carry_missing,
                same_base=same_base,
                warn_above=1.0,
                allow_pickle=allow_pickle,
                revision=revision,
            )
            (name,) = set(opened.names) - before
            records[name] = record
        warn_of_losses(records, warn_above)
    if json:
        console.print_json({"pack": str(pack), "added": {name: asdict(record) for name, record in records.items()}})
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
