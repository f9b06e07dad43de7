"""What a report says of collections whose answer is known: in one sentence, in findings, and in its figures."""

import math
import re

import pytest
import torch
from reported import adapters, findings, names, report_on, the

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.errors import UntrainedAdapterWarning
from eigenlorax.reports import numbers
from made import gauged, of_one_subspace, one_start, random, with_a_mean

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")

pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")


def without(collection, place, factor=0.0):
    """The collection with one adapter's B multiplied by `factor`."""
    found = list(collection)
    found[place] = {m: LoRAFactors(f.down, f.up * factor, f.scaling) for m, f in found[place].items()}
    return found


def square(width):
    """Two modules whose sides have this dimension."""
    return {f"layers.{layer}.query": (width, width) for layer in range(2)}


def assert_plain(report, *others):
    """Nothing is said but the answer, the bytes, what does better, and `others`."""
    kinds = {finding.kind for finding in report.verdict.findings}
    assert kinds <= {"shared", "partly-shared", "not-shared", "unknown", "loss", "bytes", "baseline", *others}


class TestShared:
    @pytest.mark.parametrize("seed", [0, 5])
    def test_is_said(self, seed):
        report = report_on(of_one_subspace(12, noise=0.02, seed=seed))
        assert report.verdict.headline.startswith("These 12 adapters share a subspace: an adapter that is left out")
        finding = the(report, "shared")
        assert finding.good is True
        assert "New adapters of this kind will mostly fit" in finding.advice
        assert f"a mean error of {report.left_out.errors.mean:.3f}" in report.verdict.headline
        assert report.left_out.errors.mean < 0.2
        assert_plain(report)

    def test_in_more_directions_than_were_kept(self):
        report = report_on(of_one_subspace(12, noise=0.02, k=12), k=6)
        assert "share a subspace with more components than the pack has" in report.verdict.headline
        assert "`-k 12`" in the(report, "partly-shared").advice
        (point,) = (point for point in report.sizes if point.k == 12)
        assert point.left_out < 0.2 < report.left_out.errors.mean

    @pytest.mark.parametrize(("width", "k"), [(16, 3), (24, 5)])
    def test_in_more_directions_of_narrow_modules(self, width, k):
        collection = of_one_subspace(60, noise=0.02, rank=2, k=k, shapes=square(width))
        report = report_on(collection, k=1, left_out=12)
        assert "share a subspace with more components than the pack has" in report.verdict.headline
        assert int(re.search(r"`-k (\d+)`", the(report, "partly-shared").advice)[1]) in (k, k + 1)
        made = adapters(collection)
        coded = ex.report(ex.fit(made, max_error=0.5), made, left_out=12)
        assert {"shared", "partly-shared"} & {finding.kind for finding in coded.verdict.findings}

    def test_by_three_quarters_or_less(self):
        """Half of each update's squared norm is in one subspace, half its own."""
        shared = of_one_subspace(12, rank=3)
        made = []
        for one, own in zip(shared, random(12, rank=3, seed=44), strict=True):
            mixed = {}
            for m, f in one.items():
                sizes = [float(torch.linalg.matrix_norm(g.up @ g.down)) for g in (f, own[m])]
                down = torch.cat([f.down / sizes[0], own[m].down / sizes[1]])
                mixed[m] = LoRAFactors(down, torch.cat([f.up, own[m].up], dim=1), 1.0)
            made.append(mixed)
        report = report_on(made)
        assert "share a part of their subspace" in report.verdict.headline
        assert report.left_out.errors.rms == pytest.approx(math.sqrt(0.5), abs=0.07)

    def test_does_not_show_where_nearly_all_directions_are_kept(self):
        report = report_on(random(14, rank=8), k=90)
        assert "any adapter would mostly fit (" in report.verdict.headline
        assert the(report, "unknown").advice == "Fit with fewer components to find out."

    @pytest.mark.parametrize("strangers", [0, 12, 20])
    def test_a_limit_for_many_adapters_is_stated_only_if_they_share(self, strangers):
        shared = of_one_subspace(25 - strangers, noise=0.05)
        report = report_on([*shared, *random(strangers, seed=4)], k=6, left_out=25)
        assert report.bytes.ratio > 1
        assert ("in the limit of many adapters" in the(report, "bytes").text) == (strangers == 0)

    def test_by_some_and_not_by_others(self):
        report = report_on([*of_one_subspace(9, noise=0.05), *random(3, seed=4)])
        finding = the(report, "partly-shared")
        assert report.verdict.headline.startswith("9 of these 12 adapters share a subspace: left out of the fit, they")
        assert finding.adapters == names(*range(9))
        errors = {row.name: row.left_out_error for row in report.adapters}
        inside = sum(errors[name] for name in names(*range(9))) / 9
        assert f"they have a mean error of {inside:.3f}, the others of 0.99" in report.verdict.headline
        assert "`--exclude-adapter`" in finding.advice

    def test_by_some_in_more_directions_than_were_kept(self):
        report = report_on([*of_one_subspace(6, noise=0.05), *random(6, seed=3)])
        assert report.left_out.errors.mean > 0.85
        finding = the(report, "partly-shared")
        assert report.verdict.headline.startswith(
            "6 of these 12 adapters share a subspace with more components than the"
        )
        assert finding.adapters == names(*range(6))
        k = int(re.search(r"`-k (\d+)`", finding.advice)[1])
        (point,) = (point for point in report.sizes if point.k == k)
        assert sorted(point.sharing) == names(*range(6))

    def test_a_number_of_directions_that_is_there_is_not_advised(self):
        for collection in (of_one_subspace(8, noise=0.1), random(2), with_a_mean(6, share=0.5)):
            report = report_on(collection, k=12)
            there = max(side.k for module in report.modules for side in (module.down, module.up))
            for finding in report.verdict.findings[:1]:
                advised = re.findall(r"(?:`-k |raise k to )(\d+)", finding.advice + finding.text)
                assert all(int(k) > there for k in advised)

    def test_untrained_and_projected_adapters_are_not_counted(self):
        made = adapters(without(of_one_subspace(8, noise=0.05), 2))
        with pytest.warns(UntrainedAdapterWarning, match="untrained .*: a02"):
            pack = ex.fit(made[:7], n_components=8)
        pack.add(made[7])
        assert ex.report(pack, made).verdict.headline.startswith("These 6 adapters share a subspace")

    def test_augmented_directions_answer_nothing(self):
        made = adapters(random(10))
        pack = ex.fit(made, n_components=8, warn_above=1.0)
        plain, augmented = ex.report(pack, made), ex.report(pack.augment(40, seed=1), made)
        assert augmented.verdict.headline == plain.verdict.headline
        chance = [[one.errors.mean for one in report.baselines if one.key == "random"] for report in (plain, augmented)]
        assert chance[0] == chance[1]


class TestNotShared:
    @pytest.mark.parametrize("seed", [0, 3])
    def test_is_said(self, seed):
        report = report_on(random(12, seed=seed))
        assert report.verdict.headline.startswith("These 12 adapters do not share a subspace")
        finding = the(report, "not-shared")
        assert finding.good is False
        (coded,) = (point for point in report.frontier.points if (point.way, point.worst) == ("codec", 0.1))
        assert finding.advice.startswith(
            f"For storage, fit with `--max-error 0.1` (`max_error=0.1`): about {numbers.size(coded.stored_bytes)}, "
        )
        assert finding.advice.endswith(
            "These adapters give no basis for new ones, neither for training nor for serving from a shared basis."
        )
        assert report.left_out.errors.mean > 0.98
        assert_plain(report)

    @pytest.mark.parametrize(("width", "rank", "seed"), [(8, 2, 0), (16, 2, 1), (24, 4, 0)])
    def test_at_no_k_even_if_all_components_hold_everything(self, width, rank, seed):
        """A stack of more rows than dimensions: at k = width every adapter fits, as it would in random components."""
        made = adapters(random(60, rank=rank, shapes=square(width), seed=seed))
        coded = ex.report(ex.fit(made, max_error=0.1), made, left_out=12)
        assert max(side.k for module in coded.modules for side in (module.down, module.up)) < width
        whole = coded.sizes[-1]
        assert (whole.k, whole.random, whole.left_out) == (
            width,
            pytest.approx(0, abs=1e-6),
            pytest.approx(0, abs=1e-6),
        )
        assert whole.ratio > 1
        for report in (coded, report_on(random(60, rank=rank, shapes=square(width), seed=seed), k=2, left_out=12)):
            assert the(report, "not-shared").text.startswith("They do not share a subspace")
            assert all(point.sharing == [] for point in report.sizes)

    def test_the_whole_width_is_no_number_of_components_to_advise(self):
        report = report_on(random(60, rank=2, shapes=square(16)), k=2, left_out=4)
        advice = the(report, "loss").advice
        assert advice.startswith(
            "All 16 components, the whole width, hold them up to rounding, in a pack no smaller than the LoRAs. For "
        )
        assert "or less" not in advice

    def test_a_low_error_in_the_fit_is_called_compression(self):
        report = report_on(random(5), k=16)
        assert report.in_fit.mean < 0.3
        assert "That is compression, and no common structure." in the(report, "not-shared").text


class TestOneStart:
    def test_of_all(self):
        report = report_on(one_start(10, trained=0.4))
        finding = the(report, "start")
        assert finding.adapters == names(*range(10))
        assert finding.text.startswith("10 adapters were trained from the same random A")
        assert "do not share a subspace" in report.verdict.headline
        (group,) = report.starts.groups
        assert group.cosine_down == pytest.approx(1 - 0.4**2, abs=0.03)
        assert abs(group.cosine_up) < 0.05
        (energy,) = report.starts.energies
        assert (energy.who, energy.adapters) == ("group 1", 10)
        assert energy.factors_down > 0.75
        assert_plain(report, "start")

    def test_of_some(self):
        report = report_on([*one_start(6, trained=0.3), *random(5, rank=4, seed=9)])
        assert the(report, "start").adapters == names(*range(6))
        energy = {row.who: row for row in report.starts.energies}
        assert {who: row.adapters for who, row in energy.items()} == {"all": 11, "group 1": 6, "others": 5}
        assert energy["group 1"].factors_down > energy["all"].factors_down > energy["others"].factors_down

    @pytest.mark.parametrize("collection", [of_one_subspace(8, noise=0.05), random(8), with_a_mean(8, share=0.7)])
    def test_is_not_seen_where_there_is_none(self, collection):
        report = report_on(collection)
        assert findings(report, "start") == []
        assert report.starts.groups == []


class TestMean:
    def test_is_said(self):
        report = report_on(with_a_mean(10, share=0.7))
        finding = the(report, "mean")
        assert report.similarity.mean_cosine == pytest.approx(0.7, abs=0.01)
        # the mean of nine others is 0.7 of the squared norm, and a ninth of what is their own
        expected = 0.7**2 / (0.7 + 0.3 / 9)
        assert report.similarity.mean_energy == pytest.approx(expected, abs=0.01)
        assert f"explains {report.similarity.mean_energy:.3f}" in finding.text
        assert "`eigenlorax merge ADAPTER… -o mean/`" in finding.advice
        baselines = {one.key: one for one in report.baselines}
        assert baselines["mean-scaled"].errors.mean < 0.6

    def test_is_not_seen_where_there_is_none(self):
        assert findings(report_on(of_one_subspace(10, noise=0.05)), "mean") == []


class TestWhoIsLikeWhom:
    def test_one_outlier(self):
        report = report_on([*of_one_subspace(9, noise=0.05), *random(1, seed=5)])
        finding = the(report, "outlier")
        assert finding.adapters == report.outliers == names(9)
        assert "--exclude-adapter" in finding.advice
        assert report.verdict.headline.startswith("These 10 adapters share a subspace")
        assert_plain(report, "shared", "outlier")

    def test_two_clusters(self):
        report = report_on([*of_one_subspace(6, noise=0.05), *of_one_subspace(5, noise=0.05, seed=99)], k=12)
        finding = the(report, "clusters")
        assert finding.text.startswith("They form 2 groups, of 6 and 5 adapters")
        assert [one.adapters for one in report.similarity.clusters] == [names(*range(6)), names(*range(6, 11))]
        assert {row.name: row.cluster for row in report.adapters} == dict.fromkeys(names(*range(6)), 0) | dict.fromkeys(
            names(*range(6, 11)), 1
        )
        assert report.outliers == []

    def test_copies_are_named_and_do_not_count_as_left_out(self):
        collection = random(6)
        report = report_on([*collection, gauged(collection[0], 3)])
        assert "a00 = a06" in the(report, "duplicate").text
        assert report.duplicates == [names(0, 6)]
        assert report.left_out.sampled == 5
        assert report.left_out.errors.mean > 0.98
        errors = {row.name: row.left_out_error for row in report.adapters}
        assert max(errors["a00"], errors["a06"]) < 0.8 < min(errors[name] for name in names(1, 2, 3, 4, 5))

    def test_copies_of_strangers_share_nothing_at_any_k(self):
        collection = random(5)
        copied = [one for i in range(4) for one in (collection[i], gauged(collection[i], i))]
        report = report_on([*copied, collection[4]])
        assert report.verdict.headline.startswith("These 9 adapters do not share a subspace")
        assert all(point.left_out > 0.9 for point in report.sizes)
        assert (report.similarity.clusters, report.outliers) == ([], [])
        assert report.similarity.mean_energy < 0.01
        assert "; and 1 group more" in the(report, "duplicate").text

    def test_copies_are_in_the_cluster_of_what_they_are_copies_of(self):
        one, two = of_one_subspace(5, noise=0.05), of_one_subspace(4, noise=0.05, seed=99)
        report = report_on([*one, *two, gauged(two[0], 3)], k=12)
        assert [cluster.adapters for cluster in report.similarity.clusters] == [names(*range(5)), names(5, 6, 7, 8, 9)]

    @pytest.mark.filterwarnings("ignore::eigenlorax.errors.DuplicateAdapterWarning")
    def test_nothing_but_copies(self):
        one, two = random(2)
        report = report_on([one, gauged(one, 3), two, two])
        assert report.left_out is None
        assert "none can be left out" in report.verdict.headline

    def test_an_untrained_adapter(self):
        with pytest.warns(UntrainedAdapterWarning, match="untrained .*: a02"):
            report = report_on(without(of_one_subspace(7, noise=0.05), 2))
        assert the(report, "untrained").adapters == report.untrained == names(2)
        assert report.left_out.of == 6
        assert "a02" not in report.similarity.names
        row = next(row for row in report.adapters if row.name == "a02")
        assert (row.untrained, row.delta_error, row.left_out_error, row.x) == (True, 0.0, None, None)

    def test_a_loud_adapter_does_not_drown_the_others(self):
        """Sizes mean nothing to the answer."""
        collection = of_one_subspace(8, noise=0.05)
        quiet, loud = report_on(collection), report_on(without(collection, 3, factor=1000.0))
        assert loud.verdict.headline == quiet.verdict.headline


class TestModulesWithoutDirections:
    """`max_error` may drop a module, and one may be trained by nobody."""

    def dropped(self):
        collection = of_one_subspace(6, noise=0.05)
        first = next(iter(collection[0]))
        return adapters(
            [
                {**one, first: LoRAFactors(one[first].down * 1e-4, one[first].up, one[first].scaling)}
                for one in collection
            ]
        )

    def untrained(self):
        collection = of_one_subspace(6, noise=0.05)
        first = next(iter(collection[0]))
        return adapters(
            [{**one, first: LoRAFactors(one[first].down, one[first].up * 0, one[first].scaling)} for one in collection]
        )

    @pytest.mark.parametrize("originals", [True, False])
    @pytest.mark.parametrize(("make", "options"), [("dropped", {"max_error": 0.3}), ("untrained", {"n_components": 8})])
    def test_are_reported(self, make, options, originals, tmp_path):
        made = getattr(self, make)()
        pack = ex.fit(made, **options)
        first = min(pack.subspace.modules)
        assert pack.subspace.modules[first].down.k == 0
        report = ex.report(pack, made if originals else None)
        assert {module.name: module.down.k for module in report.modules}[first] == 0
        for name in ("report.html", "report.md", "report.json"):
            report.save(tmp_path / name)
        assert ex.Report.load(tmp_path / "report.json") == report


class TestFew:
    def test_one_adapter(self):
        report = report_on(random(1))
        assert report.verdict.headline == "A single adapter cannot share a subspace."
        assert (report.left_out, report.starts.groups, report.similarity.clusters) == (None, [], [])

    def test_two_adapters(self):
        report = report_on(random(2))
        assert report.verdict.headline.startswith("These 2 adapters do not share a subspace")
        assert {row.nearest for row in report.adapters} == set(names(0, 1))


class TestThePackAlone:
    def test_says_what_is_missing(self):
        made = adapters(of_one_subspace(8, noise=0.05))
        report = ex.report(ex.fit(made, n_components=8))
        assert report.verdict.headline == "The pack alone does not tell whether its adapters share a subspace."
        assert "`--adapters`" in the(report, "unknown").advice
        assert (report.left_out, report.baselines, report.sizes, report.module_errors) == (None, [], [], [])
        assert report.similarity.of == "pack"

    def test_its_similarities_are_those_of_what_comes_back(self):
        made = adapters(of_one_subspace(8, noise=0.05))
        pack = ex.fit(made, n_components=8)
        alone = ex.report(pack)
        returned = [pack.adapter(name) for name in pack.names]
        again = ex.report(ex.fit(returned, energy=1.0), returned)
        order = [again.similarity.names.index(name) for name in alone.similarity.names]
        expected = torch.tensor(again.similarity.cosine)[order][:, order]
        torch.testing.assert_close(torch.tensor(alone.similarity.cosine), expected, atol=1e-5, rtol=0)

    def test_clusters_are_seen(self):
        made = adapters([*of_one_subspace(6, noise=0.05), *of_one_subspace(5, noise=0.05, seed=99)])
        report = ex.report(ex.fit(made, n_components=12))
        assert [len(one.adapters) for one in report.similarity.clusters] == [6, 5]


class TestOriginals:
    def test_are_recognised_by_their_content_under_any_name(self):
        made = adapters(of_one_subspace(6, noise=0.05))
        pack = ex.fit(made, n_components=8)
        renamed = {f"other-{i}": one for i, one in enumerate(reversed(made))}
        assert ex.report(pack, renamed) == ex.report(pack, made)

    def test_one_of_the_fit_that_is_missing(self):
        made = adapters(of_one_subspace(6, noise=0.05))
        pack = ex.fit(made, n_components=4)
        with pytest.raises(ex.errors.OptionError, match="the original of 'a05', which is in the fit, is not among"):
            ex.report(pack, made[:5])

    def test_strangers_are_left_out_and_named(self):
        made = adapters(of_one_subspace(6, noise=0.05))
        pack = ex.fit(made, n_components=8)
        (stranger,) = adapters(random(1, seed=7))
        with pytest.warns(ex.errors.SkippedAdapterWarning, match="not in the pack.*: stranger"):
            report = ex.report(pack, {**{one.name: one for one in made}, "stranger": stranger})
        assert [row.name for row in report.adapters] == [row.name for row in ex.report(pack, made).adapters]

    def test_projected_ones_may_be_missing_and_are_named(self):
        collection = of_one_subspace(8, noise=0.05)
        made = adapters(collection)
        pack = ex.fit(made[:6], n_components=8)
        for one in made[6:]:
            pack.add(one)
        report = ex.report(pack, made[:7])
        assert any("No originals were passed of these projected adapters: a07" in note for note in report.notes)
        assert report.projected.adapters == 2
        rows = {row.name: row for row in report.adapters}
        assert rows["a06"].int8_error is not None
        assert rows["a07"].int8_error is None


@pytest.mark.parametrize("collection", [with_a_mean(6, share=0.7), of_one_subspace(7, noise=0.05), random(5)])
def test_bytes_and_errors_by_k_are_those_of_fits_without_sweeps(collection):
    made = adapters(collection)
    for point in ex.report(ex.fit(made, n_components=8, warn_above=1.0), made).sizes:
        pack = ex.fit(made, n_components=point.k, sweeps=0, warn_above=1.0)
        b = pack.summary.bytes
        assert (point.stored_bytes, point.ratio) == (b.basis + b.coefficients, pytest.approx(b.ratio))
        assert point.mean == pytest.approx(pack.summary.in_fit.mean, abs=1e-6)
        assert point.worst == pytest.approx(pack.summary.in_fit.worst, abs=1e-6)


def test_the_same_twice_is_the_same():
    collection = of_one_subspace(7, noise=0.1)
    assert report_on(collection) == report_on(collection)


def test_a_sample_is_drawn_by_the_seed():
    collection = of_one_subspace(9, noise=0.1)
    few = [report_on(collection, left_out=3, seed=seed) for seed in (0, 0, 1)]
    left = [{row.name for row in one.adapters if row.left_out_error is not None} for one in few]
    assert left[0] == left[1] != left[2]
    assert few[0].left_out.sampled == 3
    assert any("3 of 9 adapters were left out" in note for note in few[0].notes)


@pytest.mark.parametrize("left_out", [0, -1])
def test_left_out_is_at_least_one(left_out):
    with pytest.raises(ex.errors.OptionError, match="left_out must be at least 1"):
        report_on(random(3), left_out=left_out)


def test_factor_errors_of_a_module_are_the_mean_over_adapters_of_what_is_lost_of_a_and_b():
    made = adapters(of_one_subspace(6, noise=0.3))
    pack = ex.fit(made, n_components=7, warn_above=1.0)
    for module in ex.report(pack, made).modules:
        lost = {"down": [], "up": []}
        for one in made:
            back, factors = pack.adapter(one.name).modules[module.name], one.modules[module.name]
            for side in lost:
                ours, theirs = (getattr(f, side).double() for f in (back, factors))
                lost[side].append(float((ours - theirs).square().sum() / theirs.square().sum()))
        assert module.factor_error_down == pytest.approx(math.sqrt(sum(lost["down"]) / 6), rel=1e-4)
        assert module.factor_error_up == pytest.approx(math.sqrt(sum(lost["up"]) / 6), rel=1e-4)
        assert module.energy_kept == pytest.approx(1 - module.delta_error**2)
