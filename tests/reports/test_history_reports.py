"""Reports of histories, and of adapters that are versions of one run: figures against a dense oracle, and sentences."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import Document
from reported import adapters, findings, the
from synthetic import history
from synthetic import report as synthetic

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.errors import OptionError
from eigenlorax.reports import histories, history_findings, json_document, stored
from eigenlorax.reports.render import markdown, page
from made import one_start, with_a_mean
from planted import normal

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")

SHAPES = {"layer.0.query": (61, 43), "layer.0.value": (47, 59)}
RUN = Path(__file__).parents[3] / "shared" / "zoo" / "lineages" / "roberta-portuguese"


def random_walk(n, *, rank=4, size=0.15, shapes=SHAPES):
    """Adapters whose factors walk at random from common ones, in steps of `size` of their norm."""
    current = {
        module: [normal(rank, n_in, seed=index), normal(n_out, rank, seed=50 + index)]
        for index, (module, (n_out, n_in)) in enumerate(shapes.items())
    }
    versions = []
    for step in range(n):
        versions.append(
            from_factors(
                f"v{step}",
                {m: LoRAFactors(down.float(), up.float(), 2.0) for m, (down, up) in current.items()},
                base_model="org/base",
            )
        )
        for place, pair in enumerate(current.values()):
            for side in (0, 1):
                pair[side] = pair[side] + size * normal(*pair[side].shape, seed=1000 * step + 10 * place + side)
    return versions


def appended(versions, **options):
    pack = ex.Pack.empty()
    for index, version in enumerate(versions):
        pack.append(version, name="run", step=100 * index + 100, metrics={"loss": 1 / (index + 1)}, **options)
    return pack


@pytest.fixture(scope="module")
def versions():
    return random_walk(7)


@pytest.fixture(scope="module")
def pack(versions):
    return appended(versions, max_error=0.02)


@pytest.fixture(scope="module")
def report(pack):
    return ex.report(pack)


def dense(adapter):
    """All updates of an adapter as one vector, in float64."""
    factors = (adapter.modules[module] for module in sorted(adapter.specs))
    return np.concatenate([(f.scaling * f.up.double() @ f.down.double()).numpy().ravel() for f in factors])


class TestFigures:
    def test_are_those_of_a_dense_principal_component_analysis(self, pack, report):
        (figures,) = report.histories
        updates = np.stack([dense(pack[f"run@{version.version}"]) for version in figures.versions])
        updates /= np.linalg.norm(updates[-1])
        left, sizes, _ = np.linalg.svd(updates - updates.mean(0), full_matrices=False)
        positions = np.array([(version.x, version.y) for version in figures.versions])
        # the sign of a component is arbitrary
        assert np.abs(positions) == pytest.approx(np.abs(left[:, :2] * sizes[:2]), abs=1e-9)
        assert figures.path_share == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum(), rel=1e-9)
        distances = np.linalg.norm(updates - updates[-1], axis=1)
        assert [version.to_final for version in figures.versions] == pytest.approx(distances, abs=1e-7)

    def test_left_out_errors_are_those_of_a_fit_without_the_version(self, pack, report):
        (figures,) = report.histories
        names = [f"run@{version.version}" for version in figures.versions]
        renamed = {f"v{index}": pack[name] for index, name in enumerate(names)}
        for index, version in enumerate(figures.versions):
            others = {name: adapter for name, adapter in renamed.items() if name != f"v{index}"}
            fitted = ex.fit(others, n_components=32, dtype="float32", warn_above=1.0)
            expected = fitted.add(renamed[f"v{index}"], name="left-out", warn_above=1.0).delta_error
            assert version.left_out_error == pytest.approx(expected, rel=1e-3)
        assert figures.fitted == 7

    def test_are_those_of_the_records(self, pack, report):
        (figures,) = report.histories
        for version, record in zip(figures.versions, pack.histories["run"], strict=True):
            assert (version.version, version.step, version.metrics) == (record.version, record.step, record.metrics)
            assert (version.lora_stored, version.tensors_stored) == (record.lora_bytes, record.tensor_bytes)
            assert (version.delta_error, version.change) == (record.delta_error, record.change)
            assert version.source_bytes == record.source_lora_bytes

    def test_of_a_long_history_are_of_a_sample_with_the_first_and_the_last(self, pack, monkeypatch):
        monkeypatch.setattr(histories, "MAX_VERSIONS", 4)
        (figures,) = ex.report(pack).histories
        assert [version.x is not None for version in figures.versions] == [True, False, True, False, True, False, True]
        assert figures.versions[-1].to_final == 0

    def test_of_zero_updates(self):
        zero = [
            from_factors("z", {"m": LoRAFactors(torch.ones(2, 5), torch.zeros(7, 2), 1.0)}, base_model="org/base")
        ] * 3
        report = ex.report(appended(zero, lossless=True))
        assert [version.left_out_error for version in report.histories[0].versions] == [None] * 3
        assert markdown.render(report)

    @pytest.mark.parametrize("n", [1, 2])
    def test_of_few_versions(self, versions, n):
        report = ex.report(appended(versions[:n]))
        assert report.verdict.headline.startswith(f"These are {'1 version' if n == 1 else '2 versions'} of one run")
        assert page.render(report)


class TestSentences:
    def test_say_that_recycling_pays(self, report):
        (figures,) = report.histories
        assert report.verdict.headline.startswith("These are 7 versions of one run: they share ")
        assert report.verdict.headline.endswith(f"they take {figures.ratio:.2f}× fewer bytes than their files.")
        finding = the(report, "history")
        assert finding.good is True
        assert f"a mean error of {figures.left_out:.3f} in 32 components" in finding.text

    def test_name_no_run_where_there_is_a_common_adapter(self, versions):
        members = {f"user-{number}": adapter for number, adapter in enumerate(versions[1:3])}
        report = ex.report(ex.fit(members, reference=versions[0]))
        assert report.verdict.headline.startswith("These are 2 adapters that were trained from a common one")
        text = the(report, "history").text
        assert text.startswith("members: 2 adapters that were trained from a common one, each at a distance of ")
        assert "from that (median" in text

    @pytest.mark.parametrize(("error", "words"), [(0.1, "nearly everything"), (0.4, "most of their"), (0.9, "little")])
    def test_say_how_much_is_shared(self, error, words):
        full = history("run", 3)
        figures = dataclasses.replace(
            full, versions=[dataclasses.replace(version, left_out_error=error) for version in full.versions]
        )
        report = dataclasses.replace(synthetic(3), adapters=[], histories=[figures], runs=[])
        assert f"they share {words}" in history_findings.headline(report)

    def test_stand_beside_those_on_adapters(self, versions):
        pack = ex.fit(adapters(one_start(5, trained=0.4)), max_error=0.2)
        for version in versions:
            pack.append(version, name="run")
        report = ex.report(pack)
        assert [finding.kind for finding in report.verdict.findings][:3] == ["bytes", "unknown", "history"]
        assert "Versions of run" in markdown.render(report)
        assert "Versions of one run" in page.render(report)


class TestVersionsAmongAdapters:
    @pytest.mark.parametrize("names", ["abcdefghij", None], ids=["any names", "checkpoints"])
    def test_of_a_random_walk_are_found_and_the_command_is_named(self, names):
        walked = random_walk(8)
        named = {
            (names[index] if names else f"checkpoint-{index + 1}"): version for index, version in enumerate(walked)
        }
        report = ex.report(ex.fit(named, n_components=16, warn_above=1.0), named)
        (run,) = report.runs
        assert run.adapters == list(named)
        finding = the(report, "versions")
        assert "8 adapters look like versions of one run" in finding.text
        assert "eigenlorax track" in finding.advice
        assert findings(report, "start") == findings(report, "mean") == []

    def test_are_not_seen_among_independent_adapters(self):
        for collection in (one_start(8, trained=0.4), with_a_mean(8, share=0.7)):
            made = {f"checkpoint-x{index}": adapter for index, adapter in enumerate(adapters(collection))}
            report = ex.report(ex.fit(made, n_components=8, warn_above=1.0), made)
            assert report.runs == []
            assert findings(report, "versions") == []

    @pytest.mark.skipif(not RUN.is_dir(), reason=f"{RUN} is not there")
    def test_of_real_checkpoints(self):
        folders = [RUN / f"checkpoint-{step}" for step in (500, 1000, 1500, 2000)]
        report = ex.report(ex.fit(folders, n_components=32), folders)
        assert the(report, "versions").adapters == [folder.name for folder in folders]
        assert findings(report, "start") == findings(report, "mean") == []
        assert "share a subspace" in report.verdict.headline


class TestDocuments:
    def test_json_is_read_again_as_it_was(self, report, tmp_path):
        report.save(tmp_path / "report.json")
        assert ex.Report.load(tmp_path / "report.json") == report

    def test_the_page_has_a_table_and_figures_of_every_history(self, report):
        shown = Document(page.render(report))
        assert shown.column("Versions of run", "version") == [str(100 * index + 100) for index in range(7)]
        labels = [attributes["aria-label"] for _, attributes in shown.all("svg")]
        assert labels == [
            "Path of 7 versions",
            "Distance to the last version",
            "Bytes of each version",
            "Metrics of the versions",
        ]

    def test_markdown_has_the_last_versions(self):
        report = dataclasses.replace(synthetic(3), adapters=[], runs=[], histories=[history("run", 30)])
        text = markdown.render(report)
        assert "## Versions of run" in text
        assert "The last 20 of 30 versions." in text

    @pytest.mark.parametrize(("n", "left"), [(400, 400), (1500, 200)])
    def test_json_of_many_versions_is_within_the_limit(self, n, left):
        many = history("run", n, metrics=[f"eval_metric_{index}" for index in range(20)])
        small = [dataclasses.replace(version, lora_stored=200, tensors_stored=0) for version in many.versions]
        full = synthetic(3)
        made = dataclasses.replace(
            full,
            bytes=dataclasses.replace(full.bytes, basis=0, coefficients=0, carried=0, heads=0),
            histories=[dataclasses.replace(many, versions=small)],
            adapters=[],
            modules=[],
            module_errors=[],
            runs=[],
        )
        text = json_document.to_json(made)
        assert len(text) <= json_document.limit(made)
        (note,) = (note for note in json.loads(text)["notes"] if note.startswith("To keep the JSON within"))
        assert "metrics of versions" in note
        assert ("most versions of long histories" in note) == (left < n)
        versions = json.loads(text)["histories"][0]["versions"]
        assert len(versions) == left
        assert [versions[place]["version"] for place in (0, -1)] == ["500", str(500 * n)]

    def test_a_stored_report_is_used_until_a_version_is_appended(self, versions, tmp_path):
        made = appended(versions[:3])
        made.save(tmp_path / "pack")
        ex.report(made).save(tmp_path / "pack" / "report.json")
        opened = ex.Pack.open(tmp_path / "pack")
        assert stored.load(opened) is not None
        opened.append(versions[3], name="run", step=900)
        with pytest.warns(ex.errors.StaleReportWarning, match="run@900"):
            assert stored.load(opened) is None


def test_originals_of_a_pack_of_histories_are_refused(pack, versions):
    with pytest.raises(OptionError, match="The pack has histories only"):
        ex.report(pack, versions)
