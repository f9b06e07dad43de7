"""`eigenlorax remove`: adapters out of a pack."""

from typing import Annotated

import typer

from . import console

EPILOG = """Example:

  eigenlorax remove pack/ sst2 mrpc"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(remove)


def remove(
    pack: console.PackFolder,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The adapters to remove.")],
    json: console.Json = False,
) -> None:
    """Remove adapters from a pack, and their files. The subspace stays as it was fitted."""
    from ..pack.pack import Pack

    with Pack.edit(pack) as opened:
        opened.remove(*names)
    if json:
        console.print_json({"pack": str(pack), "removed": sorted(set(names)), "left": opened.names})
    else:
        console.print_rows(
            f"pack {pack}", [("removed", ", ".join(sorted(set(names)))), ("left", str(len(opened.names)))]
        )
