"""`eigenlorax augment`: add random components to a pack's subspace, for training when source adapters are few."""

import time
from pathlib import Path
from typing import Annotated

import typer

from . import arguments, console, verbs

EXAMPLES = "eigenlorax augment pack/ --n-extra 32 --seed 7 -o wider/"


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, augment, EXAMPLES)


def augment(
    pack: arguments.PackFolder,
    n_extra: Annotated[
        int, typer.Option("--n-extra", metavar="L", help="Number of random components to add to each module and side.")
    ],
    seed: Annotated[
        int,
        typer.Option(
            metavar="S", help="Seed of the components, which is stored. Each augmentation of a pack needs another one."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PACK2", help="Folder of the new pack.", parser=arguments.path)
    ],
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Write a new pack with L random orthonormal components per module and side added. Adapters do not change."""
    from ..pack import writer
    from ..pack.pack import Pack

    started = time.perf_counter()
    opened = Pack.open(pack)
    writer.check_free(output, overwrite)
    with console.working():
        augmented = opened.augment(n_extra, seed)
        augmented.save(output, overwrite=overwrite)
    for note in augmented.notes:
        console.note(note)
    if json:
        console.print_json({"pack": str(output), **console.summary_json(augmented.summary, augmented.records)})
    else:
        rows = [*console.summary_rows(augmented.summary), ("seconds", f"{time.perf_counter() - started:.1f}")]
        console.print_rows(f"pack {output}", rows)
        console.print_sizes(augmented.summary)
