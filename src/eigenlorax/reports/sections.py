"""The page's sections, but that on similarity: each says how to read it, then shows it.

A section of which nothing was measured is the empty string.
"""

import statistics
from collections.abc import Iterable

from . import curves, kinds, numbers, plots, rankings
from .data import Report
from .energies import energies
from .frontier import at_equal_error, on_task
from .markup import columns, figure, fold, html_figure, pair, paragraph, prose, table, text, words
from .render import tables

PRINTED_ROWS = 50
"""Rows of the table of adapters that are printed on paper; the style sheet hides the others."""

_TALL = 24


def newcomers(report: Report) -> str:
    """What becomes of an adapter that the fit has not seen, and whether two halves find the same directions."""
    drawn, said = [], []
    out = report.left_out
    if out is not None:
        who = (
            f"Each of {numbers.plural(out.of, 'adapter')}"
            if out.sampled == out.of
            else f"Each of {out.sampled:,} out of {numbers.plural(out.of, 'adapter')}, drawn at random,"
        )
        said.append(
            f"{who} was put into the subspace of all the others, as a new one would be. There it loses "
            f"<b>{numbers.error(out.errors.mean)}</b> of its update on average, ± {numbers.error(out.standard_error)}; "
            f"against <b>{numbers.error(out.in_fit.mean)}</b> in a subspace that was fitted with it."
        )
        if any(one.left_out_error is not None for one in report.adapters):
            drawn.append(
                figure(
                    plots.newcomers(report),
                    "Adapters by delta error. The nearer the two heaps, the more of a new adapter is there already.",
                    wide=False,
                )
            )
    if any(side.angles for module in report.modules for side in (module.down, module.up)):
        overlaps = ", ".join(
            f"{side} {numbers.share(shared)} (unrelated: {numbers.share(unrelated)})"
            for side, shared, unrelated in _halves(report)
        )
        drawn.append(
            figure(
                curves.angles(report),
                "Two random halves of the collection, a subspace for each: the principal angles between them, means "
                "over modules. At 0° both find the same direction. Dashed: random subspaces, which have this much in "
                "common." + (f" Mean overlap: {overlaps}." if overlaps else ""),
                wide=False,
            )
        )
    if not drawn and not said:
        return ""
    return (paragraph(*said) if said else "") + pair(*drawn)


def spectra(report: Report) -> str:
    """What directions keep, by side and kind of module."""
    if not any(side.spectrum for module in report.modules for side in (module.down, module.up)):
        return ""
    more = len(kinds.grouped(report.modules, len(report.modules))) > curves.MOST_KINDS
    grouped = " The last kinds are drawn as one." if more else ""
    null = any(side.null for module in report.modules for side in (module.down, module.up))
    by_chance = [
        (
            "random directions",
            "the null model: adapters with the same singular values, and with them norms and ranks, whose directions "
            "are drawn at random, so that they share nothing.",
        )
    ]
    return (
        paragraph(
            "Dashed is how the lines would fall if the adapters shared nothing: the same singular values in random "
            "directions."
            if null
            else "The faster the lines fall, the fewer directions do.",
            text(energies(report)),
            "What lies right of the mark at k is not kept.",
        )
        + html_figure(
            pair(*(figure(curves.scree(report, side), "", wide=False) for side in curves.SIDES)),
            f"Share of energy by direction, on a logarithmic scale: means over the modules of a kind.{grouped}",
        )
        + html_figure(
            pair(*(figure(curves.cumulative(report, side), "", wide=False) for side in curves.SIDES)),
            "Energy kept by so many directions. The curve at k is what the pack keeps at best.",
        )
        + fold(
            "What the words mean",
            words(
                (
                    "down, up",
                    "the two factors of a LoRA: A reads the input, B writes the output. Each has a basis of its own.",
                ),
                ("energy", "share of the squared norm of all updates, each adapter weighing the same."),
                *(by_chance if null else []),
            ),
        )
    )


def modules(report: Report) -> str:
    """Where in the model it is lost."""
    listed = "".join(
        fold(title, table(found, tall=len(report.modules) > _TALL), columns(found))
        for title, found in (
            (f"All {numbers.plural(len(report.modules), 'module')}", tables.modules(report)),
            ("Directions of each module", tables.sides(report)),
        )
    )
    known = [module for module in report.modules if module.delta_error is not None]
    if not known:
        return listed
    worst = max(known, key=lambda module: module.delta_error or 0)
    by = f", and there of {text(worst.worst)} ({numbers.error(worst.worst_error)})" if worst.worst else ""
    much = (worst.delta_error or 0) >= plots.LEAST_STARRED
    said = (
        f"Most is lost in <code>{text(worst.name)}</code>: {numbers.error(worst.delta_error)}{by}."
        if much
        else f"No module loses more than {numbers.error(worst.delta_error)}."
    )
    if plots.has_grid(report):
        drawn = figure(plots.layers(report), "The star is on the worst module." if much else "")
    else:
        drawn = html_figure(rankings.modules(report), _which(len(known), "module"))
    return (
        paragraph("The delta error of all adapters together in each module: 0 is nothing lost, 1 is all.", said)
        + drawn
        + listed
    )


def adapters(report: Report) -> str:
    """Each adapter: the worst as bars, all in a table."""
    trained = [one for one in report.adapters if not one.untrained]
    content = [paragraph("How much of each update is lost, after rounding: the delta error, ‖D − D̂‖ / ‖D‖.")]
    if trained:
        stroke = ""
        if any(one.mean_scaled_error is not None for one in trained):
            stroke = " A bar that reaches its upright stroke does no better than a multiple of the mean adapter."
        content.append(html_figure(rankings.adapters(report), f"{_which(len(trained), 'adapter')}{stroke}"))
    content.append("<h3>All figures</h3>")
    if len(report.adapters) > PRINTED_ROWS:
        content.append(
            f'<p class="for-print">The first {PRINTED_ROWS} of {len(report.adapters):,} rows are printed.</p>'
        )
    listed = tables.adapters(report)
    weights = tables.weights(report)
    content += [
        table(listed, "adapter-table", tall=True),
        fold("What the columns mean", columns(listed)),
        fold("Bytes and factors of each adapter", table(weights, "weight-table", tall=True), columns(weights)),
    ]
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
        content.append(
            fold(
                f"{numbers.plural(len(skipped), 'adapter')} that could not be read, and why",
                f'<ul class="notes">{"".join(skipped)}</ul>',
            )
        )
    return "".join(content)


def baselines(report: Report) -> str:
    """What else could be done with the same adapters."""
    if not report.baselines:
        return ""
    return (
        paragraph(
            "The same adapters, stored or replaced in other ways. Their directions have something in common where the "
            "pack's error is below that of the same singular values in random directions, and that of adapters left "
            "out below that of random bases. The pack is worth its trouble where nothing simpler is as small and as "
            "exact."
        )
        + html_figure(rankings.baselines(report), "")
        + table(tables.baselines(report))
    )


def frontier(report: Report) -> str:
    """Bytes at an error, with everything else that could be done."""
    found = report.frontier
    if found is None or len(found.points) < 2:
        return ""
    some = (
        f" Measured on {found.modules:,} of {numbers.plural(found.of, 'module')}; bytes of the other ways are in "
        "proportion."
        if found.modules < found.of
        else ""
    )
    return (
        paragraph(
            "Each way tuned, and measured after rounding: the lower left is better. " + text(at_equal_error(found)),
        )
        + figure(
            curves.frontier(report),
            f"Bytes of all adapters together over the worst adapter's delta error.{some} Dashed: by bases in common.",
        )
        + fold("As a table", table(tables.frontier(report), tall=len(found.points) > _TALL))
    )


def bytes_(report: Report) -> str:
    """What it weighs, and for how many adapters it pays."""
    b = report.bytes
    even = (
        f"The pack is smaller than such LoRAs from {numbers.plural(b.break_even, 'adapter')} on."
        if b.break_even is not None
        else "With such LoRAs, no number of adapters makes the pack the smaller one."
    )
    said = paragraph(
        "The basis is paid once, coefficients by each adapter: the more adapters, the better the ratio.", even
    )
    listed = table(tables.bytes_(report))
    if not b.over_n:
        return said + listed
    return said + pair(
        f"<div>{listed}</div>",
        figure(curves.ratio(report), "LoRA bytes ÷ the pack's, for so many such adapters.", wide=False),
    )


def sizes(report: Report) -> str:
    """Errors and bytes at another k."""
    if not report.sizes:
        return ""
    return (
        paragraph(
            "The same adapters with k components on every side, without sweeps. Dashed: the same singular values in "
            "random directions, fitted alike, and random bases. Where the left-out error falls no faster than that of "
            "random bases, more components learn the adapters by heart, not what they share."
        )
        + pair(
            figure(curves.sizes(report), "Delta error over k; the mark is the pack's k.", wide=False),
            figure(curves.size_bytes(report), "Bytes over k, beside those of the LoRAs.", wide=False),
        )
        + fold("As a table", table(tables.sizes(report)))
    )


def evaluations(report: Report) -> str:
    """The adapters on their task."""
    if not report.evaluations:
        return ""
    content = [
        paragraph(
            "What counts in the end: the base model's predictions with the original adapter, with the recycled one, "
            "and with no update. Agreement is with the original."
        )
    ]
    for task, listed in tables.evaluations(report).items():
        content.append(f"<h3>{text(task)}</h3>")
        drawn = rankings.accuracies(tables.by_task(report)[task])
        content.append(html_figure(drawn, "Accuracy by adapter, the largest loss first.") if drawn else "")
        content.append(table(listed, tall=len(listed.rows) > _TALL))
    content.append(
        fold(
            "What the words mean",
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
    return "".join(content)


def task_frontiers(report: Report) -> str:
    """Bytes, and what becomes of the task."""
    content = []
    for place, found in enumerate(report.task_frontiers):
        runs = [tables.task_runs(found, measure) for measure in ("accuracy", "perplexity", "kl")]
        score = "perplexity" if found.original_perplexity is not None else "accuracy"
        drawn = [
            figure(curves.task_frontier(found, measure, f"task-{place}-{measure}"), "", wide=False)
            for measure in (score, "kl")
            if any(getattr(point, measure) is not None for point in found.points)
        ]
        content += [
            f"<h3>{text(found.task)}</h3>",
            paragraph(text(on_task(found))),
            html_figure(pair(*drawn), f"Over the bytes of {numbers.plural(found.adapters, 'adapter')} together."),
            table(tables.task_frontier(found)),
            *(fold(each.caption, table(each, tall=len(each.rows) > _TALL)) for each in runs if each.rows),
        ]
    if not content:
        return ""
    return paragraph(
        "The originals fitted anew at several ratios, and each of them cut and rounded by itself to the same "
        "bytes, run on the same rows. KL is the mean divergence from what the originals predict: 0 is equal."
    ) + "".join(content)


def notes(report: Report) -> str:
    """What was not measured, or only of a sample, and why."""
    listed = [prose(note) for note in report.notes]
    if report.collection.excluded_modules:
        names = ", ".join(report.collection.excluded_modules)
        listed.append(f"Modules left out on request: {text(names)}.")
    return f'<ul class="notes">{"".join(f"<li>{note}</li>" for note in listed)}</ul>' if listed else ""


def _which(number: int, noun: str) -> str:
    return (
        f"The worst {rankings.MOST} of {numbers.plural(number, noun)}."
        if number > rankings.MOST
        else "The worst first."
    )


def _halves(report: Report) -> Iterable[tuple[str, float, float]]:
    """Of each side, the mean overlap of the two halves, and what unrelated ones would have."""
    for name in curves.SIDES:
        sides = [getattr(module, name) for module in report.modules]
        known = [side for side in sides if side.halves_overlap is not None]
        if known:
            overlaps = [[getattr(side, field) for side in known] for field in ("halves_overlap", "null_halves_overlap")]
            yield name, statistics.fmean(overlaps[0]), statistics.fmean(overlaps[1])
