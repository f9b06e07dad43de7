"""`eigenlorax restore`: write a lossless version as the PEFT folder that it was."""

from pathlib import Path
from typing import Annotated

import typer

from . import arguments, console, verbs

EXAMPLES = "eigenlorax restore exact/ run@20 -o checkpoint/"


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, restore, EXAMPLES)


def restore(
    pack: arguments.PackSource,
    name: Annotated[
        str, typer.Argument(metavar="NAME@VERSION", help="Lossless version, such as run@500 or run@latest.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write the adapter to.", parser=arguments.path),
    ],
    revision: arguments.PackRevision = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Write a lossless version as the PEFT folder that it was, bit for bit, to resume training from."""
    from ..pack.pack import Pack

    opened = Pack.from_pretrained(pack, adapters=[name], revision=revision)
    with console.working("The restoration"):
        path = opened.restore(name, output, overwrite=overwrite)
    if json:
        console.print_json({"pack": pack, "version": name, "written": str(path)})
    else:
        console.print_rows(f"version {name} of {pack}", [("written to", str(path))])
