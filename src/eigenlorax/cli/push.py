"""`eigenlorax push`: a pack, or its basis and some adapters, to a repository on the Hub."""

from typing import Annotated

import typer

from . import console

EPILOG = """Examples:

  eigenlorax push pack/ org/name

  eigenlorax push pack/ org/name --adapter sst2 --adapter mrpc --private"""


def register(app: typer.Typer) -> None:
    """Make the verb known to the command."""
    app.command(epilog=EPILOG)(push)


def push(
    pack: console.PackFolder,
    repo: console.Repo,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The only adapters to push with the basis; all by default. Repeatable."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request, rather than push.")] = False,
    json: console.Json = False,
) -> None:
    """Make a repository on the Hub hold this pack, in one commit. Adapters that the pack lacks are deleted there."""
    from ..pack.pack import Pack

    opened = Pack.open(pack)
    names = sorted(set(adapter)) if adapter else opened.names
    with console.working():
        made = opened.push_to_hub(
            repo,
            adapters=names,
            private=private or None,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
        )
    if json:
        console.print_json(
            {
                "pack": str(pack),
                "repo": repo,
                "adapters": names,
                "commit": made.oid,
                "url": made.commit_url,
                "pull_request": made.pr_url,
            }
        )
    else:
        rows = [("adapters", str(len(names))), ("commit", made.commit_url)]
        if made.pr_url is not None:
            rows.append(("pull request", made.pr_url))
        console.print_rows(f"pack {repo}", rows)
