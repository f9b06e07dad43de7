"""The page's section on how the adapters lie to one another: matrices, the map, and who belongs together."""

from . import maps, numbers, svg
from .data import Report, Similarity
from .markup import chips, figure, fold, paragraph, table, words
from .render import tables

_FEW = 2
"""Adapters up to which there is no picture of them."""


def render(report: Report) -> str:
    """The matrices, the map, and the groups; "" where nothing of it was measured."""
    near = report.similarity
    if near is None:
        return _groups(report, None)
    figures = [
        f"mean cosine {numbers.cosine(near.mean_cosine)}" if near.mean_cosine is not None else "",
        f"silhouette of the clusters {numbers.cosine(near.silhouette)}" if near.silhouette is not None else "",
        f"overlap by chance {numbers.share(near.chance_overlap)}" if near.chance_overlap is not None else "",
    ]
    said = ", ".join(part for part in figures if part)
    of = "as they were" if near.of == "originals" else "as they come back from the pack, for want of the originals"
    content = [
        paragraph(
            f"Compared are the updates of {numbers.plural(len(near.names), 'trained adapter')}, {of}.",
            f"{said[:1].upper()}{said[1:]}." if said else "",
        ),
        *_pictures(report, near),
    ]
    content.append(_groups(report, near))
    content.append(
        fold(
            "What the words mean",
            words(
                ("cosine", "of two updates D as long vectors: 1 the same but for size, 0 nothing in common."),
                ("overlap", "how much of their directions two adapters share, whatever they do along them: 0 to 1."),
                ("by chance", "what adapters with these singular values in random directions have of it, on average."),
                (
                    "dendrogram",
                    "who joins whom by their overlap beyond chance, (overlap − chance) / (1 − chance).",
                ),
                (
                    "silhouette",
                    "how much nearer the adapters of a cluster are to each other than to the next: −1 to 1.",
                ),
                (
                    "start",
                    "LoRA's A begins as random numbers. Of one seed, adapters keep part of them, and look alike.",
                ),
            ),
        )
    )
    return "".join(content)


def _pictures(report: Report, near: Similarity) -> list[str]:
    """The matrices and the map, each where it says something."""
    content = []
    # a report read from JSON has no matrices of many adapters, and of two there is but one figure
    if len(near.cosine) > _FEW:
        pixels = "Neighbours are averaged." if len(near.cosine) > maps.PIXELS else "The diagonal, 1, is off the scale."
        content.append(
            figure(
                maps.matrices(near),
                f"In the order of the dendrogram: adapters whose branches join early share directions. {pixels}",
            )
        )
    if sum(one.x is not None and one.y is not None for one in report.adapters) > _FEW:
        share = (
            f" The map shows {numbers.share(near.map_share)} of the squared distance."
            if near.map_share is not None
            else ""
        )
        colours = ", coloured by cluster" if near.clusters else ""
        outliers = " Outliers are ringed." if report.outliers else ""
        content += [
            "<h3>Map</h3>",
            figure(
                f'<div class="map">{maps.points(report)}</div>',
                f"Each point an adapter{colours}; near ones have similar updates. Point at one to read its name."
                f"{outliers}{share}",
            ),
        ]
    return content


def _groups(report: Report, near: Similarity | None) -> str:
    content = []
    if near is not None and near.clusters:
        cards = [
            _group(
                f'<span class="dot" style="background: var(--ink-series-{place % svg.SERIES})"></span>'
                f"Cluster {place + 1}: {numbers.plural(len(one.adapters), 'adapter')}",
                f"Overlap {numbers.share(one.overlap)}; with the others {numbers.share(one.overlap_with_others)}.",
                one.adapters,
            )
            for place, one in enumerate(near.clusters)
        ]
        content += ["<h3>Clusters</h3>", f'<div class="groups">{"".join(cards)}</div>']
    if report.starts is not None and report.starts.groups:
        content += [
            "<h3>Shared starts</h3>",
            paragraph("These adapters began as the same random numbers: their A look alike for that reason alone."),
            table(tables.start_groups(report.starts.groups)),
        ]
        content += [
            fold(f"Adapters of group {place}", chips(group.adapters, most=64))
            for place, group in enumerate(report.starts.groups, start=1)
        ]
        if report.starts.energies:
            content.append(
                paragraph("The energy that k directions keep, with and without them. Trust “updates” more than “A”.")
                + table(tables.start_energies(report.starts.energies))
            )
    cards = [
        _group(f"Duplicates, {place}", "Equal updates, but for rounding.", names)
        for place, names in enumerate(report.duplicates, start=1)
    ]
    if report.outliers:
        cards.append(_group("Outliers", "They share little with the others.", report.outliers))
    if report.untrained:
        cards.append(_group("Untrained", "Their update is zero; they are left out of the fit.", report.untrained))
    if cards:
        content += ["<h3>To look at</h3>", f'<div class="groups">{"".join(cards)}</div>']
    return "".join(content)


def _group(title: str, meaning: str, names: list[str]) -> str:
    return f'<div class="group"><h4>{title}</h4><p>{meaning}</p>{chips(names)}</div>'
