"""Facts of a report that both Markdown and the page print."""

from .. import numbers
from ..data import ReportData, Similarity


def title(report: ReportData) -> str:
    """Return the title of a report: the number of adapters, or of versions, and the base model."""
    about = report.collection
    counted = numbers.plural(about.adapters, "LoRA adapter")
    if not report.adapters:
        versions = sum(len(history.versions) for history in report.histories)
        counted = f"{numbers.plural(versions, 'version')} of {numbers.plural(len(report.histories), 'LoRA adapter')}"
    return f"{counted} of {about.base_model or 'an unnamed base model'}"


def size_range(report: ReportData) -> list[int]:
    """Return the smallest and the largest number of components per side, or one number if they are equal."""
    sizes = sorted({side.k for module in report.modules for side in (module.down, module.up)})
    return [sizes[0], sizes[-1]] if len(sizes) > 1 else sizes


def similarity_summary(similarity: Similarity | None) -> str:
    """Return the similarity figures of the whole collection as one phrase; "" if there are none."""
    if similarity is None:
        return ""
    phrases = []
    if similarity.mean_cosine is not None:
        phrases.append(f"mean cosine {numbers.cosine(similarity.mean_cosine)}")
    if similarity.silhouette is not None:
        phrases.append(f"silhouette of the clusters {numbers.cosine(similarity.silhouette)}")
    if similarity.chance_overlap is not None:
        phrases.append(f"overlap by chance {numbers.share(similarity.chance_overlap)}")
    return ", ".join(phrases)
