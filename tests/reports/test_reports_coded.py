"""Reports of packs that were made for an error or a size."""

import pytest
import torch

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, from_factors
from planted import factors_in, orthonormal, random_collection, shared_collection


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
    assert "rounding" not in found
    report.save(tmp_path / "report.md")
    assert pack.fit_info.size in (tmp_path / "report.md").read_text("utf-8")


def test_adapters_that_share_all(tmp_path):
    adapters, _ = shared_collection(9)
    report = ex.report(ex.fit(adapters, max_error=0.2), adapters)
    assert "They share a subspace" in kinds(report)["shared"]
    assert report.left_out.errors.mean < 0.3


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
