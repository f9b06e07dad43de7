"""Sentences on bytes and errors: of a pack for storage, and of what the codec or another k would give instead."""

from ..codec.storage.table import CODED
from .comparison_data import FrontierPoint, SizePoint
from .data import Finding, ReportData
from .frontier import coded_points, coded_within, estimated_size, is_rough, on_bound, option
from .numbers import error, plural, ratio, size

LARGE_ERROR = 0.5
"""Delta error above which an adapter is listed with a large error."""
SMALL_ERROR = 0.1
"""Delta error up to which a pack keeps its adapters well."""
_NO_ERROR = 1e-3
"""Delta error below which adapters are held completely."""
_OTHER_BOUND = 1.3
"""Smallest factor between the pack's error and another error bound that is mentioned."""


def is_coded(report: ReportData) -> bool:
    """Return whether the pack is coded at an error bound, with residuals beside the coefficients."""
    return report.collection.coefficient_dtype == CODED.name


def is_for_storage(report: ReportData) -> bool:
    """Return whether the pack was made for storage, so that its bytes and errors are its main figures."""
    return report.collection.purpose == "storage"


def worst_error(report: ReportData) -> float | None:
    """Return the largest delta error of the trained adapters; None if there are none."""
    return max((spread.worst for spread in (report.in_fit, report.projected) if spread is not None), default=None)


def pack_bytes(report: ReportData) -> int:
    """Return the bytes of the pack's tensors, without heads."""
    return report.bytes.basis + report.bytes.coefficients + report.bytes.carried


def storage_headline(report: ReportData) -> str:
    """Return one sentence with the bytes and the largest error of a pack for storage."""
    worst = worst_error(report)
    at_error = "" if worst is None else f", and no adapter has a delta error above {error(worst)}"
    count = report.collection.adapters
    subject = "This adapter takes" if count == 1 else f"These {plural(count, 'adapter')} take"
    return f"{subject} {size(pack_bytes(report))} in this pack, {_than_loras(report)}{at_error}."


def storage_finding(report: ReportData) -> Finding:
    """Return the main finding on a pack for storage, with other error bounds as advice."""
    gain, worst = report.bytes, worst_error(report)
    heads = f" Heads take {size(gain.heads)} more." if gain.heads else ""
    errors = ""
    if report.in_fit is not None and worst is not None:
        errors = f" The mean error of an adapter is {error(report.in_fit.mean)}, the largest {error(worst)}."
    bounds = [f"{option(point)} takes about {size(point.stored_bytes)}" for point in _other_bounds(report, worst)]
    caution = (
        " These estimates can be wrong by a factor of two: adapters differ from each other by about such an error."
    )
    if report.frontier is None or not is_rough(report.frontier, is_coded=is_coded(report)):
        caution = ""
    least = "".join(f" {text}" for text in on_bound(report.frontier)) if report.frontier is not None else ""
    return Finding(
        "bytes",
        f"The pack takes {size(pack_bytes(report))}, {_than_loras(report)}.{heads}{errors}{least}",
        f"With another error bound, {' and '.join(bounds)}.{caution}" if bounds else "",
        good=gain.ratio > 1 and (worst is None or worst <= LARGE_ERROR),
    )


def _than_loras(report: ReportData) -> str:
    gain = report.bytes.ratio
    difference = f"{ratio(gain)} smaller" if gain >= 1 else f"{ratio(1 / gain)} larger"
    return f"{difference} than the LoRAs" + (" in 16 bits" if is_coded(report) else "")


def _other_bounds(report: ReportData, worst: float | None) -> list[FrontierPoint]:
    """Return the codec's nearest points at a clearly smaller error than the pack's, and at a clearly larger one."""
    if worst is None:
        return []
    points = coded_points(report.frontier)
    smaller = [point for point in points if point.worst * _OTHER_BOUND <= worst]
    larger = [point for point in points if worst * _OTHER_BOUND <= point.worst <= LARGE_ERROR]
    return [*smaller[-1:], *larger[:1]]


def for_storage(report: ReportData, bound: float = SMALL_ERROR) -> str:
    """Return a sentence on a pack of the codec with this error bound; "" if the report has no estimate of it."""
    point = coded_within(report.frontier, bound)
    if point is None or report.frontier is None or not point.stored_bytes:
        return ""
    smaller = ratio(report.frontier.lora_float16 / point.stored_bytes)
    return (
        f"For storage, fit with {option(point)}: {estimated_size(report.frontier, point)}, {smaller} smaller than the "
        "LoRAs in 16 bits."
    )


def on_size(report: ReportData) -> str:
    """Return advice on bytes: to keep the pack, to fit with an error bound, or another number of components."""
    if is_coded(report):
        return "Keep the pack for its size: entropy coding needs no shared subspace."
    otherwise = for_storage(report) or "Keep them as ordinary LoRAs."
    if report.in_fit is not None and report.in_fit.mean <= SMALL_ERROR:
        point = coded_within(report.frontier, report.in_fit.worst)
        is_smallest = point is None or point.stored_bytes >= pack_bytes(report)
        return "Keep the pack for its size." if report.bytes.ratio > 1 and is_smallest else otherwise
    larger_k = next((point for point in larger_sizes(report) if point.mean <= SMALL_ERROR), None)
    if larger_k is None or larger_k.ratio <= 1:
        return otherwise
    return (
        f"{otherwise} With `n_components={larger_k.k}` (`-k {larger_k.k}`), the mean error is {error(larger_k.mean)}, "
        f"and the pack is {ratio(larger_k.ratio)} smaller than the LoRAs."
    )


def on_partial_sharing(report: ReportData) -> str:
    """Return advice on a coded pack whose adapters share a subspace in part; "" for other packs.

    Leaving adapters out, or another number of components, would take more bytes.
    """
    if not is_coded(report):
        return ""
    return (
        f"{on_size(report)} To train new tasks in the subspace that is shared, fit these adapters with "
        "`purpose='training'` (`--for training`) as well."
    )


def on_losses(report: ReportData) -> str:
    """Return advice on adapters of the fit with large errors."""
    coded = for_storage(report, LARGE_ERROR)
    if is_coded(report):
        smaller = f"`max_error={LARGE_ERROR}`, `--max-error {LARGE_ERROR}`"
        return coded or f"Fit with a smaller error bound ({smaller}) or more bytes."
    coded = coded or f"`max_error={LARGE_ERROR}` (`--max-error {LARGE_ERROR}`) finds the smallest pack with that error."
    point = next((point for point in report.sizes if point.worst <= LARGE_ERROR), None)
    if point is None:
        return coded
    smaller = f"{ratio(point.ratio)} smaller" if point.ratio > 1 else "no smaller"
    if point.worst < _NO_ERROR and point is report.sizes[-1]:
        width = max(side.dimension for module in report.modules for side in (module.down, module.up))
        whole = f"All {point.k:,} components{', the whole width,' if point.k >= width else ''} hold them up to rounding"
        return f"{whole}, in a pack {smaller} than the LoRAs. {coded}"
    return (
        f"`n_components={point.k}` (`-k {point.k}`) would bring every adapter of the fit to {error(point.worst)} or "
        f"less, in a pack {smaller} than the LoRAs. {coded}"
    )


def larger_sizes(report: ReportData) -> list[SizePoint]:
    """Return the measured sizes with more components than any side of the pack."""
    largest = max((side.k for module in report.modules for side in (module.down, module.up)), default=0)
    return [point for point in report.sizes if point.k > largest]
