"""`eigenlorax refit`: another basis for the adapters of a pack, and what that changes for whom."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.options import parse_byte_count
from ..errors import WARN_ABOVE
from . import console
from .fit import number_or_auto

if TYPE_CHECKING:
    from ..fitting.refit import Change

EPILOG = """Examples:

  eigenlorax refit pack/ --adapters adapters/ -k 48 -o pack-48/

  eigenlorax refit pack/ -o pack/ --overwrite"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(refit)


def refit(
    pack: console.PackFolder,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PACK2", help="The new pack's folder; PACK itself too.", parser=console.path
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters", "-a", metavar="ADAPTER", help="Originals, as for `fit`, found by content. Once or more."
        ),
    ] = None,
    n_components: Annotated[
        Any,
        typer.Option(
            "--n-components",
            "-k",
            metavar="K|auto",
            help="Directions a side of a module, at most (default: as the pack was fitted).",
            parser=number_or_auto,
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="E", help="Instead of K: the share of squared norm to keep.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Instead of K: as few bytes as keep delta errors at most X."),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="B", help="Instead of K: the least error in so much: 40MB, 1.5GiB.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(metavar="R", help="The same in a pack R times smaller than the LoRAs in 16 bits.")
    ] = None,
    weighting: Annotated[str | None, typer.Option(help="delta or factors (default: as before).")] = None,
    sweeps: Annotated[int | None, typer.Option(help="Alternating refinements (default: as before).")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16, bfloat16, float64, int8, int4. (Default: as before; with --max-error, --max-bytes "
            "or --ratio coded.)"
        ),
    ] = None,
    coefficient_dtype: Annotated[
        str | None, typer.Option(help="That of the coefficients (default: as before).")
    ] = None,
    warn_above: Annotated[
        float, typer.Option(metavar="SHARE", help="Name adapters whose delta error is above that; 1: never.")
    ] = WARN_ABOVE,
    allow_pickle: console.AllowPickle = False,
    revision: console.Revision = None,
    device: Annotated[str, typer.Option(help="Where bases are fitted: cpu, cuda, cuda:1.")] = "cpu",
    overwrite: console.Overwrite = False,
    json: console.Json = False,
) -> None:
    """Fit a pack's adapters again, from originals where they are given, and say what changed for whom."""
    from ..fitting.refit import changes_json
    from ..fitting.refit import refit as refit_adapters
    from ..pack import folder
    from ..pack.pack import Pack

    started = time.perf_counter()
    opened = Pack.open(pack)
    folder.check_free(output, overwrite)
    reading = {"allow_pickle": allow_pickle, "revision": revision} if adapters else {}
    with console.working() as progress:
        found = refit_adapters(
            opened,
            adapters or None,
            n_components=n_components,
            energy=energy,
            max_error=max_error,
            max_bytes=parse_byte_count("--max-bytes", max_bytes) if max_bytes is not None else None,
            ratio=ratio,
            weighting=weighting,
            sweeps=sweeps,
            dtype=dtype,
            coefficient_dtype=coefficient_dtype,
            warn_above=warn_above,
            device=device,
            progress=progress,
            **reading,
        )
        found.pack.save(output, overwrite=overwrite)
    if json:
        console.print_json(
            {
                "pack": str(output),
                "seconds": time.perf_counter() - started,
                "changes": changes_json(found),
                "worse": found.worse,
                "frontier": [asdict(point) for point in found.pack.frontier],
                "fingerprint_before": opened.info.fingerprint,
                **console.figures_json(found.pack.summary, found.pack.records),
            }
        )
        return
    header = ("adapter", "fitted from", "delta error before", "after", "moved", "bytes before", "after")
    rows = [(name, *_row(change)) for name, change in found.changes.items()]
    console.print_table("", header, rows, numbers=(2, 3, 4, 5, 6))
    before, after = opened.summary.bytes, found.pack.summary.bytes
    any_bound = any(found.changes[name].bound for name in found.worse)
    console.print_rows(
        f"pack {output}",
        [
            ("got worse" + ", or may have" * any_bound, ", ".join(found.worse) or "none"),
            ("basis bytes", f"{before.basis:,} before, {after.basis:,} after"),
            ("compression ratio", f"{before.ratio:.2f} before, {after.ratio:.2f} after, the basis counted"),
            ("seconds", f"{time.perf_counter() - started:.1f}"),
        ],
    )
    if found.pack.frontier:
        console.print_frontier(found.pack)
    console.note(
        "adapters that were trained in the old subspace and saved elsewhere do not belong to the new one: keep the old "
        "pack for them, or add them to this one."
    )


def _row(change: "Change") -> tuple[str, ...]:
    def share(value: float | None, *, bound: bool = False) -> str:
        return "untrained" if value is None else ("≤ " if bound else "") + console.share(value)

    return (
        "its original" if change.from_original else "the pack",
        share(change.error_before),
        share(change.error_after, bound=change.bound),
        "" if change.moved is None else console.share(change.moved),
        f"{change.bytes_before:,}",
        f"{change.bytes_after:,}",
    )
