"""The page's sections about spectra, modules, adapters, bytes and tasks: each says how to read it, then shows it.

A section of which nothing was measured is the empty string.
"""

from . import curves, numbers, plots, tables
from .data import Report
from .markup import columns, figure, fold, paragraph, table, text, words

PRINTED_ROWS = 50
"""Rows of the table of adapters that are printed on paper; the style sheet hides the others."""

_TALL = 24


def spectra(report: Report) -> str:
    """What directions keep, by side and kind of module, and whether two halves find the same ones."""
    sides = [side for module in report.modules for side in (module.down, module.up)]
    if not any(side.spectrum for side in sides):
        return ""
    content = [
        paragraph(
            "Where the lines fall faster than the dashed one, that of unrelated adapters of equal ranks and norms, the "
            "adapters share directions. What lies right of the mark at k is not kept."
        ),
        figure(
            curves.scree(report),
            "Share of energy by direction, on a logarithmic scale: means over the modules of a kind.",
        ),
        figure(
            curves.cumulative(report),
            "Energy kept by so many directions. The curve at k is what the pack keeps at best.",
        ),
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
        said = f"Mean overlap: {', '.join(overlaps)}." if overlaps else ""
        content += [
            '<div class="pair"><div><h3>Two halves of the collection</h3>',
            paragraph(
                "The adapters in two random halves, a subspace for each. Small angles: both halves find the same "
                "directions, so the next adapter may find them too. At 90° they have nothing in common."
            ),
            f"<p>{said}</p></div>" if said else "</div>",
            figure(curves.angles(report), "Principal angles, sorted, means over modules.", wide=False),
            "</div>",
        ]
    content.append(
        fold(
            "The words",
            words(
                (
                    "down, up",
                    "the two factors of a LoRA: A reads the input, B writes the output. Each has a basis of its own.",
                ),
                ("energy", "share of the squared norm of all updates, each adapter weighing the same."),
                (
                    "Gaussian adapters",
                    "random ones of equal ranks and norms: what k directions keep if nothing is shared.",
                ),
            ),
        )
    )
    return "".join(content)


def modules(report: Report) -> str:
    """Where in the model it is lost."""
    found = tables.modules(report)
    listed = fold(
        f"All {numbers.plural(len(report.modules), 'module')}",
        table(found, tall=len(report.modules) > _TALL),
        columns(found),
    )
    if all(module.delta_error is None for module in report.modules):
        return listed
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


def adapters(report: Report) -> str:
    """Each adapter: the worst as bars, all in a table."""
    trained = [one for one in report.adapters if not one.untrained]
    stroke = ""
    if any(one.mean_scaled_error is not None for one in trained):
        stroke = " A bar that reaches its upright stroke does no better than a multiple of the mean adapter."
    content = [
        paragraph(
            "How much of each update is lost: ‖D − D̂‖ / ‖D‖, after rounding. Left out, an adapter is put into the "
            "subspace of all the others, as a new one would be."
        )
    ]
    if trained:
        which = (
            f"The worst {plots.MOST_BARS} of {len(trained):,}."
            if len(trained) > plots.MOST_BARS
            else "The worst first."
        )
        content.append(
            figure(
                plots.adapters(report),
                f"{which}{stroke}",
            )
        )
    content.append("<h3>All figures</h3>")
    if len(report.adapters) > PRINTED_ROWS:
        content.append(
            f'<p class="for-print">The first {PRINTED_ROWS} of {len(report.adapters):,} rows are printed, '
            "and the first columns.</p>"
        )
    listed = tables.adapters(report)
    content += [table(listed, "adapter-table", tall=True), fold("The columns", columns(listed))]
    if any(value is not None for row in report.module_errors for value in row):
        content.append(
            fold(
                "Each adapter in each module",
                figure(
                    plots.grid(report), "Delta error; empty where an adapter has no update. The worst adapters on top."
                ),
            )
        )
    skipped = [f"<li><b>{text(name)}</b>: {text(why)}</li>" for name, why in report.collection.skipped.items()]
    if skipped:
        content.append(fold(f"{len(skipped)} left out of the pack", f'<ul class="notes">{"".join(skipped)}</ul>'))
    return "".join(content)


def baselines(report: Report) -> str:
    """What else could be done with the same adapters."""
    if not report.baselines:
        return ""
    return paragraph(
        "The same adapters, stored or replaced in other ways. The pack is worth its trouble where its error is below "
        "that of random bases and of the mean adapter, and where nothing simpler is as small and as exact."
    ) + table(tables.baselines(report))


def bytes_(report: Report) -> str:
    """What it weighs, and for how many adapters it pays."""
    b = report.bytes
    even = (
        f"The pack is smaller than such LoRAs from {numbers.plural(b.break_even, 'adapter')} on."
        if b.break_even is not None
        else "With such LoRAs, no number of adapters makes the pack the smaller one."
    )
    listed = table(tables.bytes_(report))
    drawn = (
        figure(curves.ratio(report), "LoRA bytes ÷ the pack's, for so many such adapters.", wide=False)
        if b.over_n
        else ""
    )
    return (
        paragraph(
            "The basis is paid once, coefficients by each adapter: the more adapters, the better the ratio.", even
        )
        + f'<div class="pair"><div>{listed}</div>{drawn}</div>'
    )


def sizes(report: Report) -> str:
    """Errors and bytes at another k."""
    if not report.sizes:
        return ""
    return (
        paragraph(
            "The same adapters with k components on every side, without sweeps. Where the left-out error no longer "
            "falls, more components learn the adapters by heart, not what they share."
        )
        + '<div class="pair">'
        + figure(curves.sizes(report), "Delta error over k; the mark is the pack's k.", wide=False)
        + figure(curves.size_bytes(report), "Bytes over k, beside those of the LoRAs.", wide=False)
        + "</div>"
        + fold("As a table", table(tables.sizes(report)))
    )


def evaluations(report: Report) -> str:
    """The adapters on their task."""
    if not report.evaluations:
        return ""
    return (
        paragraph(
            "What counts in the end: the base model's predictions with the original adapter, with the recycled one, "
            "and with no update. Agreement is with the original."
        )
        + table(tables.evaluations(report))
        + fold(
            "The words",
            words(
                ("agreement", "share of rows, or of predicted tokens, on which both predict the same."),
                (
                    "KL",
                    "mean divergence of the recycled from the original prediction, in nats a row or token: 0 is equal.",
                ),
                ("no update", "the adapter's head, if it has one, on the bare base model."),
            ),
        )
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
