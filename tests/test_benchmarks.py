"""The benchmark measures what it says: the authors' algorithm, exponents, errors; its runner goes on, and refuses."""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import eigenlorax as ex
from children import python
from eigenlorax.codec import entropy

ROOT = Path(__file__).resolve().parents[1]
# at the end: nothing there may hide a module of another name
sys.path.append(str(ROOT / "benchmarks"))
import authors  # noqa: E402
import byte_collections  # noqa: E402
import bytes_tables  # noqa: E402
import collection  # noqa: E402
import file_bytes  # noqa: E402
import file_bytes_tables  # noqa: E402
import growth  # noqa: E402
import growth_tables  # noqa: E402
import measured  # noqa: E402
import profile_parts  # noqa: E402
import profile_tables  # noqa: E402

pytestmark = pytest.mark.slow

N, D, R, K = 5, 23, 3, 7


def run(*arguments):
    return python(ROOT / "benchmarks" / arguments[0], *arguments[1:])


class TestAuthors:
    def factors(self, shift):
        random = np.random.default_rng(1)
        common = random.standard_normal((D, 1)) * shift
        return [(random.standard_normal((D, R)) + common).astype(np.float32) for _ in range(N)]

    def test_its_directions_are_those_of_centred_pca(self):
        factors = self.factors(shift=2.0)
        directions, _ = authors.fit_side(factors, K)
        columns = np.concatenate(factors, axis=1).astype(np.float64)
        left, _, _ = np.linalg.svd(columns - columns.mean(axis=1, keepdims=True), full_matrices=False)
        oracle = left[:, :K] @ left[:, :K].T
        np.testing.assert_allclose(directions @ directions.T, oracle, atol=1e-4)

    def test_the_mean_is_taken_off_and_lost(self):
        # one direction common to all columns, and nothing else in common
        factors = self.factors(shift=50.0)
        directions, loadings = authors.fit_side(factors, N * R - 1)
        lost = [
            np.linalg.norm(factor - directions @ loading) / np.linalg.norm(factor)
            for factor, loading in zip(factors, loadings, strict=True)
        ]
        columns = np.concatenate(factors, axis=1)
        exact = np.linalg.svd(columns, full_matrices=False)[0][:, : N * R - 1]
        kept = [np.linalg.norm(factor - exact @ (exact.T @ factor)) / np.linalg.norm(factor) for factor in factors]
        assert min(lost) > 0.5
        assert max(kept) < 0.05

    def test_factors_come_back_by_side(self):
        factors = self.factors(shift=0.0)
        directions, loadings = authors.fit_side(factors, K)
        back = authors.rebuilt({"up": directions}, {"up": loadings[2]})
        np.testing.assert_allclose(back["up"], directions @ (directions.T @ factors[2]), rtol=1e-5)


class TestGrowth:
    def test_the_exponent_of_a_power_is_found_and_told_at(self):
        found = growth.fitted([(size, 3 * size**1.7) for size in (32, 2, 8, 16, 4)])
        assert found.exponent == pytest.approx(1.7, abs=1e-12)
        assert found.sizes == (8, 16, 32)
        assert found.at(64) == pytest.approx(3 * 64**1.7)

    def test_a_fixed_cost_in_the_lower_half_does_not_count(self):
        points = [(1, 100.0), (2, 100.0), (64, 64.0**2), (128, 128.0**2)]
        assert growth.fitted(points).exponent == pytest.approx(2, abs=1e-12)

    @pytest.mark.parametrize("points", [[], [(8, 1.0)], [(8, 1.0), (16, 2.0)], [(8, 1.0), (16, 0.0), (32, 4.0)]])
    def test_two_sizes_of_the_upper_half_are_needed(self, points):
        assert growth.fitted(points) is None


def test_an_error_is_that_of_the_whole_matrices():
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (11, 7), "b": (5, 13)}
    pairs = [
        {
            name: (torch.randn(R, n_in, generator=generator), torch.randn(n_out, R, generator=generator))
            for name, (n_out, n_in) in shapes.items()
        }
        for _ in range(2)
    ]
    source = collection.Source("one", Path("one"), 1.5, pairs[0])
    whole = [{name: up.double() @ down.double() for name, (down, up) in each.items()} for each in pairs]
    lost = sum(float((1.5 * whole[0][name] - 0.5 * whole[1][name]).square().sum()) for name in shapes)
    total = sum(float((1.5 * each).square().sum()) for each in whole[0].values())
    assert collection.delta_error(source, pairs[1], scaling=0.5) == pytest.approx(math.sqrt(lost / total), rel=1e-12)
    assert collection.delta_error(source, pairs[0]) < 1e-12


def test_a_quick_run_of_ours_goes_on_and_is_shown(tmp_path):
    result = tmp_path / "run.json"
    options = ("--quick", "--only", "fit", "--output", result, "--methods")
    first = run("run.py", *options, "delta")
    assert first.returncode == 0, first.stderr
    second = run("run.py", *options, "delta", "authors")
    assert second.returncode == 0, second.stderr
    assert "1 to measure, 1 there or skipped" in second.stderr
    found = json.loads(result.read_text("utf-8"))
    assert len(found["runs"]) == 2
    ours, theirs = (one for _, one in sorted(found["cases"].items(), key=lambda item: item[1]["run"]))
    for one in (ours, theirs):
        assert 0 < one["seconds"]["total"] < one["process_seconds"]
        assert one["peak_bytes"] >= one["baseline_bytes"] > 0
    assert 0 < ours["delta_error"]["mean_square"] <= theirs["delta_error"]["mean_square"]
    other = run("run.py", *options, "delta", "--threads", "2")
    assert other.returncode == 1
    assert "was measured with other threads: [1], now [2]. --fresh begins anew" in other.stderr


def test_bytes_of_a_planted_collection_go_on_and_hold_the_error(tmp_path):
    output = tmp_path / "bytes.json"
    options = ("--quick", "--collections", "shared, tiny, 10", "--output", output, "--errors", "0.3")
    first = run("bytes.py", *options, "--only", "ours")
    assert first.returncode == 0, first.stderr
    second = run("bytes.py", *options, "--only", "ours", "baselines")
    assert second.returncode == 0, second.stderr
    assert "ours" not in second.stderr
    found = json.loads(output.read_text("utf-8"))
    name = "planted, shared, tiny, 10"
    ours = found["cells"][f"{name} | ours | 0.3"]
    assert 0 < ours["worst"] <= 0.3
    assert 0 < ours["bytes"] < ours["file_bytes"]
    # 10 adapters of r = 4 in a module of 48 × 32, in 16 bits
    assert ours["lora_bytes"] == 10 * 2 * 4 * (48 + 32)
    method, point = bytes_tables.best(found, name, 0.3)
    assert point["worst"] <= 0.3
    ratio = ours["bytes"] / point["bytes"]
    assert bytes_tables.ratio(found, name, 0.3) == pytest.approx(ratio)
    table = bytes_tables.markdown(found)
    assert f"| {name} | {ratio:.2f}" in table
    assert f"{ours['lora_bytes'] / point['bytes']:.3g}× {method}" in table


class TestPlantedBytes:
    @staticmethod
    def spans(kind, indices, side=0):
        shape = byte_collections.SHAPES["narrow"]
        made = [byte_collections.factors(kind, shape, index)["layers.0.q_proj"] for index in indices]
        rows = torch.cat([pair[0] if side == 0 else pair[1].mT for pair in made]).double()
        return int((torch.linalg.svdvals(rows) > 1e-4).sum())

    @pytest.mark.parametrize("side", [0, 1])
    def test_each_kind_shares_what_it_says(self, side):
        assert self.spans("shared", range(12), side) == 24
        assert self.spans("noisy", range(12), side) == 96
        assert self.spans("unshared", range(12), side) == 96
        assert self.spans("clustered", range(0, 12, 4), side) == 16
        assert self.spans("clustered", range(12), side) == 64
        one, other = (byte_collections.factors("variants", byte_collections.SHAPES["narrow"], i) for i in (0, 1))
        alike = torch.nn.functional.cosine_similarity(*(x["layers.0.q_proj"][side].flatten() for x in (one, other)), 0)
        assert alike == pytest.approx(1 - byte_collections.VARIATION**2, abs=0.02)

    def test_the_same_each_time_and_an_outlier_is_one(self):
        shape = byte_collections.SHAPES["narrow"]
        for kind in byte_collections.KINDS:
            first, again = (byte_collections.factors(kind, shape, 3)["layers.0.q_proj"] for _ in range(2))
            assert torch.equal(first[0], again[0])
        outlier, unshared, noisy = (
            [byte_collections.factors(kind, shape, index)["layers.0.q_proj"][0] for index in (0, 1)]
            for kind in ("outlier", "unshared", "noisy")
        )
        assert torch.equal(outlier[0], unshared[0])
        assert torch.equal(outlier[1], noisy[1])


def fit_case(method, seconds, dimension=4096, mean_square=0.25):
    return {
        "section": "fit",
        "options": {"method": method, "k": 32},
        "shape": {"adapters": 32, "dimension": dimension, "rank": 16, "modules": 1},
        "seconds": {"read": 0.1, "fit": seconds - 0.3, "rest": 0.2, "total": seconds},
        "all_seconds": [seconds],
        "baseline_bytes": 2**20,
        "peak_bytes": 2**22,
        "delta_error": {"mean": 0.5, "mean_square": mean_square, "worst": 0.75},
    }


class TestTables:
    def test_a_result_without_cases_has_no_tables(self):
        assert measured.markdown({"runs": [], "cases": {}}) == measured.UNMEASURED
        assert measured.page({"runs": [], "cases": {}}) == measured.UNMEASURED

    def test_claims_hold_or_fail_by_medians_or_are_not_judged(self):
        cases = [fit_case("delta", s, mean_square=0.24) for s in (0.5, 0.4, 9.0)]
        cases += [fit_case("factors", 0.4), fit_case("lorashare", 19.0), fit_case("lorashare", 19.2, dimension=64)]
        result = {"runs": [], "cases": {str(index): case for index, case in enumerate(cases)}}
        judged = {words: (holds, figure) for words, holds, figure in measured.claims(result)}
        assert judged["4096 wide: ours at least 40 times as fast as lorashare"] == (False, "38.0 times")
        assert judged["4096 wide: ours, factors at least 40 times as fast as lorashare"] == (True, "47.5 times")
        (lost,) = (one for words, one in judged.items() if "mean square" in words and "lorashare" in words)
        assert lost == (True, "0.2400, 0.2500")
        assert judged["4096 wide: ours at least 100 times as fast as authors' algorithm"] == (None, "")
        assert "| **fails** | 38.0 times |" in measured.markdown(result)
        assert "authors" not in measured.markdown(result)


def test_the_picture_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")

    def case(method, adapters, dimension):
        return {
            "section": "growth",
            "options": {"method": method, "k": 32},
            "shape": {"adapters": adapters, "dimension": dimension, "rank": 16, "modules": 1},
            "seconds": {"total": 1e-3 * adapters * dimension},
            "baseline_bytes": 2**20,
            "peak_bytes": 2**20 * (1 + adapters),
        }

    planted = [case(m, n, d) for m in ("delta", "authors") for n, d in ((8, 64), (16, 64), (32, 64), (8, 128))]
    result = {"runs": [], "cases": {str(index): one for index, one in enumerate(planted)}}
    (tmp_path / "run.json").write_text(json.dumps(result))
    (tmp_path / "growth.json").write_text(json.dumps(planted_growth()))
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        drawn = run("plot.py", "--results", tmp_path, "--output", tmp_path / folder)
        assert drawn.returncode == 0, drawn.stderr
    for name, label in (("benchmarks-growth.svg", b"ours, 1.00"), ("benchmarks-growth-verbs.svg", b"report, 2.00")):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second
        assert first.count(label) >= 1


def test_the_picture_of_the_readme_is_that_of_its_results(tmp_path):
    drawn = run("ratio_error.py", "--draw", "--output", tmp_path / "ratio-error.svg")
    assert drawn.returncode == 0, drawn.stderr
    committed = (Path(__file__).resolve().parents[1] / "docs" / "ratio-error.svg").read_bytes()
    if f"matplotlib {version('matplotlib')}".encode() not in committed:
        pytest.skip("the picture was drawn by another matplotlib")
    assert (tmp_path / "ratio-error.svg").read_bytes() == committed


def planted_growth():
    """A result of `growth_verbs.py` in which reports grow with the square of N, less or more by a hundredth."""
    base = {"adapters": 4, "dimension": 64, "rank": 4, "k": 4, "modules": 2}
    collections = {}
    for n in (1, 2, 4, 8, 16):
        rounds = [{"seconds": n**2 * f, "peak_bytes": n * 2**20, "load": 1.0} for f in (0.99, 1.0, 1.01)]
        collections[f"N={n}"] = {"sizes": {**base, "adapters": n}, "verbs": {"report": rounds}}
    environment = {"eigenlorax": "1.2.3", "processor": "a processor", "cpus": "2", "torch": "2"}
    return {"command": "a command", "base": base, "environment": environment, "collections": collections}


def test_growth_is_shown_with_two_standard_errors():
    """By hand: logarithms are off by about -.01, 0 and .01 at each of three sizes, a factor of two apart."""
    (row,) = [line for line in growth_tables.markdown(planted_growth()).splitlines() if line.startswith("| `report`")]
    error = 2 * np.sqrt(6 * 0.01**2 / 7 / (6 * np.log(2) ** 2))
    assert f"| 1.0, 4.0, 16, 64, 256 | 2.00 ± {error:.2f} |" in row
    assert row.endswith("| 1, 2, 4, 8, 16 | 1.00 ± 0.00 |")


def test_a_quick_run_of_growth_goes_on(tmp_path):
    output, verbs = tmp_path / "growth.json", ("fit_components", "open")
    for _ in range(2):
        finished = run(
            "growth_verbs.py", "--quick", "--rounds", 1, "--axes", "k", "--verbs", *verbs, "--output", output
        )
        assert finished.returncode == 0, finished.stderr
        result = json.loads(output.read_text())
        assert [len(case["verbs"][verb]) for case in result["collections"].values() for verb in verbs] == [1] * 6


def test_the_tables_are_those_of_the_results():
    checked = run("table.py", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


class TestProfile:
    @pytest.mark.parametrize(
        ("path", "function", "part"),
        [
            ("formats/peft.py", "read", "reading"),
            ("formats/peft.py", "to_files", "writing"),
            ("codec/entropy.py", "decode", "coding"),
            ("codec/encoder.py", "encode", "mathematics"),
            ("pack/folder_tensors.py", "read_adapter", "reading"),
            ("formats/safetensors_file.py", "to_bytes", "writing"),
            ("pack/pack.py", "export", None),
        ],
    )
    def test_a_function_belongs_to_a_part(self, path, function, part):
        assert (ROOT / "src/eigenlorax" / path).is_file()
        assert profile_parts.part_of(path, function) == part

    def test_every_listed_module_exists(self):
        modules = [path.relative_to(ROOT / "src/eigenlorax").as_posix() for path in (ROOT / "src").rglob("*.py")]
        for prefix in [*profile_parts.MODULES, *(path for path, _ in profile_parts.FUNCTIONS)]:
            assert any(module.startswith(prefix) for module in modules), prefix

    def test_processor_time_is_divided_among_the_parts(self):
        with profile_parts.PartTimes() as times:
            classes = np.full(400_000, 20)
            (data,) = entropy.encode([(np.zeros(400_000, int), classes)])
            entropy.decode([(data, classes)])
        total = sum(times.seconds.values())
        assert times.seconds["coding"] > total / 2
        assert times.seconds["mathematics"] == times.seconds["reading"] == 0

    def test_operations_of_products_and_decompositions_are_counted(self):
        left, right = torch.randn(2, 5, 7), torch.randn(2, 7, 3)
        with profile_parts.OperationCount() as counted:
            left @ right
            torch.linalg.qr(torch.randn(11, 4, dtype=torch.float64))
            torch.linalg.eigh(torch.eye(6, dtype=torch.float64))
        assert counted.operations["float32"] == 2 * 2 * 5 * 7 * 3
        assert counted.operations["float64"] == int(4 * 11 * 16 - 4 / 3 * 64) + 9 * 216

    def test_the_table_divides_seconds_by_both_limits(self):
        figures = {
            "processor_seconds": 6.0,
            "parts": dict.fromkeys(profile_tables.PARTS, 1.2),
            "read_bytes": 2e9,
            "written_bytes": 1e9,
            "operations": {"float64": 5e10},
            "load": 1.5,
        }
        machine = {"read": 2e9, "write": 1e9, "operations": {"float64": 5e10}}
        row = profile_tables.row("fit", figures, machine)
        assert row == ["`fit`", "6.0", *["1.2"] * 5, "2.0", "1.0", "2.0"]


def test_bytes_of_files_by_kind_are_those_of_the_folder(tmp_path):
    sources = byte_collections.planted("shared", byte_collections.QUICK["tiny"], 2, tmp_path / "in")
    sizes = file_bytes.fitted(sources, 0.3, tmp_path / "pack", None)
    pack = ex.Pack.open(tmp_path / "pack")
    assert sum(sizes.values()) == pack.summary.files.pack
    assert sizes["adapters"] + sizes["bases"] == pack.summary.bytes.pack
    bounds = file_bytes.least_bytes(sources)
    assert bounds == sorted(bounds, reverse=True)
    cell = {"adapters": 2, "bound": bounds[0], "after": sizes, "before": sizes}
    where = {"processor": "a processor", "torch": "2"}
    text = file_bytes_tables.markdown(
        {"cells": {"tiny | 0.3": cell}, "command": "c", "commit": "d", "environment": where}
    )
    assert f"{sum(sizes.values()):,} → {sum(sizes.values()):,}" in text
