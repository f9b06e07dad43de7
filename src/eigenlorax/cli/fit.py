"""`eigenlorax fit`: fit a subspace to adapters, and write a pack."""

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.options import parse_byte_count
from ..errors import WARN_ABOVE, OptionError, reason
from . import arguments, console, durations, verbs, version_rows

if TYPE_CHECKING:
    from ..core.progress import Progress
    from ..pack.pack import Pack

EXAMPLES = """
eigenlorax fit demo/adapters -o small/
eigenlorax fit demo/adapters -o smaller/ --ratio 10
eigenlorax fit demo/adapters -o pack/ --for training
eigenlorax fit demo/adapters -o auto/ -k auto
eigenlorax fit demo/adapters -o pack/ --energy 0.95 --dtype float16 --overwrite
eigenlorax fit demo/adapters/sms-* new=demo/new/clinc-travel -o few/ -k 16
"""

MAX_SOURCES = 3
"""Maximum number of adapters that are repeated in the command for a report."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, fit, EXAMPLES)


def fit(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help="Adapter folders, LoRA files, a folder of adapters, URLs (s3://…), Hub ids (org/name), or NAME=PATH.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="PACK", help="Folder to write the pack to.", parser=arguments.path),
    ],
    purpose: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="PURPOSE",
            help="Purpose, which sets the size and storage that are not passed. storage (default): no adapter's delta "
            "error exceeds 0.1, in as few bytes as possible. training: 32 components in float16. serving: errors of at "
            "most 0.1 in float16, so that one shared basis serves every adapter.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Write the smallest pack in which no adapter's delta error exceeds X, 0 < X < 1."
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Write the pack of the smallest errors that is R times smaller than the LoRAs in 16 bits, basis "
            "included. Untrained adapters do not count.",
        ),
    ] = None,
    # typed Any, because typer does not support the union of int and "auto"
    n_components: Annotated[
        Any,
        typer.Option(
            "--n-components",
            "-k",
            metavar="K|auto",
            help="Maximum number of components per module and side. More components give smaller errors and a larger "
            "pack. auto: choose K by cross-validation over the adapters.",
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
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER",
            help="Common adapter from which all others were trained, as those of many users: write a history in which "
            "each is coded as its change from this one. --max-error is then relative to the change (default: 0.2).",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    max_bytes_per_adapter: Annotated[
        str | None,
        typer.Option(
            metavar="B",
            help="With --reference: minimise the error of each adapter within B bytes: 8000, 4kB.",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    basis: arguments.Basis = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Instead of K: fraction of the squared norm to keep per module and side, 0 < E ≤ 1.",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    head_error: arguments.HeadError = None,
    exact_heads: arguments.ExactHeads = False,
    weighting: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Error that the fit minimises. delta: error of the updates. factors: error of A and B separately, as "
            "in the paper.",
            rich_help_panel=verbs.KEEP,
        ),
    ] = "delta",
    sweeps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Alternating refinements of the bases, with weighting delta (default: 2).",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    exclude_adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Skip an adapter. Can be repeated.", rich_help_panel=verbs.KEEP),
    ] = None,
    exclude_module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep matching modules out of the subspace, and store them unchanged. Can be repeated.",
            rich_help_panel=verbs.KEEP,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Storage dtype: float32, float16, bfloat16, float64, int8 or int4 (default: entropy-coded integers "
            "for storage, --max-error, --max-bytes and --ratio; float16 for training and serving; else the widest of "
            "the adapters).",
            rich_help_panel=verbs.STORAGE,
        ),
    ] = None,
    coefficient_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Storage dtype of the coefficients (default: same as --dtype; int8 for int8 and int4).",
            rich_help_panel=verbs.STORAGE,
        ),
    ] = None,
    same_base: arguments.SameBase = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Skip adapters that are damaged or contain NaN or Inf, and show their names.",
            rich_help_panel=verbs.READING,
        ),
    ] = False,
    allow_pickle: arguments.AllowPickle = False,
    base_config: arguments.BaseConfig = None,
    revision: arguments.Revision = None,
    device: arguments.Device = "cpu",
    solver: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto: an iterative solver for large modules, which is faster and misses less than 1e-4 of the "
            "energy. exact: full decompositions (slower).",
            rich_help_panel=verbs.EXECUTION,
        ),
    ] = "auto",
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Engine that fits the modules: serial (this process), processes (on this machine) or ray (on a "
            "cluster).",
            rich_help_panel=verbs.EXECUTION,
        ),
    ] = "serial",
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of processes for --engine processes (default: all cores).",
            rich_help_panel=verbs.EXECUTION,
        ),
    ] = None,
    report: Annotated[
        bool | None,
        typer.Option(
            "--report/--no-report",
            help="Write report.html and report.json into the pack (default: if the extra `report` is installed).",
            rich_help_panel=verbs.OUTPUT,
            show_default=False,
        ),
    ] = None,
    warn_above: arguments.WarnAbove = WARN_ABOVE,
) -> None:
    """Fit a subspace to LoRA adapters, and write a pack: the shared components, and each adapter as coefficients."""
    if not skip_bad:
        arguments.check_adapters(adapters)
    from ..core import checkpoint, keys
    from ..fitting.fit import fit as fit_adapters
    from ..fitting.options import Target
    from ..pack import writer
    from ..reports import extra

    started = time.perf_counter()
    if report:
        if reference is not None:
            raise OptionError(
                "--report is about adapters over a subspace, which --reference does not fit. Remove it, and make a "
                f"report of the members with `eigenlorax report {shlex.quote(str(output))} -o report.html`."
            )
        extra.require()
    checkpoint.discard_finished(output, output / keys.MANIFEST)
    writer.check_free(output, overwrite)
    sizes = {
        "n_components": n_components,
        "energy": energy,
        "max_error": max_error,
        "max_bytes": _byte_count("--max-bytes", max_bytes),
        "ratio": ratio,
    }
    options: dict[str, Any] = {
        "purpose": purpose,
        **sizes,
        "reference": reference,
        "max_bytes_per_adapter": _byte_count("--max-bytes-per-adapter", max_bytes_per_adapter),
        "basis": basis,
        "head_error": arguments.head_error(head_error, exact=exact_heads),
        "weighting": weighting,
        "sweeps": sweeps,
        "exclude_adapters": exclude_adapter or (),
        "exclude_modules": exclude_module or (),
        "dtype": dtype,
        "coefficient_dtype": coefficient_dtype,
        "same_base": same_base,
        "skip_bad": skip_bad,
        "warn_above": warn_above,
        "device": device,
        "solver": solver,
        "engine": engine,
        "workers": workers,
    }
    reading: dict[str, Any] = {"allow_pickle": allow_pickle, "base_config": base_config, "revision": revision}
    checkpoints, old_manifest = checkpoint.default_folder(output), _manifest(output)
    options["checkpoint"] = None if reference is not None else checkpoints
    is_coded = (
        reference is not None or Target.of(sizes, weighting, sweeps, (dtype, coefficient_dtype), purpose, None).is_coded
    )
    headline = None
    with (
        console.explain_interrupt(lambda: _state_after_interrupt(output, old_manifest, checkpoints)),
        console.working("The fit", durations.fit_seconds(adapters, is_coded=is_coded)) as progress,
    ):
        with checkpoint.new_one_discarded(output, OptionError):
            pack = fit_adapters(adapters, **options, **reading, progress=progress)
        pack.save(output, overwrite=overwrite)
        fit_seconds = time.perf_counter() - started
        if reference is None and (report or (report is None and _can_report())):
            headline = _write_report(pack, adapters, output, progress, **reading)
    report_seconds = time.perf_counter() - started - fit_seconds if headline is not None else None
    for note in pack.notes:
        console.note(note)
    if json:
        _print_json(pack, output, fit_seconds, headline)
    elif reference is not None:
        _print_population(pack, output, fit_seconds)
    else:
        _print_table(pack, output, fit_seconds, report_seconds, headline)


def _byte_count(option: str, text: str | None) -> int | None:
    return parse_byte_count(option, text) if text is not None else None


def _print_population(pack: "Pack", output: Path, seconds: float) -> None:
    from ..pack import history_figures

    console.print_rows(f"pack {output}", [("seconds", f"{seconds:.1f}")])
    version_rows.print_histories(history_figures.all_figures(pack.histories), pack.summary.files)


def _print_json(pack: "Pack", output: Path, seconds: float, headline: str | None) -> None:
    from ..pack import history_figures

    histories = {name: asdict(figures) for name, figures in history_figures.all_figures(pack.histories).items()}
    console.print_json(
        {
            "pack": str(output),
            "seconds": seconds,
            "seconds_by_stage": pack.seconds,
            "notes": pack.notes,
            "frontier": [asdict(point) for point in pack.frontier],
            "headline": headline,
            **console.summary_json(pack.summary, pack.records),
            **({"histories": histories} if histories else {}),
        }
    )


def _print_table(
    pack: "Pack", output: Path, fit_seconds: float, report_seconds: float | None, headline: str | None
) -> None:
    from ..core import keys

    seconds = f"{fit_seconds:.1f}"
    if report_seconds is not None:
        seconds += f", and {report_seconds:.1f} for the report"
    rows = [*console.summary_rows(pack.summary), ("seconds", seconds)]
    if headline is not None:
        rows.append((keys.REPORT_PAGE, headline))
    console.print_rows(f"pack {output}", rows)
    console.print_sizes(pack.summary)
    if pack.frontier:
        console.print_frontier(pack)


def _manifest(pack_folder: Path) -> bytes | None:
    from ..core import atomic_files, keys, limits

    return atomic_files.read_regular_file(pack_folder / keys.MANIFEST, limits.MAX_MANIFEST_BYTES)


def _state_after_interrupt(output: Path, old_manifest: bytes | None, checkpoints: Path) -> str:
    """Describe the state after an interrupted fit.

    Args:
        output: Folder of the pack.
        old_manifest: Manifest of the pack that was there before the fit, or None.
        checkpoints: Folder of the finished parts.
    """
    from ..core import checkpoint

    if _manifest(output) != old_manifest:
        return f"{output} is written and complete, except perhaps for its report."
    pack_state = "No pack was written" if old_manifest is None else f"{output} is unchanged"
    parts = checkpoint.count_parts(checkpoints)
    if not parts:
        return f"{pack_state}, and nothing was left."
    finished = "1 finished part is" if parts == 1 else f"{parts:,} finished parts are"
    return f"{pack_state}. {finished} kept in {checkpoints}: run the same command to continue."


def _can_report() -> bool:
    """Return whether the libraries of reports are installed; else print how to install them."""
    from ..reports import extra

    if not extra.is_installed():
        console.note(f"no report was written. {extra.HOW} Or pass --no-report.")
    return extra.is_installed()


def _write_report(pack: "Pack", adapters: list[str], folder: Path, progress: "Progress", **reading: Any) -> str | None:
    """Write the report into the pack.

    Args:
        pack: The fitted pack.
        adapters: Its adapters, as given to `fit`.
        folder: Folder of the pack.
        progress: Called with the progress of the report.
        reading: Options of reading the adapters.

    Returns:
        The headline of the report, or None if none was written. A note then gives the reason.
    """
    from ..reports import stored

    try:
        return stored.write(pack, adapters, folder, progress, **reading).verdict.headline
    except OSError as error:
        # the pack itself is complete, so that this is a note and no error
        console.note(f"no report was written: {reason(error).rstrip('.')}.")
        return None
