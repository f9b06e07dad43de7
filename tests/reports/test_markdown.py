"""The report in Markdown, read back by a parser of CommonMark: the page's figures, and names as text."""

import dataclasses
import itertools
import re

import pytest
from markdown_it import MarkdownIt
from synthetic import HOSTILE, bare, hostile_names, report

from eigenlorax.reports import data
from eigenlorax.reports.comparison_data import Spread
from eigenlorax.reports.render import markdown


def changed(one, **values):
    return dataclasses.replace(one, **values)


def parsed(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def shown(token):
    """What an inline token shows, line breaks and all."""
    return "".join(
        "\n" if child.type == "softbreak" else child.content for child in token.children if child.type != "image"
    )


def tables(text):
    """By the heading they stand under, each a list of rows of texts, the heads first."""
    found, heading, tokens = {}, None, parsed(text)
    for token, after in itertools.pairwise(tokens):
        if token.type == "heading_open":
            heading = shown(after)
        elif token.type == "table_open":
            found.setdefault(heading, []).append([])
        elif token.type == "tr_open":
            found[heading][-1].append([])
        elif token.type in {"th_open", "td_open"}:
            found[heading][-1][-1].append(shown(after))
    return found


def all_shown(text):
    return [shown(token) for token in parsed(text) if token.type == "inline"]


def test_figures_are_in_the_tables_the_worst_first():
    full = report(3)
    rows = [
        changed(one, name=f"a{n}", untrained=False, delta_error=error, left_out_error=None, cluster=None)
        for n, (one, error) in enumerate(zip(full.adapters, (0.987654, 0.00012345, 0.0), strict=True))
    ]
    rows[1] = changed(rows[1], left_out_error=0.75)
    gain = changed(full.bytes, lora=1_234_567, ratio=123.4)
    found = tables(markdown.render(changed(full, adapters=rows, bytes=gain)))
    head, *body = found["Adapters, the worst first"][0]
    assert [row[:3] for row in body] == [["a0", "0.988", "–"], ["a1", "1.2e-04", "0.750"], ["a2", "0", "–"]]
    assert "cluster" not in head
    weighed = {row[0]: row[1:] for row in found["Bytes"][0]}
    assert weighed["LoRAs, at the pack's dtype"] == ["1.2 MB", "1.00×"]
    assert weighed["this pack, total"][1] == "123×"


def test_key_figures():
    full = report(6)
    out = changed(
        full.left_out,
        sampled=5,
        of=6,
        errors=Spread(5, 0.7654, 0.8, 0.91, "a_b"),
        standard_error=0.0123,
    )
    modules = [changed(one, up=changed(one.up, k=7)) for one in full.modules]
    figures = dict(
        tables(markdown.render(changed(full, left_out=out, in_fit=Spread(6, 0.1234, 0.2, 0.3, "c"), modules=modules)))[
            "6 LoRA adapters of FacebookAI/roberta-base in one subspace"
        ][0][1:]
    )
    assert figures["k"] == "7–32, chosen as at most 32 components"
    assert figures["delta error, 6 adapters in the fit"] == "mean 0.123, worst 0.300 (c)"
    assert figures["delta error, 5 of 6 adapters left out of the fit"] == (
        f"mean 0.765, worst 0.910 (a_b); mean ±0.012; in equally many random components: "
        f"mean {full.left_out.chance:.3f}; the same in the fit: mean {full.left_out.in_fit.mean:.3f}"
    )
    assert figures["null model: same singular values, random singular vectors"].startswith("mean 0.880, worst")


def test_verdict_notes_and_groups():
    full = report(9)
    finding = data.Finding("loss", "Use `-k 3`, not *4*.", "Do.", False, ["p", "q_"])
    text = markdown.render(
        changed(full, verdict=data.Verdict("It is so.", [finding]), notes=["One."], duplicates=[["d1", "d2"]])
    )
    said = all_shown(text)
    assert text.splitlines()[2] == "**It is so.**"
    assert "! Use -k 3, not *4*. Do. (p, q_)" in said
    assert {"One.", "duplicates: d1, d2", f"outliers: {full.outliers[0]}", "untrained: sst2-000"} <= set(said)
    assert "Excluded modules: classifier.dense" in said
    assert "broken-one was left out: NaN in encoder.layer.3.attention.self.query" in said
    assert "group 1: sst2-000, mnli-genre-001, org--intent-classifier-002" in said
    assert "perplexity: stored" in tables(text)["On the task: causal-lm"][0][0]


def test_names_are_text():
    names = hostile_names()
    full = report(len(names), names=names, base_model=HOSTILE)
    about = changed(full.collection, skipped={HOSTILE: HOSTILE}, excluded_modules=[HOSTILE], size=HOSTILE)
    finding = data.Finding("loss", "Lost.", "Keep them.", False, names)
    tasks = {
        "evaluations": [changed(one, task=HOSTILE) for one in full.evaluations],
        "task_frontiers": [changed(one, task=HOSTILE) for one in full.task_frontiers],
    }
    full = changed(full, collection=about, duplicates=[names[:3]], outliers=names, **tasks)
    text = markdown.render(changed(full, verdict=data.Verdict("So.", [finding])))
    tokens = parsed(text)
    inside = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inside]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "fence", "code_block"}
    # options of `fit` alone are code
    assert {child.content for child in inside if child.type == "code_inline"} == {"--max-error 0.2", "max_error=0.2"}
    # strong is the verdict, emphasis the advice; names have none
    assert [shown(token) for token in tokens for child in token.children or [] if child.type == "strong_open"] == [
        "So."
    ]
    listed = [row[0] for row in tables(text)["Adapters, the worst first"][0][1:]]
    assert sorted(listed) == sorted(" ".join(name.split()) for name in names)
    assert all_shown(text)[0] == f"12 LoRA adapters of {HOSTILE} in one subspace"
    headings = [token for token in tokens if token.type == "heading_open"]
    assert len(headings) == len(re.findall(r"^#+ ", text, re.MULTILINE))
    # GitHub's own marks, which CommonMark does not know: strikes and formulas
    assert not re.search(r"(?<!\\)[~$]", text)


@pytest.mark.parametrize(
    "words", ["@everyone", "#12", "www.example.com", "https://example.com", "1. a", "2) a", "- a", "+ a", "---"]
)
def test_names_are_no_lists_and_no_headings(words):
    full = report(3)
    finding = data.Finding("loss", words, "", False, [])
    text = markdown.render(changed(full, verdict=data.Verdict(words, [finding]), notes=[words]))
    assert text.splitlines()[2].startswith("**")
    tokens = parsed(text)
    assert "ordered_list_open" not in {token.type for token in tokens}
    assert max(token.level for token in tokens if token.type == "bullet_list_open") == 0
    assert words in all_shown(text)


def test_rows_have_as_many_cells_as_their_head_and_only_some_adapters_are_listed():
    full = report(30, names=[f"n|{n}" for n in range(30)])
    text = markdown.render(full)
    for group in tables(text).values():
        for head, *rows in group:
            assert rows
            assert {len(row) for row in rows} == {len(head)}
    assert len(tables(text)["Adapters, the worst first"][0]) == markdown.MAX_ADAPTERS + 1
    assert "… and 10 more." in all_shown(text)


def test_what_was_not_measured_is_not_spoken_of():
    text = markdown.render(bare(4))
    pairs = itertools.pairwise(parsed(text))
    headings = [shown(after) for token, after in pairs if token.type == "heading_open"]
    assert headings == [
        "4 LoRA adapters of an unnamed base model in one subspace",
        "Adapters, the worst first",
        "Bytes and factors of the adapters",
        "Modules",
        "Components",
        "Bytes",
    ]
    assert "None" not in text
    assert "\n\n\n" not in text


def test_the_same_report_gives_the_same_text():
    assert markdown.render(report(8)) == markdown.render(report(8))
