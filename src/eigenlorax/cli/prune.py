"""`eigenlorax prune`: remove versions of a history."""

from dataclasses import asdict
from typing import Annotated

import typer

from . import arguments, console, verbs

EXAMPLES = """
eigenlorax prune history/ run --keep-last 2
eigenlorax prune history/ run --keep-last 2 --keep-every 100
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, prune, EXAMPLES)


def prune(
    pack: arguments.PackFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the history.")],
    keep_last: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of versions at the end that stay (default: 1; the latest always stays)."
        ),
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(metavar="M", help="Versions stay whose step is a multiple of M (default: none).")
    ] = None,
    json: arguments.Json = False,
) -> None:
    """Remove versions of a history. All others keep their exact numbers, and with them their error bounds."""
    from ..pack.pack import Pack

    with Pack.edit(pack) as opened:
        pruned = opened.prune(name, keep_last=keep_last, keep_every=keep_every)
    left = len(opened.histories[name])
    if json:
        console.print_json({"pack": str(pack), "name": name, "left": left, **asdict(pruned)})
        return
    rows = [
        ("removed", f"{len(pruned.removed)}: {', '.join(pruned.removed)}" if pruned.removed else "0"),
        ("encoded again", f"{len(pruned.encoded_again)}, to the same numbers"),
        ("left", str(left)),
        ("freed bytes", f"{pruned.freed_bytes:,}"),
    ]
    console.print_rows(f"history {name} in {pack}", rows)
