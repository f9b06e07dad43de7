"""The page: figures as they were planted, names as text, nothing fetched, and sections that vanish."""

import base64
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from documents import Document
from synthetic import HOSTILE, LLAMA, bare, even, hostile_names, report

from eigenlorax.errors import MissingExtraError
from eigenlorax.reports import data
from eigenlorax.reports.comparison_data import Baseline, Bytes, SizePoint, Spread
from eigenlorax.reports.render import page

pytestmark = pytest.mark.slow

ADAPTERS = "All adapters, the worst first"
WEIGHTS = "Bytes and factors of all adapters"
ARXIV = "https://arxiv.org/abs/2502.04700"


def changed(one, **values):
    return dataclasses.replace(one, **values)


@pytest.fixture(scope="module")
def html():
    return page.render(report(7))


@pytest.fixture(scope="module")
def hostile():
    names = hostile_names()
    full = report(len(names), names=names, base_model=HOSTILE)
    about = changed(full.collection, skipped={HOSTILE: HOSTILE}, excluded_modules=[HOSTILE], size=HOSTILE)
    modules = [changed(module, name=f"{HOSTILE}.{n}", kind=HOSTILE) for n, module in enumerate(full.modules)]
    evaluations = [changed(one, data=HOSTILE, task=HOSTILE) for one in full.evaluations]
    frontiers = [
        changed(
            one,
            task=HOSTILE,
            points=[changed(p, runs=[changed(run, name=HOSTILE, data=HOSTILE) for run in p.runs]) for p in one.points],
        )
        for one in full.task_frontiers
    ]
    verdict = data.Verdict(HOSTILE, [data.Finding("loss", HOSTILE, HOSTILE, False, names)])
    tasks = {"evaluations": evaluations, "task_frontiers": frontiers}
    return changed(full, collection=about, modules=modules, verdict=verdict, notes=[HOSTILE], **tasks)


def test_figures_of_adapters_are_in_the_table_the_worst_first():
    full = report(4)
    rows = [
        changed(one, name=f"a{n}", untrained=False, delta_error=error, left_out_error=None, lora_bytes=1_934_567 + n)
        for n, (one, error) in enumerate(zip(full.adapters, (0.987654, 0.5, 0.00012345, 0.0), strict=True))
    ]
    rows[2] = changed(rows[2], left_out_error=0.75, nearest_cosine=-0.25)
    document = Document(page.section("adapters", changed(full, adapters=rows)))
    assert document.column(ADAPTERS, "adapter") == ["a0", "a1", "a2", "a3"]
    assert document.column(ADAPTERS, "delta error") == ["0.988", "0.500", "1.2e-04", "0"]
    assert document.column(ADAPTERS, "left out") == ["–", "–", "0.750", "–"]
    assert document.column(ADAPTERS, "cosine")[2] == "−0.250"
    exact = [found["title"] for text, found in document.all("td") if text == "1.9 MB"]
    assert exact == [f"1,934,5{n} bytes" for n in (67, 68, 69, 70)]


def test_bars_are_as_long_as_the_errors():
    full = report(3)
    rows = [
        changed(
            one,
            name=f"a{n}",
            untrained=False,
            in_fit=n != 1,
            delta_error=error,
            left_out_error=0.7,
            mean_scaled_error=None,
        )
        for n, (one, error) in enumerate(zip(full.adapters, (0.5, 0.3, 0.1), strict=True))
    ]
    html = page.section("adapters", changed(full, adapters=rows))
    section = Document(html[html.index('<ol class="bars"') : html.index("</ol>")] + "</ol>")
    # of an axis that ends at 0.8
    assert [(found["class"], found["style"]) for _, found in section.of_class("bar")] == [
        ("bar", "width:62.50%"),
        ("bar other", "width:37.50%"),
        ("bar", "width:12.50%"),
    ]
    assert [found["style"] for _, found in section.of_class("diamond")] == ["left:87.50%"] * 3
    assert section.of_class("stroke") == []
    assert section.all("li")[1] == (
        "a10.300",
        {"title": "a1: delta error, not in the fit 0.300; left out of the fit 0.700"},
    )


def test_headline_tiles_findings_and_notes():
    full = report(6)
    finding = data.Finding("bytes", "Use `-k 3` <now>.", "Or not.", True, ["a b", "c"])
    out = changed(
        full.left_out,
        errors=Spread(6, 0.765432, 0.8, 0.9, "worst"),
        standard_error=0.0123,
        sampled=5,
        of=6,
    )
    document = Document(
        page.render(
            changed(
                full,
                verdict=data.Verdict("One & only.", [finding]),
                in_fit=Spread(6, 0.123456, 0.2, 0.654321, "worst one"),
                left_out=out,
                bytes=changed(full.bytes, ratio=3.456, limit=123.456),
                notes=["Noted `x`."],
            )
        )
    )
    assert [text for text, _ in document.of_class("headline")] == ["One & only."]
    assert [text for text, _ in document.of_class("finding")] == ["✓Good: Use -k 3 <now>.a bcOr not."]
    tiles = [text for text, _ in document.of_class("tile")]
    assert tiles[0].startswith("Error when left out, mean0.765± 0.012, of 5 adapters; the same in the fit: ")
    assert tiles[1] == "Error in the fit, mean0.123worst 0.654: worst one"
    assert tiles[2] == "LoRA bytes ÷ pack bytes3.46×basis counted; without the basis 123×"
    assert any(
        text.startswith("Each of 5 out of 6 adapters, drawn at random, was projected") for text, _ in document.all("p")
    )
    assert "Noted x." in [text for text, _ in document.all("li")]


def test_tables_of_baselines_bytes_sizes_starts_and_tasks():
    full = report(5)
    gain = Bytes(
        lora_files=9_000_001, lora_stored=8_000_000, lora=6_000_000, lora_float16=4_000_000, basis=1_000_000,
        coefficients=300_000, carried=0, heads=0, ratio=6 / 1.3, limit=20.0, break_even=2, over_n=[(1, 0.5), (5, 4.6)],
    )  # fmt: skip
    baselines = [
        Baseline("pack", "this pack", Spread(5, 0.25, 0.3, 0.5, "w"), 1_300_000),
        Baseline("null", "noise", Spread(5, 0.75, 0.8, 0.9, "w"), None),
    ]
    starts = data.Starts(
        groups=[data.StartGroup(["p", "q"], 0.875, -0.125)],
        energies=[data.StartEnergy("group 1", 2, 8, 0.25, 0.375, 0.125, 0.0625, 0.9999, 1.0)],
    )
    sizes = [SizePoint(k, 0.5 / k, 0.75 / k, 0.6 / k, 0.01, None, 0.9, 1000 * k, 8.0 / k, []) for k in (2, 3)]
    document = Document(page.render(changed(full, bytes=gain, baselines=baselines, starts=starts, sizes=sizes)))
    tables = document.tables
    assert tables["Other methods for these adapters"] == [
        ["method", "mean error", "worst error", "worst adapter", "bytes", "smaller"],
        ["this pack", "0.250", "0.500", "w", "1.3 MB", "4.62×"],
        ["noise", "0.750", "0.900", "w", "–", "–"],
    ]
    assert tables["Tensor bytes, without heads"][1:] == [
        ["LoRAs, at the pack's dtype", "6.0 MB", "1.00×"],
        ["LoRAs, in their own dtypes", "8.0 MB", "–"],
        ["LoRAs, at two bytes per number", "4.0 MB", "–"],
        ["LoRAs, files", "9.0 MB", "–"],
        ["basis", "1.0 MB", "–"],
        ["coefficients", "300.0 kB", "–"],
        ["this pack, total", "1.3 MB", "4.62×"],
    ]
    assert tables["The same adapters with other numbers of components"] == [
        ["k", "mean error", "worst error", "random", "null model", "bytes", "ratio"],
        ["2", "0.250", "0.375", "0.900", "0.300", "2.0 kB", "4.00×"],
        ["3", "0.167", "0.250", "0.900", "0.200", "3.0 kB", "2.67×"],
    ]
    assert tables["Groups that share a start"][1] == ["group 1", "2", "+0.875", "−0.125"]
    assert tables["Energy that k components keep"][1] == [
        "group 1",
        "2",
        "0.250",
        "0.125",
        "0.375",
        "0.062",
        ">0.999",
        "1.000",
    ]
    # by task, so that neither has columns of the other
    assert [text for text, _ in document.all("h3") if "-" in text] == ["text-classification", "causal-lm"] * 2


def test_each_task_has_its_own_columns():
    full = report(5)
    for kind, has, lacks in (
        ("text-classification", "accuracy: stored", "perplexity: stored"),
        ("causal-lm", "perplexity: stored", "accuracy: stored"),
    ):
        one = changed(full, evaluations=[row for row in full.evaluations if row.task == kind])
        heads = Document(page.section("task", one)).tables["Adapters on their task"][0]
        assert has in heads
        assert lacks not in heads


def test_names_are_text_wherever_they_stand(hostile):
    html = page.render(hostile)
    document = Document(html)
    assert len(document.all("script")) == 1
    assert document.all("img") == []
    assert document.all("title")[0][0] == f"12 LoRA adapters of {HOSTILE} · eigenlorax"
    assert sorted(document.column(ADAPTERS, "adapter")) == sorted(hostile_names())
    assert not [name for _, found in document.elements for name in found if name.startswith("on")]
    assert [text for text, _ in document.of_class("headline")] == [HOSTILE.replace("`", "`")]
    # inside of pictures too: names there are on one line, and shortened
    pictured = {text for text, _ in document.all("text")}
    assert "a b # c" in pictured
    assert "[a](javascript:alert(1))" in pictured
    tooltips = [text for text, _ in document.all("title")[1:]]
    assert any(text.startswith(f"{HOSTILE}: delta error ") for text in tooltips)


@pytest.mark.parametrize("make", [report, bare], ids=["full", "bare"])
def test_the_page_refers_to_nothing_outside(make):
    html = page.render(make(7))
    for tag, found in Document(html).elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form", "video", "audio"}
        for name, value in found.items():
            if name == "href" and tag == "a":
                assert value.startswith("#") or value == ARXIV
            elif name in {"src", "href", "xlink:href", "srcset", "action", "background", "poster"}:
                assert value.startswith(("#", "data:image/png;base64,"))
    assert set(re.findall(r"url\(.", html)) <= {"url(#"}
    assert "@import" not in html
    outside = set(re.findall(r"https?://[^\s\"'<)]+", html))
    assert outside <= {ARXIV, "http://www.w3.org/2000/svg"}


def test_the_policy_lets_one_script_run_and_nothing_load(html):
    document = Document(html)
    policy = next(found["content"] for _, found in document.all("meta") if "http-equiv" in found)
    script = document.all("script")[0][0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_links_lead_to_sections_and_ids_are_unique(html):
    document = Document(html)
    ids = [found["id"] for _, found in document.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    links = [found["href"][1:] for _, found in document.all("a") if found["href"].startswith("#")]
    assert links == [found["id"] for _, found in document.all("section") if "card" in found.get("class", "")]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert used <= set(ids)


def test_pictures_and_tables_can_be_read_without_eyes(html):
    document = Document(html)
    assert document.all("svg")
    assert all(found["role"] == "img" and found["aria-label"] for _, found in document.all("svg"))
    assert all(found["scope"] in {"col", "row"} for _, found in document.all("th"))
    assert len(document.all("caption")) == len(document.all("table"))
    # a box that scrolls takes the focus, so that keys can scroll it
    assert all(found["tabindex"] == "0" and found["aria-label"] for _, found in document.of_class("scroll"))
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert dict(document.elements)["html"] == {"lang": "en"}


def test_what_was_not_measured_has_no_section_no_tile_and_no_column():
    document = Document(page.render(bare(4)))
    assert [text for text, _ in document.all("h2")] == ["Module by module", "Adapter by adapter", "Bytes"]
    assert [text[:4] for text, _ in document.of_class("tile")] == ["LoRA"]
    assert document.tables[ADAPTERS][0] == ["adapter", "delta error", "state"]
    assert document.tables[WEIGHTS][0] == [
        "adapter", "LoRA", "in the pack", "rounding", "rank", "modules", "carried", "head"
    ]  # fmt: skip
    assert [text for text, _ in document.all("svg")] == []


@pytest.mark.parametrize(
    ("lacking", "titles"),
    [
        (("left_out", "starts", "sizes", "frontier"), ["Bytes at an error", "With more or fewer components"]),
        (
            ("similarity", "in_fit", "projected", "baselines", "evaluations"),
            ["Other methods", "On the task"],
        ),
        (("task_frontiers",), ["Bytes and scores on the task"]),
    ],
)
def test_some_things_may_be_missing(lacking, titles, html):
    full = report(7)
    values = {name: [] if isinstance(getattr(full, name), list) else None for name in lacking}
    found = [text for text, _ in Document(page.render(changed(full, **values))).all("h2")]
    assert [text for text, _ in Document(html).all("h2") if text not in found] == titles


def test_one_adapter_and_none_that_is_trained():
    one = report(2)
    alone = changed(one.similarity, cosine=[[1.0]], overlap=[[1.0]], tree=[], clusters=[])
    only = changed(one, adapters=one.adapters[:1], similarity=alone, untrained=[])
    assert Document(page.render(only)).column(ADAPTERS, "adapter") == [one.adapters[0].name]
    idle = [changed(row, untrained=True, delta_error=0.0) for row in bare(3).adapters]
    document = Document(page.render(changed(bare(3), adapters=idle)))
    assert document.column(ADAPTERS, "state") == ["untrained"] * 3
    assert document.of_class("bars") == []


def test_a_model_without_layers_has_bars_of_modules():
    full = report(4)
    modules = [changed(module, layer=None, delta_error=0.01 * n) for n, module in enumerate(full.modules)]
    html = page.section("modules", changed(full, modules=modules))
    listed = html[html.index('aria-label="Delta error by module') :].split("</ol>")[0]
    said = re.findall(r'class="said" aria-hidden="true">([^<]+)<', listed)
    assert said[:3] == ["0.230", "0.220", "0.210"]
    assert len(said) == 24


def test_a_thousand_adapters_stay_small(tmp_path):
    full = report(1000)
    html = page.render(full)
    assert len(html.encode()) < 5_000_000
    document = Document(html)
    assert len(document.tables[ADAPTERS]) == 1001
    bars = html[html.index('aria-label="Delta error by adapter') :].split("</ol>")[0]
    # and the axis
    assert bars.count("<li") == 41
    assert "The 40 worst of 999 adapters." in html


def test_many_kinds_of_modules():
    html = page.render(report(9, layers=31, kinds=LLAMA, width=96))
    assert {"q_proj", "down_proj"} <= {text for text, _ in Document(html).all("text")}


def test_the_same_report_gives_the_same_bytes(html):
    assert page.render(report(7)) == html
    # of another process, whose sets have another order
    code = "import hashlib; from synthetic import report; from eigenlorax.reports.render import page\n"
    code += "print(hashlib.sha256(page.render(report(7)).encode()).hexdigest())"
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": folders, "PYTHONHASHSEED": "3", "TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(html.encode()).hexdigest()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eigenlorax\[report\]'"):
        page.render(report(3))


@pytest.mark.parametrize(("trained", "pictured"), [(2, []), (3, ["matrices", "points"])])
def test_two_adapters_are_no_picture(trained, pictured):
    section = page.section("similarity", report(trained + 1))
    drawn = {found["id"].split("-")[0] for _, found in Document(f"<div>{section}</div>").elements if "id" in found}
    assert sorted(drawn) == pictured
    assert f"of {trained} trained adapters are compared." in section


def test_what_is_not_there_is_not_in_the_captions():
    full = report(6)
    near = changed(full.similarity, clusters=[], map_share=None, of="pack")
    section = page.section("similarity", changed(full, similarity=near, outliers=[]))
    assert "as the pack reconstructs them" in section
    assert not re.search("coloured by cluster|ringed|squared distance|<h3>Clusters", section)
    assert "Each point is an adapter; near points have similar updates" in section


@pytest.mark.parametrize(
    ("adapters", "error", "cosine"),
    # one adapter has no cosine, two have no map
    [(1, 0.25, 1.0), (2, 0.0, 0.0), (3, 0.0, 0.0), (3, 5e-8, 0.02), (3, 0.25, 1.0)],
)
def test_figures_that_are_all_equal_give_pictures_and_no_warning(adapters, error, cosine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = page.render(even(adapters, error=error, cosine=cosine))
    drawn = {found["aria-label"] for _, found in Document(html).all("svg")}
    assert any(label.startswith("Similarity of") for label in drawn) == (adapters > 2)
    assert "Delta error by layer and kind of module" in drawn


@pytest.mark.parametrize(("error", "worst"), [(5e-8, False), (0.25, True)])
def test_only_a_loss_is_pointed_at(error, worst):
    section = page.section("modules", even(2, error=error))
    assert ("★" in section) is worst
    assert ("The star is on the worst module." in section) is worst
    assert ("It is largest in" in section) is worst
    assert ("The largest error of a module is" in section) is not worst
