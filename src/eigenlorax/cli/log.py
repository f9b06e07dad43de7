"""`eigenlorax log`: show the versions of histories."""

from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments, console, verbs, version_rows

if TYPE_CHECKING:
    from ..pack.version_log import LogEntry

EXAMPLES = """
eigenlorax log history/
eigenlorax log history/ run --metric loss --metric learning_rate
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, log, EXAMPLES)


def log(
    pack: arguments.PackSource,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of the history (default: all histories).")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Metric to show (default: at most two of those recorded). Can be repeated."),
    ] = None,
    revision: arguments.PackRevision = None,
    json: arguments.Json = False,
) -> None:
    """Show the versions of histories: metrics, distances to the previous and the latest version, bytes and errors."""
    from ..core import keys
    from ..core.options import suggestion
    from ..errors import OptionError
    from ..pack.pack import Pack

    if name is not None and (parts := keys.split_version(name)) is not None:
        raise OptionError(f"{name!r} is the name of a version. Pass that of its history, {parts[0]!r}.")
    opened = Pack.from_pretrained(pack, adapters=None if name is None else [name], revision=revision)
    names = [name] if name is not None else list(opened.histories)
    if not names:
        raise OptionError(f"{pack} has no histories. Append versions with `eigenlorax track RUN -o {pack}`.")
    with console.working("The log"):
        logs = {history: opened.log(history) for history in names}
    recorded = {key for entries in logs.values() for entry in entries for key in entry.record.metrics}
    for key in metric or ():
        if key not in recorded:
            listing = ", ".join(map(repr, sorted(recorded))) or "none"
            raise OptionError(
                f"--metric {key}: no version has this metric.{suggestion(key, recorded)} It has: {listing}."
            )
    if json:
        histories = {
            history: [{**version_rows.record_json(entry.record), "to_latest": entry.to_latest} for entry in entries]
            for history, entries in logs.items()
        }
        console.print_json({"pack": pack, "histories": histories})
        return
    for history, entries in logs.items():
        is_population = opened.histories[history].is_population
        _print_log(f"history {history} in {pack}", entries, metric or [], is_population=is_population)


def _print_log(title: str, entries: list["LogEntry"], metrics: list[str], *, is_population: bool) -> None:
    records = [entry.record for entry in entries]
    changes = [version_rows.distance(record.change) for record in records]
    # the members of a population are in the order of their names
    distances = (
        {"to common": changes}
        if is_population
        else {"to previous": changes, "to latest": [version_rows.distance(entry.to_latest) for entry in entries]}
    )
    columns = {
        "version": [record.version for record in records],
        **distances,
        "bytes": [f"{record.file_bytes:,}" for record in records],
        "delta error": [version_rows.error(record) for record in records],
        **version_rows.metric_columns(records, metrics),
    }
    console.print_table(title, list(columns), list(zip(*columns.values(), strict=True)), numbers=range(len(columns)))
    if not is_population:
        console.say("to previous, to latest: norm of the difference ÷ norm of the previous or the latest version.")
