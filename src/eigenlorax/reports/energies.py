"""A paragraph on the spectra: energy in the kept directions, compared with the null model and the verdict."""

from . import numbers
from .chance import is_above
from .comparison_data import SideEnergy
from .data import ReportData

_WORDS = {"down": "the down side", "up": "the up side"}
_NEARLY_ALL = 0.99
"""Energy of the null model from which on the kept directions hold nearly everything by chance."""


def energies(report: ReportData) -> str:
    """Say how much energy the kept directions hold, and whether that is more than chance; "" if it was not measured.

    A spectrum concerns one side. An update is kept only as far as both sides are, in directions of other adapters,
    which is what the verdict measures on adapters that were left out.
    """
    if report.null is None:
        return ""
    sides = {"down": report.null.down, "up": report.null.up}
    above_chance = [name for name, side in sides.items() if is_above(side.energy, side.null, side.spread)]
    text = f"The first k directions hold {_energy(sides['down'], 'down')} and {_energy(sides['up'], 'up')}."
    if not above_chance:
        if all(side.null >= _NEARLY_ALL for side in sides.values()):
            return f"{text} So many of them hold nearly everything, whatever adapters share."
        if _kind(report) in ("shared", "partly-shared"):
            return f"{text} That is no more than chance: what they share shows in adapters left out, and not here."
        return f"{text} That is no more than chance: nothing shows here that the adapters share."
    where = "on both sides" if len(above_chance) == 2 else f"on {_WORDS[above_chance[0]]} alone"
    return f"{text} What is above chance is shared, {where}. {_caveats(report, above_chance)}".rstrip()


def _kind(report: ReportData) -> str:
    """Return the kind of the finding that answers the main question."""
    return report.verdict.findings[0].kind if report.verdict.findings else "unknown"


def _energy(side: SideEnergy, name: str) -> str:
    return (
        f"{numbers.share(side.energy)} of the energy of {_WORDS[name]} (in random directions: "
        f"{numbers.share(side.null)} ± {numbers.error(side.spread)})"
    )


def _caveats(report: ReportData, above_chance: list[str]) -> str:
    """Say what energy above chance on these sides means for an adapter that is not in the fit."""
    sentences = []
    if "down" in above_chance and report.starts is not None and report.starts.groups:
        sentences.append("On the down side, a common random start does that by itself.")
    out = report.left_out
    if out is None:
        return " ".join(sentences)
    kind = _kind(report)
    if kind == "unknown":
        sentences.append("What it is worth to a new adapter does not show at this k.")
        return " ".join(sentences)
    kept = (
        f"{numbers.share(out.kept)} of its squared norm beyond chance"
        if is_above(out.kept, 0.0, out.kept_spread)
        else "no more than by chance"
    )
    too_little = ", which is too little for a subspace" if kind == "not-shared" else ""
    sentences.append(
        "An update is kept as far as others have the directions of both its sides: an adapter that is left out of the "
        f"fit keeps {kept}{too_little}."
    )
    return " ".join(sentences)
