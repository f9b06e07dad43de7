"""`eigenlorax remove`: remove adapters, histories and versions from a pack."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..core import keys
from . import arguments, console, verbs

if TYPE_CHECKING:
    from ..pack.pack import Pack

EXAMPLES = """
eigenlorax remove pack/ sms-spam-a clinc-home
eigenlorax remove history/ run@20
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, remove, EXAMPLES)


def remove(
    pack: arguments.PackFolder,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Adapters, histories, and versions such as run@500.")
    ],
    json: arguments.Json = False,
) -> None:
    """Remove adapters, histories and versions, with their files, from a pack. All others keep their exact numbers."""
    from ..pack.pack import Pack

    with Pack.edit(pack) as opened:
        removed = sorted({_own_name(opened, name) for name in names})
        opened.remove(*names)
    versions = {name: len(history) for name, history in opened.histories.items()}
    if json:
        histories = {"histories": versions} if versions else {}
        console.print_json({"pack": str(pack), "removed": removed, "left": opened.names, **histories})
    else:
        rows = [("removed", ", ".join(removed))]
        # a pack of histories alone has no adapters to count
        if opened.names or not versions:
            rows.append(("adapters left", str(len(opened.names))))
        rows += [(f"versions of {name} left", str(count)) for name, count in versions.items()]
        console.print_rows(f"pack {pack}", rows)


def _own_name(pack: "Pack", name: str) -> str:
    """Return the name of what is removed: for "run@latest", that of the version itself."""
    if not keys.is_version(name):
        return name
    history, record = pack.history_store.find(name)
    return history.full_name(record)
