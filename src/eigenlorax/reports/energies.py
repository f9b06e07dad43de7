"""What the spectra say, in words that agree with the verdict: energy in the kept directions beside the null model."""

from . import numbers
from .chance import is_above
from .data import ReportData, SideEnergy

_WORDS = {"down": "the down side", "up": "the up side"}
_ALL = 0.99
"""The energy from which on nearly everything is kept, whether adapters share directions or not."""


def energies(report: ReportData) -> str:
    """How much of the energy the kept directions hold, and whether that is more than chance; "" if not measured.

    A spectrum is of one side. An update is kept as far as both its sides are, by directions that others have too: that
    is the verdict's answer, of adapters that were left out.
    """
    found = report.null
    if found is None:
        return ""
    sides = {"down": found.down, "up": found.up}
    more = [name for name, side in sides.items() if _is_more(side)]
    text = f"The first k directions hold {_said(sides['down'], 'down')} and {_said(sides['up'], 'up')}."
    if not more:
        if all(side.null >= _ALL for side in sides.values()):
            return f"{text} So many of them hold nearly everything, whatever adapters share."
        if _kind(report) in ("shared", "partly-shared"):
            return f"{text} That is no more than chance: what they share shows in adapters left out, and not here."
        return f"{text} That is no more than chance: nothing shows here that the adapters share."
    where = "on both sides" if len(more) == 2 else f"on {_WORDS[more[0]]} alone"
    return f"{text} What is above chance is shared, {where}. {_of_the_verdict(report, more)}".rstrip()


def _kind(report: ReportData) -> str:
    """Of the finding that answers the main question."""
    return report.verdict.findings[0].kind if report.verdict.findings else "unknown"


def _said(side: SideEnergy, name: str) -> str:
    return (
        f"{numbers.share(side.energy)} of the energy of {_WORDS[name]} (in random directions: "
        f"{numbers.share(side.null)} ± {numbers.error(side.spread)})"
    )


def _is_more(side: SideEnergy) -> bool:
    return is_above(side.energy, side.null, side.spread)


def _of_the_verdict(report: ReportData, more: list[str]) -> str:
    """What that is worth to an adapter that the fit has not seen."""
    said = []
    if "down" in more and report.starts is not None and report.starts.groups:
        said.append("On the down side, a common random start does that by itself.")
    out = report.left_out
    if out is None:
        return " ".join(said)
    kind = _kind(report)
    if kind == "unknown":
        said.append("What it is worth to a new adapter does not show at this k.")
        return " ".join(said)
    kept = (
        f"{numbers.share(out.kept)} of its squared norm beyond chance"
        if is_above(out.kept, 0.0, out.kept_spread)
        else "no more than by chance"
    )
    too_little = ", which is too little for a subspace" if kind == "not-shared" else ""
    said.append(
        "An update is kept as far as others have the directions of both its sides: an adapter that is left out of the "
        f"fit keeps {kept}{too_little}."
    )
    return " ".join(said)
