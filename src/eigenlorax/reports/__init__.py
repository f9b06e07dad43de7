"""Reports on a collection of adapters: measurements, verdict, rendering."""

from .build import report, with_evaluations
from .files import Report, read, write
from .task_data import Evaluation

__all__ = ["Evaluation", "Report", "read", "report", "with_evaluations", "write"]
