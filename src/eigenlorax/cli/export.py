"""`eigenlorax export`: write adapters of a pack as ordinary LoRAs, in PEFT folders or single files."""

from pathlib import Path
from typing import Annotated

import typer

from . import arguments, console

EPILOG = """Examples:

  eigenlorax export pack/ -o loras/

  eigenlorax export pack/ sst2 mrpc -o loras/ --dtype float16

  eigenlorax export org/pack sst2 -o loras/

  eigenlorax export styles-pack/ -o exported/ --format kohya"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command(epilog=EPILOG)(export)


def export(
    pack: arguments.PackSource,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write to: each adapter becomes DIR/NAME, or DIR/NAME.safetensors.",
            parser=arguments.path,
        ),
    ],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Adapters to export (default: all).")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="File format: peft, kohya, diffusers, diffusers-old or diffusion-model (default: the format in which "
            "each adapter was read)."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the LoRA factors (default: float32, or the pack's if that is wider).")
    ] = None,
    revision: arguments.PackRevision = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Write adapters of a pack as ordinary LoRAs, for PEFT, vLLM, diffusers or a web UI."""
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
                console.format_error(records[name].delta_error),
                console.format_error(opened.export_rounding(name, dtype)),
                str(path),
            )
            for name, path in written.items()
        ]
        console.print_table("", ("adapter", "delta error", "rounding", "written to"), rows, numbers=(1, 2))
