"""The report: does this collection share a subspace, and what did recycling cost? Figures, words, page."""

from .build import report, with_evaluations
from .data import Evaluation
from .files import Report, read, write

__all__ = ["Evaluation", "Report", "read", "report", "with_evaluations", "write"]
