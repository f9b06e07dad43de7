"""The report in GitHub's Markdown: the page's facts as sentences and tables, without pictures."""

import re
from collections.abc import Iterable

from . import frontier, numbers, tables
from .data import Finding, Report, Spread, TaskFrontier
from .energies import energies
from .tables import Cell, Table

MOST_ADAPTERS = 20

_MARKS = {True: "✓", False: "!", None: "·"}


def render(report: Report) -> str:
    """The text, from the verdict to the notes."""
    about = report.collection
    base = about.base_model or "a base model its adapters do not name"
    blocks = [
        f"# {numbers.plural(about.adapters, 'LoRA adapter')} of {escaped(base)} in one subspace",
        f"**{_prose(report.verdict.headline)}**",
        "\n".join(_finding(one) for one in report.verdict.findings),
        _key_figures(report),
        *_adapters(report),
        *_section("Modules", tables.modules(report)),
        *_section("Their directions", tables.sides(report)),
        _prose(energies(report)),
        *_section("What else could be done", tables.baselines(report)),
        *_frontier(report),
        *_section("Bytes", tables.bytes_(report)),
        _pays(report),
        *_section("With more or fewer components", tables.sizes(report)),
        *_kinship(report),
        *(
            block
            for task, found in tables.evaluations(report).items()
            for block in _section(f"On the task: {task}", found)
        ),
        *(block for found in report.task_frontiers for block in _task_frontier(found)),
        *_notes(report),
        f"Made by eigenlorax {escaped(report.eigenlorax_version)} from the subspace of fingerprint "
        f"{escaped(about.fingerprint)}.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def escaped(text: str) -> str:
    """The text as Markdown shows it, in a table too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # underscores within a word mean nothing
    text = " ".join(re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text).split())
    # what would begin a list, or draw a line
    return re.sub(r"^(\d{0,9})([.)](?= |$)|[-+](?=[- ]|$))", r"\1\\\2", text)


def _prose(text: str) -> str:
    """Our own sentences: what stands between backticks is code; the names in them are escaped."""
    pieces = re.split(r"`([^`]+)`", text)
    return "".join(f"`{piece}`" if place % 2 else _kept_ends(piece) for place, piece in enumerate(pieces))


def _kept_ends(text: str) -> str:
    before, after = (" " if text[:1].isspace() else ""), (" " if text[-1:].isspace() else "")
    return f"{before}{escaped(text)}{after}" if text.strip() else text


def _finding(one: Finding) -> str:
    names = _listed(one.adapters)
    parts = [_prose(one.text), f"*{_prose(one.advice)}*" if one.advice else "", f"({names})" if names else ""]
    return f"- {_MARKS[one.good]} {' '.join(part for part in parts if part)}"


def _key_figures(report: Report) -> str:
    about, b = report.collection, report.bytes
    k = sorted({side.k for module in report.modules for side in (module.down, module.up)})
    rows = [
        ("modules", numbers.count(about.modules)),
        (
            "k",
            f"{'–'.join(map(str, k if len(k) == 1 else [k[0], k[-1]]))}, chosen as {escaped(about.size)}" if k else "",
        ),
        ("weighting", escaped(about.weighting)),
        ("ranks", ", ".join(map(str, about.ranks))),
        ("compression ratio, basis counted", numbers.ratio(b.ratio)),
        ("compression ratio, basis free", numbers.ratio(b.limit)),
    ]
    for label, spread in (("in the fit", report.in_fit), ("projected afterwards", report.projected)):
        if spread is not None:
            rows.append((f"delta error, {numbers.plural(spread.adapters, 'adapter')} {label}", _spread_text(spread)))
    if report.left_out is not None:
        out = report.left_out
        rows.append(
            (
                f"delta error, {out.sampled:,} of {out.of:,} adapters left out of the fit",
                f"{_spread_text(out.errors)}; mean ±{numbers.error(out.standard_error)}; "
                f"in as many random directions: mean {numbers.error(out.chance)}; "
                f"the same in the fit: mean {numbers.error(out.in_fit.mean)}",
            )
        )
    if report.null is not None:
        rows.append(
            (
                "the same singular values in random directions, fitted alike",
                f"{_spread_text(report.null.errors)}; mean ±{numbers.error(report.null.spread)} by chance",
            )
        )
    if report.similarity is not None and report.similarity.mean_energy is not None:
        rows.append(("energy in the mean adapter", numbers.share(report.similarity.mean_energy)))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _spread_text(spread: Spread) -> str:
    return f"mean {numbers.error(spread.mean)}, worst {numbers.error(spread.worst)} ({escaped(spread.worst_adapter)})"


def _adapters(report: Report) -> list[str]:
    more = len(report.adapters) - MOST_ADAPTERS
    return [
        *_section("Adapters, the worst first", tables.adapters(report, MOST_ADAPTERS)),
        *_section("Their bytes and factors", tables.weights(report, MOST_ADAPTERS)),
        f"… and {numbers.count(more)} more." if more > 0 else "",
    ]


def _frontier(report: Report) -> list[str]:
    found = report.frontier
    if found is None or len(found.points) < 2:
        return []
    title, *rest = _section("What an error costs", tables.frontier(report))
    some = (
        f" Measured on {found.modules:,} of {numbers.plural(found.of, 'module')}; bytes in proportion."
        if found.modules < found.of
        else ""
    )
    return [title, _prose(frontier.at_equal_error(found) + some), *rest]


def _task_frontier(found: TaskFrontier) -> list[str]:
    title, *rest = _section(f"Bytes, and what becomes of the task: {found.task}", tables.task_frontier(found))
    blocks = [title, _prose(frontier.on_task(found)), *rest]
    for measure in ("accuracy", "perplexity", "kl"):
        listed = tables.task_runs(found, measure)
        if listed.rows:
            shown = tables.task_runs(found, measure, MOST_ADAPTERS)
            more = len(listed.rows) - len(shown.rows)
            blocks += [f"### {shown.caption}", _table(shown), f"… and {numbers.count(more)} more." if more else ""]
    return blocks


def _pays(report: Report) -> str:
    even = report.bytes.break_even
    if even is None:
        return "With such LoRAs, no number of adapters makes the pack the smaller one."
    return f"The pack is smaller than such LoRAs from {numbers.plural(even, 'adapter')} on."


def _kinship(report: Report) -> list[str]:
    lines = []
    near = report.similarity
    if near is not None:
        measured = [
            f"mean cosine {numbers.cosine(near.mean_cosine)}" if near.mean_cosine is not None else "",
            f"silhouette of the clusters {numbers.cosine(near.silhouette)}" if near.silhouette is not None else "",
            f"overlap by chance {numbers.share(near.chance_overlap)}" if near.chance_overlap is not None else "",
        ]
        said = ", ".join(part for part in measured if part)
        lines += [f"- {said}"] if said else []
        lines += [
            f"- cluster {place}, overlap {numbers.share(one.overlap)}, with the others "
            f"{numbers.share(one.overlap_with_others)}: {_listed(one.adapters)}"
            for place, one in enumerate(near.clusters, start=1)
        ]
    lines += [f"- duplicates: {_listed(names)}" for names in report.duplicates]
    lines += [f"- outliers: {_listed(report.outliers)}"] if report.outliers else []
    lines += [f"- untrained: {_listed(report.untrained)}"] if report.untrained else []
    blocks = ["## How alike the adapters are", "\n".join(lines)] if lines else []
    if report.starts is not None and report.starts.groups:
        blocks += [*_section("Shared starts", tables.start_groups(report.starts.groups))]
        blocks.append(
            "\n".join(
                f"- group {place}: {_listed(group.adapters)}"
                for place, group in enumerate(report.starts.groups, start=1)
            )
        )
        blocks += [_table(tables.start_energies(report.starts.energies))] if report.starts.energies else []
    return blocks


def _listed(names: list[str]) -> str:
    first, rest = numbers.some(names)
    return ", ".join(map(escaped, first)) + (f" and {numbers.count(len(rest))} more" if rest else "")


def _notes(report: Report) -> list[str]:
    about = report.collection
    notes = [f"- {_prose(note)}" for note in report.notes]
    notes += [f"- {escaped(name)} was left out: {escaped(why)}" for name, why in about.skipped.items()]
    if about.excluded_modules:
        notes.append(f"- Modules left out on request: {', '.join(map(escaped, about.excluded_modules))}")
    return ["## Notes", "\n".join(notes)] if notes else []


def _section(title: str, found: Table) -> list[str]:
    return [f"## {title}", _table(found), _meanings(found)] if found.rows else []


def _table(found: Table) -> str:
    lines = [
        _row(Cell(column.label) for column in found.columns),
        "|" + "|".join("---:" if column.numeric else "---" for column in found.columns) + "|",
        *(_row(row) for row in found.rows),
    ]
    return "\n".join(lines)


def _row(cells: Iterable[Cell]) -> str:
    return "| " + " | ".join(escaped(cell.text) for cell in cells) + " |"


def _meanings(found: Table) -> str:
    said = [f"{escaped(column.label)}: {escaped(column.meaning)}" for column in found.columns if column.meaning]
    return f"{'; '.join(said)}." if said else ""
