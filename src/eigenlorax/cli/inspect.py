"""`eigenlorax inspect`: what a pack or an adapter holds. Every byte of a pack is read and checked on the way."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..pack.pack import Pack

EPILOG = """Examples:

  eigenlorax inspect pack/

  eigenlorax inspect adapters/sst2 --json

  eigenlorax inspect pack/ --verify adapters/

  eigenlorax inspect org/pack"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(inspect)


def inspect(
    target: Annotated[
        str, typer.Argument(metavar="PACK|ADAPTER", help="A pack, an adapter's folder or URL, or a Hub id.")
    ],
    verify: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER", help="Originals, as for `fit`: measure again, from the files, what the pack has lost."
        ),
    ] = None,
    allow_pickle: console.AllowPickle = False,
    revision: console.Revision = None,
    json: console.Json = False,
) -> None:
    """Show what a pack or an adapter holds, what it costs, and what was lost."""
    from ..core import keys
    from ..errors import FormatError, OptionError
    from ..formats import hub, read_adapter
    from ..pack import hub as remote
    from ..pack.pack import Pack

    if Path(target).is_dir() and not any(
        (Path(target) / name).is_file() for name in (keys.MANIFEST, keys.ADAPTER_CONFIG, keys.LORA_FILE)
    ):
        raise FormatError(
            f"{target} is neither a pack nor an adapter: it has no {keys.MANIFEST} and no {keys.ADAPTER_CONFIG}."
        )
    if remote.is_pack(target, revision=revision):
        with console.working():
            pack = Pack.from_pretrained(target, revision=revision)
            pack.verify()
        if verify:
            _show_verified(target, pack, verify, json, allow_pickle=allow_pickle)
        else:
            _show_pack(target, pack, json)
    elif verify:
        raise OptionError(f"{target} is an adapter: --verify measures the adapters of a pack beside their originals.")
    else:
        with console.working():
            # whatever its folder is called: only a pack needs a name for it
            name = hub.name_of(target)
            adapter = read_adapter(
                target,
                name=name if keys.is_valid_name(name) else "adapter",
                allow_pickle=allow_pickle,
                revision=revision,
            )
        _show_adapter(target, adapter, json)


def _show_verified(target: str, pack: "Pack", originals: list[str], json: bool, **options: Any) -> None:
    """Every adapter's error as it is; status 4 if one loses more than it should."""
    from ..errors import LossError
    from ..fitting.verify import verify

    with console.working() as progress:
        found = verify(pack, originals, progress=progress, **options)
    if json:
        adapters = {name: {**asdict(one), "holds": one.holds} for name, one in found.adapters.items()}
        console.print_json(
            {
                "pack": target,
                "holds": found.holds,
                "complete": not found.unknown,
                "adapters": adapters,
                "unknown": found.unknown,
            }
        )
    else:
        rows = [
            (
                name,
                f"{one.delta_error:.6f}",
                f"{one.recorded:.6f}",
                "" if one.bound is None else f"{one.bound:g}",
                "yes" if one.holds else "no",
            )
            for name, one in found.adapters.items()
        ]
        header = ("adapter", "delta error", "as recorded", "asked for", "holds")
        console.print_table(f"pack {target}", header, rows, numbers=(1, 2, 3))
    if found.unknown:
        console.note(f"no original was given of {', '.join(found.unknown)}.")
    broken = [name for name, one in found.adapters.items() if not one.holds]
    if broken:
        raise LossError(f"more is lost than the pack says, or than was asked for, of {', '.join(broken)}.")


def _show_pack(target: str, pack: "Pack", json: bool) -> None:
    from ..pack.summary import kept_exactly

    if (dominated := kept_exactly(pack.summary.bytes)) is not None:
        console.note(dominated)
    if json:
        console.print_json({"pack": target, **console.figures_json(pack.summary, pack.records)})
        return
    console.print_rows(f"pack {target}", console.summary_rows(pack.summary))
    records = pack.records
    # what says the same of every adapter leaves room for what does not, at 80 columns
    varied = len({record.modules for record in records.values()}) > 1
    carries = any(record.carried_bytes for record in records.values())
    columns = {
        "adapter": list(records),
        "rank": [", ".join(map(str, record.ranks)) for record in records.values()],
        **({"modules": [str(record.modules) for record in records.values()]} if varied else {}),
        "delta error": [
            "untrained" if record.untrained else "≤ " * record.bound + console.share(record.delta_error)
            for record in records.values()
        ],
        "rounding": [console.share(record.rounding_error) for record in records.values()],
        "bytes": [f"{record.coefficient_bytes:,}" for record in records.values()],
        **({"carried": [f"{record.carried_bytes:,}" for record in records.values()]} if carries else {}),
        "in fit": ["yes" if record.in_fit else "no" for record in records.values()],
    }
    numbers = [index for index, name in enumerate(columns) if name not in ("adapter", "rank", "in fit")]
    console.print_table("", list(columns), list(zip(*columns.values(), strict=True)), numbers=numbers)


def _show_adapter(target: str, adapter: "Adapter", json: bool) -> None:
    figures = _figures(adapter)
    if json:
        console.print_json({"adapter": target, **figures})
        return
    console.print_rows(
        f"adapter {target}",
        [
            ("base model", figures["base_model"] or "not stated"),
            ("format", figures["format"]),
            *[("made for", figures["family"])] * bool(figures["family"]),
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


def _figures(adapter: "Adapter") -> dict[str, Any]:
    from ..core.dtypes import name as dtype_name
    from ..formats import checks, format_of

    scan = checks.scan(adapter)
    specs = adapter.specs.values()
    norm = sum(scan.delta_squares.values()) ** 0.5
    return {
        "base_model": adapter.base_model,
        "revision": adapter.revision,
        "format": format_of(adapter.origin),
        "family": checks.family(adapter),
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
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown or "none"
