"""Pieces of the pictures: numbers as text, axes, averages, labels of kinds, and SVG that is the page's own."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from documents import Document
from hypothesis import given
from hypothesis import strategies as st
from synthetic import even, report

from eigenlorax.reports import numbers
from eigenlorax.reports.render import bars
from eigenlorax.reports.render.figures import curves, error_plots, maps, module_labels, svg


def changed(one, **values):
    return dataclasses.replace(one, **values)


def texts(drawn):
    return [text for text, _ in Document(drawn).all("text")]


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (numbers.error, 0.12345, "0.123"),
        (numbers.error, 0.001, "0.001"),
        (numbers.error, 0.00099, "9.9e-04"),
        (numbers.error, 0.0, "0"),
        (numbers.error, 1.25, "1.250"),
        (numbers.share, 0.9995, ">0.999"),
        (numbers.share, 0.9994, "0.999"),
        (numbers.share, 1.0, "1.000"),
        (numbers.cosine, -0.5, "−0.500"),
        (numbers.cosine, 0.5, "+0.500"),
        (numbers.ratio, 2.954, "2.95×"),
        (numbers.ratio, 12.34, "12.3×"),
        (numbers.ratio, 1234.5, "1,234×"),
        (numbers.size, 999, "999 bytes"),
        (numbers.size, 1000, "1.0 kB"),
        (numbers.size, 999_950, "1.0 MB"),
        (numbers.size, 1_250_000_000, "1.2 GB"),
        (numbers.norm, 52.123, "52.1"),
        (numbers.plain, 13.9249, "13.92"),
        (numbers.count, 1234, "1,234"),
    ],
)
def test_numbers(show, value, text):
    assert show(value) == text
    assert show(None) == "–"


def test_names_are_shortened_in_the_middle_and_on_one_line():
    assert numbers.shortened("abcdefghij", 10) == "abcdefghij"
    assert numbers.shortened("abcdefghijk", 10) == "abcd…ghijk"
    assert numbers.shortened("a\n b", 10) == "a b"
    assert numbers.split_names(list("abcd"), 3) == (list("abcd"), [])
    assert numbers.split_names(list("abcde"), 3) == (list("abc"), list("de"))


@given(st.floats(min_value=1e-8, max_value=1e8))
def test_an_axis_holds_its_largest_value_and_little_more(largest):
    end = bars.axis_end(largest)
    assert largest <= end * (1 + 1e-9)
    assert end <= 2 * largest * (1 + 1e-9)


@pytest.mark.parametrize(
    ("largest", "end"), [(0.0, 1.0), (0.398, 0.4), (0.41, 0.8), (0.97, 1.0), (1.0, 1.0), (1.56, 1.6), (3e-7, 4e-7)]
)
def test_the_end_of_an_axis_is_a_round_number(largest, end):
    assert bars.axis_end(largest) == pytest.approx(end, rel=1e-12)


@pytest.mark.parametrize(("error", "end"), [(5e-8, "0.1"), (0.0, "0.1"), (0.3, "0.4")])
def test_bars_of_nearly_nothing_are_short(error, end):
    kind = bars.Kind("bar", "delta error")
    chart = bars.Chart("one", [bars.Bar("a", bars.Mark(kind, error, ""))])
    assert chart.ticks[-1] == (100, end)
    assert chart.position(error) == f"{100 * error / float(end):.2f}%"


@pytest.mark.parametrize(
    ("cosine", "ends"), [(0.02, {"−0.20", "0.20", "0.30"}), (0.8, {"−0.80", "0.80", "0.64", "0.32"})]
)
def test_colours_of_likeness_end_at_the_largest_or_where_it_is_worth_a_colour(cosine, ends):
    found = texts(maps.matrices(even(4, cosine=cosine).similarity))
    # the dendrogram's axis has numbers too
    assert set(found) >= ends


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_directions_are_counted_in_whole_numbers(directions):
    full = report(3, layers=2)
    values = {
        "spectrum": [0.2] * directions,
        "null": [],
        "angles": [9.0] * directions,
        "null_angles": [80.0] * directions,
        "k": 1,
    }
    modules = [changed(one, down=changed(one.down, **values), up=changed(one.up, **values)) for one in full.modules]
    planted = changed(full, modules=modules)
    for drawn, label in (
        (curves.scree(planted, "down"), "component"),
        (curves.cumulative(planted, "up"), "components"),
        (curves.angles(planted), "principal angle, in order"),
    ):
        found = texts(drawn)
        # numbers of the x axis come before its label
        assert found[: found.index(label)] == [str(n) for n in range(1, directions + 1)]


def test_a_matrix_is_averaged_by_blocks():
    table = np.random.default_rng(5).normal(size=(7, 7))
    starts = [0, 2, 4, 7]
    blocks = list(itertools.pairwise(starts))
    wanted = [[table[a:b, c:d].mean() for c, d in blocks] for a, b in blocks]
    np.testing.assert_allclose(maps.downsampled(table, 3), wanted, rtol=1e-12)
    np.testing.assert_array_equal(maps.downsampled(table, 7), table)


def test_kinds_are_called_by_what_tells_them_apart():
    assert module_labels.labels(["encoder.layer.*.attention.query", "encoder.layer.*.attention.value"]) == {
        "encoder.layer.*.attention.query": "query",
        "encoder.layer.*.attention.value": "value",
    }
    found = module_labels.labels(["l.*.attention.output.dense", "l.*.output.dense", "l.*.intermediate.dense", "*"])
    assert found["l.*.attention.output.dense"] == "attention.output.dense"
    assert found["l.*.intermediate.dense"] == "intermediate.dense"
    assert len(set(found.values())) == 4


def test_more_kinds_than_colours_are_drawn_as_one():
    modules = report(3, layers=2, kinds=[f"m{n}.p" for n in range(9)]).modules
    groups = module_labels.grouped(modules, 4)
    assert [len(group) for group in groups.values()] == [2, 2, 2, 12]
    assert list(groups)[-1] == "6 others"
    assert len(module_labels.grouped(modules, 9)) == 9


def test_the_heat_map_has_the_errors_and_a_star_on_the_worst():
    full = report(3, layers=3)
    errors = [0.11, 0.22, 0.33, None, 0.77, 0.44]
    modules = [changed(one, delta_error=error) for one, error in zip(full.modules, errors, strict=True)]
    found = texts(error_plots.layers(changed(full, modules=modules)))
    # query, then value, each by layer; nothing where nothing is known
    assert [text for text in found if re.fullmatch(r"0\.\d\d( ★)?", text)] == ["0.11", "0.33", "0.77 ★", "0.22", "0.44"]
    assert found[:2] == ["0", "1"]
    assert {"query", "value", "layer"} <= set(found)


def test_a_heat_map_needs_layers_and_kinds():
    full = report(3, layers=2)
    assert error_plots.has_grid(full)
    assert not error_plots.has_grid(report(3, layers=1))
    assert not error_plots.has_grid(report(3, kinds=["p"]))
    assert not error_plots.has_grid(changed(full, modules=[changed(full.modules[0], layer=None), *full.modules[1:]]))


def test_spectra_are_means_over_a_kind_and_their_sums():
    full = report(5, layers=2, kinds=["p", "q"])
    spectra = {"p": ([0.5, 0.3], [0.7, 0.1]), "q": ([0.9], [0.5, 0.4])}
    modules = [
        changed(
            one,
            down=changed(one.down, k=2, spectrum=spectra[one.kind[-1]][one.layer], null=[0.6, 0.4]),
            up=changed(one.up, spectrum=[], null=[]),
        )
        for one in full.modules
    ]
    found = curves.spectra(changed(full, modules=modules), "down")
    assert list(found) == ["p", "q", "null model"]
    np.testing.assert_allclose(found["p"], [0.6, 0.2])
    # one that has ended adds nothing
    np.testing.assert_allclose(found["q"], [0.7, 0.2])
    np.testing.assert_allclose(found["null model"], [0.6, 0.4])
    assert curves.spectra(changed(full, modules=modules), "up") == {}
    assert "k = 2" in texts(curves.cumulative(changed(full, modules=modules), "down"))


def test_points_of_the_map_say_their_names():
    full = report(8)
    found = [text for text, _ in Document(maps.points(full)).all("title")]
    shown = [one for one in full.adapters if one.x is not None]
    assert len(found) == 7
    for one, text in zip(shown, found, strict=True):
        cluster = "in no cluster" if one.cluster is None else f"cluster {one.cluster + 1}"
        assert text == f"{one.name}: delta error {one.delta_error:.3f}, {cluster}"
    assert {one.cluster for one in shown} >= {None, 0}


def test_a_picture_is_the_pages_own():
    def paint(figure):
        axis = figure.subplots()
        axis.plot([1, 2], [3, 4], color=svg.series(1), label="<a> & $x$")
        axis.legend()

    drawn = svg.draw("mine", (300, 200), 'said "so"', paint)
    assert drawn == svg.draw("mine", (300, 200), 'said "so"', paint)
    document = Document(drawn)
    (_, root), *_ = document.all("svg")
    assert (root["width"], root["height"], root["viewbox"]) == ("300", "200", "0 0 300 200")
    assert root["aria-label"] == 'said "so"'
    assert "<a> & $x$" in texts(drawn)
    ids = [found["id"] for _, found in document.elements if "id" in found]
    assert ids
    assert all(one.startswith("mine-") for one in ids)
    assert "var(--ink-series-1)" in drawn
    # every colour is the page's: no stand-in, no black, no white is left
    assert re.findall(r"#[0-9a-f]{6}", drawn) == []
    assert "font-family" not in drawn


def test_series_repeat_after_the_last_colour():
    assert len({svg.series(n) for n in range(svg.SERIES)}) == svg.SERIES
    assert svg.series(svg.SERIES + 2) == svg.series(2)
