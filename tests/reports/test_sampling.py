"""Reports of large collections: a sample of modules and adapters, and standard errors of what is measured on it."""

import dataclasses
import json
import math
import statistics
from collections import Counter
from types import SimpleNamespace

import pytest
from documents import Document
from reported import adapters, report_on

import eigenlorax as ex
from eigenlorax.errors import OptionError
from eigenlorax.reports import module_sample, sampling_errors
from eigenlorax.reports.measured import SampledMeasurements
from eigenlorax.reports.module_sample import ModuleSample, ModuleSize
from eigenlorax.reports.render import markdown, page
from made import of_one_subspace

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

LLAMA = {
    f"layers.{layer}.{kind}": ModuleSize(128, shape)
    for layer in range(32)
    for kind, shape in {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "down_proj": (4096, 14336)}.items()
}
SHAPES = {f"layers.{layer}.{kind}": (37, 29) for layer in range(6) for kind in ("query", "value")}


@pytest.fixture
def of_four_modules(monkeypatch):
    """Let reports measure four modules of any larger collection."""
    monkeypatch.setattr(module_sample, "MIN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def planted():
    return of_one_subspace(9, noise=0.4, shapes=SHAPES)


@pytest.fixture(scope="module")
def sampled(planted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_sample, "MIN_SECONDS", 0.0)
        return report_on(planted, 6)


class TestChoice:
    @pytest.mark.parametrize("seed", range(5))
    def test_every_kind_has_its_share(self, seed):
        chosen = module_sample.systematic(list(LLAMA), 12, seed)
        assert len(chosen) == 12
        assert chosen == [name for name in LLAMA if name in chosen]
        for kind in ("q_proj", "k_proj", "down_proj"):
            layers = [int(name.split(".")[1]) for name in chosen if name.endswith(kind)]
            assert len(layers) == 4
            assert max(layers) - min(layers) >= 20

    def test_the_seed_decides(self):
        assert module_sample.systematic(list(LLAMA), 12, 1) == module_sample.systematic(list(LLAMA), 12, 1)
        assert len({tuple(module_sample.systematic(list(LLAMA), 12, seed)) for seed in range(9)}) > 3

    def test_small_collections_are_measured_whole(self):
        sizes = {f"layers.{layer}.query": ModuleSize(128, (384, 384)) for layer in range(12)}
        sample = module_sample.choose(sizes, 32, None, 0)
        assert sample.is_whole
        assert sample.left_out == module_sample.LEFT_OUT_MAX

    def test_large_ones_take_at_most_half_the_time_of_the_fit(self):
        sample = module_sample.choose(LLAMA, 16, None, 0)
        assert 4 < len(sample.modules) < sample.of == 96
        assert sample.seconds <= module_sample.fit_seconds(LLAMA) / 2

    def test_of_modules_that_take_long_few_adapters_are_left_out(self):
        sizes = {f"layers.{layer}.query": ModuleSize(8000, (768, 768)) for layer in range(24)}
        sample = module_sample.choose(sizes, 32, None, 0)
        assert (len(sample.modules), sample.left_out) == (module_sample.MIN_MODULES, module_sample.LEFT_OUT_MIN)
        assert module_sample.choose(sizes, 32, 100, 0).left_out == 100


def test_the_jackknife_of_a_mean_is_its_standard_error():
    figures = [0.31, 0.42, 0.28, 0.55, 0.44]
    sample = ModuleSample([str(index) for index in range(5)], of=12, left_out=0, seconds=0.0)
    measured = SampledMeasurements(None, [], sample, [])
    replicates = [statistics.fmean(figures[:index] + figures[index + 1 :]) for index in range(5)]
    expected = statistics.stdev(figures) / math.sqrt(5) * math.sqrt(1 - 5 / 12)
    assert measured.standard_error(replicates) == pytest.approx(expected)


@pytest.mark.parametrize("figures", [[], [0.4], [None, 0.4, None]])
def test_a_standard_error_of_fewer_than_two_replicates_is_unknown(figures):
    sample = ModuleSample(["a", "b", "c"], of=9, left_out=0, seconds=0.0)
    assert SampledMeasurements(None, [], sample, []).standard_error(figures) is None


class TestGroups:
    @pytest.mark.parametrize("layers", [24, 32])
    @pytest.mark.parametrize("kinds", [5, 7, 10])
    @pytest.mark.parametrize("seed", range(3))
    def test_kinds_are_spread_over_the_groups(self, layers, kinds, seed):
        modules = [f"layers.{layer}.kind_{kind}" for layer in range(layers) for kind in "abcdefghij"[:kinds]]
        for count in range(4, len(modules), 3):
            groups = module_sample.jackknife_groups(module_sample.systematic(modules, count, seed))
            n_groups = 1 + max(groups.values())
            assert 3 <= n_groups <= 5
            _assert_spread(list(groups.values()), n_groups)
            for kind in "abcdefghij"[:kinds]:
                _assert_spread([group for name, group in groups.items() if name.endswith(kind)], n_groups)

    @pytest.mark.parametrize(
        ("layers", "kinds", "count"),
        [(32, 5, 20), (32, 5, 40), (24, 5, 15), (24, 5, 25), (24, 7, 28), (32, 7, 35), (24, 10, 50), (32, 10, 80)],
    )
    def test_equal_numbers_of_each_kind_are_in_each_group(self, layers, kinds, count):
        modules = [f"layers.{layer}.kind_{kind}" for layer in range(layers) for kind in range(kinds)]
        groups = module_sample.jackknife_groups(module_sample.systematic(modules, count, 0))
        in_groups = Counter((name.rpartition("_")[2], group) for name, group in groups.items())
        assert len(set(in_groups.values())) == 1
        assert len(in_groups) == kinds * (1 + max(groups.values()))

    def test_more_adapters_than_there_are_do_not_lessen_the_modules(self):
        adapters = of_one_subspace(3, noise=0.4, shapes=dict.fromkeys(list(LLAMA)[:12], (13, 11)))
        whole, more = (report_on(adapters, 4, left_out=left_out) for left_out in (3, 100_000))
        assert more.sampling == whole.sampling
        assert more.left_out.sampled == 3

    def test_single_modules_of_many_kinds_are_in_five_groups(self):
        assert set(module_sample.jackknife_groups(["embed", "head", "query", "key", "value", "out"]).values()) == {
            *range(5)
        }

    def test_kinds_that_differ_are_no_sampling_error(self, monkeypatch):
        layers, count = 24, 15
        monkeypatch.setattr(module_sample, "MIN_SECONDS", 0.0)
        monkeypatch.setattr(module_sample, "MIN_MODULES", count)
        of_kind = {
            kind: of_one_subspace(4, noise=noise, shapes={kind: (13, 11)})
            for kind, noise in {"query": 0.05, "key": 0.3, "value": 0.6, "up_proj": 1.0, "down_proj": 2.0}.items()
        }
        report = report_on(
            [
                {f"layers.{layer}.{kind}": of_kind[kind][index][kind] for layer in range(layers) for kind in of_kind}
                for index in range(4)
            ],
            6,
        )
        assert (report.sampling.modules, report.sampling.of) == (count, 5 * layers)
        errors = [module.delta_error for module in report.modules if module.delta_error is not None]
        assert max(errors) - min(errors) > 0.2
        assert report.left_out.errors.standard_error == pytest.approx(0, abs=1e-6)
        assert [point.standard_error for point in report.sizes] == pytest.approx([0] * len(report.sizes), abs=1e-6)


def _assert_spread(groups, n_groups):
    """Check that numbers of modules in any two groups differ by at most one."""
    counts = [groups.count(group) for group in range(n_groups)]
    assert max(counts) - min(counts) <= 1


class TestSampled:
    def test_figures_are_those_of_all_modules_within_their_standard_errors(self, planted, sampled):
        full = report_on(planted, 6, full=True)
        assert (sampled.sampling.modules, sampled.sampling.of, full.sampling) == (4, 12, None)
        for some, all_ in zip(sampled.baselines, full.baselines, strict=True):
            assert some.key == all_.key
            assert abs(some.errors.mean - all_.errors.mean) <= 5 * some.errors.standard_error + 1e-12
            assert (some.errors.standard_error > 0) == (some.key != "pack")
            assert all_.errors.standard_error == 0
        for some, all_ in zip(sampled.sizes, full.sizes, strict=True):
            assert abs(some.mean - all_.mean) <= 6 * some.standard_error + 1e-9
            assert abs(some.left_out - all_.left_out) <= 6 * some.left_out_standard_error + 1e-9
        assert sampled.left_out.errors.standard_error < sampled.left_out.standard_error
        assert sampled.in_fit == full.in_fit
        assert [row.norm for row in sampled.adapters] == pytest.approx([row.norm for row in full.adapters])

    def test_modules_beside_the_sample_have_no_errors(self, sampled, tmp_path):
        report = sampled
        assert sum(module.delta_error is not None for module in report.modules) == 4
        for module, errors in zip(report.modules, zip(*report.module_errors, strict=True), strict=True):
            assert {error is None for error in errors} == {module.delta_error is None}
            assert module.down.spectrum
        report.save(tmp_path / "report.json")
        assert ex.Report.load(tmp_path / "report.json") == report

    def test_standard_errors_are_printed(self, sampled):
        report, out = sampled, sampled.left_out
        assert f"{out.errors.mean:.3f} ± {out.standard_error:.3f}" in report.verdict.headline
        document = markdown.render(report)
        assert "measured on 4 of 12 modules, drawn at random by kind. Standard errors of one adapter's" in document
        assert f"| mean {out.errors.mean:.3f} ± {out.errors.standard_error:.3f}, worst" in document
        assert "4 of 12 modules were measured, drawn at random by kind" in page.section("modules", report)
        assert any("`full=True` (`--full`) measures all modules" in note for note in report.notes)

    def test_the_error_of_a_single_adapter_left_out_is_unknown(self, of_four_modules, planted, tmp_path):
        report = report_on(planted, 6, left_out=1)
        mean = f"{report.left_out.errors.mean:.3f}"
        assert (report.left_out.sampled, report.left_out.standard_error) == (1, None)
        assert f"{mean} ±" not in report.verdict.headline
        report.save(tmp_path / "report.json")
        assert json.loads((tmp_path / "report.json").read_text("utf-8"))["left_out"]["standard_error"] is None
        assert ex.Report.load(tmp_path / "report.json") == report
        (row,) = (line for line in markdown.render(report).splitlines() if "1 of 9 adapters left out" in line)
        assert "mean ±" not in row
        document = Document(page.render(report))
        (tile,) = (text for text, _ in document.of_class("tile") if text.startswith("Error when left out"))
        assert tile.startswith(f"Error when left out, mean{mean}of 1 adapter")
        assert f"its mean error is <b>{mean}</b>, against" in page.section("newcomers", report)

    def test_unknown_standard_errors_are_not_printed(self, sampled):
        null = dataclasses.replace(sampled.null, down=dataclasses.replace(sampled.null.down, standard_error=None))
        errors = dict.fromkeys(sampled.sampling.standard_errors)
        report = dataclasses.replace(
            sampled, null=null, sampling=dataclasses.replace(sampled.sampling, standard_errors=errors)
        )
        document = markdown.render(report)
        assert "Standard errors of one adapter's figures" not in document
        assert f"(with random singular vectors: {null.down.null:.3f})" in document
        assert f"(with random singular vectors: {null.up.null:.3f} ±" in document

    def test_the_error_of_a_figure_that_no_adapter_has_is_unknown(self):
        sample = ModuleSample(list(SHAPES)[:4], of=12, left_out=0, seconds=0.0)
        fields = ("left_out_error", "mean_error", "mean_scaled_error", "random_error", "truncated_error")
        figures = {"a": {**dict.fromkeys(fields), "int8_error": 0.25, "int4_error": 0.5}}
        whole = SimpleNamespace(names=["a"])
        measured = SampledMeasurements(whole, [], sample, [])
        sampling = sampling_errors.sampling(measured, [figures, figures], seed=0)
        assert sampling.standard_errors == {**dict.fromkeys(fields), "int8_error": 0.0, "int4_error": 0.0}

    def test_updates_that_differ_in_other_modules_are_no_copies(self, of_four_modules):
        made = of_one_subspace(9, noise=0.4, shapes=SHAPES)
        other = next(module.name for module in report_on(made, 6).modules if module.delta_error is None)
        factors = made[0][other]
        made.append({**made[0], other: dataclasses.replace(factors, up=3 * factors.up)})
        report = report_on(made, 6)
        assert report.sampling is not None
        assert report.duplicates == []
        made[-1] = {**made[0], other: dataclasses.replace(factors, down=2 * factors.down, up=factors.up / 2)}
        assert len(report_on(made, 6).duplicates) == 1

    def test_all_adapters_are_left_out_of_a_full_report(self):
        collection = of_one_subspace(35, noise=0.4, shapes={"layers.0.query": (19, 23)})
        for options, count in (({"full": True}, 35), ({}, 32), ({"full": True, "left_out": 3}, 3)):
            assert report_on(collection, 4, **options).left_out.sampled == count

    def test_full_needs_originals(self, planted):
        pack = ex.fit(adapters(planted), n_components=6, warn_above=1.0)
        with pytest.raises(OptionError, match="full needs the original adapters"):
            ex.report(pack, full=True)
