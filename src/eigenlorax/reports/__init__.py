"""The report: does this collection share a subspace, and what did recycling cost? Figures, words, page."""

from .build import report, with_evaluations
from .files import Report, read, write
from .task_data import Evaluation

__all__ = ["Evaluation", "Report", "read", "report", "with_evaluations", "write"]
