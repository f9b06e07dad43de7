"""Facts of a report in the form in which both Markdown and the page print them."""

from .. import numbers
from ..data import ReportData, Similarity


def size_range(report: ReportData) -> list[int]:
    """Return the smallest and the largest number of components per side; one number where they are equal."""
    sizes = sorted({side.k for module in report.modules for side in (module.down, module.up)})
    return [sizes[0], sizes[-1]] if len(sizes) > 1 else sizes


def similarity_summary(similarity: Similarity | None) -> str:
    """Return the measured figures of the whole collection as one phrase; "" if there are none."""
    if similarity is None:
        return ""
    parts = []
    if similarity.mean_cosine is not None:
        parts.append(f"mean cosine {numbers.cosine(similarity.mean_cosine)}")
    if similarity.silhouette is not None:
        parts.append(f"silhouette of the clusters {numbers.cosine(similarity.silhouette)}")
    if similarity.chance_overlap is not None:
        parts.append(f"overlap by chance {numbers.share(similarity.chance_overlap)}")
    return ", ".join(parts)
