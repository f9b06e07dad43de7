"""`eigenlorax add`: project adapters on a pack's subspace, and add them to the pack."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import WARN_ABOVE
from . import arguments, console, verbs

if TYPE_CHECKING:
    from ..pack.manifest import SubspaceInfo

EXAMPLES = """
eigenlorax add pack/ demo/new/clinc-travel
eigenlorax add pack/ demo/new/banking77-c --extend 4
eigenlorax add pack/ mine=demo/new/acl-arc-b
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, add, EXAMPLES)


def add(
    pack: arguments.PackFolder,
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER", help="Adapter folders, LoRA files, a folder of adapters, URLs, Hub ids, or NAME=PATH."
        ),
    ],
    extend: Annotated[
        int | None,
        typer.Option(
            metavar="L",
            help="Append up to L components to each module and side: the components that reduce the error of the new "
            "adapters most.",
        ),
    ] = None,
    carry_missing: Annotated[
        bool,
        typer.Option(
            "--carry-missing", help="Store modules that the subspace lacks unchanged, instead of raising an error."
        ),
    ] = False,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual",
            help="Store what the bases do not represent of the adapters as well, so that only rounding is lost. "
            "It takes about as many bytes as the LoRA. For packs of floats.",
        ),
    ] = False,
    warn_above: arguments.WarnAbove = WARN_ABOVE,
    same_base: arguments.SameBase = False,
    allow_pickle: arguments.AllowPickle = False,
    base_config: arguments.BaseConfig = None,
    revision: arguments.Revision = None,
    json: arguments.Json = False,
) -> None:
    """Project adapters on a pack's subspace, add them to the pack, and show each adapter's delta error."""
    arguments.check_adapters(adapters)
    from ..pack.pack import Pack

    with console.working() as progress, Pack.edit(pack) as opened:
        before = opened.info
        records = opened.add_all(
            adapters,
            extend=extend,
            carry_missing=carry_missing,
            residual=residual,
            same_base=same_base,
            warn_above=warn_above,
            progress=progress,
            allow_pickle=allow_pickle,
            base_config=base_config,
            revision=revision,
        )
    extension = None if extend is None else _extension(before, opened.info)
    if json:
        added = {name: asdict(record) for name, record in records.items()}
        growth = {} if extension is None else {"extended": extension}
        console.print_json({"pack": str(pack), "added": added, **growth})
    else:
        rows = [
            (
                name,
                "untrained" if record.untrained else console.format_error(record.delta_error),
                f"{record.coefficient_bytes:,}",
                f"{record.carried_bytes:,}",
            )
            for name, record in records.items()
        ]
        header = ("added", "delta error", "coefficient bytes", "carried bytes")
        console.print_table("", header, rows, numbers=(1, 2, 3))
        if extension is not None:
            console.print_rows("", [("basis extended", _describe(extension))])


def _extension(before: "SubspaceInfo", after: "SubspaceInfo") -> dict[str, int]:
    """Return the JSON of an extension.

    Returns:
        `directions`: components appended to all sides together; `sides`: number of sides that grew; `most`: largest
        number of components appended to one side; `basis_bytes`: bytes added to the stored bases.
    """
    appended = [
        side.k - before.modules[module][name].k for module, pair in after.modules.items() for name, side in pair.items()
    ]
    return {
        "directions": sum(appended),
        "sides": sum(n > 0 for n in appended),
        "most": max(appended, default=0),
        "basis_bytes": after.stored_bytes - before.stored_bytes,
    }


def _describe(extension: dict[str, int]) -> str:
    if not extension["directions"]:
        return "by nothing: it represents the new adapters exactly"
    return (
        f"by {extension['directions']:,} components on {extension['sides']:,} sides, at most {extension['most']} on "
        f"one; {extension['basis_bytes']:,} bytes more"
    )
