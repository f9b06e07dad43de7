"""The file of a contest: what its trainings depend on, each of them as it came to an end, and what they came to."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import atomic_files, typed
from ..errors import FormatError, OptionError, PackExistsError
from ..pack import folder
from ..version import __version__
from .verdicts import Run

_OTHER = {
    "train": "other rows to train on",
    "evaluation": "other rows for evaluation",
    "subspace": "a pack of another subspace",
}
"""What is known by a hash, which nobody knows it by."""


def check(output: Path, resume: bool) -> None:
    """An error unless the file is there to be resumed, or is not there."""
    folder.check_outside(output)
    atomic_files.check_is_folder(output.parent)
    if output.is_dir():
        raise OptionError(f"{output} is a folder. The results are one file: name it, such as results.json.")
    if resume and not output.is_file():
        raise OptionError(f"{output} does not exist, so that there is nothing to resume.")
    if not resume and output.exists():
        raise PackExistsError(f"{output} exists. Choose another file, or go on with it: resume=True (--resume).")


def write(output: Path, asked: Mapping[str, Any], runs: Iterable[Run], result: Mapping[str, Any] | None) -> None:
    """Everything so far, a training a line, in the place of what was there."""
    parts = {
        "eigenlorax": json.dumps(__version__),
        "asked": json.dumps(asked, sort_keys=True),
        "trainings": "[\n" + ",\n".join(json.dumps(asdict(run), sort_keys=True) for run in runs) + "\n]",
        "result": json.dumps(result, indent=2, sort_keys=True),
    }
    text = "{\n" + ",\n".join(f'"{name}": {value}' for name, value in parts.items()) + "\n}\n"
    atomic_files.write_file(output, text.encode("utf-8", errors="surrogatepass"))


def read(output: Path, asked: Mapping[str, Any]) -> list[Run]:
    """The trainings of a file, if they are of this contest."""
    try:
        found = json.loads(output.read_bytes())
        before = typed.typed(dict, found["asked"], "asked")
        runs: list[Run] = typed.typed(list[Run], found["trainings"], "trainings")
    except (ValueError, KeyError, TypeError, typed.UnfitError) as error:
        raise FormatError(f"{output} is not what `eigenlorax compare` writes: {error}") from error
    differing = sorted(name for name in asked if before.get(name) != asked[name])
    if differing:
        name = differing[0]
        said = _OTHER.get(name) or f"another {name}: {before.get(name)!r} there, {asked[name]!r} now"
        raise OptionError(
            f"{output} was begun with {said}. resume=True (--resume) goes on with the same contest, of more methods, "
            "rates or seeds if you like; begin another one in another file."
        )
    return runs
