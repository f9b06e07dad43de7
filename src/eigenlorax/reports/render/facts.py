"""Facts of a report that both Markdown and the page print."""

from .. import numbers
from ..data import ReportData, Similarity


def title(report: ReportData) -> str:
    """Return the title of a report: the number of adapters, or of versions, and the base model."""
    about = report.collection
    counted = numbers.plural(about.adapters, "LoRA adapter")
    if not report.adapters:
        versions = sum(len(history.versions) for history in report.histories)
        if all(history.is_population for history in report.histories):
            members = numbers.plural(versions - len(report.histories), "LoRA adapter")
            return f"{members} and their common one, of {about.base_model or 'an unnamed base model'}"
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
        error = similarity.mean_cosine_error
        interval = f" ± {numbers.error(error)}" if error else ""
        phrases.append(f"mean cosine {numbers.cosine(similarity.mean_cosine)}{interval}")
    if similarity.silhouette is not None:
        phrases.append(f"silhouette of the clusters {numbers.cosine(similarity.silhouette)}")
    if similarity.chance_overlap is not None:
        phrases.append(f"overlap by chance {numbers.share(similarity.chance_overlap)}")
    return ", ".join(phrases)


_COLUMNS = {
    "left_out_error": "left out",
    "mean_scaled_error": "mean ×",
    "random_error": "random",
    "truncated_error": "truncated",
    "int8_error": "int8",
    "int4_error": "int4",
}
"""Heading in the table of adapters, by field of `AdapterFigures` that is measured on a sample of modules."""


def sampling(report: ReportData) -> str:
    """Return a sentence on the standard errors of the figures of one adapter; "" if all modules were measured."""
    if report.sampling is None:
        return ""
    errors = report.sampling.standard_errors
    listed = [f"{label} ± {numbers.error(errors[field])}" for field, label in _COLUMNS.items() if errors.get(field)]
    sample = f"{report.sampling.modules:,} of {numbers.plural(report.sampling.of, 'module')}"
    errors_of_one = f" Standard errors of one adapter's figures, on average: {', '.join(listed)}." if listed else ""
    return f"Figures that need the originals are measured on {sample}, drawn at random by kind.{errors_of_one}"
