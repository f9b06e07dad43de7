"""The null model in a report: nothing is said to be shared where nothing is, whatever the singular values are; and what
is shared is said, by every sentence alike."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from core_packs import fit_with_cores
from reported import adapters, report_on, the

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors
from eigenlorax.reports import alternatives, json_document, measure, originals, verdict
from eigenlorax.reports.chance import SIGMAS
from eigenlorax.reports.energies import energies
from eigenlorax.reports.module_sample import ModuleSample
from eigenlorax.reports.render import markdown, page
from eigenlorax.train import demo
from made import WIDE, of_one_subspace, one_start, random
from planted import normal, of_spectrum, orthonormal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_shape_checks")]

pytest.importorskip("scipy", reason="SciPy is not installed: pip install '.[report]'")

EVEN, STEEP = [1.0, 1.0, 1.0], [1.0, 0.2, 0.05, 0.01]
SMALL = {"m": (61, 64)}


def strangers(n, spectrum=lambda i: STEEP, *, shapes=WIDE, seed=1, size=lambda i: 1.0):
    """Adapters of these singular values, by place, in random directions."""
    return [
        {
            module: of_spectrum(spectrum(i), *shape, seed=100_000 * seed + 100 * i + 10 * place, size=size(i))
            for place, (module, shape) in enumerate(shapes.items())
        }
        for i in range(n)
    ]


def convolutional(n):
    """Strangers of convolutions: rows of channels · height · width numbers."""
    kernels = {"conv": (3, 5), "point": (1, 1)}
    return [
        {
            module: of_spectrum(STEEP, 31, 7 * math.prod(kernel), seed=100 * i + 10 * place, kernel=kernel)
            for place, (module, kernel) in enumerate(kernels.items())
        }
        for i in range(n)
    ]


def of_many_kinds():
    """Strangers whose ranks, norms and spectra differ, and of whom some lack a module."""
    spectra = ([1.0], EVEN, STEEP, [1.0, 0.9, 0.1, 0.1, 0.1, 0.01])
    found = strangers(13, lambda i: spectra[i % 4], size=lambda i: (-1.0) ** i * 10.0 ** (i % 5 - 2))
    del found[3]["layer.0.query"], found[6]["layer.0.value"]
    return found


NOTHING_SHARED = {
    "even": (lambda: strangers(12, lambda i: EVEN), 8),
    "steep": (lambda: strangers(12), 8),
    "of rank 1 but for a little": (lambda: strangers(12, lambda i: [1.0, 1e-2, 1e-4]), 8),
    "of many kinds": (of_many_kinds, 8),
    "one small module": (lambda: strangers(10, shapes=SMALL), 12),
    "very small": (lambda: strangers(9, lambda i: [1.0] * (1 + i % 3), shapes={"m": (17, 16)}), 5),
    "two": (lambda: strangers(2), 3),
    "more rows than are fitted again": (lambda: strangers(80, shapes=SMALL), 16),
    "convolutions": (lambda: convolutional(8), 6),
}


@pytest.fixture(scope="module", params=NOTHING_SHARED)
def unrelated(request):
    make, k = NOTHING_SHARED[request.param]
    return report_on(make(), k=k)


class TestNothingShared:
    def test_is_the_verdict_and_no_sentence_says_otherwise(self, unrelated):
        finding = the(unrelated, "not-shared")
        assert "do not share a subspace" in unrelated.verdict.headline
        assert "keep no more of it than random components would." in finding.text
        said = " ".join([energies(unrelated), *(f"{one.text} {one.advice}" for one in unrelated.verdict.findings)])
        assert "is shared" not in said
        assert not re.search(r"(?<!not )share a (sub|part)|beyond chance|hardly any common", said)
        assert {one.kind for one in unrelated.verdict.findings} <= {"not-shared", "loss", "bytes", "baseline"}
        assert energies(unrelated) in markdown.render(unrelated).replace("\\", "")

    def test_errors_are_those_of_the_null_model_at_every_k(self, unrelated):
        null = unrelated.null
        assert abs(unrelated.in_fit.mean - null.errors.mean) <= SIGMAS * null.spread + 1e-4
        for point in unrelated.sizes:
            assert abs(point.mean - point.null) <= 1.25 * SIGMAS * point.null_spread + 1e-4
            assert point.sharing == []
        out = unrelated.left_out
        assert abs(out.kept) <= SIGMAS * out.kept_spread
        assert out.errors.rms**2 == pytest.approx(out.chance**2, abs=SIGMAS * out.kept_spread + 0.01)
        assert out.sharing == []

    def test_so_are_energies_and_halves(self, unrelated):
        for side in (unrelated.null.down, unrelated.null.up):
            assert abs(side.energy - side.null) <= SIGMAS * side.spread + 1e-4
        for module in unrelated.modules:
            for side in (module.down, module.up):
                assert side.halves_overlap == pytest.approx(side.null_halves_overlap, abs=0.2)
                assert sum(side.null[: side.k]) >= side.null_energy - 1e-9
                assert len(side.angles) == len(side.null_angles)


def test_steep_spectra_keep_much_of_strangers_in_a_fit():
    """What adapters of even ones would lose says nothing of these, and was taken for what they have in common."""
    steep, even = (report_on(strangers(12, lambda i, s=sigma: s), k=10) for sigma in (STEEP, EVEN))
    assert steep.in_fit.mean < 0.6 * even.null.errors.mean
    for report in (steep, even):
        null = report.null
        assert null.spread < 0.02
        assert report.in_fit.mean == pytest.approx(null.errors.mean, abs=SIGMAS * null.spread)


def test_the_null_model_of_the_demo():
    """Adapters of real tasks lose hardly less in the fit than they would with nothing in common."""
    pack = ex.fit(demo.data() / "adapters", n_components=32)
    packed = {name: pack.packed(name) for name in pack.names}
    found = originals.find(pack, demo.data() / "adapters", lambda stage, done, total: None)
    sample = ModuleSample.whole(measure.module_sizes(pack, packed), 32, 1)
    measured = measure.measure(pack, packed, found, 0, sample, lambda stage, done, total: None)
    null = alternatives.null(measured.whole, pack, 0)
    assert pack.summary.in_fit.mean == pytest.approx(0.299, abs=5e-4)
    assert null.errors.mean == pytest.approx(0.306, abs=1e-3)
    assert null.spread < 1e-3


def test_what_the_report_on_the_demo_says():
    report = ex.Report.load(Path(__file__).parents[2] / "docs" / "reports" / "minilm.json")
    assert "do not share a subspace" in report.verdict.headline
    text = the(report, "not-shared").text
    assert "too little for a shared subspace" in text
    assert f"singular values and random singular vectors it would be {report.null.errors.mean:.3f}" in text
    assert "That is compression, and hardly any common structure." in text
    # of the groups of tasks: said in the section on spectra, and that it is no subspace
    assert "The energy above chance is shared, on both sides." in energies(report)
    assert "which is too little for a subspace" in energies(report)


class TestShared:
    def test_in_one_subspace(self):
        report = report_on(of_one_subspace(12, noise=0.02))
        assert report.verdict.headline.startswith("These 12 adapters share a subspace")
        assert report.left_out.errors.mean < 0.2
        assert report.left_out.kept > 0.95
        assert len(report.left_out.sharing) == 12
        # a steeper spectrum than that of as many strangers, on both sides
        assert report.in_fit.mean < 0.5 * report.null.errors.mean
        assert min(report.null.down.energy, report.null.up.energy) > 0.99 > report.null.down.null + 0.1
        assert "The energy above chance is shared, on both sides." in energies(report)
        assert "no more than" not in energies(report)
        assert f"keep {report.left_out.kept:.3f} of its squared norm beyond chance." in energies(report)

    def test_in_part(self):
        """Half of each update's squared norm is in one subspace, half its own."""
        made = []
        for one, own in zip(of_one_subspace(12), random(12, seed=44), strict=True):
            sizes = {m: [float(torch.linalg.matrix_norm(f.up @ f.down)) for f in (one[m], own[m])] for m in one}
            made.append(
                {
                    m: LoRAFactors(
                        torch.cat([f.down / sizes[m][0], own[m].down / sizes[m][1]]),
                        torch.cat([f.up, own[m].up], dim=1),
                        1.0,
                    )
                    for m, f in one.items()
                }
            )
        report = report_on(made)
        assert "share a part of their subspace" in report.verdict.headline
        assert report.left_out.kept == pytest.approx(0.5, abs=0.1)
        assert "is shared, on both sides" in energies(report)
        assert "too little" not in energies(report)

    def test_on_one_side_alone_is_no_subspace(self):
        """A in few directions that all have, B in random ones: spectra of A fall fast, and nothing of an update is
        kept without it."""
        bases = {m: orthonormal(4, n_in, 7 + place) for place, (m, (_, n_in)) in enumerate(WIDE.items())}
        made = [
            {
                m: LoRAFactors(normal(3, 4, seed=50 * i + n_in) @ bases[m], normal(n_out, 3, seed=70 * i + n_out), 1.0)
                for m, (n_out, n_in) in WIDE.items()
            }
            for i in range(12)
        ]
        report = report_on(made)
        assert "do not share a subspace" in report.verdict.headline
        assert report.null.down.energy > 0.99 > report.null.down.null + 0.2
        assert "The energy above chance is shared, on the down side alone." in energies(report)
        assert "which is too little for a subspace" in energies(report)

    def test_a_common_start_is_named_where_a_falls_fast(self):
        report = report_on(one_start(10, trained=0.4))
        assert "do not share a subspace" in report.verdict.headline
        assert "On the down side, a common random start alone causes that." in energies(report)
        (row,) = report.starts.energies
        assert row.null_down < row.factors_down - 0.3
        assert row.factors_up == pytest.approx(row.null_up, abs=0.05)
        finding = the(report, "start")
        assert f"with random singular vectors {row.null_down:.3f} and {row.null_up:.3f}" in finding.text

    def test_versions_of_one_run(self):
        """Checkpoints: A and B go on from where they were."""
        start = random(1, rank=4)[0]
        steps = [random(1, rank=4, seed=31 * i)[0] for i in range(7)]
        made, now = [], start
        for step in steps:
            now = {m: LoRAFactors(f.down + 0.1 * step[m].down, f.up + 0.1 * step[m].up, 2.0) for m, f in now.items()}
            made.append(now)
        report = report_on(made)
        assert "share a subspace" in the(report, "shared").text
        assert report.left_out.kept > 0.9
        assert report.in_fit.mean < report.null.errors.mean - 0.2
        assert "is shared, on both sides" in energies(report)

    def test_versions_of_a_real_run(self, shared):
        folder = shared / "zoo" / "lineages" / "roberta-portuguese"
        made = {str(n): ex.read_adapter(folder / f"checkpoint-{n}") for n in (2000, 4000, 6000, 8000)}
        pack = ex.fit(made, n_components=8)
        report = ex.report(pack, made)
        assert the(report, "shared")
        assert report.left_out.errors.mean < 0.2
        assert report.in_fit.mean < 0.6 * report.null.errors.mean
        assert report.left_out.chance > 0.99


class TestTheVerdictKnowsHowChanceScatters:
    def report(self, **changes):
        import dataclasses

        full = report_on(strangers(4, shapes=SMALL), k=4)
        return dataclasses.replace(full, left_out=dataclasses.replace(full.left_out, **changes))

    @pytest.mark.parametrize(
        ("kept", "spread", "kind"),
        [(0.8, 0.1, "shared"), (0.8, 0.3, "not-shared"), (0.4, 0.05, "partly-shared"), (0.4, 0.2, "not-shared")],
    )
    def test_what_chance_may_have_kept_is_not_shared(self, kept, spread, kind):
        assert verdict.conclude(self.report(kept=kept, kept_spread=spread)).findings[0].kind == kind

    @pytest.mark.parametrize(
        ("spread", "said"),
        [(0.01, "0.100 of its squared norm beyond chance: too little"), (0.04, "keep no more of it than random")],
    )
    def test_a_little_is_shared_where_it_is_more_than_that(self, spread, said):
        assert said in verdict.conclude(self.report(kept=0.1, kept_spread=spread)).findings[0].text


class TestForms:
    """Of packs that store other things than coefficients, the null model is beside no error that is not of its form."""

    def test_diagonal_cores(self):
        made = adapters(strangers(8))
        report = ex.report(fit_with_cores(made, "diagonal", n_components=8), made)
        assert "random singular vectors" not in the(report, "not-shared").text
        assert "the null model" in the(report, "cores").text

    def test_in_whole_numbers(self):
        made = adapters(strangers(8))
        report = ex.report(ex.fit(made, max_error=0.3), made)
        assert "random singular vectors" not in the(report, "not-shared").text


def test_one_adapter_is_its_own_null_model():
    report = report_on(strangers(1, lambda i: EVEN), k=2)
    assert report.in_fit.mean == pytest.approx(report.null.errors.mean, abs=1e-6)
    assert report.null.spread == pytest.approx(0.0, abs=1e-9)
    assert "no more than chance" in energies(report)


def test_a_pack_without_originals_has_none():
    made = adapters(strangers(4))
    report = ex.report(ex.fit(made, n_components=8, warn_above=1.0))
    assert report.null is None
    assert energies(report) == ""
    assert "Dashed: the null model" not in page.render(report)


def test_the_same_input_gives_the_same_bytes_and_another_seed_other_draws():
    collection = of_many_kinds()
    one, again, other = (json_document.to_json(report_on(collection, seed=seed)) for seed in (0, 0, 1))
    assert one == again
    nulls = [json.loads(text)["null"] for text in (one, other)]
    assert nulls[0] != nulls[1]
    assert [null["seed"] for null in nulls] == [0, 1]
    # of two modules, so many draws that their scatter is known
    assert [null["draws"] for null in nulls] == [12, 12]
