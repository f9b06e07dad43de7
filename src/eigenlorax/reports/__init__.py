"""The report: does this collection share a subspace, and what did recycling cost? Figures, words, page."""
