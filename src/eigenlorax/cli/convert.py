"""`eigenlorax convert`: write one adapter in another format."""

from pathlib import Path
from typing import Annotated

import typer

from . import arguments, console, verbs

EXAMPLES = """
eigenlorax convert demo/new/clinc-travel half/ --to peft --dtype float16
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, convert, EXAMPLES)


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Adapter: a folder, a file, a URL or a Hub id.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder or file to write, by the format.", parser=arguments.path)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="Format to write: peft, mlx, gguf, kohya, diffusers, diffusers-old or diffusion-model.",
        ),
    ],
    stated_format: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help="Format of IN (default: found by its files and tensors)."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Dtype of the LoRA factors; q8_0 for gguf (default: that of IN)."),
    ] = None,
    base_config: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the base model's config.json. Required to write GGUF, and to read some GGUF files.",
            parser=arguments.path,
        ),
    ] = None,
    allow_pickle: arguments.AllowPickle = False,
    revision: arguments.Revision = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Write an adapter in another format. What the format cannot represent is an error that names the tensor."""
    from ..core import keys
    from ..formats import hub_client, read_adapter, source_format, writable, write_adapter

    hub_client.check_exists(source)
    writable(to)
    with console.working():
        name = hub_client.adapter_name(source)
        adapter = read_adapter(
            source,
            format=stated_format,
            name=name if keys.is_valid_name(name) else "adapter",
            allow_pickle=allow_pickle,
            revision=revision,
            base_config=base_config,
        )
        written = write_adapter(adapter, target, format=to, dtype=dtype, base_config=base_config, overwrite=overwrite)
    document = {
        "written": str(written),
        "from": source_format(source, adapter),
        "to": to,
        "modules": len(adapter.specs),
        "ranks": list(adapter.ranks),
        "heads": list(adapter.heads),
        "carried": list(adapter.carried),
    }
    if json:
        console.print_json(document)
        return
    rows = [
        ("written", str(written)),
        ("format", f"{document['from']} → {to}"),
        ("modules", f"{len(adapter.specs)}, ranks {', '.join(map(str, adapter.ranks)) or 'none'}"),
    ]
    if adapter.heads:
        rows.append(("heads", f"{len(adapter.heads)} tensors, written unchanged"))
    if adapter.carried:
        rows.append(("other tensors", f"{len(adapter.carried)}, written as the format names them"))
    console.print_rows("", rows)
