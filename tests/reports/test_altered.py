"""Reports that somebody has altered: read, they are refused by an error of ours, or shown in every form."""

import json
import random

import pytest
from altered import alter
from synthetic import HOSTILE, bare
from synthetic import report as synthetic

import eigenlorax as ex
from eigenlorax.errors import FormatError
from eigenlorax.reports import json_document
from eigenlorax.reports.render import markdown, page
from planted import shared_collection

pytestmark = pytest.mark.slow

# a page takes a second to draw
CASES, PAGES, ALTERATIONS = 300, 1, 40


@pytest.fixture(scope="module")
def documents():
    adapters = shared_collection(4, noise=0.05)[0]
    real = ex.report(ex.fit(adapters, n_components=3), adapters)
    return [json.loads(json_document.to_json(one)) for one in (real, synthetic(5, layers=2), bare())]


def read(document, path):
    """The report, or None where it is refused."""
    path.write_text(json.dumps(document), encoding="utf-8")
    try:
        return ex.Report.load(path)
    except FormatError:
        return None


@pytest.mark.parametrize("which", [0, 1], ids=["real", "with every field"])
def test_what_is_read_is_shown_as_markdown_and_json(documents, tmp_path, which):
    chance = random.Random(which)
    shown = 0
    for _ in range(CASES):
        altered = alter(documents[which], chance, times=chance.choice([1, 1, 2, 3]))
        found = read(altered, tmp_path / "report.json")
        if found is not None:
            shown += 1
            assert markdown.render(found)
            assert json.loads(json_document.to_json(found))["notes"] == found.notes
    assert CASES / 10 < shown < CASES / 2


@pytest.mark.parametrize("which", [0, 1, 2], ids=["real", "with every field", "with none that may be missing"])
def test_what_is_read_is_shown_as_a_page(documents, tmp_path, which):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")
    chance = random.Random(which)
    for _ in range(PAGES):
        kept, found = documents[which], None
        for _ in range(ALTERATIONS):
            altered = alter(kept, chance)
            read_again = read(altered, tmp_path / "report.json")
            if read_again is not None:
                kept, found = altered, read_again
        assert found is not None
        assert page.render(found).endswith("</html>\n")


def changed(document, path, value):
    document = json.loads(json.dumps(document))
    *parents, last = path
    holder = document
    for key in parents:
        holder = holder[key]
    holder[last] = value(holder[last]) if callable(value) else value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ["frontier", "points", 1, "way"],
            "other",
            r"report.frontier.points\[1\].way is 'other'; expected the pack first",
        ),
        (["frontier", "points", 0, "way"], "rounded", r"report.frontier.points\[0\].way is 'rounded'"),
        (["frontier", "points"], [], "report.frontier.points is empty"),
        (["task_frontiers", 0, "points", 1, "ratio"], 1234.5, r"points has fits at ratios \[1234.5, "),
        (["task_frontiers", 0, "points", 1, "runs"], [], r"points\[1\].runs have other adapters or files"),
        (
            ["similarity", "cosine", 0],
            lambda row: row[1:],
            r"similarity.cosine has 4 rows of \[3, 4\] items, expected 4 of 4",
        ),
        (["similarity", "overlap"], [], r"similarity.overlap has 0 rows of \[\] items, expected 4 of 4"),
        (["similarity", "tree", 0, 0], 99.0, r"similarity.tree\[0\] joins 99 and "),
        (["similarity", "tree"], lambda rows: rows[1:], "similarity.tree has 2 rows"),
        (["module_errors"], lambda rows: rows[1:], r"module_errors has 4 rows of \[4\] items, expected 5 of 4"),
        (["outliers"], ["nobody"], "report.outliers names 'nobody', which is not among the adapters"),
        (["modules", 0, "worst"], "nobody", "report.modules names 'nobody'"),
        (["in_fit", "worst_adapter"], "nobody", "report.in_fit names 'nobody'"),
        (["adapters", "cluster", 0], 99, r"report.adapters\[0\].cluster is 99, but there are \d clusters"),
        (["adapters", "name", 0], lambda _: None, r"report.adapters\[0\].name is null; str was expected"),
        (["adapters", "name"], lambda names: [*names[1:], names[1]], "report.adapters contains .* 2 times"),
        (["collection", "adapters"], 6, "report.collection.adapters is 6, but report.adapters has 5 items"),
        (["modules", 0, "down", "dimension"], 0, r"report.modules\[0\].down.dimension must be positive, got 0"),
        (["modules", 0, "up", "k"], 9999, r"report.modules\[0\].up has 9999 components, but only"),
        (
            ["modules", 0, "up", "null"],
            [0.0, 0.0],
            r"report.modules\[0\].up.null must be non-negative and not all zero",
        ),
        (["left_out", "seed"], -1, "report.left_out.seed must be an integer .* got -1"),
        (["bytes", "heads"], 2**63, "report.bytes.heads must be an integer .* got 9223372036854775808"),
        (["left_out", "standard_error"], 1e200, r"report.left_out.standard_error must be a number .* got 1e\+200"),
        (["runs", 0, "adapters"], ["nobody"], "report.runs names 'nobody', which is not among the adapters"),
        (["histories", 0, "versions"], [], r"report.histories\[0\] has no versions"),
        (["histories", 0, "name"], HOSTILE, r"report.histories contains .* 2 times"),
        (["histories", 0, "versions", 2, "x"], None, r"histories\[0\].versions\[2\] has some of x, y and to_final"),
        (
            ["histories", 0, "versions", 0],
            lambda version: {**version, "x": None, "y": None, "to_final": None},
            r"histories\[0\]: the first and the last version have no position",
        ),
        (["histories", 0, "versions", 0, "metrics", "epoch"], 1e200, r"versions\[0\].metrics.epoch must be a number"),
        (["schema_version"], [[]], "schema_version is an array; int was expected"),
        (["notes"], json.loads("[" * 900 + "]" * 900), r"report.notes\[0\] is an array; str was expected"),
    ],
)
def test_what_does_not_fit_together_is_named(documents, tmp_path, path, value, message):
    altered = changed(documents[1], path, value)
    (tmp_path / "report.json").write_text(json.dumps(altered))
    with pytest.raises(FormatError, match=message):
        ex.Report.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    "text", ['{"schema": "eigenlorax-report", "notes": 1e999}', "[" * 100_000, "1" * 5000, "\udcff"]
)
def test_what_is_hardly_json_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(FormatError, match=r"report.json (is not valid JSON|does not match the schema)"):
        ex.Report.load(tmp_path / "report.json")
