"""Figures of the page: each function takes a report and returns an `<svg>`, drawn by matplotlib, coloured by CSS."""
