"""Adapters in as many bytes as a pack takes: what each way gives back, how answers are compared, tables of planted
records."""

import importlib.util
import math
import sys
import tomllib
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from harness import record, records, same_bytes, same_bytes_tables, size_methods  # noqa: E402
from harness.recycled import delta_error  # noqa: E402
from harness.size_methods import DIAGONAL, FULL, SharedFactors  # noqa: E402

from adapters import make_adapter  # noqa: E402
from eigenlorax.reports.analysis import per_adapter  # noqa: E402

CONFIG = tomllib.loads((EXPERIMENTS / "configs" / "bytes.toml").read_text("utf-8"))
MODULES = {"layer.0.query": (97, 83), "layer.1.query": (89, 101)}
N, RANK = 5, 4
LORA = 2 * N * RANK * sum(map(sum, MODULES.values()))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return size_methods.Collection(
        {
            f"a{n}": make_adapter(folder / f"a{n}", seed=n, rank=RANK, modules=MODULES, dtype=torch.float16)
            for n in range(N)
        }
    )


def errors(collection, kept):
    return [delta_error(one.modules, kept.adapters[name]) for name, one in collection.adapters.items()]


class TestWays:
    def test_a_pack_is_as_small_as_was_asked_for_and_loses_what_its_files_say(self, collection):
        found = size_methods.packed(collection, 6.0)
        assert LORA / 6.5 < found.bytes <= LORA / 6
        assert 0 < max(errors(collection, found)) < 1

    @pytest.mark.parametrize("way", [per_adapter.CUT, per_adapter.BOTH])
    def test_alone_no_way_of_the_same_error_is_smaller_and_none_of_a_smaller_error_fits(self, collection, way):
        most = LORA // 5
        found = size_methods.kept(way, collection, 5.0, most)
        lost, tables = errors(collection, found), per_adapter.tables(collection.modules)
        name = {per_adapter.CUT: per_adapter.CUT_BY_ENERGY}.get(way, way)
        # what the benchmark's own rival takes for that error, and for a little less
        assert found.bytes == pytest.approx(per_adapter.at_error(tables, max(lost) + 1e-6)[name].stored_bytes, rel=0.02)
        assert found.bytes <= most < per_adapter.at_error(tables, 0.97 * max(lost))[name].stored_bytes

    def test_rounding_alone_reaches_so_far_and_no_further(self, collection):
        found = size_methods.kept(per_adapter.ROUNDED, collection, 4.0, LORA // 4)
        assert set(found.settings["bits"].values()) == {3, 4}
        assert found.bytes <= LORA / 4
        assert size_methods.kept(per_adapter.ROUNDED, collection, 18.0, LORA // 18) is None

    @pytest.mark.parametrize("kind", [FULL, DIAGONAL])
    def test_joint_factors_lose_what_the_search_says_in_no_fewer_bytes(self, collection, kind):
        least = LORA // 6
        found = size_methods.kept(kind, collection, 6.0, least)
        together = SharedFactors(collection.modules, [range(N)], rounds=(20, 60))
        point = together.measure(kind, found.settings["k"])[tuple(found.settings["bits"])]
        assert max(errors(collection, found)) == pytest.approx(point.worst, rel=1e-5)
        assert found.bytes == point.stored_bytes >= least

    def test_a_shared_basis_in_floats(self, collection):
        found = size_methods.kept(size_methods.SHARED, collection, 6.0, LORA // 6)
        assert found.bytes >= LORA // 6
        assert 0 < max(errors(collection, found)) < 1

    @pytest.mark.parametrize("name", size_methods.PACKAGES)
    def test_packages_that_are_installed(self, collection, name):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        found = size_methods.kept(name, collection, 3.0, LORA // 3)
        assert found.bytes >= LORA // 3
        assert all(math.isfinite(error) and error < 1.1 for error in errors(collection, found))

    @pytest.mark.parametrize(("least", "k"), [(1, 1), (30, 3), (31, 4), (1000, 9)])
    def test_the_fewest_components_that_are_not_below_a_size(self, least, k):
        assert size_methods._fewest(lambda k: 10 * k, least, 9) == k


class TestAnswers:
    def test_beside_each_other_and_beside_the_labels(self):
        original = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
        found = torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 1.0], [0.0, 4.0]])
        one = same_bytes.compared(original, found, torch.tensor([0, 1, 1, 0]))
        assert (one["rows"], one["before"], one["score"]) == (4, 0.5, 0.5)
        assert (one["lost"], one["won"], one["agreement"]) == (1, 1, 0.5)
        p, q = original.softmax(1), found.softmax(1)
        assert one["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)

    def test_every_way_at_every_size_is_a_run(self):
        made = list(same_bytes.shipped(CONFIG))
        assert len(made) == len({job.name for job in made}) == len(CONFIG["demo"]["ratios"]) * len(size_methods.METHODS)
        assert made[0].name == "bytes/demo/18--pack"
        assert made[0].config["adapters"]["banking77-b"] == "banking77"
        assert len(next(same_bytes.sources(CONFIG)).config["adapters"]) == 24


def planted(stage, ratio, way, drops):
    """A record in which each adapter answers 50 of 100 rows, and loses so many of them."""
    adapters = {
        name: {
            "rows": 100,
            "before": 0.5,
            "score": 0.5 - drop / 100,
            "lost": max(drop, 0),
            "won": max(-drop, 0),
            "agreement": 0.9,
            "kl": 0.01,
            "delta_error": 0.3,
        }
        for name, drop in drops.items()
    }
    config = {"way": way, "ratio": ratio, "recipe": CONFIG["recipe"]}
    name = f"bytes/{stage}/{ratio:g}--{same_bytes.file_name(way)}"
    test = {"lora_bytes": 3600, "pack_bytes": 200, "bytes": 180 if drops else None, "adapters": adapters}
    record.write(record.RESULTS / f"{name}.json", {**record.about(name, config, "a command", 0.0), "test": test})


class TestTables:
    @pytest.fixture
    def results(self, tmp_path, monkeypatch):
        monkeypatch.setattr(record, "RESULTS", tmp_path)
        records.of.cache_clear()
        for ratio in CONFIG["demo"]["ratios"]:
            for way in size_methods.METHODS:
                drops = {"sms-spam-a": 1, "banking77-a": -2} if way == size_methods.PACK else {"acl-arc-a": 8}
                planted("demo", ratio, way, {} if way == per_adapter.ROUNDED else drops)
        yield tmp_path
        records.of.cache_clear()

    def test_changes_and_the_worst_of_them(self, results):
        found = same_bytes_tables.blocks(CONFIG)["same-bytes"]()
        # the mean of -1 and +2; variances of .01 and of .02 less the squares, over 100 rows
        half = 1.96 * math.sqrt((0.01 - 0.01**2) / 100 + (0.02 - 0.02**2) / 100) / 2
        assert f"| +0.5 ± {100 * half:.1f} | -1.0 (sms-spam-a) | 90.0 | 0.0100 |" in found
        assert "| rounded | – |" in found
        assert "-8.0 (acl-arc-a)" in found

    def test_all_sizes_are_columns(self, results):
        found = same_bytes_tables.blocks(CONFIG)["same-bytes-sizes"]()
        assert "| asked for | ratio 6 | ratio 12 | ratio 18 | ratio 36 | ratio 72 |" in found
        assert f"| **pack, `--ratio`** | {' | '.join(['+0.5, -1.0'] * 5)} |" in found
        assert f"| rounded | {' | '.join(['–'] * 5)} |" in found

    def test_what_was_not_run_is_empty(self, results):
        (results / "bytes" / "demo" / "72--lorashare.json").unlink()
        found = same_bytes_tables.blocks(CONFIG)["same-bytes-sizes"]()
        assert f"| lorashare | {' | '.join(['-8.0, -8.0'] * 4)} |  |" in found

    def test_by_adapter_and_in_short(self, results):
        blocks = same_bytes_tables.blocks(CONFIG)
        assert "| sms-spam-a | text messages | 100 | 50.0 | 49.0 | 1, 0 | 90.0 |" in blocks["same-bytes-adapters"]()
        assert blocks["same-bytes-short"]().startswith(
            "Sixteen adapters in a pack 20.0 times smaller: +0.5 ± 1.7 points"
        )
