"""`eigenlorax pull`: download a pack, or its basis and some adapters, from the Hub into a folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import arguments, console, verbs, version_rows

EXAMPLES = """
eigenlorax pull org/name -o mine/
eigenlorax pull org/name --adapter sms-spam-a -o spam/
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, pull, EXAMPLES)


def pull(
    repo: arguments.Repo,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PACK", help="Folder to write the pack to.", parser=arguments.path)
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Adapter or history to download with the basis (default: all). Can be repeated."
        ),
    ] = None,
    revision: arguments.PackRevision = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Download a pack from the Hub into a folder where it can be changed. Every byte is checked."""
    from ..pack import history_figures, writer
    from ..pack.pack import Pack

    writer.check_free(output, overwrite)
    with console.working():
        pulled = Pack.from_pretrained(repo, adapters=adapter or None, revision=revision)
        pulled.save(output, overwrite=overwrite)
    histories = history_figures.all_figures(pulled.histories)
    if json:
        versions = {"histories": {name: asdict(each) for name, each in histories.items()}} if histories else {}
        console.print_json({"pack": str(output), **console.summary_json(pulled.summary, pulled.records), **versions})
        return
    version_rows.print_pack(f"pack {output}", pulled.summary, histories)
    if histories:
        version_rows.print_histories(histories, pulled.summary.files)
