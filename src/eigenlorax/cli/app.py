"""`eigenlorax app`: serve a web page that reports on adapters, and makes packs to download."""

from typing import Annotated

import typer

from ..app.settings import HOST, MAX_UPLOAD, PORT
from . import arguments, console, verbs

EXAMPLES = """
eigenlorax app
eigenlorax app --port 8080 --max-upload 200MB
"""


def register(command: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(command, app, EXAMPLES)


def app(
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="Host name or address to listen at. Where other machines reach it, folders of this machine cannot be "
            "named.",
        ),
    ] = HOST,
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Port to listen at.")] = PORT,
    max_upload: Annotated[
        str, typer.Option(metavar="B", help="Maximum size of a user's uploads together, unpacked, such as 200MB.")
    ] = f"{MAX_UPLOAD // 10**6}MB",
    json: arguments.Json = False,
) -> None:
    """Serve a web page: drop adapters, read their report, choose a point on the curve, download the pack."""
    from ..app.server import running, wait
    from ..core.options import parse_byte_count

    limit = parse_byte_count("--max-upload", max_upload)
    with console.explain_interrupt(lambda: "The page is closed."), running(host, port, limit) as url:
        if json:
            console.print_json({"url": url})
        else:
            console.say(f"The page is at {url} until Ctrl-C.")
        wait()
