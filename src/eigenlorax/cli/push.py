"""`eigenlorax push`: upload a pack, or its basis and some adapters, to the Hub."""

from typing import Annotated

import typer

from . import arguments, console, verbs

EXAMPLES = """
eigenlorax push pack/ org/name
eigenlorax push pack/ org/spam --adapter sms-spam-a --private
eigenlorax push pack/ org/name --license apache-2.0
"""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, push, EXAMPLES)


def push(
    pack: arguments.PackFolder,
    repo: arguments.Repo,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Adapter or history to upload with the basis (default: all). Can be repeated."
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Make the repository private, if it is created. An existing public one is an error."
        ),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch to push to; created if it does not exist.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Licence that the model card states, such as apache-2.0 (default: that of all adapters, if they state "
            "the same one). Each push writes the card again.",
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Commit message.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of pushing to the branch.")
    ] = False,
    json: arguments.Json = False,
) -> None:
    """Upload a pack to the Hub in one commit. Adapters in the repository that the pack lacks are deleted there."""
    from ..pack import licenses
    from ..pack.pack import Pack

    opened = Pack.open(pack)
    names = sorted(set(adapter)) if adapter else [*opened.names, *opened.histories]
    adapters = [name for name in names if name in opened.names]
    histories = [name for name in names if name in opened.histories]
    adapter_licenses = {name: opened.licenses[name] for name in adapters}
    stated = license or licenses.common(adapter_licenses, histories)
    with console.working():
        commit = opened.push_to_hub(
            repo,
            adapters=names,
            private=private or None,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            license=license,
        )
    if json:
        console.print_json(
            {
                "pack": str(pack),
                "repo": repo,
                "adapters": adapters,
                **({"histories": histories} if histories else {}),
                "commit": commit.oid,
                "url": commit.commit_url,
                "pull_request": commit.pr_url,
                "license": stated,
            }
        )
    else:
        rows = [("adapters", str(len(adapters))), *[("histories", str(len(histories)))] * bool(histories)]
        rows += [("licence", stated or "not stated"), ("commit", commit.commit_url)]
        if commit.pr_url is not None:
            rows.append(("pull request", commit.pr_url))
        console.print_rows(f"pack {repo}", rows)
    differing = licenses.describe(adapter_licenses)
    if stated is None and differing is not None:
        console.note(
            f"the model card states no licence: those of the adapters differ or have no identifier ({differing}). "
            "State one with --license."
        )
