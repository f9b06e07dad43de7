"""`eigenlorax demo`: placeholder."""

import typer


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
