"""`eigenlorax report`, and the report that `eigenlorax fit` leaves."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import eigenlorax as ex
from adapters import make_adapter
from eigenlorax.core import keys
from eigenlorax.reports import extra, measure, module_sample
from outcomes import assert_refused, contents, json_of, succeeded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_shape_checks")]

pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")


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

    @pytest.mark.parametrize("originals", [[], ["--adapters", "in"]])
    def test_not_of_a_pack_without_adapters(self, cli, inside, originals):
        with ex.Pack.edit("pack") as pack:
            pack.remove(*pack.names)
        assert_refused(cli("report", "pack", *originals), 3, "The pack has no adapter", "eigenlorax add")

    def test_json_is_that_of_the_file(self, cli, inside):
        done = cli("report", "pack", "-a", "in/alpha", "-a", "in/beta", "-a", "in/gamma", "--json", "-o", "a.json")
        assert json_of(done) == json.loads((inside / "a.json").read_text("utf-8"))
        assert len(json_of(done)["adapters"]["name"]) == 3

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

    def test_full_measures_all_modules(self, cli, inside, monkeypatch):
        monkeypatch.setattr(module_sample, "MIN_SECONDS", 0.0)
        monkeypatch.setattr(module_sample, "MIN_MODULES", 1)
        sampled = json_of(cli("report", "pack", "-a", "in", "--json"))
        assert sampled["sampling"]["modules"] == 1
        assert sampled["sampling"]["of"] == sampled["collection"]["modules"]
        full = json_of(cli("report", "pack", "-a", "in", "--full", "--json"))
        assert full["sampling"] is None
        assert full["left_out"]["sampled"] == 3

    def test_the_seed(self, cli, inside):
        found = [json_of(cli("report", "pack", "-a", "in", "--seed", seed, "--json")) for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]

    @pytest.mark.parametrize(
        ("line", "parts"),
        [
            ("report pack -a in -o report.txt", ["the suffix of a report must be .html", "report.html"]),
            ("report pack -a in -o in", ["the suffix of a report must be"]),
            (
                "report pack -a in --left-out none",
                ["--left-out must be an integer of at least 1, or `all`"],
            ),
            ("report pack -a in --left-out 0", ["--left-out must be an integer of at least 1"]),
            ("report pack -a in/alpha", ["the original of 'beta', which is in the fit", "recognised by their content"]),
            ("report pack -a nowhere", ["nowhere"]),
            ("report pack --evaluate rows.csv", ["--evaluate needs --adapters with the original adapters"]),
            ("report pack --left-out 2", ["--left-out needs --adapters"]),
            ("report pack --seed 1", ["--seed needs --adapters"]),
            ("report pack --full", ["--full needs --adapters"]),
            ("report pack --labels a,b", ["--labels needs --adapters"]),
            ("report pack --allow-pickle", ["--allow-pickle needs --adapters"]),
            ("report pack -a in --labels a,b", ["--labels needs --evaluate with a file of rows", "remove --labels"]),
            ("report pack -a in --max-length 5", ["--max-length needs --evaluate"]),
            ("report pack -a in --text-column body", ["--text-column needs --evaluate"]),
            ("report pack -a in --seed 99999999999999999999999", ["--seed must be a whole number from 0 to 2**63 - 1"]),
            ("report pack -a in -o pack/subspace_config.json", ["packs and adapters use the name", "pack/report.json"]),
            ("report pack -a in -o in/alpha/adapter_config.json", ["packs and adapters use the name"]),
            ("report pack -a in -o pack/README.md", ["is the model card of the pack", "pack/report.md"]),
            ("report pack -a in --evaluate rows.csv --labels x=a,b", ["the pack has no x"]),
            ("report pack -a in --evaluate rows.csv --labels in", ["in has no training.json"]),
            ("report pack -a in --evaluate rows.csv --labels alpha=in", ["in has no training.json"]),
            ("report pack -a in --evaluate alpha=in/rows.csv", ["in/rows.csv does not exist"]),
            ("report pack -a in --evaluate no=rows.csv", ["no=rows.csv does not exist"]),
            ("report pack -a in --evaluate no=README.csv", ["no adapter named 'no' in the pack", "alpha, beta, gamma"]),
            ("report pack -a in --evaluate README.csv --task causal-lm", ["the task type 'SEQ_CLS'"]),
            ("report pack -a in --evaluate README.csv --task chess", ["no task 'chess'"]),
            ("report pack -a in --evaluate README.csv --max-length 0", ["--max-length must be at least 2, got 0"]),
            ("report pack -a in --evaluate README.csv --batch-size 0", ["--batch-size must be at least 1"]),
            ("report pack -a in --evaluate README.csv --labels a,b,a", ["'a' appears twice"]),
            ("report pack -a in --evaluate empty.csv", ["empty.csv: the first line has to name", "it is empty"]),
            ("report pack -a in --evaluate cut.jsonl", ["cut.jsonl, line 2 is not JSON", "column 11. Each line"]),
            ("report pack -a in --evaluate rows.csv --labels a,b --labels c,d", ["pass A,B,… once"]),
            ("report pack --frontier 4", ["--frontier needs --adapters"]),
            ("report pack -a in --frontier 4", ["--frontier needs --evaluate with a file of rows"]),
            ("report pack -a in --evaluate README.csv --frontier a,b", ["--frontier takes ratios", "got 'a,b'"]),
            ("report pack -a in --evaluate README.csv --frontier 4,", ["--frontier takes ratios", "got '4,'"]),
            (
                "report pack -a in --evaluate README.csv --frontier 4,0.5",
                ["that of the pack, 1 or more, got 0.5"],
            ),
            ("report pack -a in --evaluate README.csv --frontier nan", ["1 or more, got nan"]),
        ],
    )
    def test_what_cannot_be_done(self, cli, inside, line, parts, monkeypatch):
        (inside / "README.csv").write_text("text,label\ngood,1\n")
        (inside / "empty.csv").touch()
        (inside / "cut.jsonl").write_text('{"text": "x"}\n{"text": 1\n')
        # whatever it is, it is known before anything is measured
        monkeypatch.setattr(measure, "measure", None)
        before = contents(inside)
        assert_refused(cli(*line.split()), 3, *parts)
        assert contents(inside) == before

    def test_no_pack(self, cli, inside):
        assert_refused(cli("report", "in", "-a", "in"), 4, "is not a pack")

    def test_a_file_that_is_no_report_is_not_replaced(self, cli, inside):
        (inside / "thesis.html").write_text("mine")
        assert_refused(
            cli("report", "pack", "-a", "in", "-o", "thesis.html"), 4, "thesis.html exists, and is not a report"
        )
        assert (inside / "thesis.html").read_text() == "mine"

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nobody may write")
    def test_a_place_that_cannot_be_written(self, cli, inside):
        done = cli("report", "pack", "-o", "/proc/x.html")
        assert done.code == 6
        assert "No such file or directory: /proc/x.html. Nothing was left" in done.err

    def test_what_fit_has_skipped_is_passed_over(self, cli, inside):
        make_adapter(inside / "in/nan", seed=5)
        tensors = load_file(inside / "in/nan/adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, inside / "in/nan/adapter_model.safetensors", metadata={"format": "pt"})
        make_adapter(inside / "in/cut", seed=6)
        (inside / "in/cut/adapter_model.safetensors").write_bytes(b"cut")
        succeeded(cli("fit", "in", "-o", "fresh", "-k", "4", "--skip-bad"))
        done = succeeded(cli("report", "fresh", "-a", "in", "-o", "a.json"))
        assert "nan was passed over: it holds NaN or Inf" in done.err
        assert "cut was passed over: " in done.err
        assert "--skip-bad" not in done.err
        assert "--exclude-adapter" not in done.err
        assert [row.name for row in ex.Report.load("a.json").adapters if row.left_out_error is not None] != []
        shutil.rmtree(inside / "in/beta")
        assert_refused(
            cli("report", "fresh", "-a", "in"),
            3,
            "the original of 'beta', which is in the fit",
            "Passed over: cut, nan.",
        )

    def test_strangers_are_named(self, cli, inside):
        done = succeeded(cli("report", "pack", "-a", "in", "-a", "new"))
        assert "left out, because their content is not in the pack: new." in done.err


class TestFit:
    def test_leaves_one_that_report_shows_again(self, cli_with_reports, inside):
        figures = json_of(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4", "--json"))
        report = ex.Report.load(inside / "fresh" / keys.REPORT_FIGURES)
        assert figures["headline"] == report.verdict.headline
        assert (inside / "fresh" / keys.REPORT_PAGE).read_text("utf-8").startswith("<!doctype html>")
        shutil.rmtree("in")
        assert succeeded(cli_with_reports("report", "fresh")).out.startswith(report.verdict.headline)
        ex.Pack.open("fresh").verify()

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
        report = ex.Report.load(inside / "fresh" / keys.REPORT_FIGURES)
        assert report.verdict.headline in done.out
        assert {row.name for row in report.adapters} == {"alpha", "gamma", "new"}

    def test_without_the_extra(self, cli_with_reports, inside, monkeypatch):
        monkeypatch.setattr(extra, "is_installed", lambda: False)
        done = succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4"))
        assert "no report was written. A report needs matplotlib and SciPy: pip install" in done.err
        assert "--no-report" in done.err
        asked = cli_with_reports("fit", "in", "-o", "other", "-k", "4", "--report")
        assert_refused(asked, 3, "A report needs matplotlib and SciPy: pip install")
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

    def test_goes_when_the_pack_changes_and_is_not_used_if_it_comes_back(self, cli_with_reports, inside):
        succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4"))
        assert (inside / "fresh" / keys.REPORT_PAGE).is_file()
        figures = (inside / "fresh" / keys.REPORT_FIGURES).read_bytes()
        shutil.copytree("fresh", "smaller")
        succeeded(cli_with_reports("add", "fresh", "new"))
        succeeded(cli_with_reports("remove", "smaller", "beta"))
        for pack in ("fresh", "smaller"):
            assert not any((inside / pack / name).exists() for name in keys.REPORTS)
            done = succeeded(cli_with_reports("report", pack))
            assert done.out.startswith("The pack alone does not tell")
            assert "is not used" not in done.err
        (inside / "fresh" / keys.REPORT_FIGURES).write_bytes(figures)
        done = succeeded(cli_with_reports("report", "fresh"))
        assert done.out.startswith("The pack alone does not tell")
        assert "the pack has changed since it was made" in done.err

    def test_does_not_replace_somebody_elses(self, cli_with_reports, inside):
        succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4", "--no-report"))
        (inside / "fresh" / keys.REPORT_PAGE).write_text("mine")
        done = succeeded(cli_with_reports("fit", "in", "-o", "fresh", "-k", "4", "--overwrite"))
        assert "no report was written: " in done.err
        assert "report.html exists, and is not a report" in done.err
        assert (inside / "fresh" / keys.REPORT_PAGE).read_text() == "mine"
