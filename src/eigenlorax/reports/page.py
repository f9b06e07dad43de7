"""The report as one HTML document that fetches nothing: what a person looks at. The figures are `data`'s, each section
says how to read them; pictures are `plots` and `maps`, tables are `tables`."""

import base64
import hashlib
from importlib import resources

import numpy as np
from jaxtyping import Float

from . import maps, numbers, plots, svg, tables
from .data import Finding, Report, Similarity
from .markup import chips, figure, fold, paragraph, table, text

MARKS = {True: ("good", "✓", "Good"), False: ("bad", "!", "Bad"), None: ("", "i", "Note")}
"""Of a finding: its class, its mark, and the word for who cannot see it."""

_PRINTED_ROWS = 50
_TALL = 24


def render(report: Report, matrix: Float[np.ndarray, "n n"] | None = None) -> str:
    """The document. matrix: cosines of the updates in the order of `report.similarity.names`, where those are more than
    the report's data holds; it becomes a picture."""
    sections = [
        ("spectra", "Spectra", "How much a few directions keep", _spectra(report)),
        ("modules", "Modules", "Where in the model it is lost", _modules(report)),
        ("adapters", "Adapters", "Each adapter", _adapters(report)),
        ("similarity", "Similarity", "How the adapters lie to one another", _similarity(report, matrix)),
        ("baselines", "Baselines", "What else could be done", _baselines(report)),
        ("bytes", "Bytes", "What it weighs", _bytes(report)),
        ("sizes", "Other k", "Another number of components", _sizes(report)),
        ("task", "On the task", "On the task", _evaluations(report)),
    ]
    script = _asset("page.js")
    links = "".join(f'<a href="#{key}">{short}</a>' for key, short, _, _ in sections)
    cards = "\n".join(
        f'<section class="card" id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{content}</section>'
        for key, _, title, content in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{text(_title(report))} · eigenlorax</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header>
{_header(report)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{_tiles(report)}
{_findings(report)}
{cards}
{_notes(report)}
</main>
<footer>{_footer(report)}</footer>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the browser may do with the page: show it, and run this one script. It may fetch nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def _title(report: Report) -> str:
    base = report.collection.base_model or "an unnamed base model"
    return f"{numbers.plural(report.collection.adapters, 'LoRA adapter')} of {base}"


def _header(report: Report) -> str:
    about = report.collection
    k = sorted({side.k for module in report.modules for side in (module.down, module.up)})
    facts = [
        ("modules", numbers.count(about.modules)),
        ("k", "–".join(map(str, [k[0], k[-1]] if len(k) > 1 else k)) or numbers.MISSING),
        ("chosen as", about.size),
        ("weighting", about.weighting),
        ("ranks", ", ".join(map(str, about.ranks))),
        ("dtype", about.dtype),
    ]
    if about.coefficient_dtype != about.dtype:
        facts.append(("coefficients", about.coefficient_dtype))
    if about.n_extra:
        facts.append(("extra directions", numbers.count(about.n_extra)))
    listed = "".join(f"<li>{name} <b>{text(value)}</b></li>" for name, value in facts)
    return (
        f"<h1>{text(_title(report))}</h1>"
        f'<p class="headline">{text(report.verdict.headline)}</p>'
        f'<ul class="facts">{listed}</ul>'
    )


def _tiles(report: Report) -> str:
    fit, out, b = report.in_fit, report.left_out, report.bytes
    near = report.similarity
    tiles = [
        (
            "Delta error in the fit, mean",
            numbers.error(fit.mean if fit else None),
            f"worst {numbers.error(fit.worst)}: {text(fit.worst_adapter)}" if fit else "no adapter is in the fit",
        ),
        (
            "Delta error when left out, mean",
            numbers.error(out.errors.mean if out else None),
            f"±{numbers.error(out.standard_error)}, {out.sampled:,} of {out.of:,} adapters; "
            f"the same in the fit: {numbers.error(out.in_fit.mean)}"
            if out
            else "not measured",
        ),
        (
            "Smaller than the LoRAs, basis counted",
            numbers.ratio(b.ratio),
            f"{numbers.ratio(b.limit)} were the basis free",
        ),
        (
            "Energy in the mean adapter",
            numbers.share(near.mean_energy if near else None),
            "of the updates, the best multiple for each" if near and near.mean_energy is not None else "not measured",
        ),
    ]
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd><dd class="beside">{beside}</dd></div>'
            for label, value, beside in tiles
        )
        + "</dl>"
    )


def _findings(report: Report) -> str:
    if not report.verdict.findings:
        return ""
    return (
        '<h2 class="hidden">Findings</h2><ul class="findings">'
        + "".join(_finding(one) for one in report.verdict.findings)
        + "</ul>"
    )


def _finding(one: Finding) -> str:
    shape, mark, word = MARKS[one.good]
    advice = f'<p class="advice">{text(one.advice)}</p>' if one.advice else ""
    return (
        f'<li class="finding {shape}"><span class="mark" aria-hidden="true">{mark}</span><span class="hidden">{word}: </span>'
        f"<p>{text(one.text)}</p>{advice}{chips(one.adapters)}</li>"
    )


def _spectra(report: Report) -> str:
    sides = [side for module in report.modules for side in (module.down, module.up)]
    if not any(side.spectrum for side in sides):
        return _absent("Without the original adapters there are no spectra.")
    content = [
        paragraph(
            "Where the lines fall faster than the dashed one, that of unrelated adapters of equal ranks and norms, the "
            "adapters share directions. What lies right of the mark at k is not kept."
        ),
        figure(plots.scree(report), "Share of energy by direction, on a logarithmic scale: means over the modules of a kind."),
        figure(plots.cumulative(report), "Energy kept by so many directions. The curve at k is what the pack keeps at best."),
    ]
    if any(side.angles for side in sides):
        overlaps = [
            f"{name} {numbers.share(_mean([v for v in values if v is not None]))} "
            f"(unrelated: {numbers.share(_mean(unrelated))})"
            for name, values, unrelated in (
                (
                    side,
                    [getattr(module, side).halves_overlap for module in report.modules],
                    [getattr(module, side).k / getattr(module, side).dimension for module in report.modules],
                )
                for side in ("down", "up")
            )
            if any(value is not None for value in values)
        ]
        said = f" Mean overlap: {', '.join(overlaps)}." if overlaps else ""
        content += [
            "<h3>Two halves of the collection</h3>",
            paragraph(
                "The adapters in two random halves, a subspace for each. Small angles: both halves find the same "
                "directions, so the next adapter may find them too. At 90° they have nothing in common."
            ),
            figure(plots.angles(report), f"Principal angles, sorted, means over modules.{said}", wide=False),
        ]
    content.append(
        fold(
            "The words",
            _words(
                ("down, up", "the two factors of a LoRA: A reads the input, B writes the output. Each has a basis of its own."),
                ("energy", "share of the squared norm of all updates, each adapter weighing the same."),
                ("Gaussian adapters", "random ones of equal ranks and norms: what k directions keep if nothing is shared."),
            ),
        )
    )
    return "".join(content)


def _modules(report: Report) -> str:
    listed = fold(
        f"All {numbers.plural(len(report.modules), 'module')}",
        table(tables.modules(report), tall=len(report.modules) > _TALL),
    )
    if all(module.delta_error is None for module in report.modules):
        return _absent("Without the original adapters, errors are not known by module.") + listed
    worst = max((m for m in report.modules if m.delta_error is not None), key=lambda m: m.delta_error or 0)
    by = f", and there of {text(worst.worst)} ({numbers.error(worst.worst_error)})" if worst.worst else ""
    said = f"Most is lost in <code>{text(worst.name)}</code>: {numbers.error(worst.delta_error)}{by}."
    drawn = plots.layers(report) if plots.has_grid(report) else plots.modules(report)
    legend = "The star is on the worst module." if plots.has_grid(report) else f"At most the worst {plots.MOST_BARS}."
    return (
        paragraph("The delta error of all adapters together in each module: 0 is nothing lost, 1 is all.", said)
        + figure(drawn, legend)
        + listed
    )


def _adapters(report: Report) -> str:
    trained = [one for one in report.adapters if not one.untrained]
    content = [
        paragraph(
            "How much of each update is lost: ‖D − D̂‖ / ‖D‖, after rounding. Left out, an adapter is put into the "
            "subspace of all the others, as a new one would be."
        )
    ]
    if trained:
        which = f"The worst {plots.MOST_BARS} of {len(trained):,}." if len(trained) > plots.MOST_BARS else "The worst first."
        content.append(
            figure(
                plots.adapters(report),
                f"{which} A bar that reaches its upright stroke does no better than a multiple of the mean adapter.",
            )
        )
    content.append("<h3>All figures</h3>")
    if len(report.adapters) > _PRINTED_ROWS:
        content.append(
            f'<p class="for-print">Only the first {_PRINTED_ROWS} of {len(report.adapters):,} rows are printed.</p>'
        )
    content.append(table(tables.adapters(report), "adapter-table", tall=True))
    if any(value is not None for row in report.module_errors for value in row):
        content.append(
            fold(
                "Each adapter in each module",
                figure(plots.grid(report), "Delta error; empty where an adapter has no update. The worst adapters on top."),
            )
        )
    skipped = [f"<li><b>{text(name)}</b>: {text(why)}</li>" for name, why in report.collection.skipped.items()]
    if skipped:
        content.append(fold(f"{len(skipped)} left out of the pack", f'<ul class="notes">{"".join(skipped)}</ul>'))
    return "".join(content)


def _similarity(report: Report, matrix: Float[np.ndarray, "n n"] | None) -> str:
    near = report.similarity
    if near is None:
        return _absent("How the adapters lie to one another was not measured.") + _groups(report, None)
    figures = [
        f"mean cosine {numbers.cosine(near.mean_cosine)}" if near.mean_cosine is not None else "",
        f"silhouette of the clusters {numbers.cosine(near.silhouette)}" if near.silhouette is not None else "",
    ]
    said = ", ".join(part for part in figures if part)
    of = "as they were" if near.of == "originals" else "as they come back from the pack, for want of the originals"
    content = [
        paragraph(
            f"Compared are the updates of {numbers.plural(len(near.names), 'trained adapter')}, {of}: those whose branches "
            "join early, and those close on the map, share directions.",
            f"{said[:1].upper()}{said[1:]}." if said else "",
        )
    ]
    off_scale = "The diagonal, 1, is off the scale."
    if near.cosine:
        content.append(figure(maps.matrices(report, near), f"In the order of the dendrogram. {off_scale}"))
    elif matrix is not None:
        averaged = " Neighbours are averaged." if len(matrix) > maps.PIXELS else f" {off_scale}"
        content.append(figure(maps.picture(matrix), f"In the order of the dendrogram.{averaged}", wide=False))
    if any(one.x is not None and one.y is not None for one in report.adapters):
        share = f" It shows {numbers.share(near.map_share)} of the squared distance." if near.map_share is not None else ""
        outliers = " Outliers are ringed." if report.outliers else ""
        content += [
            "<h3>Map</h3>",
            figure(maps.points(report), f"Each point an adapter, coloured by cluster; point at one to read it.{outliers}{share}"),
        ]
    content.append(_groups(report, near))
    content.append(
        fold(
            "The words",
            _words(
                ("cosine", "of two updates D as long vectors: 1 the same but for size, 0 nothing in common."),
                ("overlap", "how much of their directions two adapters share, whatever they do along them: 0 to 1."),
                ("silhouette", "how much nearer the adapters of a cluster are to each other than to the next: −1 to 1."),
                ("start", "LoRA's A begins as random numbers. Adapters trained from one seed keep part of them, and look alike."),
            ),
        )
    )
    return "".join(content)


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


def _baselines(report: Report) -> str:
    if not report.baselines:
        return _absent("Without the original adapters there is nothing to compare with.")
    return paragraph(
        "The same adapters, stored or replaced in other ways. The pack is worth its trouble where its error is below that "
        "of random bases and of the mean adapter, and where nothing simpler is as small and as exact."
    ) + table(tables.baselines(report))


def _bytes(report: Report) -> str:
    b = report.bytes
    even = (
        f"The pack is smaller than such LoRAs from {numbers.plural(b.break_even, 'adapter')} on."
        if b.break_even is not None
        else "With such LoRAs, no number of adapters makes the pack the smaller one."
    )
    listed = table(tables.bytes_(report))
    drawn = figure(plots.ratio(report), "LoRA bytes ÷ the pack's, for so many such adapters.", wide=False) if b.over_n else ""
    return (
        paragraph("The basis is paid once, coefficients by each adapter: the more adapters, the better the ratio.", even)
        + f'<div class="pair"><div>{listed}</div>{drawn}</div>'
    )


def _sizes(report: Report) -> str:
    if not report.sizes:
        return _absent("Other numbers of components were not tried.")
    return (
        paragraph(
            "The same adapters with k components on every side, without sweeps. Where the left-out error no longer falls, "
            "more components learn the adapters by heart, not what they share."
        )
        + '<div class="pair">'
        + figure(plots.sizes(report), "Delta error over k; the mark is the pack's k.", wide=False)
        + figure(plots.size_bytes(report), "Bytes over k, beside those of the LoRAs.", wide=False)
        + "</div>"
        + fold("As a table", table(tables.sizes(report)))
    )


def _evaluations(report: Report) -> str:
    if not report.evaluations:
        return _absent("No adapter was run on its task.")
    return (
        paragraph(
            "What counts in the end: the base model's predictions with the original adapter, with the recycled one, and "
            "with no update. Agreement is with the original."
        )
        + table(tables.evaluations(report))
        + fold(
            "The words",
            _words(
                ("agreement", "share of rows, or of predicted tokens, on which both predict the same."),
                ("KL", "mean divergence of the recycled from the original prediction, in nats a row or token: 0 is equal."),
                ("no update", "the adapter's head, if it has one, on the bare base model."),
            ),
        )
    )


def _absent(reason: str) -> str:
    return f'<p class="absent">{reason} See the <a href="#notes">notes</a>.</p>'


def _notes(report: Report) -> str:
    notes = list(report.notes)
    if not report.collection.with_originals:
        notes.append("The original adapters were not at hand: give them, and what is missing can be measured.")
    if report.collection.excluded_modules:
        notes.append(f"Modules left out on request: {', '.join(report.collection.excluded_modules)}.")
    listed = "".join(f"<li>{text(note)}</li>" for note in notes) or "<li>Everything was measured, on all adapters.</li>"
    return (
        '<section class="card" id="notes" aria-labelledby="notes-title"><h2 id="notes-title">Notes</h2>'
        f'<p>What was not measured, or only of a sample, and why.</p><ul class="notes">{listed}</ul></section>'
    )


def _footer(report: Report) -> str:
    about = report.collection
    revision = f" at revision <code>{text(about.revision)}</code>" if about.revision else ""
    out = report.left_out
    left_out = f" Left-out errors: {text(out.method)}; seed {out.seed}." if out else ""
    return (
        f"<p>Made by eigenlorax {text(report.eigenlorax_version)} from the subspace of fingerprint "
        f"<code>{text(about.fingerprint)}</code>, base model {text(about.base_model or 'not named')}{revision}; "
        f"weighting “{text(about.weighting)}”, {numbers.plural(about.sweeps, 'sweep')}.{left_out}</p>"
        "<p>This page fetches nothing. The method is EigenLoRAx, "
        '<a href="https://arxiv.org/abs/2502.04700">arXiv 2502.04700</a>.</p>'
    )


def _words(*pairs: tuple[str, str]) -> str:
    return f'<dl class="words">{"".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in pairs)}</dl>'


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
