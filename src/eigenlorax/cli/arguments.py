"""Arguments and options that several verbs share: their types, names and help texts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..errors import OptionError
from ..formats import hub_client, urls
from ..train.options import MAX_LENGTH
from . import verbs

T = TypeVar("T", str, Path)


def path(text: str) -> Path:
    """Parse a local path.

    An empty text is a usage error, because `Path("")` is the current folder, and an unset shell variable is not meant
    as that. So is a URL.
    """
    if not text.strip():
        raise typer.BadParameter("it is empty. Is a variable of the shell not set?")
    if urls.is_url(text):
        raise typer.BadParameter(f"{text} is a URL. Only adapters are read from URLs; pass a path on this machine.")
    return Path(text)


def text(argument: str) -> str:
    """Parse a local path or a repository id, which must not be empty or a URL."""
    path(argument)
    return argument


def check_pack(source: T) -> T:
    """Read the manifest of a pack on this machine, so that an error is printed before the verb loads torch.

    A callback and not a part of the parser, whose errors typer would print as errors of the command line.
    """
    from ..pack import hub

    hub.check_pack(source)
    return source


def check_adapters(sources: Iterable[str]) -> None:
    """Raise `FormatError` for the first adapter that does not exist, before the verb loads torch.

    Texts of other kinds (NAME=PATH, nothing but blanks) are left to the verb.

    Args:
        sources: Adapters as they are passed to `fit`: paths, URLs, Hub ids, or NAME=PATH.
    """
    for source in sources:
        if source.strip() and "=" not in source:
            hub_client.check_exists(source)


def number_or_auto(argument: str) -> int | str:
    """Parse the value of --n-components: an integer or "auto"."""
    if argument == "auto":
        return argument
    try:
        return int(argument)
    except ValueError as error:
        raise typer.BadParameter(f"{argument!r} is neither an integer nor 'auto'.") from error


Basis = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="Add to an entropy-coded pack a basis of at most K components per module and side, for training and for "
        "serving from one basis.",
        rich_help_panel=verbs.KEEP,
    ),
]
PackFolder = Annotated[
    Path, typer.Argument(metavar="PACK", help="Folder of the pack.", parser=path, callback=check_pack)
]
PackSource = Annotated[
    str,
    typer.Argument(metavar="PACK", help="Folder of the pack, or its id on the Hub.", parser=text, callback=check_pack),
]
PackRevision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a pack on the Hub.", rich_help_panel=verbs.READING),
]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: ORG/NAME.", parser=text)]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON to stdout.")]
SameBase = Annotated[
    bool,
    typer.Option(
        "--same-base",
        help="Accept adapters that name different base models, and treat the names as one model.",
        rich_help_panel=verbs.READING,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read adapter_model.bin if there is no safetensors file (weights_only=True).",
        rich_help_panel=verbs.READING,
    ),
]
BaseConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="For GGUF files of Llama, Mistral and others: folder with the base model's config.json.",
        parser=path,
        rich_help_panel=verbs.READING,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of adapters on the Hub.", rich_help_panel=verbs.READING),
]
WarnAbove = Annotated[
    float,
    typer.Option(
        metavar="ERROR",
        help="Show a note for adapters with a larger delta error. 1 disables the note.",
        rich_help_panel=verbs.OUTPUT,
    ),
]

Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Device of the fit, such as cpu, cuda or cuda:1.", rich_help_panel=verbs.EXECUTION
    ),
]

Model = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Base model: a folder, or an id on the Hub (default: the one the pack names)."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Maximum number of tokens per row; longer rows are truncated (default: "
        + ", ".join(f"{tokens} for {task}" for task, tokens in MAX_LENGTH.items())
        + ").",
        rich_help_panel=verbs.ROWS,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Metric of a classification that decides: f1_macro, a name of scikit-learn such as matthews_corrcoef, or "
        "evaluate:NAME (default: accuracy).",
        rich_help_panel=verbs.ROWS,
    ),
]
TextColumn = Annotated[str, typer.Option(metavar="NAME", help="Column with the text.", rich_help_panel=verbs.ROWS)]
LabelColumn = Annotated[str, typer.Option(metavar="NAME", help="Column with the label.", rich_help_panel=verbs.ROWS)]
PairColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column with the second text, for tasks on pairs of texts.",
        rich_help_panel=verbs.ROWS,
    ),
]

HeadError = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Error bound of task heads in an entropy-coded pack (default: that of the updates, from 0.1 to 0.3). "
        "Biases, norms, embeddings and other tensors outside the subspace are kept within 0.002, or X if it is "
        "smaller.",
        rich_help_panel=verbs.KEEP,
    ),
]
ExactHeads = Annotated[
    bool,
    typer.Option(
        "--exact-heads",
        help="Store heads and all other tensors outside the subspace exactly.",
        rich_help_panel=verbs.KEEP,
    ),
]


def head_error(bound: float | None, *, exact: bool) -> float | None:
    """Return the option of `fit` for --head-error and --exact-heads."""
    if exact and bound is not None:
        raise OptionError(f"--exact-heads stores heads exactly, and --head-error {bound:g} does not: pass one of them.")
    return 0.0 if exact else bound
