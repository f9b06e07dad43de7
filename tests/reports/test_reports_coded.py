"""Reports of packs that were made for an error or a size."""

import pytest
import torch
from documents import Document
from reported import adapters as named_adapters

import eigenlorax as ex
import made
from eigenlorax.codec import encoder
from eigenlorax.core.adapter import LoRAFactors, from_factors
from eigenlorax.reports import frontier, numbers
from eigenlorax.reports.render import page
from planted import factors_in, orthonormal, random_collection, shared_collection

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")


def kinds(report):
    return {finding.kind: f"{finding.text} {finding.advice}" for finding in report.verdict.findings}


@pytest.mark.parametrize("aim", [{"ratio": 6.0}, {"max_bytes": 2500}, {"max_error": 0.3}], ids=str)
def test_adapters_that_share_nothing(aim, tmp_path):
    adapters = random_collection(5)
    pack = ex.fit(adapters, warn_above=1.0, **aim)
    report = ex.report(pack, adapters)
    assert report.in_fit.worst == pytest.approx(pack.summary.in_fit.worst, abs=1e-5)
    found = kinds(report)
    assert (
        "needs no shared subspace. An adapter that is added later takes as many bytes as it would alone"
        in found["not-shared"]
    )
    assert "stores a residual for each adapter" in found["not-shared"]
    best = min((point for point in report.sizes if point.random >= 0.7), key=lambda point: point.left_out)
    assert f"at best, with k = {best.k}, an adapter that is left out of the fit has" in found["not-shared"]
    assert "rounding" not in found
    report.save(tmp_path / "report.md")
    assert pack.fit_info.size in (tmp_path / "report.md").read_text("utf-8")


def test_adapters_that_share_all(tmp_path):
    adapters, _ = shared_collection(9)
    report = ex.report(ex.fit(adapters, max_error=0.2), adapters)
    assert "They share a subspace" in kinds(report)["shared"]
    assert report.left_out.errors.mean < 0.3


@pytest.mark.parametrize(
    ("collection", "kind", "options"),
    [
        ([*made.of_one_subspace(9, noise=0.05), *made.random(3, seed=4)], "partly-shared", {}),
        ([*made.of_one_subspace(6, noise=0.05), *made.random(6, seed=3)], "partly-shared", {"ratio": 20.0}),
        ([*made.of_one_subspace(9, noise=0.05), *made.random(1, seed=5)], "outlier", {}),
        ([*made.of_one_subspace(6, noise=0.05), *made.of_one_subspace(5, noise=0.05, seed=99)], "clusters", {}),
    ],
    ids=["divided", "more components", "outlier", "clusters"],
)
def test_no_adapter_is_advised_to_be_left_out(collection, kind, options):
    adapters = named_adapters(collection)
    report = ex.report(ex.fit(adapters, **options), adapters)
    advice = {finding.kind: finding.advice for finding in report.verdict.findings}
    assert kind in advice
    for sentence in advice.values():
        assert "--exclude-adapter" not in sentence
        assert "ordinary LoRA" not in sentence
        assert "separately" not in sentence
        assert "Fit again with" not in sentence


def test_a_side_without_directions_is_no_obstacle():
    bases = orthonormal(2, 31, seed=1), torch.eye(47, dtype=torch.float64)
    adapters = []
    for index in range(12):
        one = factors_in(bases, 2, seed=10 * index)
        modules = {"layer": LoRAFactors(one.down.float(), one.up.float(), one.scaling)}
        adapters.append(from_factors(f"a{index}", modules, base_model="org/base"))
    pack = ex.fit(adapters, max_error=0.3)
    sides = pack.info.modules["layer"]
    assert (sides["down"].k, sides["up"].k) == (2, 0)
    report = ex.report(pack, adapters)
    assert report.left_out.errors.mean == 1
    assert report.in_fit.worst == pytest.approx(pack.summary.in_fit.worst, abs=1e-5)


@pytest.fixture(scope="module")
def reported():
    adapters = random_collection(7)
    pack = ex.fit(adapters, max_error=0.2)
    return pack, ex.report(pack, adapters)


class TestPackForStorage:
    """Its main answer are bytes and errors, with what other error bounds would take."""

    def test_leads_with_bytes_and_the_largest_error(self, reported):
        pack, report = reported
        size, worst = numbers.size(pack.summary.bytes.pack), numbers.error(pack.summary.in_fit.worst)
        assert report.verdict.headline == (
            f"These 7 adapters take {size} in this pack, {numbers.ratio(pack.summary.bytes.ratio)} smaller than the "
            f"LoRAs in 16 bits, and no adapter has a delta error above {worst}."
        )
        first, second, *others = report.verdict.findings
        assert (first.kind, first.good) == ("bytes", True)
        assert (second.kind, second.good) == ("not-shared", None)
        assert "bytes" not in {finding.kind for finding in others}

    def test_advises_other_bounds_with_their_bytes(self, reported):
        _, report = reported
        at = {point.worst: point.stored_bytes for point in report.frontier.points if point.way == "codec"}
        assert report.verdict.findings[0].advice == (
            f"With another error bound, `--max-error 0.15` (`max_error=0.15`) takes about {numbers.size(at[0.15])} and "
            f"`--max-error 0.3` (`max_error=0.3`) takes about {numbers.size(at[0.3])}."
        )

    def test_says_how_far_the_bytes_are_from_the_gaussian_bound(self, reported):
        pack, report = reported
        worst = report.frontier.points[0].worst
        (bound,) = (point for point in report.frontier.points if (point.way, point.worst) == ("bound", worst))
        assert 1 < pack.summary.bytes.pack / bound.stored_bytes < 1.4
        sentence = f"each by itself, are {numbers.size(bound.stored_bytes)}: the Gaussian rate–distortion bound."
        assert sentence in report.verdict.findings[0].text
        assert all(point.way != "bound" or point.mean == point.worst for point in report.frontier.points)

    def test_its_page_begins_with_bytes(self, reported):
        document = Document(page.render(reported[1]))
        assert [text for text, _ in document.all("h2")][:3] == ["Findings", "Bytes at an error", "Bytes"]
        assert "With more or fewer components" not in [text for text, _ in document.all("h2")]
        tiles = [text for text, _ in document.of_class("tile")]
        worst = numbers.error(reported[1].in_fit.worst)
        assert tiles[0].startswith("Bytes of the pack")
        assert tiles[1].startswith(f"Largest error{worst}")
        assert len(tiles) == 2

    def test_a_pack_by_components_leads_with_what_a_left_out_adapter_loses(self, reported):
        adapters = random_collection(7)
        report = ex.report(ex.fit(adapters, n_components=3, warn_above=1.0), adapters)
        assert "an adapter that is left out of the fit has a mean error of" in report.verdict.headline
        document = Document(page.render(report))
        assert [text[:10] for text, _ in document.of_class("tile")] == ["Error when", "Error in t", "LoRA bytes"]
        assert "`--max-error" in report.verdict.findings[0].advice


def perturbed(n, *, own=0.1, rank=4, shapes):
    """Adapters that differ from one by `own` of its norm."""
    common = made.random(1, rank=rank, shapes=shapes, seed=5)[0]
    factors = [
        {
            module: LoRAFactors(f.down + own * other[module].down, f.up + own * other[module].up, f.scaling)
            for module, f in common.items()
        }
        for other in made.random(n, rank=rank, shapes=shapes, seed=9)
    ]
    return named_adapters(factors)


@pytest.fixture(scope="module")
def adapters():
    return perturbed(80, rank=8, shapes={f"layers.{layer}.query": (64, 64) for layer in range(3)})


class TestAdaptersThatDifferByAboutTheError:
    """Below it each has a residual, above it none: the bytes fall by four between errors of 0.1 and 0.15."""

    @pytest.mark.parametrize("error", [0.1, 0.15])
    def test_a_stricter_bound_takes_more_than_the_pack_and_a_looser_one_less(self, adapters, error):
        pack = ex.fit(adapters, max_error=error)
        report = ex.report(pack, adapters, left_out=2)
        own = report.frontier.points[0]
        coded = [point for point in report.frontier.points if point.way == "codec"]
        assert coded
        for point in coded:
            assert (point.stored_bytes > own.stored_bytes) == (point.worst < own.worst)
            assert not own.worst / 1.05 < point.worst < own.worst * 1.05
        for point in pack.frontier:
            if point.error != own.worst:
                assert (point.bytes > own.stored_bytes) == (point.error < own.worst)
        assert "These estimates can be wrong by a factor of two" in report.verdict.findings[0].advice
        assert "would take" not in " ".join(finding.text for finding in report.verdict.findings)

    @pytest.mark.parametrize("error", [0.1, 0.2])
    def test_estimates_of_a_fit_are_wrong_by_a_factor_of_two_at_most(self, adapters, error):
        pack = ex.fit(adapters, max_error=error)
        assert encoder.is_steep(pack.frontier)
        for point in pack.frontier:
            taken = ex.fit(adapters, max_error=point.error).summary.bytes.pack
            assert taken / 2 < point.bytes < 2 * taken

    def test_a_pack_by_components_hears_how_rough_estimates_are(self, adapters):
        report = ex.report(ex.fit(adapters, n_components=2, warn_above=1.0), adapters, left_out=2)
        assert "(an estimate that can be wrong by a factor of two)" in str(report.verdict)


@pytest.mark.parametrize(
    ("points", "is_steep"),
    [
        # bytes ~ error ** -3 and error ** -1
        ([(0.1, 8000), (0.2, 1000)], True),
        ([(0.1, 2000), (0.2, 1000)], False),
        # as an altered report may have them
        ([(0.0, 2000), (0.1, 1000)], False),
        ([(-0.1, 2000), (0.0, 1500), (0.1, 1000)], False),
        ([(5e-324, 2000), (0.1, 1000)], False),
        ([(0.1, 2000), (0.1, 1000)], True),
        ([(0.1, 0), (0.2, 1000)], False),
    ],
)
def test_a_curve_is_steep_where_bytes_fall_faster_than_the_square_of_the_error(points, is_steep):
    assert encoder.is_steep([encoder.RatePoint(*point) for point in points]) is is_steep


@pytest.mark.parametrize("make", [made.random, made.of_one_subspace], ids=["alone", "shared"])
@pytest.mark.parametrize("error", [0.05, 0.2, 0.4])
def test_estimated_bytes_of_the_codec_are_near_those_of_its_fits(make, error):
    factors = make(12, shapes={"layers.0.query": (310, 290), "layers.1.value": (290, 330)})
    adapters = [from_factors(f"a{n:02}", one, base_model="org/base") for n, one in enumerate(factors)]
    report = ex.report(ex.fit(adapters, n_components=3, warn_above=1.0), adapters, left_out=1)
    (point,) = (point for point in report.frontier.points if (point.way, point.worst) == ("codec", error))
    assert not frontier.is_rough(report.frontier)
    # headers of files are not estimated
    assert point.stored_bytes == pytest.approx(ex.fit(adapters, max_error=error).summary.bytes.pack, rel=0.03, abs=300)
