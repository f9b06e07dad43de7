"""`eigenlorax find`: find adapters of a pack by words, by the similarity of updates, or by rows."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..search.match import TOP
from ..train.options import EVALUATION_BATCH, TASKS, Columns
from . import arguments, console, verbs

if TYPE_CHECKING:
    from ..pack.folder import PackFolder
    from ..search.match import Match

EXAMPLES = r"""
eigenlorax find pack/ "classify spam messages"
eigenlorax find pack/ --like sms-spam-a
eigenlorax find pack/ --like demo/adapters/sms-spam-b --top 3
eigenlorax find pack/ --rows demo/spam.csv --labels ham,spam \
    --model demo/model --task text-classification
"""
_SHOWN_SKIPPED = 5
"""Maximum number of skipped adapters whose reasons are printed."""
_BY_WORDS, _BY_SIMILARITY, _BY_LOSS = "By words", "By similarity", "By loss"
_SCORES = {"words": "score", "similarity": "cosine", "loss": "loss", "centroids": "cosine"}
"""Heading of the scores of each search."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    verbs.register(app, find, EXAMPLES)


def find(
    pack: arguments.PackSource,
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="Words to look for in names, configs and model cards."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER",
            help="Find adapters whose updates are most similar to that of an adapter: a name in the pack, or a folder, "
            "file or Hub id.",
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Find adapters with the smallest loss on rows, or with --router those of the closest texts: .jsonl, "
            ".csv, or a folder saved by datasets.",
            parser=arguments.path,
        ),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Router with centroids of the adapters' texts (`Router.save`): rows are compared with these, and no "
            "adapter is evaluated.",
            parser=arguments.path,
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", help="Maximum number of results.")] = TOP,
    cards: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with model cards, NAME/README.md or NAME.md, which a pack does not keep.",
            parser=arguments.path,
            rich_help_panel=_BY_WORDS,
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of adapters whose similarity is computed exactly; sketches choose them (default: 32, or TOP "
            "if that is more).",
            rich_help_panel=_BY_SIMILARITY,
        ),
    ] = None,
    same_base: arguments.SameBase = False,
    allow_pickle: arguments.AllowPickle = False,
    model: arguments.Model = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help=f"Task: {' or '.join(TASKS)} (default: the adapters' task type).",
            rich_help_panel=_BY_LOSS,
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…|OUT",
            help="Class names in the order of the heads, or the OUT folder of `train`. Needed if labels are texts.",
            rich_help_panel=_BY_LOSS,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Rows per batch.", rich_help_panel=verbs.ROWS)
    ] = EVALUATION_BATCH,
    max_length: arguments.MaxLength = None,
    text_column: arguments.TextColumn = "text",
    label_column: arguments.LabelColumn = "label",
    pair_column: arguments.PairColumn = None,
    revision: arguments.PackRevision = None,
    json: arguments.Json = False,
) -> None:
    """Find adapters of a pack by words, by the similarity of their updates, or by rows."""
    if sum(query is not None for query in (text, like, rows)) != 1:
        raise OptionError("pass one of TEXT, --like ADAPTER and --rows FILE: what the adapters are compared with.")
    _check_unused(text is not None, {"--cards": cards})
    similarity_options = {
        "--candidates": candidates,
        "--same-base": same_base or None,
        "--allow-pickle": allow_pickle or None,
    }
    _check_unused(like is not None, similarity_options)
    if like is not None and not like.strip():
        raise OptionError("--like is empty. Pass the name of an adapter of the pack, a folder, a file or a Hub id.")
    columns = Columns(text_column, label_column, pair_column)
    row_options = {
        "--model": model,
        "--router": router,
        "--text-column": None if text_column == "text" else text_column,
    }
    loss_options = {
        "--task": task,
        "--labels": labels,
        "--max-length": max_length,
        "--batch-size": None if batch_size == EVALUATION_BATCH else batch_size,
        "--label-column": None if label_column == "label" else label_column,
        "--pair-column": pair_column,
    }
    _check_unused(rows is not None, row_options)
    _check_unused(rows is not None and router is None, loss_options)
    opened = _open(pack, revision)
    skipped: dict[str, str] = {}
    if text is not None:
        by, query, matches = "words", text, _by_words(opened, text, cards, top)
    elif like is not None:
        reading = {"same_base": same_base, "allow_pickle": allow_pickle}
        by, query, matches = "similarity", like, _by_similarity(opened, like, top, candidates, reading)
    elif router is not None:
        assert rows is not None
        options: dict[str, Any] = {"model": model, "columns": columns, "top": top}
        by, query, matches = "centroids", str(rows), _by_centroids(opened, rows, router, options)
    else:
        assert rows is not None
        options = {"model": model, "columns": columns, "top": top, "task": task, "labels": labels}
        options |= {"batch_size": batch_size, "max_length": max_length}
        by, query = "loss", str(rows)
        matches, skipped = _by_loss(opened, rows, options)
    if json:
        fields = [asdict(match) for match in matches]
        console.print_json({"pack": pack, "by": by, "query": query, "matches": fields, "skipped": skipped})
    else:
        _print(pack, by, matches, skipped)
    if by != "words" and opened.manifest.histories:
        console.note(f"versions of histories are not searched by {by}: {len(opened.manifest.histories)} in the pack.")


def _check_unused(is_used: bool, options: dict[str, Any]) -> None:
    """Raise `OptionError` for an option of another search than the one that was chosen."""
    passed = [option for option, value in options.items() if value is not None]
    if passed and not is_used:
        raise OptionError(f"{passed[0]} has no effect on this search. Remove it.")


def _open(pack: str, revision: str | None) -> "PackFolder":
    from ..pack import hub

    return hub.open_folder(pack, revision=revision)


def _by_words(opened: "PackFolder", text: str, cards: Path | None, top: int) -> "list[Match]":
    from ..search import cache

    with console.working("The search"):
        return cache.text_index(opened, cards=cards).find(text, top)


def _by_similarity(
    opened: "PackFolder", like: str, top: int, candidates: int | None, options: dict[str, bool]
) -> "list[Match]":
    from ..pack.pack import Pack
    from ..search import cache, similarity_index

    number = similarity_index.CANDIDATES if candidates is None else candidates
    with console.working("The search") as progress:
        index = cache.similarity_index(Pack.from_folder(opened), opened, progress)
        return index.find(like, top, candidates=number, **options)


def _by_loss(opened: "PackFolder", rows: Path, options: dict[str, Any]) -> "tuple[list[Match], dict[str, str]]":
    from ..pack.pack import Pack
    from ..train import row_search
    from .evaluate import class_names

    if options["labels"] is not None:
        options["labels"] = class_names(options["labels"])
    with console.working() as progress:
        search = row_search.rank_by_loss(Pack.from_folder(opened), rows, progress=progress, **options)
    return search.matches, search.skipped


def _by_centroids(opened: "PackFolder", rows: Path, router: Path, options: dict[str, Any]) -> "list[Match]":
    from ..pack.pack import Pack
    from ..train import centroid_search

    with console.working("The search"):
        return centroid_search.rank_by_centroids(Pack.from_folder(opened), rows, router, **options)


def _print(pack: str, by: str, matches: "list[Match]", skipped: dict[str, str]) -> None:
    if not matches:
        console.note("no adapter has one of these words. Only names, configs and metadata are in a pack; see --cards.")
        return
    header = ("adapter", _SCORES[by], "reason")
    body = [(match.name, f"{match.score:.4f}", match.reason) for match in matches]
    console.print_table(f"{pack} by {by}", header, body, numbers=(1,))
    for name, why in list(skipped.items())[:_SHOWN_SKIPPED]:
        console.note(f"{name} was skipped: {why}")
    if len(skipped) > _SHOWN_SKIPPED:
        console.note(f"{len(skipped) - _SHOWN_SKIPPED} more adapters were skipped; --json has the reasons.")
