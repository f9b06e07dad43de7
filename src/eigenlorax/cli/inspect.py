"""`eigenlorax inspect`: show the content of a pack or an adapter. Every byte of a pack is read and checked."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import keys, printable
from ..errors import FormatError, LossError, OptionError
from ..formats import hub_client
from . import arguments, console, verbs, version_rows

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..pack.folder import PackFolder
    from ..pack.manifest import Manifest

EXAMPLES = """
eigenlorax inspect pack/
eigenlorax inspect pack/ --verify demo/adapters
eigenlorax inspect demo/adapters/sms-spam-a --json
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, inspect, EXAMPLES)


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PACK|ADAPTER", help="A pack or an adapter: a folder, an id on the Hub, or the URL of an adapter."
        ),
    ],
    verify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER",
            help="Original adapters, as for `fit`: measure each adapter's error again and compare it with the pack's "
            "record and bound. The exit code is 4 if one is larger. Can be repeated.",
        ),
    ] = None,
    allow_pickle: arguments.AllowPickle = False,
    base_config: arguments.BaseConfig = None,
    revision: arguments.Revision = None,
    json: arguments.Json = False,
) -> None:
    """Show what a pack or an adapter contains, its size, and the errors of its adapters."""
    from ..pack import hub as remote

    hub_client.check_exists(target)
    files = (keys.MANIFEST, keys.ADAPTER_CONFIG, keys.LORA_FILE, keys.ADAPTER_WEIGHTS, keys.ADAPTER_PICKLE)
    if Path(target).is_dir() and not any((Path(target) / name).is_file() for name in files):
        raise FormatError(_describe_folder(target))
    if remote.is_pack(target, revision=revision):
        with console.working():
            folder = remote.open_folder(target, revision=revision)
            folder.verify()
        if verify:
            reading = {"allow_pickle": allow_pickle, "base_config": base_config}
            _show_verified(target, folder, verify, json, **reading)
        else:
            _show_pack(target, folder, json)
    elif verify:
        raise OptionError(f"{target} is an adapter, and --verify measures adapters of a pack. Remove --verify.")
    else:
        from ..formats import read_adapter

        with console.working():
            # a folder whose name is not valid in a pack can still be shown
            name = hub_client.adapter_name(target)
            adapter = read_adapter(
                target,
                name=name if keys.is_valid_name(name) else "adapter",
                allow_pickle=allow_pickle,
                base_config=base_config,
                revision=revision,
            )
        _show_adapter(target, adapter, json)


def _describe_folder(target: str) -> str:
    """Return the text of the error about a folder that is neither a pack nor an adapter."""
    from ..formats import sources

    neither = f"{target} is neither a pack nor an adapter: it has no {keys.MANIFEST} and no {keys.ADAPTER_CONFIG}."
    try:
        adapters = sources.find_adapters(target)
    except FormatError as error:
        return f"{neither} {error}"
    return (
        f"{target} is a folder of {len(adapters)} adapters. Make a pack of them: `eigenlorax fit {target} -o PACK`. Or "
        f"inspect one of them: `eigenlorax inspect {adapters[0].source}`."
    )


def _show_verified(target: str, folder: "PackFolder", originals: list[str], json: bool, **options: Any) -> None:
    """Measure and print every adapter's error. Raises `LossError` if one exceeds its record or its bound."""
    from ..fitting.verify import verify
    from ..pack.pack import Pack

    with console.working() as progress:
        verification = verify(Pack.from_folder(folder), originals, progress=progress, **options)
    if json:
        adapters = {name: {**asdict(check), "holds": check.holds} for name, check in verification.adapters.items()}
        console.print_json(
            {
                "pack": target,
                "holds": verification.holds,
                "complete": not verification.unknown,
                "adapters": adapters,
                "unknown": verification.unknown,
            }
        )
    else:
        has_heads = any(check.head_error or not check.heads_hold for check in verification.adapters.values())
        rows = [
            (
                name,
                f"{check.delta_error:.6f}",
                f"{check.recorded:.6f}",
                "" if check.bound is None else f"{check.bound:g}",
                *([f"{check.head_error:.4f}"] if has_heads else []),
                "yes" if check.holds else "no",
            )
            for name, check in verification.adapters.items()
        ]
        header = ("adapter", "delta error", "as recorded", "asked for", *(["heads"] if has_heads else []), "holds")
        console.print_table(f"pack {target}", header, rows, numbers=(1, 2, 3, 4) if has_heads else (1, 2, 3))
        n_holding = sum(check.holds for check in verification.adapters.values())
        worst, check = max(verification.adapters.items(), key=lambda item: item[1].delta_error)
        console.say(
            f"{n_holding:,} of {len(verification.adapters):,} adapters hold their record and bound; the largest delta "
            f"error is {check.delta_error:.6f} ({worst})."
        )
    if verification.unknown:
        console.note(f"no original was given for {printable.first_names(verification.unknown)}.")
    exceeding = [name for name, check in verification.adapters.items() if not check.holds]
    if exceeding:
        raise LossError(
            "the measured error exceeds the pack's record or the requested bound for "
            f"{printable.first_names(exceeding)}. Fit the pack again from the originals."
        )


def _show_pack(target: str, folder: "PackFolder", json: bool) -> None:
    from ..pack import history_figures
    from ..pack.summary import summarize_manifest, uncompressed_note

    listed = folder.manifest
    summary = summarize_manifest(listed, folder.file_sizes())
    if (note := uncompressed_note(summary)) is not None:
        console.note(note)
    histories = history_figures.all_figures(dict(sorted(listed.histories.items())))
    if json:
        references = {"references": listed.references} if listed.references else {}
        versions = {"histories": {name: asdict(each) for name, each in histories.items()}} if histories else {}
        stated = {name: asdict(licence) for name, licence in listed.licenses.items() if licence is not None}
        licenses = {"licenses": stated} if stated else {}
        figures = console.summary_json(summary, listed.records)
        console.print_json({"pack": target, **figures, **references, **licenses, **versions})
        return
    version_rows.print_pack(f"pack {target}", summary, histories)
    if listed.adapters:
        _print_adapters(listed)
    if histories:
        version_rows.print_histories(histories, summary.files)


def _print_adapters(listed: "Manifest") -> None:
    """Print the figures of each adapter of a pack."""
    records, references, licenses = listed.records, listed.references, list(listed.licenses.values())
    # columns that are equal for all adapters are left out, so that the table fits 80 columns
    varied = len({record.modules for record in records.values()}) > 1
    carries = any(record.carried_bytes for record in records.values())
    columns = {
        "adapter": list(records),
        "rank": [", ".join(map(str, record.ranks)) for record in records.values()],
        **({"modules": [str(record.modules) for record in records.values()]} if varied else {}),
        "delta error": [
            "untrained" if record.untrained else "≤ " * record.bound + console.format_error(record.delta_error)
            for record in records.values()
        ],
        "rounding": [console.format_error(record.rounding_error) for record in records.values()],
        "bytes": [
            f"as {references[name]}" if name in references else f"{record.coefficient_bytes:,}"
            for name, record in records.items()
        ],
        **({"carried": [f"{record.carried_bytes:,}" for record in records.values()]} if carries else {}),
        "in fit": ["yes" if record.in_fit else "no" for record in records.values()],
        **(
            {"licence": [licence.title if licence is not None else "" for licence in licenses]} if any(licenses) else {}
        ),
    }
    numbers = [index for index, name in enumerate(columns) if name not in ("adapter", "rank", "in fit", "licence")]
    console.print_table("", list(columns), list(zip(*columns.values(), strict=True)), numbers=numbers)


def _show_adapter(target: str, adapter: "Adapter", json: bool) -> None:
    figures = _figures(adapter, target)
    if json:
        console.print_json({"adapter": target, **figures})
        return
    console.print_rows(
        f"adapter {target}",
        [
            ("base model", figures["base_model"] or "not stated"),
            ("format", figures["format"]),
            *[("made for", figures["family"])] * bool(figures["family"]),
            *([("licence", adapter.license.title)] if adapter.license is not None else []),
            ("modules", str(figures["modules"])),
            ("rank", ", ".join(map(str, figures["ranks"]))),
            ("scaling", ", ".join(f"{scaling:g}" for scaling in figures["scalings"])),
            ("dtype", ", ".join(figures["dtypes"])),
            ("LoRA bytes", f"{figures['lora_bytes']:,} (file: {figures['file_bytes']:,})"),
            ("heads", _listing(figures["heads"])),
            *[("  head bytes", f"{figures['head_bytes']:,} (kept as they are)")] * bool(figures["heads"]),
            ("carried", _listing(figures["carried"])),
            *[("  carried bytes", f"{figures['carried_bytes']:,} (kept as they are)")] * bool(figures["carried"]),
            *[("metadata", _listing(list(figures["metadata"])))] * bool(figures["metadata"]),
            ("norm of the update", f"{figures['delta_norm']:.4g}" + (" (untrained)" * figures["untrained"])),
        ],
    )


def _figures(adapter: "Adapter", source: str) -> dict[str, Any]:
    from ..core.dtypes import name as dtype_name
    from ..formats import checks, source_format

    scan = checks.scan(adapter)
    specs = adapter.specs.values()
    norm = sum(scan.delta_squares.values()) ** 0.5
    return {
        "base_model": adapter.base_model,
        "revision": adapter.revision,
        "format": source_format(source, adapter),
        "family": checks.family(adapter),
        "license": asdict(adapter.license) if adapter.license is not None else None,
        "metadata": dict(adapter.origin.metadata) if adapter.origin is not None else {},
        "modules": len(adapter.specs),
        "ranks": list(adapter.ranks),
        "scalings": sorted({spec.scaling for spec in specs}),
        "dtypes": sorted({dtype_name(spec.dtype) for spec in specs}),
        "lora_bytes": sum(spec.numbers * spec.dtype.itemsize for spec in specs),
        "file_bytes": adapter.file_bytes,
        "heads": list(adapter.heads),
        "carried": list(adapter.carried),
        "head_bytes": sum(tensor.nbytes for tensor in adapter.heads.values()),
        "carried_bytes": sum(tensor.nbytes for tensor in adapter.carried.values()),
        "delta_norm": norm,
        "untrained": norm == 0,
        "content_sha256": scan.content_hash,
    }


def _listing(names: list[str]) -> str:
    return printable.first_names(names, 4) or "none"
