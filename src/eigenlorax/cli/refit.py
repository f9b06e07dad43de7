"""`eigenlorax refit`: fit another subspace to the adapters of a pack, and show each adapter's change."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.options import parse_byte_count
from ..core.printable import first_names
from ..errors import WARN_ABOVE
from . import arguments, console, durations, verbs

if TYPE_CHECKING:
    from ..fitting.refit import Change, Refit
    from ..pack.pack import Pack

EXAMPLES = """
eigenlorax refit pack/ --adapters demo/adapters -k 48 -o pack-48/
eigenlorax refit pack/ -k 24 -o pack/ --overwrite
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, refit, EXAMPLES)


def refit(
    pack: arguments.PackFolder,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PACK2",
            help="Folder of the new pack. May be PACK, with --overwrite.",
            parser=arguments.path,
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            metavar="ADAPTER",
            help="Original adapters, as for `fit`; matched by content. Can be repeated.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(metavar="X", help="Write the smallest pack in which no adapter's delta error exceeds X."),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Write the pack of the smallest errors that is R times smaller than the LoRAs in 16 bits.",
        ),
    ] = None,
    n_components: Annotated[
        Any,
        typer.Option(
            "--n-components",
            "-k",
            metavar="K|auto",
            help="Maximum number of components per module and side (default: as the pack was fitted).",
            parser=arguments.number_or_auto,
        ),
    ] = None,
    overwrite: arguments.Overwrite = False,
    json: arguments.Json = False,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="B",
            help="Minimise the largest error of all adapters within B bytes of tensors: 40MB, 1.5GiB.",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    basis: arguments.Basis = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Instead of K: fraction of the squared norm to keep, 0 < E ≤ 1.",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    head_error: arguments.HeadError = None,
    exact_heads: arguments.ExactHeads = False,
    weighting: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Error that the fit minimises: delta or factors (default: as before).",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    sweeps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Alternating refinements of the bases (default: as before).",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Storage dtype: float32, float16, bfloat16, float64, int8 or int4 (default: as before; entropy-coded "
            "integers with --max-error, --max-bytes or --ratio).",
            rich_help_panel=verbs.STORAGE,
        ),
    ] = None,
    coefficient_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Storage dtype of the coefficients (default: as before).",
            rich_help_panel=verbs.STORAGE,
        ),
    ] = None,
    allow_pickle: arguments.AllowPickle = False,
    base_config: arguments.BaseConfig = None,
    revision: arguments.Revision = None,
    device: arguments.Device = "cpu",
    warn_above: arguments.WarnAbove = WARN_ABOVE,
) -> None:
    """Fit another subspace to a pack's adapters, from their originals if given, and show each adapter's new error."""
    from ..fitting.refit import refit as refit_adapters
    from ..pack import writer
    from ..pack.pack import Pack

    started = time.perf_counter()
    opened = Pack.open(pack)
    writer.check_free(output, overwrite)
    reading = {"allow_pickle": allow_pickle, "base_config": base_config, "revision": revision} if adapters else {}
    by_components = n_components is not None or energy is not None
    is_coded = not by_components and (opened.is_coded or (max_error, max_bytes, ratio) != (None, None, None))
    with console.working("The fit", durations.refit_seconds(opened.records, is_coded=is_coded)) as progress:
        refitted = refit_adapters(
            opened,
            adapters or None,
            n_components=n_components,
            energy=energy,
            max_error=max_error,
            max_bytes=parse_byte_count("--max-bytes", max_bytes) if max_bytes is not None else None,
            ratio=ratio,
            basis=basis,
            head_error=arguments.head_error(head_error, exact=exact_heads),
            weighting=weighting,
            sweeps=sweeps,
            dtype=dtype,
            coefficient_dtype=coefficient_dtype,
            warn_above=warn_above,
            device=device,
            progress=progress,
            **reading,
        )
        refitted.pack.save(output, overwrite=overwrite)
    for note in refitted.pack.notes:
        console.note(note)
    seconds = time.perf_counter() - started
    if json:
        _print_json(opened, refitted, output, seconds)
    else:
        _print_tables(opened, refitted, output, seconds)


def _print_json(old: "Pack", refitted: "Refit", output: Path, seconds: float) -> None:
    from ..fitting.refit import changes_json

    console.print_json(
        {
            "pack": str(output),
            "seconds": seconds,
            "changes": changes_json(refitted),
            "worse": refitted.worse,
            "frontier": [asdict(point) for point in refitted.pack.frontier],
            "fingerprint_before": old.info.fingerprint,
            **console.summary_json(refitted.pack.summary, refitted.pack.records),
        }
    )


def _print_tables(old: "Pack", refitted: "Refit", output: Path, seconds: float) -> None:
    header = ("adapter", "fitted from", "delta error before", "after", "moved", "bytes before", "after")
    rows = [(name, *_change_row(change)) for name, change in refitted.changes.items()]
    console.print_table("", header, rows, numbers=(2, 3, 4, 5, 6))
    before, after = old.summary.bytes, refitted.pack.summary.bytes
    any_bound = any(refitted.changes[name].bound for name in refitted.worse)
    console.print_rows(
        f"pack {output}",
        [
            ("got worse" + (", or may have" if any_bound else ""), first_names(refitted.worse) or "none"),
            ("basis bytes", f"{before.basis:,} before, {after.basis:,} after"),
            ("compression ratio", f"{before.ratio:.2f} before, {after.ratio:.2f} after, basis included"),
            ("seconds", f"{seconds:.1f}"),
        ],
    )
    console.print_sizes(refitted.pack.summary)
    if refitted.pack.frontier:
        console.print_frontier(refitted.pack)
    console.note(
        "adapters that were trained in the old subspace and saved elsewhere do not fit the new one: keep the old pack "
        "for them, or add them to this one."
    )


def _change_row(change: "Change") -> tuple[str, ...]:
    def cell(error: float | None, *, is_bound: bool = False) -> str:
        return "untrained" if error is None else ("≤ " if is_bound else "") + console.format_error(error)

    return (
        "its original" if change.from_original else "the pack",
        cell(change.error_before),
        cell(change.error_after, is_bound=change.bound),
        "" if change.moved is None else console.format_error(change.moved),
        f"{change.bytes_before:,}",
        f"{change.bytes_after:,}",
    )
