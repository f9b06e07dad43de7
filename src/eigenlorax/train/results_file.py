"""Results file of a comparison: the settings that its runs depend on, every finished run, and the summary."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import atomic_files, json_dataclasses
from ..errors import FormatError, OptionError, PackExistsError
from ..pack import writer
from ..version import __version__
from .comparison_summary import MethodRun

_HASHED_SETTINGS = {
    "train": "other training rows",
    "evaluation": "other test rows",
    "subspace": "a pack with another subspace",
}
"""Setting that is stored as a hash → description of a difference, for messages."""


def check_output(output: Path, resume: bool) -> None:
    """Check that the results file can be written or resumed.

    Args:
        output: Results file.
        resume: Continue an existing file.

    Raises:
        OptionError: `output` is a folder, or `resume` is True and there is no file.
        PackExistsError: The file exists, and `resume` is False.
    """
    writer.check_outside(output)
    atomic_files.check_is_folder(output.parent)
    if output.is_dir():
        raise OptionError(f"{output} is a folder. Name a file for the results, such as results.json.")
    if resume and not output.is_file():
        raise OptionError(f"{output} does not exist: there is nothing to resume. Remove resume=True (--resume).")
    if not resume and output.exists():
        raise PackExistsError(f"{output} exists. Choose another file, or continue it with resume=True (--resume).")


def write(
    output: Path, settings: Mapping[str, Any], runs: Iterable[MethodRun], summary: Mapping[str, Any] | None
) -> None:
    """Write the file, or replace it.

    Args:
        output: Results file.
        settings: Everything that the runs depend on, as JSON.
        runs: Finished runs. Each is one line of the file.
        summary: `ComparisonResult` as JSON; None until the comparison is complete.
    """
    fields = {
        "eigenlorax": json.dumps(__version__),
        "asked": json.dumps(settings, sort_keys=True),
        "trainings": "[\n" + ",\n".join(json.dumps(asdict(run), sort_keys=True) for run in runs) + "\n]",
        "result": json.dumps(summary, indent=2, sort_keys=True),
    }
    text = "{\n" + ",\n".join(f'"{name}": {encoded}' for name, encoded in fields.items()) + "\n}\n"
    atomic_files.write_file(output, text.encode("utf-8", errors="surrogatepass"))


def read_runs(output: Path, settings: Mapping[str, Any]) -> list[MethodRun]:
    """Read the runs of a file.

    Args:
        output: Results file.
        settings: Settings of the comparison that resumes it.

    Raises:
        FormatError: The file was not written by `eigenlorax compare`.
        OptionError: The file has other settings.
    """
    try:
        document = json.loads(output.read_bytes())
        stored = json_dataclasses.from_json(dict, document["asked"], "asked")
        runs: list[MethodRun] = json_dataclasses.from_json(list[MethodRun], document["trainings"], "trainings")
    except (ValueError, KeyError, TypeError, json_dataclasses.JsonTypeError) as error:
        raise FormatError(f"{output} is not a file of `eigenlorax compare`: {error}") from error
    differing = sorted(name for name in settings if stored.get(name) != settings[name])
    if differing:
        name = differing[0]
        difference = _HASHED_SETTINGS.get(name) or f"{name}={stored.get(name)!r}, and now it is {settings[name]!r}"
        raise OptionError(
            f"{output} was started with {difference}. resume=True (--resume) continues the same comparison; methods, "
            "rates and seeds may be added. Choose another file for another comparison."
        )
    return runs
