"""The report as one HTML document that fetches nothing: the verdict, the key figures, and the sections below."""

import base64
import hashlib
from importlib import resources

from . import kinship, numbers, sections
from .data import Finding, Report
from .markup import chips, prose, text, whole

MARKS = {True: ("good", "✓", "Good"), False: ("bad", "!", "Bad"), None: ("", "i", "Note")}
"""Of a finding: its class, its mark, and the word for who cannot see it."""


def render(report: Report) -> str:
    """The document. It needs matplotlib: `MissingExtraError` where that is not installed."""
    found = [
        ("newcomers", "New adapters", "Would a new adapter fit in?", sections.newcomers(report)),
        ("spectra", "Spectra", "How much a few directions keep", sections.spectra(report)),
        ("modules", "Modules", "Module by module", sections.modules(report)),
        ("adapters", "Adapters", "Adapter by adapter", sections.adapters(report)),
        ("similarity", "Similarity", "How alike the adapters are", kinship.render(report)),
        ("baselines", "Baselines", "What else could be done", sections.baselines(report)),
        ("frontier", "Bytes at an error", "What an error costs", sections.frontier(report)),
        ("bytes", "Bytes", "What it weighs", sections.bytes_(report)),
        ("sizes", "Other k", "With more or fewer components", sections.sizes(report)),
        ("task", "On the task", "On the task", sections.evaluations(report)),
        ("task-bytes", "Bytes on the task", "Bytes, and what becomes of the task", sections.task_frontiers(report)),
        ("notes", "Notes", "What to know of these figures", sections.notes(report)),
    ]
    found = [one for one in found if one[-1]]
    script = _asset("page.js")
    links = "".join(f'<a href="#{key}">{short}</a>' for key, short, _, _ in found)
    cards = "\n".join(
        f'<section class="card" id="{key}" aria-labelledby="{key}-title">'
        f'<h2 id="{key}-title">{title}</h2>{content}</section>'
        for key, _, title, content in found
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
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


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
        f'<p class="headline">{prose(report.verdict.headline)}</p>'
        f'<ul class="facts">{listed}</ul>'
    )


def _tiles(report: Report) -> str:
    fit, out, near, b = report.in_fit, report.left_out, report.similarity, report.bytes
    tiles = []
    if fit is not None:
        worst = f"worst {numbers.error(fit.worst)}: {text(fit.worst_adapter)}"
        tiles.append(("Error in the fit, mean", numbers.error(fit.mean), worst))
    if out is not None:
        tiles.append(
            (
                "Error when left out, mean",
                numbers.error(out.errors.mean),
                f"± {numbers.error(out.standard_error)}, of {numbers.plural(out.sampled, 'adapter')}; "
                f"the same in the fit: {numbers.error(out.in_fit.mean)}",
            )
        )
    tiles.append(
        (
            "LoRA bytes ÷ the pack's",
            numbers.ratio(b.ratio),
            f"with the basis counted; without it {numbers.ratio(b.limit)}",
        )
    )
    if near is not None and near.mean_energy is not None:
        tiles.append(
            (
                "Energy in the mean adapter",
                numbers.share(near.mean_energy),
                "of each update, in the best multiple of the others' mean",
            )
        )
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd>'
            f'<dd class="beside">{whole(beside)}</dd></div>'
            for label, value, beside in tiles
        )
        + "</dl>"
    )


def _findings(report: Report) -> str:
    if not report.verdict.findings:
        return ""
    return (
        '<section aria-labelledby="findings-title"><h2 id="findings-title" class="lead">What was found</h2>'
        '<ul class="findings">' + "".join(_finding(one) for one in report.verdict.findings) + "</ul></section>"
    )


def _finding(one: Finding) -> str:
    shape, mark, word = MARKS[one.good]
    advice = f'<p class="advice">{prose(one.advice)}</p>' if one.advice else ""
    return (
        f'<li class="finding {shape}"><span class="mark" aria-hidden="true">{mark}</span>'
        f'<span class="hidden">{word}: </span>'
        f'<div class="says"><p>{prose(one.text)}</p>{chips(one.adapters)}</div>{advice}</li>'
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
