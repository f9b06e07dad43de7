"""Rendering of a report as one HTML document without external resources: verdict, key figures, sections."""

import base64
import hashlib
import re
import statistics
from collections.abc import Iterator
from importlib import resources
from typing import Any

from .. import numbers
from ..data import ReportData
from ..energies import energies
from ..frontier import at_equal_error, on_task
from ..size_advice import is_for_storage, pack_bytes, worst_error
from . import bars, facts, tables, task_tables
from .environment import html_environment
from .figures import curves, error_plots, histories, maps, module_labels, svg

SECTIONS = {
    "histories": ("Histories", "Versions of one run"),
    "newcomers": ("New adapters", "Would a new adapter fit?"),
    "spectra": ("Spectra", "Energy in few components"),
    "modules": ("Modules", "Module by module"),
    "adapters": ("Adapters", "Adapter by adapter"),
    "similarity": ("Similarity", "Similarity of the adapters"),
    "baselines": ("Baselines", "Other methods"),
    "frontier": ("Bytes at an error", "Bytes at an error"),
    "bytes": ("Bytes", "Bytes"),
    "sizes": ("Other k", "With more or fewer components"),
    "task": ("On the task", "On the task"),
    "task-bytes": ("Bytes on the task", "Bytes and scores on the task"),
    "notes": ("Notes", "Notes on these figures"),
}
"""Text of the link and heading of each section, by name of its template, in the order of the page."""

POPULATION_HEADING = "Adapters as changes from a common one"
"""Heading of the section on histories if one of them is a population."""

HISTORY_SECTIONS = ("histories", "notes")
"""Sections of the report of a pack that has histories only."""

STORAGE_SECTIONS = ("frontier", "bytes", "adapters", "modules", "task", "task-bytes")
"""Sections that come first in the report of a pack for storage."""

PRINTED_ROWS = 50
"""Number of rows of the table of adapters that are printed on paper; the style sheet hides the others."""

MARKS = {True: ("good", "✓", "Good"), False: ("bad", "!", "Bad"), None: ("", "i", "Note")}
"""CSS class, mark, and word for screen readers of a finding, by `Finding.good`."""

_TALL = 24
"""Maximum number of rows of a table that is shown in full; a longer one scrolls."""
_FEW = 2
"""Maximum number of adapters for which no figure compares them."""


def render(report: ReportData) -> str:
    """Return the HTML document; `MissingExtraError` if matplotlib is not installed."""
    context = _context(report)
    first = ("histories", *STORAGE_SECTIONS) if is_for_storage(report) else ()
    names = dict.fromkeys([*first, *SECTIONS]) if report.adapters else HISTORY_SECTIONS
    contents = {name: _compact(f"sections/{name}.html", **context) for name in names}
    about, script = report.collection, _asset("page.js")
    title = facts.title(report)
    body = _compact(
        "body.html",
        report=report,
        about=about,
        near=report.similarity,
        title=title,
        size_range=facts.size_range(report),
        is_for_storage=context["is_for_storage"],
        pack_bytes=pack_bytes(report),
        worst_error=worst_error(report),
        marks=MARKS,
        sections=[(name, *_headings(name, report), content) for name, content in contents.items() if content],
    )
    shell = html_environment().get_template("page.html")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return shell.render(title=title, body=body, style=_asset("page.css"), script=script, script_hash=digest)


def section(name: str, report: ReportData) -> str:
    """Return one section as HTML without its heading; "" if nothing was measured."""
    return _compact(f"sections/{name}.html", **_context(report))


def _headings(name: str, report: ReportData) -> tuple[str, str]:
    """Return the text of the link to a section, and its heading."""
    if name == "histories" and any(history.is_population for history in report.histories):
        return SECTIONS[name][0], POPULATION_HEADING
    return SECTIONS[name]


def _compact(template: str, **context: Any) -> str:
    """Render a template and remove line breaks between elements."""
    html = html_environment().get_template(template).render(**context)
    return re.sub(r">\s*\n\s*<", "><", html).strip()


def _context(report: ReportData) -> dict[str, Any]:
    """Return the variables of the templates: the report, tables, figures, and conditions."""
    modules = report.modules
    sides = [side for module in modules for side in (module.down, module.up)]
    known = [module for module in modules if module.delta_error is not None]
    worst = max(known, key=lambda module: module.delta_error or 0, default=None)
    return {
        "report": report,
        "about": report.collection,
        "near": report.similarity,
        "is_for_storage": is_for_storage(report),
        "bars": bars,
        "tables": tables,
        "task_tables": task_tables,
        "curves": curves,
        "error_plots": error_plots,
        "history_figures": histories,
        "maps": maps,
        "energies": energies(report),
        "at_equal_error": at_equal_error,
        "on_task": on_task,
        "similarity_summary": facts.similarity_summary(report.similarity),
        "sampling": facts.sampling(report),
        "has_angles": any(side.angles for side in sides),
        "halves_overlap": list(_halves_overlap(report)),
        "has_spectra": any(side.spectrum for side in sides),
        "has_null": any(side.null for side in sides),
        "merges_kinds": len(module_labels.grouped(modules, len(modules))) > curves.MAX_KINDS,
        "worst_module": worst,
        "has_star": worst is not None and (worst.delta_error or 0) >= error_plots.MIN_STARRED,
        "has_module_errors": any(value is not None for row in report.module_errors for value in row),
        "worst_first": _worst_first,
        "n_series": svg.SERIES,
        "few": _FEW,
        "tall_rows": _TALL,
        "printed_rows": PRINTED_ROWS,
    }


def _worst_first(count: int, noun: str) -> str:
    if count > bars.MAX_BARS:
        return f"The {bars.MAX_BARS} worst of {numbers.plural(count, noun)}."
    return "The worst first."


def _halves_overlap(report: ReportData) -> Iterator[tuple[str, float, float]]:
    """Yield (side, mean overlap of two halves of the collection, mean overlap of random subspaces)."""
    for name in curves.SIDES:
        known = [
            (side.halves_overlap, side.null_halves_overlap)
            for side in (getattr(module, name) for module in report.modules)
            if side.halves_overlap is not None and side.null_halves_overlap is not None
        ]
        if known:
            overlaps, unrelated = zip(*known, strict=True)
            yield name, statistics.fmean(overlaps), statistics.fmean(unrelated)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")
