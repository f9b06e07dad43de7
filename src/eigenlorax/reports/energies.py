"""A paragraph on the spectra: energy in the first k components, compared with the null model and the verdict."""

import math

from . import numbers
from .chance import is_above
from .comparison_data import SideEnergy
from .data import SHARING_KINDS, ReportData

_WORDS = {"down": "the down side", "up": "the up side"}
_NEARLY_ALL = 0.99
"""Energy of the null model from which on k components keep nearly everything by chance."""


def energies(report: ReportData) -> str:
    """Return sentences on the energy in the first k components, and whether it exceeds chance; "" if not measured.

    A spectrum describes one side. An update is kept only if both of its sides are in the span of the components, which
    the verdict measures on adapters that were left out.
    """
    if report.null is None:
        return ""
    sides = {"down": report.null.down, "up": report.null.up}
    above_chance = [name for name, side in sides.items() if is_above(side.energy, side.null, side.spread)]
    text = f"The first k components keep {_energy(sides['down'], 'down')} and {_energy(sides['up'], 'up')}."
    if not above_chance:
        if all(side.null >= _NEARLY_ALL for side in sides.values()):
            return f"{text} So many components keep nearly everything, whether the adapters share anything or not."
        if _kind(report) in ("shared", "partly-shared"):
            return f"{text} That is no more than chance: that they share a subspace shows only in adapters left out."
        return f"{text} That is no more than chance: the spectra show nothing that the adapters share."
    where = "on both sides" if len(above_chance) == 2 else f"on {_WORDS[above_chance[0]]} alone"
    return f"{text} The energy above chance is shared, {where}. {_caveats(report, above_chance)}".rstrip()


def _kind(report: ReportData) -> str:
    """Return the kind of the finding that answers the main question."""
    return next((finding.kind for finding in report.verdict.findings if finding.kind in SHARING_KINDS), "unknown")


def _energy(side: SideEnergy, name: str) -> str:
    null = numbers.share(side.null)
    if side.standard_error is not None:
        null += f" ± {numbers.error(math.hypot(side.spread, side.standard_error))}"
    return f"{numbers.share(side.energy)} of the energy of {_WORDS[name]} (with random singular vectors: {null})"


def _caveats(report: ReportData, above_chance: list[str]) -> str:
    """Return sentences on what energy above chance on these sides means for an adapter that is not in the fit."""
    sentences = []
    if "down" in above_chance and report.starts is not None and report.starts.groups:
        sentences.append("On the down side, a common random start alone causes that.")
    out = report.left_out
    if out is None:
        return " ".join(sentences)
    kind = _kind(report)
    if kind == "unknown":
        sentences.append("Whether a new adapter profits from it cannot be decided at this k.")
        return " ".join(sentences)
    kept = (
        f"{numbers.share_estimate(out.kept, out.kept_standard_error)} of its squared norm beyond chance"
        if is_above(out.kept, 0.0, out.kept_spread)
        else "no more of it than random components would"
    )
    too_little = ", which is too little for a subspace" if kind == "not-shared" else ""
    sentences.append(
        "An update is kept only if both of its sides are in the span of the components: of an adapter that is left out "
        f"of the fit, the components keep {kept}{too_little}."
    )
    return " ".join(sentences)
