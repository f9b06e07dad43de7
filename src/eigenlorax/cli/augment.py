"""`eigenlorax augment`: a pack with further directions, for training where source adapters are few."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import console

EPILOG = """Example:

  eigenlorax augment pack/ --n-extra 32 --seed 7 -o pack-64/"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(augment)


def augment(
    pack: console.PackFolder,
    n_extra: Annotated[int, typer.Option("--n-extra", metavar="L", help="Directions to add to every side.")],
    seed: Annotated[int, typer.Option(metavar="S", help="The seed that gives them, and rebuilds them later.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PACK2", help="The folder of the new pack.", parser=console.path)
    ],
    overwrite: console.Overwrite = False,
    json: console.Json = False,
) -> None:
    """Write a pack with L further orthonormal directions on every side. Every adapter stays exactly what it was."""
    from ..pack import folder
    from ..pack.pack import Pack

    started = time.perf_counter()
    opened = Pack.open(pack)
    folder.check_free(output, overwrite)
    with console.working():
        augmented = opened.augment(n_extra, seed)
        augmented.save(output, overwrite=overwrite)
    if json:
        console.print_json({"pack": str(output), **console.figures_json(augmented.summary, augmented.records)})
    else:
        rows = [*console.summary_rows(augmented.summary), ("seconds", f"{time.perf_counter() - started:.1f}")]
        console.print_rows(f"pack {output}", rows)
