"""`eigenlorax remove`: remove adapters from a pack."""

from typing import Annotated

import typer

from . import arguments, console, verbs

EXAMPLES = "eigenlorax remove pack/ sms-spam-a clinc-home"


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, remove, EXAMPLES)


def remove(
    pack: arguments.PackFolder,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Adapters to remove.")],
    json: arguments.Json = False,
) -> None:
    """Remove adapters and their files from a pack. The subspace does not change."""
    from ..pack.pack import Pack

    with Pack.edit(pack) as opened:
        opened.remove(*names)
    if json:
        console.print_json({"pack": str(pack), "removed": sorted(set(names)), "left": opened.names})
    else:
        console.print_rows(
            f"pack {pack}", [("removed", ", ".join(sorted(set(names)))), ("left", str(len(opened.names)))]
        )
