"""The computations behind the page: report, sizes of packs to choose from, and the chosen pack as a file."""

import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.progress import Progress
from ..errors import EigenloraxWarning
from ..fitting.fit import fit
from ..pack.pack import Pack
from ..reports import Report
from ..reports import report as make_report
from ..reports.frontier import CODEC, ERRORS
from ..reports.numbers import bound, error, plural, ratio, size

FIRST_ERROR = 0.1
"""Error bound of the pack that is reported on, which is the default of `fit`."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One pack to choose.

    Attributes:
        max_error: Error bound of its adapters.
        stored_bytes: Estimate of its bytes, without heads.
        ratio: Bytes of the LoRAs in 16 bits ÷ `stored_bytes`.
    """

    max_error: float
    stored_bytes: int
    ratio: float

    def __str__(self) -> str:
        return f"error at most {bound(self.max_error)}: about {size(self.stored_bytes)}, {ratio(self.ratio)} smaller"


@dataclass(frozen=True, slots=True)
class Collection:
    """Adapters of one user of the page.

    Attributes:
        sources: The adapters, in any form that `fit` takes.
        options: Further arguments of `fit`.
        reading: Options of `read_adapter`.
    """

    sources: Sequence[str | Path]
    options: dict[str, Any]
    reading: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Report on a collection, and what can be chosen from it.

    Attributes:
        collection: The adapters.
        report: The report of their pack at `FIRST_ERROR`.
        points: Packs to choose from, by ascending error.
        notes: Sentences on what was skipped or read with a warning.
    """

    collection: Collection
    report: Report
    points: list[CurvePoint]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class WrittenPack:
    """A pack as a zip file.

    Attributes:
        path: The zip file.
        text: Its bytes and errors, in sentences.
    """

    path: Path
    text: str


def analyse(collection: Collection, progress: Progress) -> Analysis:
    """Fit a pack to the adapters at `FIRST_ERROR`, and report on it.

    Args:
        collection: The adapters.
        progress: Callback with the arguments (stage, done, total).

    Raises:
        EigenloraxError: As `fit` and `report`.
    """
    with _collected_notes() as notes:
        pack = fit(
            collection.sources, max_error=FIRST_ERROR, progress=progress, **collection.options, **collection.reading
        )
        report = make_report(pack, collection.sources, progress=progress, **collection.reading)
    return Analysis(collection, report, curve(report), list(dict.fromkeys([*notes, *pack.notes])))


def curve(report: Report) -> list[CurvePoint]:
    """Return the points of the codec's curve in a report, by ascending error."""
    measured = report.frontier
    # a fit has a trained adapter, so that there is something to store
    assert measured is not None
    # bytes near the pack's own error are not estimated: those of the pack are known
    exact = {FIRST_ERROR: measured.points[0].stored_bytes}
    estimated = {p.worst: p.stored_bytes for p in measured.points if p.way == CODEC and p.worst in ERRORS}
    points = [
        CurvePoint(max_error, stored_bytes, measured.lora_float16 / stored_bytes)
        for max_error, stored_bytes in {**estimated, **exact}.items()
    ]
    return sorted(points, key=lambda point: point.max_error)


def write_pack(collection: Collection, max_error: float, folder: Path, progress: Progress) -> WrittenPack:
    """Fit a pack at an error bound, and write it as a zip file.

    Args:
        collection: The adapters.
        max_error: Error bound of every adapter, above 0 and below 1.
        folder: Existing folder to write into. An earlier pack in it is replaced.
        progress: Callback with the arguments (stage, done, total).

    Raises:
        EigenloraxError: As `fit`.
    """
    with _collected_notes():
        pack = fit(
            collection.sources, max_error=max_error, progress=progress, **collection.options, **collection.reading
        )
    saved = pack.save(folder / "pack", overwrite=True)
    path = folder / f"pack-{bound(max_error)}.zip"
    files = [file for file in sorted(saved.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    # coded bytes do not get smaller by compressing them again
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for done, file in enumerate(files):
            progress("writing the zip file", done, len(files))
            archive.write(file, Path("pack", file.relative_to(saved)))
    shutil.rmtree(saved)
    return WrittenPack(path, _description(pack))


def _description(pack: Pack) -> str:
    """Return sentences on the bytes and errors of a pack."""
    stored, worst = pack.summary.bytes, max(record.delta_error for record in pack.records.values())
    heads = f" Heads take {size(stored.heads)} more." if stored.heads else ""
    return (
        f"The pack of {plural(len(pack), 'adapter')} takes {size(stored.pack)}, {ratio(stored.ratio)} smaller than the "
        f"LoRAs in 16 bits.{heads} The largest error of an adapter, measured on what is stored, is {error(worst)}."
    )


@contextmanager
def _collected_notes() -> Iterator[list[str]]:
    """Collect the warnings of this package in a list, in place of showing them."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", EigenloraxWarning)
        yield notes
    notes.extend(str(each.message) for each in caught)
