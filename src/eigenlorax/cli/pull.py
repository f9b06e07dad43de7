"""`eigenlorax pull`: a pack, or its basis and some adapters, from the Hub into a folder of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from . import console

EPILOG = """Examples:

  eigenlorax pull org/pack -o mine/

  eigenlorax pull org/pack --adapter sst2 -o sst2/"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(pull)


def pull(
    repo: console.Repo,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PACK", help="The folder of the pack.", parser=console.path)
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The only adapters to fetch with the basis; all by default. Repeatable."),
    ] = None,
    revision: console.PackRevision = None,
    overwrite: console.Overwrite = False,
    json: console.Json = False,
) -> None:
    """Fetch a pack from the Hub, every byte checked, into a folder where it may be changed."""
    from ..pack import folder
    from ..pack.pack import Pack

    folder.check_free(output, overwrite)
    with console.working():
        pulled = Pack.from_pretrained(repo, adapters=adapter or None, revision=revision)
        pulled.save(output, overwrite=overwrite)
    if json:
        console.print_json({"pack": str(output), **console.figures_json(pulled.summary, pulled.records)})
    else:
        console.print_rows(f"pack {output}", console.summary_rows(pulled.summary))
