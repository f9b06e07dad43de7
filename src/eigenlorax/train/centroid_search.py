"""Search by centroids: the adapters of a router whose texts resemble a file of rows most."""

from pathlib import Path

from ..pack.pack import Pack
from ..search.match import TOP, Match, check_top
from ..serving.routing import Router
from . import data, models
from .options import Columns


def rank_by_centroids(
    pack: Pack,
    rows: Path,
    router: Path,
    *,
    model: str | None = None,
    columns: Columns | None = None,
    top: int = TOP,
) -> list[Match]:
    """Embed a file of rows by the base model, and return the adapters with the closest centroids.

    Args:
        pack: The pack.
        rows: File of rows: JSON lines, CSV, or a folder saved by `datasets`.
        router: File of a router with centroids, whose texts were embedded by the base model.
        model: Base model. Default: the pack's.
        columns: Names of the columns; only the one of the texts is read. Default: `Columns()`.
        top: Maximum number of results, at least 1.

    Raises:
        OptionError: The router has no centroids, belongs to another pack, or texts were embedded by a function.
        FormatError: The rows, the router or the base model cannot be read.
        MissingExtraError: A package of the extra `train` is not installed.
    """
    top, columns = check_top(top), columns or Columns()
    texts = data.column_texts(data.read(rows, columns.label), columns.text, "text")
    models.check_installed()
    with models.quiet():
        base, revision = models.resolve_base_model(pack, model)
        tokenizer = models.load_tokenizer(base, revision)
        loaded = Router.load(router, pack, model=models.load_base_model(base, revision), tokenizer=tokenizer)
        return loaded.rank(texts, top=top)
