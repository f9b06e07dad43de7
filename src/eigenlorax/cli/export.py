"""`eigenlorax export`: write adapters of a pack as ordinary LoRAs, in PEFT folders or single files."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments, console, durations, verbs

if TYPE_CHECKING:
    from ..pack.export import ExportErrors
    from ..pack.pack import Pack

EXAMPLES = """
eigenlorax export pack/ -o loras/
eigenlorax export pack/ sms-spam-a clinc-home -o half/ --dtype float16
"""

EXACT = 1e-6
"""Relative error of rounding to float32, with room, which is not worth a note."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, export, EXAMPLES)


def export(
    pack: arguments.PackSource,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write to: each adapter becomes DIR/NAME, DIR/NAME.safetensors or DIR/NAME.gguf.",
            parser=arguments.path,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Adapters to export, and versions such as run@500 or run@latest (default: all adapters).",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="File format: peft, mlx, gguf, kohya, diffusers, diffusers-old or diffusion-model (default: that in "
            "which each adapter was read).",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="Dtype of the LoRA factors; q8_0 for gguf (default: that of each adapter's source)."
        ),
    ] = None,
    base_config: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For gguf: folder with the base model's config.json. Its weights are not needed.",
            parser=arguments.path,
        ),
    ] = None,
    modelfile: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="For gguf: also write NAME.Modelfile, for Ollama, with FROM BASE."),
    ] = None,
    revision: arguments.PackRevision = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
) -> None:
    """Write adapters and versions of a pack as ordinary LoRAs, for PEFT, vLLM, llama.cpp, diffusers or a web UI."""
    from ..errors import OptionError
    from ..pack.pack import Pack

    opened = Pack.from_pretrained(pack, adapters=names or None, revision=revision)
    if not names and not opened.names:
        latest = [history.full_name(history.latest) for history in opened.histories.values()]
        remedy = f"Name a version, such as {latest[0]}." if latest else "Add some with `eigenlorax add`."
        raise OptionError(f"{pack} has no adapters to export. {remedy}")
    records = {name: record for name, record in opened.records.items() if not names or name in names}
    with console.working("The export", durations.export_seconds(records, is_coded=opened.is_coded)) as progress:
        written = opened.export(
            output,
            names or None,
            format=format,
            dtype=dtype,
            overwrite=overwrite,
            base_config=base_config,
            modelfile=modelfile,
            progress=progress,
        )
        errors, bounds = {}, {}
        for done, name in enumerate(written):
            progress("measuring exported adapters", done, len(written))
            errors[name] = opened.export_errors(name, dtype)
            bounds[name] = _error_bound(opened, name)
    if json:
        console.print_json(
            {
                "written": {name: str(path) for name, path in written.items()},
                "adapters": {
                    name: {**asdict(figures), "error_bound": figures.bound} for name, figures in errors.items()
                },
            }
        )
    else:
        rows = [
            (
                name,
                errors[name].dtype,
                console.format_error(errors[name].delta_error),
                console.format_error(errors[name].rounding),
                console.format_error(errors[name].bound),
            )
            for name in written
        ]
        header = ("adapter", "dtype", "delta error", "rounding", "error at most")
        console.print_table(f"written to {output}", header, rows, numbers=(2, 3, 4))
    if (note := _bound_note(errors, bounds)) is not None:
        console.note(note)


def _error_bound(pack: "Pack", name: str) -> float | None:
    """Return the error bound that an adapter or version was stored with; None if there was none."""
    history, _, version = name.partition("@")
    if version:
        return pack.histories[history][version].max_error
    return pack.fit_info.max_error


def _bound_note(errors: Mapping[str, "ExportErrors"], bounds: Mapping[str, float | None]) -> str | None:
    """Return a note on adapters that may exceed their error bound because of rounding, or None.

    Args:
        errors: Errors of the exported adapters, by name.
        bounds: Error bound that each was stored with, or None if it had none.
    """
    above = {
        name: figures
        for name, figures in errors.items()
        if (bound := bounds[name]) is not None
        and figures.delta_error <= bound < figures.bound
        and figures.rounding > EXACT
    }
    if not above:
        return None
    worst = max(above, key=lambda name: above[name].bound)
    return (
        f"the pack keeps every delta error at or below {bounds[worst]:g}. Rounding the factors on export adds to it: "
        f"{len(above)} of {len(errors)} exported adapters may exceed it, with an error of at most "
        f"{above[worst].bound:.5f} ({worst}, in {above[worst].dtype}). Export with --dtype float32 to add less than "
        f"{EXACT:g}."
    )
