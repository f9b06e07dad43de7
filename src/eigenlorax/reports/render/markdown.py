"""Rendering of a report as GitHub Markdown: sentences and tables of the page, without figures."""

import re

from ..data import ReportData
from ..energies import energies
from ..frontier import at_equal_error, on_task
from ..size_advice import is_for_storage
from . import facts, tables, task_tables
from .environment import markdown_environment

MAX_ADAPTERS = 20
"""Maximum number of adapters in a table."""

_MARKS = {True: "✓", False: "!", None: "·"}


def render(report: ReportData) -> str:
    """Return the report as Markdown."""
    text = (
        markdown_environment()
        .get_template("report.md")
        .render(
            report=report,
            title=facts.title(report),
            about=report.collection,
            near=report.similarity,
            sizes=facts.size_range(report),
            similarity_summary=facts.similarity_summary(report.similarity),
            sampling=facts.sampling(report),
            marks=_MARKS,
            max_rows=MAX_ADAPTERS,
            tables=tables,
            task_tables=task_tables,
            energies=energies,
            is_for_storage=is_for_storage(report),
            at_equal_error=at_equal_error,
            on_task=on_task,
        )
    )
    # template blocks without output leave blank lines; printed values never contain any
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
