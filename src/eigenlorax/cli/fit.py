"""`eigenlorax fit`: adapters in, one pack out."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.options import parse_byte_count
from ..errors import WARN_ABOVE, reason
from . import console

if TYPE_CHECKING:
    from ..fitting.fit import Progress
    from ..pack.pack import Pack

EPILOG = """Examples:

  eigenlorax fit adapters/ -o pack/

  eigenlorax fit adapters/* org/on-the-hub mine=runs/3/best -o pack/ -k 64

  eigenlorax fit styles/*.safetensors -o pack/

  eigenlorax fit s3://bucket/adapters -o pack/

  eigenlorax fit adapters/ -o pack/ --energy 0.95 --dtype float16 --overwrite

  eigenlorax fit adapters/ -o pack/ --dtype int8

  eigenlorax fit adapters/ -o pack/ --max-error 0.3

  eigenlorax fit adapters/ -o pack/ --ratio 18

  eigenlorax fit adapters/ -o pack/ -k auto

  eigenlorax fit adapters/ -o pack/ -k 64 --engine processes --workers 8"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(fit)


def number_or_auto(text: str) -> int | str:
    """What -k takes."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither an integer nor 'auto'.") from error


def fit(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help="Adapter folders, LoRA files, a folder of some, URLs (s3://…), Hub ids (org/name), NAME=PATH.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="PACK", help="The folder to write the pack to.", parser=console.path),
    ],
    # an int, or "auto": a union, of which typer knows none
    n_components: Annotated[
        Any,
        typer.Option(
            "--n-components",
            "-k",
            metavar="K|auto",
            help="Directions a side of a module, at most (default 32). auto: found by leaving adapters out.",
            parser=number_or_auto,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="E", help="Instead of K: the share of squared norm to keep, above 0, at most 1."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Instead of K: as few bytes as keep every adapter's delta error at most X."),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(metavar="B", help="Instead of K: the least error all adapters can have in so much: 40MB, 1.5GiB."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="The same in a pack R times smaller than the LoRAs in 16 bits, basis counted."),
    ] = None,
    weighting: Annotated[
        str, typer.Option(help="delta: least error of the updates. factors: the paper's, of A and B apart.")
    ] = "delta",
    sweeps: Annotated[
        int | None, typer.Option(metavar="N", help="Alternating refinements of the delta weighting (default: 2).")
    ] = None,
    exclude_adapter: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Leave an adapter out.")] = None,
    exclude_module: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Keep modules out of the subspace; adapters carry them as they are."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16, bfloat16, float64, int8, int4. (Default: the widest of the sources; with "
            "--max-error, --max-bytes or --ratio coded, in as few bits as the error or the size asks for.)"
        ),
    ] = None,
    coefficient_dtype: Annotated[
        str | None, typer.Option(help="That of the coefficients (default: DTYPE; int8 beside integers).")
    ] = None,
    warn_above: Annotated[
        float, typer.Option(metavar="SHARE", help="Name adapters whose delta error is above that; 1: never.")
    ] = WARN_ABOVE,
    same_base: console.SameBase = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out, and name, adapters that are broken or hold NaN or Inf.")
    ] = False,
    allow_pickle: console.AllowPickle = False,
    revision: console.Revision = None,
    device: Annotated[str, typer.Option(help="Where bases are fitted: cpu, cuda, cuda:1.")] = "cpu",
    solver: Annotated[
        str, typer.Option(help="exact: whole spectra, however large. auto: leading directions of large stacks.")
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="Who does the work: serial, processes (of this machine), ray (a cluster).")
    ] = "serial",
    workers: Annotated[int | None, typer.Option(metavar="N", help="How many processes (default: all cores).")] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Leave report.html and report.json in the pack.")
    ] = True,
    overwrite: console.Overwrite = False,
    json: console.Json = False,
) -> None:
    """Find the subspace that LoRA adapters share, and write it, with every adapter as coefficients, to one pack."""
    from ..core import checkpoint, keys
    from ..fitting.fit import chooses_bytes
    from ..fitting.fit import fit as fit_adapters
    from ..pack import folder

    started = time.perf_counter()
    checkpoint.discard_finished(output, output / keys.MANIFEST)
    folder.check_free(output, overwrite)
    budget = parse_byte_count("--max-bytes", max_bytes) if max_bytes is not None else None
    aims = {"max_error": max_error, "max_bytes": budget, "ratio": ratio}
    kept, before = checkpoint.default_folder(output), _manifest(output)
    with console.interrupts_say(lambda: _left_behind(output, before, kept)), console.working() as progress:
        pack = fit_adapters(
            adapters,
            n_components=n_components,
            energy=energy,
            max_error=max_error,
            max_bytes=budget,
            ratio=ratio,
            weighting=weighting,
            sweeps=sweeps,
            exclude_adapters=exclude_adapter or (),
            exclude_modules=exclude_module or (),
            dtype=dtype,
            coefficient_dtype=coefficient_dtype,
            same_base=same_base,
            skip_bad=skip_bad,
            warn_above=warn_above,
            device=device,
            solver=solver,
            engine=engine,
            workers=workers,
            checkpoint=None if chooses_bytes(aims, weighting, dtype, coefficient_dtype) else kept,
            progress=progress,
            allow_pickle=allow_pickle,
            revision=revision,
        )
        pack.save(output, overwrite=overwrite)
        seconds = time.perf_counter() - started
        headline = None
        if report:
            headline = _report(pack, adapters, output, progress, allow_pickle=allow_pickle, revision=revision)
    more = f", and {time.perf_counter() - started - seconds:.1f} for the report" if report else ""
    for sentence in pack.notes:
        console.note(sentence)
    if json:
        figures = console.figures_json(pack.summary, pack.records)
        printed = {
            "pack": str(output),
            "seconds": seconds,
            "seconds_by_stage": pack.seconds,
            "notes": pack.notes,
            "frontier": [asdict(point) for point in pack.frontier],
            "headline": headline,
            **figures,
        }
        console.print_json(printed)
    else:
        rows = [*console.summary_rows(pack.summary), ("seconds", f"{seconds:.1f}{more}")]
        if headline is not None:
            rows.append((keys.REPORT_PAGE, headline))
        console.print_rows(f"pack {output}", rows)
        if pack.frontier:
            console.print_frontier(pack)


def _manifest(output: Path) -> bytes | None:
    from ..core import atomic_files, boundary, keys

    return atomic_files.read_regular_file(output / keys.MANIFEST, boundary.MAX_MANIFEST_BYTES)


def _left_behind(output: Path, before: bytes | None, kept: Path) -> str:
    """What an interrupted fit leaves. before: the manifest of the pack that was there."""
    from ..core import checkpoint

    if _manifest(output) != before:
        return f"{output} is written, and whole; it may lack its report."
    said = "No pack was written" if before is None else f"{output} is as it was"
    modules = checkpoint.count_parts(kept)
    if not modules:
        return f"{said}, and nothing was left."
    those = "1 fitted module is" if modules == 1 else f"{modules:,} fitted modules are"
    return f"{said}. {those} kept in {kept}: the same command goes on there."


def _report(pack: "Pack", adapters: list[str], folder: Path, progress: "Progress", **options: Any) -> str | None:
    """What the report says in one sentence; None, and why, where none was made."""
    from ..reports import extra, stored

    if not extra.is_installed():
        console.note(f"no report was written. {extra.HOW} (--no-report: none is wanted.)")
        return None
    seconds = stored.seconds(pack)
    if seconds > stored.PATIENCE:
        console.note(
            f"no report was written, since it would take about {seconds / 60:,.0f} minutes: "
            f"`eigenlorax report {folder} --adapters ADAPTER… -o report.html` makes one."
        )
        return None
    try:
        return stored.leave(pack, adapters, folder, progress, **options).verdict.headline
    except OSError as error:
        # the pack is written, and whole
        console.note(f"no report was written: {reason(error).rstrip('.')}.")
        return None
