"""The page as a program of gradio: components, and what happens when they are used."""

import html
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio

from ..core import keys
from ..core.printable import one_line
from ..core.progress import Progress
from ..errors import EigenloraxError, OptionError
from ..formats.sources import without_folders
from ..reports.numbers import size
from ..reports.render import page as report_page
from . import analysis, inputs, picture
from .analysis import Analysis, Collection
from .settings import Settings

_HOUR = 3600
_SHOWN = 30
"""Seconds for which an error is shown."""
_MAX_WAITING = 16
"""Maximum number of jobs that wait. One runs at a time."""
_JOB: dict[str, Any] = {"concurrency_id": "jobs", "concurrency_limit": 1, "api_visibility": "private"}

# a click on a point of the picture is a click on the choice of the same number
_CLICKS = """
element.addEventListener("click", (event) => {
  const point = event.target.closest("[data-point]");
  if (point) document.querySelectorAll("#sizes input[type=radio]")[Number(point.dataset.point)].click();
});
"""
STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True, slots=True)
class Session:
    """Work of one user.

    Attributes:
        folder: Folder of the user's files, removed with the session.
        analysis: Result of the analysis.
    """

    folder: Path
    analysis: Analysis


def build(settings: Settings) -> gradio.Blocks:
    """Return the page with these settings."""
    jobs = _Jobs(settings)
    with gradio.Blocks(title="eigenlorax", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as blocks:
        session = gradio.State(None, time_to_live=_HOUR, delete_callback=_remove)
        gradio.Markdown(_introduction(settings))
        collection = _collection_inputs(settings)
        start = gradio.Button("Analyse", variant="primary", elem_id="analyse")
        report = gradio.HTML(elem_id="report", min_height=90)
        notes = gradio.HTML(elem_id="notes")
        with gradio.Column(visible=False) as choice:
            report_file = gradio.DownloadButton("Download the report")
            gradio.Markdown("## Choose a pack\n\nThe smaller the pack, the larger the error of its adapters.")
            curve = gradio.HTML(js_on_load=_CLICKS)
            sizes = gradio.Radio([], label="Error and size, without heads", elem_id="sizes")
            make = gradio.Button("Make the pack", variant="primary", elem_id="make")
            summary = gradio.Markdown(elem_id="summary", min_height=60)
            pack_file = gradio.DownloadButton("Download the pack", visible=False, elem_id="pack")
        start.click(
            jobs.analyse,
            [*collection, session],
            [session, report, notes, report_file, curve, sizes, choice, summary, pack_file],
            show_progress_on=report,
            **_JOB,
        )
        sizes.change(
            jobs.draw, [sizes, session], [curve], show_progress="hidden", queue=False, api_visibility="private"
        )
        make.click(jobs.make, [sizes, session], [summary, pack_file], show_progress_on=summary, **_JOB)
    blocks.queue(max_size=_MAX_WAITING)
    return blocks


def _introduction(settings: Settings) -> str:
    return (
        "# eigenlorax\n\nDo LoRA adapters of one base model share a subspace, and how small do they get? Drop or name "
        f"them, read the answer, choose a point on the curve, and download the pack. Uploads may have "
        f"{size(settings.max_upload)} in all, unpacked."
    )


def _collection_inputs(settings: Settings) -> list[Any]:
    """Return the components by which adapters are passed, in the order of the arguments of `_Jobs.analyse`."""
    with gradio.Row():
        uploads = gradio.File(
            label="Zip files of adapter folders, or LoRA files",
            file_count="multiple",
            file_types=[".zip", keys.LORA_SUFFIX],
            height=170,
        )
        names = gradio.Textbox(
            label="Folders, or ids on the Hub, one per line" if settings.allows_paths else "Ids on the Hub",
            placeholder="demo/adapters\norg/name" if settings.allows_paths else "org/name\norg/name@revision",
            lines=5,
            elem_id="names",
        )
    same_base = gradio.Checkbox(label="The adapters have one base model, even if they state different names of it")
    return [uploads, names, same_base]


class _Jobs:
    """Functions of the page's events."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def analyse(
        self,
        uploads: Sequence[str] | None,
        names: str,
        same_base: bool,
        session: Session | None,
        progress: Any = gradio.Progress(),  # noqa: B008 gradio finds it by this default
    ) -> tuple[Any, ...]:
        """Return the values of all components below the button."""
        folder = Path(tempfile.mkdtemp(dir=self._settings.workspace))
        try:
            with _errors_as_sentences(self._settings):
                collection = self._collection(uploads or (), names, same_base, folder)
                done = analysis.analyse(collection, _reporter(progress))
                progress((0, 1), desc="drawing the report")
                text = report_page.render(done.report)
        except BaseException:
            shutil.rmtree(folder)
            raise
        _remove(session)
        report_file = folder / "report.html"
        report_file.write_text(text, "utf-8", errors="replace")
        chosen = min(done.points, key=lambda point: abs(point.max_error - analysis.FIRST_ERROR)).max_error
        return (
            Session(folder, done),
            _frame(text),
            _listing([_shown(note, self._settings) for note in done.notes]),
            str(report_file),
            picture.draw(done.points, chosen),
            gradio.Radio([(str(point), point.max_error) for point in done.points], value=chosen),
            gradio.Column(visible=True),
            "",
            gradio.DownloadButton(visible=False),
        )

    def draw(self, max_error: float | None, session: Session | None) -> str:
        """Return the curve with another chosen point."""
        return picture.draw(session.analysis.points, max_error or 0.0) if session is not None else ""

    def make(
        self,
        max_error: float | None,
        session: Session | None,
        progress: Any = gradio.Progress(),  # noqa: B008
    ) -> tuple[str, Any]:
        """Return a text on the pack, and the button that downloads it."""
        with _errors_as_sentences(self._settings):
            if session is None or max_error is None:
                raise OptionError("The adapters of this page were removed after an hour. Analyse them again.")
            written = analysis.write_pack(session.analysis.collection, max_error, session.folder, _reporter(progress))
        usage = "`eigenlorax inspect pack/` shows it, and `eigenlorax export pack/ -o loras/` writes LoRAs again."
        return f"{written.text} {usage}", gradio.DownloadButton(value=str(written.path), visible=True)

    def _collection(self, uploads: Sequence[str], names: str, same_base: bool, folder: Path) -> Collection:
        sources: list[str | Path] = [
            *inputs.unpack([Path(upload) for upload in uploads], folder, self._settings.max_upload),
            *inputs.parse_names(names, allows_paths=self._settings.allows_paths),
        ]
        if not sources:
            raise OptionError("No adapter was passed. Drop a zip file of adapter folders, or type an id on the Hub.")
        # the token of this machine is not for visitors
        reading = {} if self._settings.allows_paths else {"token": False}
        return Collection(sources, {"same_base": same_base}, reading)


def _reporter(progress: Any) -> Progress:
    """Return the callback of the library that shows progress on the page."""
    return lambda stage, done, total: progress((done, total) if total else None, desc=stage)


@contextmanager
def _errors_as_sentences(settings: Settings) -> Iterator[None]:
    """Show expected errors as one sentence."""
    try:
        yield
    except EigenloraxError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."
    else:
        return
    raise gradio.Error(_shown(message, settings), duration=_SHOWN, print_exception=False)


def _shown(message: str, settings: Settings) -> str:
    """Return a message as HTML, without the folders into which uploads are unpacked, and for visitors without others.

    gradio shows messages as HTML.
    """
    unpacked = re.escape(str(settings.workspace)) + r"[\\/][^\\/]+[\\/]\d+[\\/]"
    message = re.sub(unpacked, "", message)
    return html.escape(one_line(message if settings.allows_paths else without_folders(message, None)))


def _frame(document: str) -> str:
    """Return a frame with a document, which can run its script but not reach the page."""
    return f'<iframe title="Report" sandbox="allow-scripts" srcdoc="{html.escape(document)}"></iframe>'


def _listing(notes: Sequence[str]) -> str:
    """Return notes, which are HTML, as a list."""
    items = "".join(f"<li>{note}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def _remove(session: Session | None) -> None:
    """Remove the files of a session."""
    if session is not None:
        shutil.rmtree(session.folder, ignore_errors=True)
