"""Bytes at an error beside the pack: of planted collections whose best way is known, whole or on some modules."""

import dataclasses

import pytest
from documents import Document
from synthetic import report

import eigenlorax as ex
from eigenlorax.core.adapter import from_factors
from eigenlorax.core.batch import pad_factors
from eigenlorax.reports import findings, frontier
from eigenlorax.reports.analysis import per_adapter
from eigenlorax.reports.analysis.shared_basis import SHARED_BASIS
from eigenlorax.reports.comparison_data import Frontier, FrontierPoint
from eigenlorax.reports.render import markdown, page
from made import of_one_subspace, random
from planted import MODULES

CAPTION = "Bytes at an error, by method"


def adapters_of(made):
    return [from_factors(f"a{i:02}", one, base_model="org/base") for i, one in enumerate(made)]


def report_of(made, k):
    adapters = adapters_of(made)
    pack = ex.fit(adapters, n_components=k, dtype="float16", warn_above=1.0)
    return pack, ex.report(pack, adapters, left_out=1)


@pytest.fixture(scope="module")
def shared():
    return report_of(of_one_subspace(40, noise=0.05, shapes=MODULES), 6)


@pytest.fixture(scope="module")
def strangers():
    return report_of(random(4, shapes=MODULES), 6)


def test_the_pack_is_where_its_records_say(shared):
    pack, found = shared
    own = found.frontier.points[0]
    assert (own.way, own.settings) == ("pack", "")
    assert own.stored_bytes == pack.info.stored_bytes + sum(r.coefficient_bytes for r in pack.records.values())
    assert own.worst == max(record.delta_error for record in pack.records.values())
    assert (found.frontier.adapters, found.frontier.modules, found.frontier.of) == (40, 2, 2)
    assert found.frontier.lora_float16 == 2 * 40 * 3 * sum(sum(shape) for shape in MODULES.values())


def test_points_are_those_of_the_baselines_and_go_down(strangers):
    _, found = strangers
    made = random(4, shapes=MODULES)
    modules = {m: pad_factors([one[m] for one in made], n_in, n_out) for m, (n_out, n_in) in MODULES.items()}
    points = found.frontier.points[1:]
    tables = per_adapter.tables(modules)
    both = [point for point in points if point.way == per_adapter.BOTH]
    by_error = [per_adapter.at_error(tables, error)[per_adapter.BOTH] for error in frontier.ERRORS]
    expected = {each.stored_bytes for each in by_error if each is not None}
    assert {point.stored_bytes for point in both} >= expected - {max(expected)}
    for way in frontier.METHODS:
        line = [point for point in points if point.way == way]
        assert sorted(line, key=lambda point: point.stored_bytes) == line
        assert sorted(line, key=lambda point: -point.worst) == line
    # cut to the pack's own error too
    worst = found.frontier.points[0].worst
    expected = per_adapter.at_error(tables, worst)[per_adapter.BOTH]
    assert frontier.cheapest(found.frontier).stored_bytes <= expected.stored_bytes
    assert any(point.stored_bytes == expected.stored_bytes for point in both)


def test_where_much_is_shared_a_shared_basis_is_best_and_the_verdict_knows_others(shared, strangers):
    _, found = shared
    assert frontier.cheapest(found.frontier).way == SHARED_BASIS
    _, alone = strangers
    best = frontier.cheapest(alone.frontier)
    assert best.way == per_adapter.BOTH
    assert best.stored_bytes < alone.frontier.points[0].stored_bytes
    told = [one.text for one in alone.verdict.findings if one.kind == "baseline"]
    assert frontier.at_equal_error(alone.frontier) in told


def compared(*points):
    """A report of which the frontier has these points."""
    full = report(6)
    made = [FrontierPoint(method, "", size, error, error) for method, size, error in points]
    changed = dataclasses.replace(full, frontier=dataclasses.replace(full.frontier, points=made))
    return [
        finding for finding in findings.collect(changed, changed.verdict.findings[0]) if "best other" in finding.text
    ]


@pytest.mark.parametrize(
    ("points", "good"),
    [
        ([("pack", 114_000, 0.1), ("rounded", 342_000, 0.09)], True),
        ([("pack", 114_000, 0.1), ("rounded", 342_000, 0.09), ("codec", 80_000, 0.1)], None),
        ([("pack", 114_000, 0.1), ("rounded", 90_000, 0.09), ("codec", 80_000, 0.1)], False),
    ],
    ids=["smallest", "the codec is smaller", "another is smaller"],
)
def test_a_pack_that_is_smaller_than_other_methods_is_not_marked_against_itself(points, good):
    (finding,) = compared(*points)
    assert finding.good is good


def test_bytes_at_a_smaller_error_say_so():
    (finding,) = compared(("pack", 300_000, 0.793), ("rounded", 50_000, 0.7), ("codec", 116_000, 0.5))
    assert finding.text.endswith("`--max-error 0.5` (`max_error=0.5`) would take about 116.0 kB, at a smaller error.")
    (finding,) = compared(("pack", 300_000, 0.5), ("rounded", 50_000, 0.5), ("codec", 116_000, 0.5))
    assert finding.text.endswith("would take about 116.0 kB.")


def test_a_large_collection_is_tried_on_some_modules(monkeypatch):
    shapes = {f"layers.{i}.query": (41, 29) for i in range(6)}
    made = random(5, shapes=shapes)
    whole = report_of(made, 4)[1].frontier
    monkeypatch.setattr(frontier, "NUMBERS", 2 * 5 * 3 * (41 + 29))
    some = report_of(made, 4)[1].frontier
    assert (some.modules, some.of, whole.modules) == (2, 6, 6)
    assert some.points[0] == whole.points[0]
    for way in (per_adapter.ROUNDED, per_adapter.BOTH):
        few, many = ([p for p in each.points if p.way == way][-1] for each in (some, whole))
        assert few.stored_bytes == pytest.approx(many.stored_bytes, rel=0.1)


def test_no_frontier_without_originals_or_without_training():
    adapters = adapters_of(random(3, shapes=MODULES))
    pack = ex.fit(adapters, n_components=4, warn_above=1.0)
    assert ex.report(pack).frontier is None


class TestShown:
    def test_on_the_page_with_its_table(self):
        full = report(6)
        document = Document(page.section("frontier", full))
        head, first, *rest = document.tables[CAPTION]
        assert head == ["method", "settings", "worst error", "mean error", "bytes", "smaller"]
        assert first[:2] == ["this pack", "–"]
        assert len(rest) == len(full.frontier.points) - 1
        labels = [found.get("aria-label") for tag, found in document.elements if tag == "svg"]
        assert "Bytes over the worst adapter's error, by method" in labels
        assert any("Measured on 2 of 4 modules" in text for text, _ in document.all("figcaption"))

    def test_in_markdown(self):
        text = markdown.render(report(6))
        section = text.partition("## Bytes at an error")[2].partition("\n## ")[0]
        assert "For the pack's worst error of" in section
        assert "Measured on 2 of 4 modules" in section
        assert "| joint diagonalisation, full cores | k = 8, 8 bits |" in section

    def test_nothing_where_there_is_but_the_pack(self):
        full = report(6)
        for frontier_of_pack in (dataclasses.replace(full.frontier, points=full.frontier.points[:1]), None):
            without = dataclasses.replace(full, frontier=frontier_of_pack)
            assert page.section("frontier", without) == ""
            assert "## Bytes at an error" not in markdown.render(without)

    def test_an_error_of_nothing_can_be_drawn(self):
        full = report(6)
        pack = dataclasses.replace(full.frontier.points[0], worst=0.0, mean=0.0)
        exact = dataclasses.replace(full.frontier, points=[pack, *full.frontier.points[1:]])
        assert CAPTION in page.section("frontier", dataclasses.replace(full, frontier=exact))
        assert frontier.at_equal_error(exact) == "No other method that was tried reaches the pack's worst error of 0."


def test_a_sentence_says_what_is_best():
    points = [
        FrontierPoint("pack", "", 2_000_000, 0.25, 0.2),
        FrontierPoint("rounded", "", 900_000, 0.3, 0.2),
        FrontierPoint("shared basis", "k = 16, 8 bits", 1_500_000, 0.25, 0.2),
        FrontierPoint("truncated and rounded", "", 1_600_000, 0.2, 0.2),
    ]
    assert frontier.at_equal_error(Frontier(3, 1, 1, None, 9, points)) == (
        "For the pack's worst error of 0.250, the best other method takes 1.5 MB: one shared basis (k = 16, 8 bits). "
        "The pack takes 2.0 MB."
    )


class TestOnTask:
    """Bytes, and what becomes of the task: of a language model, and of a classifier, with two ratios each."""

    def test_in_a_sentence(self):
        found, _ = report(6).task_frontiers
        assert frontier.on_task(found) == (
            "Compared with LoRAs truncated and rounded to the same bytes, the predictions of the fit are closer to the "
            "originals at 1 of 2 ratios, and less close at 1."
        )

    def test_in_markdown(self):
        text = markdown.render(report(6))
        section = text.partition("## Bytes and scores on the task: causal-lm")[2].partition("\n## ")[0]
        assert frontier.on_task(report(6).task_frontiers[1]) in section
        assert "| original adapters, 16 bits | – | 20.0 MB | 1.00× | – | – | 8.5 | – | 0 |" in section
        assert "| fitted at a ratio | 50 | 400.0 kB | 50.0× | 0.300 | 0.200 | 8.5 | 0.950 | 0.910 |" in section
        assert "| no update | – | 0 bytes | – | – | – | 13.92 | – | 0.610 |" in section
        assert "### KL of every adapter" in section
        assert "accuracy" not in section.replace("accuracy: ", "").casefold()

    def test_on_the_page_with_pictures_and_tables(self):
        document = Document(page.section("task-bytes", report(6)))
        labels = [found.get("aria-label") for tag, found in document.elements if tag == "svg"]
        for label in (
            "text-classification: accuracy over bytes",
            "text-classification: KL from the originals, nats over bytes",
            "causal-lm: perplexity over bytes",
        ):
            assert label in labels
        head, *rows = document.tables["KL of every adapter"]
        assert head == [
            "adapter",
            "rows from",
            "this pack",
            "ratio 5",
            "ratio 5, truncated and rounded",
            "ratio 50",
            "ratio 50, truncated and rounded",
        ]
        assert rows[0][2:] == ["0.012", "4.0e-04", "7.0e-04", "0.910", "0.830"]

    @pytest.mark.parametrize("stored", [0, 1])
    def test_a_way_of_no_bytes_can_be_drawn(self, stored):
        full = report(6)
        (one, other) = full.task_frontiers
        points = [dataclasses.replace(point, stored_bytes=stored, kl=0.0) for point in one.points]
        made = dataclasses.replace(full, task_frontiers=[dataclasses.replace(one, points=points), other])
        assert "accuracy over bytes" in page.section("task-bytes", made)
