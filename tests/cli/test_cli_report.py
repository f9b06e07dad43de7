"""`eigenlorax report`, and the report that `eigenlorax fit` leaves."""

import errno
import json
import shutil

import pytest

import eigenlorax as ex
from eigenlorax import keys
from eigenlorax.reports import extra, stored
from outcomes import assert_refused, contents, json_of, succeeded

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[report]'")


@pytest.fixture
def inside(pack, monkeypatch):
    monkeypatch.chdir(pack.parent)
    return pack.parent


class TestReport:
    def test_prints_the_verdict_and_writes_what_is_asked_for(self, cli, inside):
        done = succeeded(cli("report", "pack", "--adapters", "in", "-o", "r/a.html", "-o", "r/a.md", "-o", "r/a.json"))
        report = ex.Report.load("r/a.json")
        assert done.out.startswith(report.verdict.headline)
        for finding in report.verdict.findings:
            assert finding.text in done.out
        assert report.verdict.headline in (inside / "r/a.md").read_text("utf-8")
        assert (inside / "r/a.html").read_text("utf-8").startswith("<!doctype html>")
        assert "r/a.html was written" in done.err
        assert report == ex.report(ex.Pack.open("pack"), "in")

    def test_json_is_that_of_the_file(self, cli, inside):
        done = cli("report", "pack", "-a", "in/alpha", "-a", "in/beta", "-a", "in/gamma", "--json", "-o", "a.json")
        assert json_of(done) == json.loads((inside / "a.json").read_text("utf-8"))
        assert len(json_of(done)["adapters"]) == 3

    def test_changes_nothing_in_the_pack(self, cli, inside):
        before = contents(inside)
        succeeded(cli("report", "pack", "-a", "in"))
        assert contents(inside) == before

    def test_of_the_pack_alone_says_what_is_missing(self, cli, inside):
        done = succeeded(cli("report", "pack"))
        assert done.out.startswith("The pack alone does not tell")
        assert "--adapters" in done.out

    @pytest.mark.parametrize(("asked", "left_out"), [("2", 2), ("all", 3), ("99", 3)])
    def test_left_out(self, cli, inside, asked, left_out):
        found = json_of(cli("report", "pack", "-a", "in", "--left-out", asked, "--json"))
        assert found["left_out"]["sampled"] == left_out

    def test_the_seed(self, cli, inside):
        found = [json_of(cli("report", "pack", "-a", "in", "--seed", seed, "--json")) for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]

    @pytest.mark.parametrize(
        ("line", "parts"),
        [
            ("report pack -a in -o report.txt", ["a report is written as .html", "report.html"]),
            ("report pack -a in -o in", ["a report is written as"]),
            ("report pack -a in --left-out none", ["--left-out must be a number from 1 on, or `all`, got 'none'"]),
            ("report pack -a in --left-out 0", ["--left-out must be a number from 1 on"]),
            ("report pack -a in/alpha", ["the original of 'beta', which is in the fit", "recognised by their content"]),
            ("report pack -a nowhere", ["nowhere"]),
            ("report pack --evaluate rows.csv", ["name them with --adapters"]),
            ("report pack -a in --evaluate rows.csv --labels x=a,b", ["the pack has no x"]),
            ("report pack -a in --evaluate rows.csv --labels a,b --labels c,d", ["give A,B,… once"]),
        ],
    )
    def test_what_cannot_be_done(self, cli, inside, line, parts):
        before = contents(inside)
        assert_refused(cli(*line.split()), 3, *parts)
        assert contents(inside) == before

    def test_no_pack(self, cli, inside):
        assert_refused(cli("report", "in", "-a", "in"), 4, "is not a pack")

    def test_strangers_are_named(self, cli, inside):
        done = succeeded(cli("report", "pack", "-a", "in", "-a", "new"))
        assert "not in the pack, by their content, and left out: new." in done.err


class TestFit:
    def test_leaves_one_that_report_shows_again(self, cli_with_reports, inside):
        done = succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4"))
        report = ex.Report.load(inside / "fresh" / keys.REPORT_FIGURES)
        assert report.verdict.headline in done.out
        assert (inside / "fresh" / keys.REPORT_PAGE).read_text("utf-8").startswith("<!doctype html>")
        shutil.rmtree("in")
        assert succeeded(cli_with_reports("report", "fresh")).out.startswith(report.verdict.headline)
        ex.Pack.open("fresh").verify()

    def test_headline_in_json(self, cli_with_reports, inside):
        found = json_of(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4", "--json"))
        assert found["headline"] == ex.Report.load(inside / "fresh" / keys.REPORT_FIGURES).verdict.headline

    def test_none_is_wanted(self, cli_with_reports, inside):
        found = json_of(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4", "--no-report", "--json"))
        assert found["headline"] is None
        assert not any((inside / "fresh" / name).exists() for name in keys.REPORTS)

    def test_what_is_said_of_adapters_is_said_once(self, cli_with_reports, inside):
        (inside / "in/not-one").mkdir()
        (inside / "in/not-one/x.safetensors").write_bytes(b"")
        done = succeeded(cli_with_reports("fit", "in", "new", "-o", "fresh", "-k", "4", "--exclude-adapter", "beta"))
        assert done.err.count("was passed over") == 1
        assert "not in the pack" not in done.err
        names = {row.name for row in ex.Report.load(inside / "fresh" / keys.REPORT_FIGURES).adapters}
        assert names == {"alpha", "gamma", "new"}

    def test_where_it_would_take_long(self, cli_with_reports, inside, monkeypatch):
        monkeypatch.setattr(stored, "PATIENCE", 0.0)
        done = succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4"))
        assert "no report was written, since it would take about" in done.err
        assert "eigenlorax report fresh --adapters" in done.err
        assert not (inside / "fresh" / keys.REPORT_PAGE).exists()

    def test_without_the_extra(self, cli_with_reports, inside, monkeypatch):
        monkeypatch.setattr(extra, "is_installed", lambda: False)
        done = succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4"))
        assert "no report was written. A report needs matplotlib and scikit-learn: pip install" in done.err
        assert "--no-report" in done.err
        assert not (inside / "fresh" / keys.REPORT_PAGE).exists()

    def test_a_disk_that_is_full_costs_the_report_alone(self, cli_with_reports, inside, monkeypatch):
        def full(report, path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr("eigenlorax.reports.files.write", full)
        done = cli_with_reports("fit", "in", "-o", "fresh", "-k", "4")
        assert done.code == 0
        assert "no report was written: " in done.err
        assert "No space left on device" in done.err
        ex.Pack.open("fresh").verify()

    def test_a_later_state_is_said(self, cli_with_reports, inside):
        succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4"))
        succeeded(cli_with_reports("add", "fresh", "new"))
        done = succeeded(cli_with_reports("report", "fresh"))
        assert done.out.startswith("The pack alone does not tell")
        assert "it was made when the pack held something else" in done.err
