"""`eigenlorax export`: adapters of a pack as ordinary LoRAs, folders of PEFT's or single files."""

from pathlib import Path
from typing import Annotated

import typer

from . import console

EPILOG = """Examples:

  eigenlorax export pack/ -o loras/

  eigenlorax export pack/ sst2 mrpc -o loras/ --dtype float16

  eigenlorax export org/pack sst2 -o loras/

  eigenlorax export styles-pack/ -o exported/ --format kohya"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(export)


def export(
    pack: console.PackSource,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Each adapter becomes DIR/NAME, or DIR/NAME.safetensors.",
            parser=console.path,
        ),
    ],
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Which ones; all by default.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="peft, kohya, diffusers, diffusers-old or diffusion-model (default: what each came in)."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the LoRA factors (default: float32, or the pack's if that is wider).")
    ] = None,
    revision: console.PackRevision = None,
    overwrite: console.Overwrite = False,
    json: console.Json = False,
) -> None:
    """Give adapters of a pack back as ordinary LoRAs, in the format they came in or another one."""
    from ..pack.pack import Pack

    opened = Pack.from_pretrained(pack, adapters=names or None, revision=revision)
    with console.working() as progress:
        written = opened.export(
            output, names or None, format=format, dtype=dtype, overwrite=overwrite, progress=progress
        )
    if json:
        console.print_json({"written": {name: str(path) for name, path in written.items()}})
    else:
        records = opened.records
        rows = [
            (
                name,
                console.share(records[name].delta_error),
                console.share(opened.export_rounding(name, dtype)),
                str(path),
            )
            for name, path in written.items()
        ]
        console.print_table("", ("adapter", "delta error", "rounding", "written to"), rows, numbers=(1, 2))
