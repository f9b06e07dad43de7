"""Reports as files: JSON that is read again, suffixes, and the report that lies in a pack."""

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic import bare
from synthetic import report as synthetic

import eigenlorax as ex
from eigenlorax.core import keys
from eigenlorax.errors import FormatError, OptionError, PackExistsError, SkippedAdapterWarning, StaleReportWarning
from eigenlorax.reports import (
    comparison_data,
    data,
    files,
    history_data,
    json_document,
    originals,
    stored,
    task_data,
)
from planted import random_adapter, random_collection, shared_collection

pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")

OBJECTS = [
    kind
    for module in (data, comparison_data, history_data, task_data)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]
REFERENCE = Path(__file__).parents[2] / "docs/reference/api/reports.md"


@pytest.fixture(scope="module")
def adapters():
    return shared_collection(6, noise=0.05)[0]


@pytest.fixture(scope="module")
def pack(adapters):
    return ex.fit(adapters, n_components=6)


@pytest.fixture(scope="module")
def report(pack, adapters):
    return ex.report(pack, adapters)


@pytest.fixture(scope="module")
def with_a_report(adapters, tmp_path_factory):
    own, folder = ex.fit(adapters, n_components=6), tmp_path_factory.mktemp("made") / "pack"
    own.save(folder)
    stored.write(own, adapters, folder, lambda stage, done, total: None)
    return folder


class TestJson:
    def test_is_read_again_as_it_was(self, report, tmp_path):
        report.save(tmp_path / "report.json")
        assert ex.Report.load(tmp_path / "report.json") == report

    def test_of_a_pack_alone(self, pack, tmp_path):
        found = ex.report(pack)
        found.save(tmp_path / "report.json")
        assert ex.Report.load(tmp_path / "report.json") == found

    def test_names_its_schema(self, report):
        body = json.loads(json_document.to_json(report))
        assert (body["schema"], body["schema_version"]) == ("eigenlorax-report", 7)
        assert body.keys() - {"schema", "schema_version"} == {
            field.name for field in dataclasses.fields(data.ReportData)
        }

    @pytest.mark.parametrize("n", [data.MATRIX, data.MATRIX + 1])
    def test_leaves_large_matrices_out(self, n):
        body = json.loads(json_document.to_json(synthetic(n)))
        assert len(body["similarity"]["names"]) <= n
        assert bool(body["similarity"]["cosine"]) == (len(body["similarity"]["names"]) <= data.MATRIX)

    def test_of_many_adapters_is_at_most_a_tenth_of_the_pack_or_200_kb(self, tmp_path):
        adapters = [random_adapter(f"adapter-{n:03}", seed=n) for n in range(200)]
        pack = ex.fit(adapters, n_components=8, warn_above=1.0)
        report = ex.report(pack, adapters, left_out=8)
        report.save(tmp_path / "report.json")
        assert (tmp_path / "report.json").stat().st_size <= 200_000
        again = ex.Report.load(tmp_path / "report.json")
        (note,) = (note for note in again.notes if note.startswith("To keep the JSON within 200.0 kB"))
        assert "it does not contain: similarity matrices" in note
        assert again.similarity.cosine == []
        assert [row.name for row in again.adapters] == [row.name for row in report.adapters]
        assert again.in_fit.mean == pytest.approx(report.in_fit.mean, rel=1e-3)
        # what was read is written again as it is
        assert json_document.to_json(again) == (tmp_path / "report.json").read_text("utf-8")

    def test_columns_of_adapters_have_equal_lengths(self, report, tmp_path):
        body = json.loads(json_document.to_json(report))
        body["adapters"]["norm"].pop()
        (tmp_path / "report.json").write_text(json.dumps(body), "utf-8")
        with pytest.raises(FormatError, match="report.adapters has columns of .5, 6. items; equally many"):
            ex.Report.load(tmp_path / "report.json")

    def test_the_same_report_gives_the_same_bytes(self, report):
        assert json_document.to_json(report) == json_document.to_json(dataclasses.replace(report))

    @pytest.mark.parametrize("of", OBJECTS)
    def test_the_docstring_describes_every_field(self, of):
        # the reference of the site renders it
        assert f"\n::: {of.__module__}.{of.__name__}\n" in REFERENCE.read_text("utf-8")
        described = inspect.getdoc(of).partition("Attributes:\n")[2]
        listed = re.findall(r"^ {4}(\w+(?:, \w+)*): ", described, flags=re.MULTILINE)
        assert [name for names in listed for name in names.split(", ")] == [one.name for one in dataclasses.fields(of)]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text[:-40], "is not valid JSON"),
            (lambda text: "[]", "is no report: its schema is not"),
            (lambda text: text.replace("eigenlorax-report", "other"), "is no report: its schema is not"),
            (
                lambda text: text.replace('"schema_version": 7', '"schema_version": 3'),
                "has version 3 .* Make the report",
            ),
            (lambda text: text.replace('"sampled": ', '"sampeld": '), "report.left_out has the fields"),
            (lambda text: text.replace('"sampled": 6', '"sampled": "6"'), 'report.left_out.sampled is "6"; int'),
            (lambda text: text.replace('"seed": 0', '"seed": NaN'), "NaN is not a JSON number"),
        ],
    )
    def test_what_is_no_report(self, report, tmp_path, change, message):
        path = tmp_path / "report.json"
        changed = change(json_document.to_json(report))
        assert changed != json_document.to_json(report)
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(FormatError, match=message):
            ex.Report.load(path)


class TestSuffixes:
    @pytest.mark.parametrize(
        ("name", "start"),
        [("a.html", "<!doctype html>"), ("a.HTM", "<!doctype"), ("a.md", "# 6 LoRA"), ("a.json", "{")],
    )
    def test_say_what_is_written(self, tmp_path, name, start):
        bare(6).save(tmp_path / "new" / name)
        assert (tmp_path / "new" / name).read_text("utf-8").startswith(start)

    @pytest.mark.parametrize("name", ["report.html", "report.md", "report.json", "README.md"])
    @pytest.mark.parametrize("before", ["a report", "nothing"])
    def test_a_report_or_an_empty_file_is_replaced(self, tmp_path, name, before):
        # a page without pictures, which take seconds to draw
        path, report = tmp_path / name, bare(4)
        if before == "nothing":
            path.touch()
        else:
            bare(3).save(path)
        old = path.read_bytes()
        report.save(path)
        assert path.read_bytes() != old
        report.save(tmp_path / f"other{path.suffix}")
        assert path.read_bytes() == (tmp_path / f"other{path.suffix}").read_bytes()
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("thesis.html", "<!doctype html><p>eigenlorax"),
            ("notes.md", "# 6 LoRA adapters"),
            ("data.json", '{"schema": "other"}'),
            ("data.json", '["eigenlorax-report"]'),
            ("data.json", '{"schema": "eigenlorax-report"'),
        ],
    )
    def test_what_is_somebody_elses_is_not_replaced(self, report, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        with pytest.raises(PackExistsError, match=f"{name} exists, and is not a report .* Choose another name"):
            report.save(tmp_path / name)
        assert (tmp_path / name).read_text() == content

    @pytest.mark.parametrize("name", ["subspace_config.json", "adapter_config.json", "Source_Config.json"])
    def test_names_of_packs_and_adapters_are_refused(self, report, tmp_path, name):
        with pytest.raises(OptionError, match=rf"packs and adapters use the name {name}. .* such as .*report\.json"):
            report.save(tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where nobody may write")
    def test_where_it_cannot_be_written(self, report):
        with pytest.raises(OSError, match="No such file or directory: '/proc/x.json'"):
            report.save("/proc/x.json")

    @pytest.mark.parametrize("name", ["report", "report.txt", "report.html.bak"])
    def test_others_are_refused(self, report, tmp_path, name):
        with pytest.raises(OptionError, match=r"the suffix of a report must be \.html, .* For example .*\.html"):
            report.save(tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_is_refused(self, report, tmp_path):
        (tmp_path / "place.html").mkdir()
        with pytest.raises(OptionError, match="place.html is a folder. Pass a file in it"):
            report.save(tmp_path / "place.html")


class TestInAPack:
    @pytest.fixture
    def own(self, adapters):
        """One of its own, which may be where it likes."""
        return ex.fit(adapters, n_components=6)

    @pytest.fixture
    def place(self, with_a_report, tmp_path):
        """A copy of it: a page takes seconds to draw."""
        return Path(shutil.copytree(with_a_report, tmp_path / "pack"))

    def test_is_read_again(self, place, report):
        assert stored.load(ex.Pack.open(place)) == report

    def test_is_no_part_of_the_pack(self, place):
        ex.Pack.open(place).verify()
        for name in keys.REPORTS:
            assert (place / name).is_file()

    def test_there_is_none(self, own, tmp_path, recwarn):
        own.save(tmp_path / "pack")
        assert stored.load(ex.Pack.open(tmp_path / "pack")) is None
        assert not recwarn.list

    def test_one_of_another_state_is_not_used(self, place):
        figures = (place / keys.REPORT_FIGURES).read_bytes()
        with ex.Pack.edit(place) as pack:
            pack.add(random_adapter("new", 50), warn_above=1.0)
        # as one that was copied there, or left by a writer that was killed
        (place / keys.REPORT_FIGURES).write_bytes(figures)
        with pytest.warns(StaleReportWarning, match=r"is not used, .* \(added, removed or replaced: "):
            assert stored.load(ex.Pack.open(place)) is None

    @pytest.mark.parametrize(
        "change",
        [
            lambda pack: pack.add(random_adapter("new", 50), warn_above=1.0),
            lambda pack: pack.remove(pack.names[0]),
        ],
        ids=["add", "remove"],
    )
    def test_goes_with_the_adapters_that_it_is_about(self, place, change):
        (place / "notes.html").write_text("somebody's own")
        with ex.Pack.edit(place) as pack:
            change(pack)
        assert not any((place / name).exists() for name in keys.REPORTS)
        assert (place / "notes.html").is_file()

    def test_a_page_goes_without_figures_too(self, place):
        (place / keys.REPORT_FIGURES).unlink()
        with ex.Pack.edit(place) as pack:
            pack.remove(pack.names[0])
        assert not (place / keys.REPORT_PAGE).exists()

    def test_stays_with_a_pack_that_is_written_as_it_was(self, place, report):
        with ex.Pack.edit(place) as pack:
            pack.base_model = "org/renamed"
        assert ex.Pack.open(place).base_model == "org/renamed"
        assert stored.load(ex.Pack.open(place)) == report

    def test_is_not_left_in_the_place_of_somebody_elses(self, own, adapters, tmp_path, monkeypatch):
        own.save(tmp_path / "pack")
        (tmp_path / "pack" / keys.REPORT_PAGE).write_text("somebody's own")
        monkeypatch.setattr("eigenlorax.reports.build.report", None)
        with pytest.raises(PackExistsError, match="report.html exists, and is not a report"):
            stored.write(own, adapters, tmp_path / "pack", lambda stage, done, total: None)
        assert not (tmp_path / "pack" / keys.REPORT_FIGURES).exists()

    def test_the_card_is_not_replaced(self, place, report):
        before = (place / keys.CARD).read_bytes()
        with pytest.raises(OptionError, match=r"is the model card of the pack. .* such as .*report\.md"):
            report.save(place / keys.CARD)
        assert (place / keys.CARD).read_bytes() == before

    def test_goes_with_the_subspace_that_it_is_about(self, place):
        ex.fit(random_collection(4), n_components=3, warn_above=1.0).save(place, overwrite=True)
        assert not any((place / name).exists() for name in keys.REPORTS)

    def test_what_is_no_report_of_ours_stays(self, own, tmp_path):
        own.save(tmp_path / "pack")
        (tmp_path / "pack" / keys.REPORT_PAGE).write_text("somebody's own")
        ex.fit(random_collection(4), n_components=3, warn_above=1.0).save(tmp_path / "pack", overwrite=True)
        assert (tmp_path / "pack" / keys.REPORT_PAGE).read_text() == "somebody's own"

    def test_a_damaged_one_is_not_used(self, place):
        (place / keys.REPORT_FIGURES).write_text("{")
        with pytest.warns(StaleReportWarning, match="the report in the pack is not used: .* is not valid JSON"):
            assert stored.load(ex.Pack.open(place)) is None


class TestArguments:
    def test_a_path_is_a_pack(self, pack, report, adapters, tmp_path):
        ex.fit(adapters, n_components=6).save(tmp_path / "pack")
        for path in (tmp_path / "pack", str(tmp_path / "pack")):
            assert ex.report(path, iter(adapters)) == report

    @pytest.mark.parametrize("seed", [-1, 2**63, 10**22])
    def test_a_seed_that_no_generator_takes(self, pack, seed):
        with pytest.raises(OptionError, match=rf"seed must be a whole number from 0 to 2\*\*63 - 1, got {seed}"):
            ex.report(pack, seed=seed)

    def test_the_largest_seed(self, pack, adapters):
        assert ex.report(pack, adapters, seed=2**63 - 1).left_out.seed == 2**63 - 1

    def test_left_out_of_nothing(self, pack):
        with pytest.raises(OptionError, match="left_out needs the original adapters"):
            ex.report(pack, left_out=3)

    def test_an_option_that_is_not_there(self, pack, adapters):
        with pytest.raises(TypeError, match=r"report\(\) got an unexpected keyword argument 'foo'.*'allow_pickle'"):
            ex.report(pack, adapters, foo=1)

    @pytest.mark.parametrize("given", [3, [3], ["adapters/", 3], {"a": 3}])
    def test_what_are_no_adapters(self, given):
        # `report` itself has its annotations checked in the tests
        with pytest.raises(OptionError, match="adapters must be folders, Hub ids or `Adapter`s, .* got 3"):
            originals.listed(given)

    def test_adapters_that_are_damaged_are_passed_over(self, pack, adapters, report):
        nan = random_adapter("bad", 7)
        first = next(iter(nan.modules))
        nan.modules[first].down[0, 0] = float("nan")
        with pytest.warns(SkippedAdapterWarning, match="bad was passed over: it holds NaN or Inf") as said:
            found = ex.report(pack, [nan, *adapters])
        assert len(said) == 1
        assert found == report
        with (
            pytest.warns(SkippedAdapterWarning, match="bad was passed over"),
            pytest.raises(OptionError, match="the original of .* is not among .* Passed over: bad."),
        ):
            ex.report(pack, [nan, *adapters[1:]])


@pytest.mark.slow
class TestOfIntegers:
    """A report of a pack whose coefficients are not those of the adapters' own factors."""

    @pytest.fixture(scope="class", params=["int8", "int4"])
    def stored(self, request, adapters):
        pack = ex.fit(adapters, n_components=5, dtype=request.param)
        return pack, ex.report(pack, adapters)

    def test_errors_are_those_of_the_pack(self, stored, adapters):
        pack, report = stored
        for row in report.adapters:
            assert row.delta_error == pytest.approx(pack.records[row.name].delta_error, rel=1e-6)
        assert {row.factor_error_down for row in report.adapters} == {None}
        assert {row.factor_error_up for row in report.modules} == {None}
        for row in report.modules:
            # measured on what comes back, whatever its factors are
            assert row.delta_error == pytest.approx(
                sum(record.delta_error**2 for record in pack.records.values()) ** 0.5 / len(adapters) ** 0.5, rel=0.5
            )

    def test_it_says_how_it_is_stored_and_what_that_costs(self, stored):
        pack, report = stored
        assert report.collection.dtype == pack.storage
        assert report.collection.coefficient_dtype == "int8"
        assert report.bytes.lora == 2 * sum(record.lora_numbers for record in pack.records.values())
        assert report.bytes.basis == pack.info.stored_bytes

    @pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
    def test_it_is_written(self, stored, tmp_path, suffix):
        files.write(stored[1], tmp_path / f"report{suffix}")
        assert stored[0].storage in (tmp_path / f"report{suffix}").read_text("utf-8")

    def test_without_originals_updates_are_compared_as_they_come_back(self, stored, adapters):
        pack, report = stored
        alone = ex.report(pack)
        cosines = {row.name: row.nearest_cosine for row in report.adapters}
        for row in alone.adapters:
            assert row.nearest_cosine == pytest.approx(cosines[row.name], abs=0.1)
