"""Bytes that are chosen, on the command line: what is printed of them, what `inspect --verify` finds, and the Hub."""

import importlib
import json
import re
import shutil

import pytest

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from children import load_command, needs_fork
from eigenlorax.fitting import coded_checkpoint
from fake_hub import FakeHub, client, running
from outcomes import assert_refused, contents, json_of, succeeded
from signing import signed_again

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_shape_checks")]

NAMES = ["alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def _coded(tmp_path_factory):
    place = tmp_path_factory.mktemp("coded")
    make_adapters(place / "in", " ".join(NAMES), shared=5)
    make_adapter(place / "new", seed=9, rank=2)
    ex.fit(place / "in", max_error=0.1).save(place / "pack")
    return place


@pytest.fixture
def place(_coded, tmp_path):
    shutil.copytree(_coded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def frontier(out):
    """The rows of the frontier's table: what is beside each, its error, bytes and ratio."""
    lines = out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if "delta error at most" in line and "ratio" in line)
    return [line.split() for line in lines[at + 1 :] if line.strip() and line.split()[-1].replace(".", "").isdigit()]


class TestFit:
    @pytest.mark.parametrize(
        "option", [("--max-error", 0.2), ("--max-bytes", "1.5kB"), ("--ratio", 4)], ids=lambda option: option[0][2:]
    )
    def test_the_frontier_is_printed_around_what_was_chosen(self, cli, place, option):
        done = succeeded(cli("fit", place / "in", "-o", place / "out", *option))
        rows = frontier(done.out)
        figures = json_of(cli("inspect", place / "out", "--json"))
        used = figures["bytes"]["basis"] + figures["bytes"]["coefficients"]
        (own,) = (row for row in rows if row[:2] == ["this", "pack"])
        assert int(own[3].replace(",", "")) == used
        assert float(own[4]) == pytest.approx(figures["bytes"]["ratio"], abs=0.05)
        errors = [float(row[2] if row is own else row[0]) for row in rows]
        sizes = [int(row[-2].replace(",", "")) for row in rows]
        assert len(rows) == 5
        assert errors == sorted(errors)
        assert sizes == sorted(sizes, reverse=True)

    def test_the_frontier_counts_heads(self, cli, tmp_path):
        for seed, name in enumerate(("one", "other")):
            make_adapter(tmp_path / "in" / name, seed=seed, rank=3, head=(40, 310))
        done = succeeded(cli("fit", tmp_path / "in", "-o", tmp_path / "out"))
        figures = json_of(cli("inspect", tmp_path / "out", "--json"))
        used = figures["bytes"]["basis"] + figures["bytes"]["coefficients"] + figures["bytes"]["heads"]
        (own,) = (row for row in frontier(done.out) if row[:2] == ["this", "pack"])
        assert float(own[2]) == pytest.approx(0.1, abs=1e-3)
        assert int(own[3].replace(",", "")) == used
        assert float(own[4]) == pytest.approx(figures["bytes"]["ratio_with_heads"], abs=0.05)

    def test_as_json(self, cli, place):
        found = json_of(cli("fit", place / "in", "-o", place / "out", "--ratio", 4, "--json"))
        assert 4 <= found["bytes"]["ratio"] < 4.15
        points = found["frontier"]
        worst = found["in_fit"]["worst"]
        (own,) = (point for point in points if point["error"] == pytest.approx(worst))
        assert own["bytes"] == found["bytes"]["basis"] + found["bytes"]["coefficients"]
        assert [sorted(point) for point in points] == [["bytes", "error"]] * 5
        assert (found["fit"]["ratio"], found["fit"]["max_error"]) == (4.0, None)
        assert (found["dtype"], found["coefficient_dtype"]) == ("coded", "coded")

    def test_there_is_none_where_nothing_was_chosen(self, cli, place):
        done = succeeded(cli("fit", place / "in", "-o", place / "out", "-k", 3))
        assert "delta error at most" not in done.out
        assert json_of(cli("fit", place / "in", "-o", place / "more", "-k", 3, "--json"))["frontier"] == []

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("--ratio", 1e6), 3, "--ratio 1e+06, which is 0 bytes, cannot be reached"),
            (("--max-bytes", 1), 3, "--max-bytes 1 cannot be reached"),
            (("--max-error", 0.1, "--ratio", 3), 3, "pass exactly one of"),
            (("--max-error", 0.1, "--dtype", "int8"), 3, "dtype int8 was passed. Remove it"),
            (("--max-error", 1e-9), 3, "ask for 1e-6 or more"),
            (("--max-bytes", "40 parsecs"), 3, "--max-bytes is '40 parsecs'; it must be a number of bytes above 0"),
            (("--ratio", 3, "--sweeps", 2), 3, "--sweeps 2 has no effect with --ratio 3"),
        ],
    )
    def test_what_cannot_be_is_refused_and_leaves_nothing(self, cli, place, options, code, message, monkeypatch):
        monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 0.0)
        before = contents(place)
        assert_refused(cli("fit", place / "in", "-o", place / "out", *options), code, message)
        assert contents(place) == before


class TestBasis:
    """A basis for training beside coded adapters."""

    def test_is_stated_with_its_bytes_and_counted(self, cli, place):
        done = succeeded(cli("fit", place / "in", "-o", place / "out", "--max-error", 0.2, "--basis", 4))
        figures = json_of(cli("inspect", place / "out", "--json"))
        sizes = figures["bytes"]
        row = f"{sizes['training_basis']:,} bytes: at most 4 components per side, stored as int8"
        for out in (done.out, succeeded(cli("inspect", place / "out")).out):
            assert row in out
        assert f"takes {sizes['training_basis']:,} bytes" in done.err
        assert sizes["training_basis"] > 0
        assert sizes["ratio"] == pytest.approx(
            sizes["lora"] / (sizes["basis"] + sizes["training_basis"] + sizes["coefficients"])
        )
        assert (figures["basis"]["dtype"], figures["basis"]["up"]["max"]) == ("int8", 4)
        assert (
            f"| basis for training and serving, bytes | {sizes['training_basis']:,} |"
            in (place / "out" / "README.md").read_text()
        )
        # the frontier's own row has all bytes of the pack
        (own,) = (line for line in frontier(done.out) if line[:2] == ["this", "pack"])
        assert int(own[3].replace(",", "")) == sizes["basis"] + sizes["training_basis"] + sizes["coefficients"]

    def test_goes_with_coded_packs_alone(self, cli, place):
        before = contents(place)
        for options in (("-k", 3), ("--max-error", 0.2, "--dtype", "float16")):
            refused = cli("fit", place / "in", "-o", place / "out", *options, "--basis", 4)
            assert_refused(refused, 3, "Remove --basis")
        assert contents(place) == before

    def test_is_added_and_augmented(self, cli, place):
        refitted = json_of(
            cli("refit", place / "pack", "-a", place / "in", "--basis", 3, "-o", place / "out", "--json")
        )
        assert refitted["basis"]["down"]["max"] == 3
        wider = json_of(cli("augment", place / "out", "--n-extra", 2, "--seed", 1, "-o", place / "wider", "--json"))
        assert (wider["basis"]["down"]["max"], wider["basis"]["n_extra"], wider["n_extra"]) == (5, 2, 0)
        assert wider["fingerprint"] == refitted["fingerprint"]


class TestTheOthers:
    def test_add_keeps_the_error(self, cli, place):
        found = json_of(cli("add", place / "pack", place / "new", "--json"))
        assert json_of(cli("inspect", place / "pack", "--json"))["adapter_records"]["new"]["delta_error"] <= 0.1
        assert found["pack"] == str(place / "pack")
        verified = json_of(
            cli("inspect", place / "pack", "--verify", place / "in", "--verify", place / "new", "--json")
        )
        assert (verified["holds"], sorted(verified["adapters"])) == (True, [*NAMES, "new"])
        assert_refused(
            cli("add", place / "pack", f"far={place / 'new'}", "--extend", 2),
            3,
            "is not extended",
            "Add the adapter without --extend.",
        )

    def test_refit_says_what_may_be_worse(self, cli, place):
        found = json_of(cli("refit", place / "pack", "--ratio", 9, "-o", place / "out", "--json"))
        assert {name for name, change in found["changes"].items() if change["bound"] and change["worse"]} == set(NAMES)

    def test_the_card_and_the_report_tell_of_it(self, cli_with_reports, place):
        pytest.importorskip("matplotlib")
        shutil.rmtree(place / "in" / "gamma")
        succeeded(cli_with_reports("fit", place / "in", "-o", place / "out", "--max-error", 0.2))
        assert (place / "out" / "report.html").exists()
        asked = "every adapter's delta error at most 0.2, in as few bytes as that takes (entropy-coded)"
        assert f"| asked for | {asked} |" in (place / "out" / "README.md").read_text()


def replace_adapter(pack, name, other):
    """Put one adapter's coefficients in another's place, with digests that are right."""
    shutil.copy(pack / "adapters" / other / "adapter_model.safetensors", pack / "adapters" / name)
    signed_again(pack)


class TestVerify:
    def test_a_pack_that_holds(self, cli, place):
        done = succeeded(cli("inspect", place / "pack", "--verify", place / "in"))
        lines = [line.split() for line in done.out.splitlines()]
        records = ex.Pack.open(place / "pack").records
        for name in NAMES:
            (row,) = (line for line in lines if line[:1] == [name])
            assert row[3:] == ["0.1", "yes"]
            assert float(row[1]) == pytest.approx(records[name].delta_error, abs=2e-6)
            assert float(row[2]) == pytest.approx(records[name].delta_error, abs=1e-6)
        worst = max(NAMES, key=lambda name: records[name].delta_error)
        assert "3 of 3 adapters hold their record and bound; the largest delta error" in " ".join(done.out.split())
        assert f"({worst})." in done.out

    def test_as_json(self, cli, place):
        found = json_of(cli("inspect", place / "pack", "--verify", place / "in" / "beta", "--json"))
        assert (found["pack"], found["holds"], found["unknown"]) == (str(place / "pack"), True, ["alpha", "gamma"])
        assert list(found["adapters"]) == ["beta"]
        beta = found["adapters"]["beta"]
        assert (beta["bound"], beta["holds"]) == (0.1, True)
        assert beta["delta_error"] == pytest.approx(beta["recorded"], abs=1e-6)

    def test_an_adapter_that_is_another_does_not_hold(self, cli, place):
        replace_adapter(place / "pack", "beta", "gamma")
        succeeded(cli("inspect", place / "pack"))
        done = cli("inspect", place / "pack", "--verify", place / "in")
        assert done.code == 4
        assert "the measured error exceeds the pack's record or the requested bound for beta." in done.err
        lines = [line.split() for line in done.out.splitlines()]
        rows = {line[0]: line[-1] for line in lines if line and line[0] in NAMES}
        assert rows == {"alpha": "yes", "beta": "no", "gamma": "yes"}

    def test_as_json_the_document_is_whole(self, cli, place):
        replace_adapter(place / "pack", "beta", "gamma")
        done = cli("inspect", place / "pack", "--verify", place / "in", "--json")
        assert done.code == 4
        found = json.loads(done.out)
        assert (found["holds"], found["adapters"]["beta"]["holds"]) == (False, False)
        assert found["adapters"]["beta"]["delta_error"] > 0.5

    def test_a_pack_of_floats_has_no_error_that_was_asked_for(self, cli, place):
        succeeded(cli("fit", place / "in", "-o", place / "out", "-k", 3))
        found = json_of(cli("inspect", place / "out", "--verify", place / "in", "--json"))
        assert found["holds"]
        assert {one["bound"] for one in found["adapters"].values()} == {None}

    def test_what_is_no_original_is_said(self, cli, place):
        assert_refused(
            cli("inspect", place / "pack", "--verify", place / "new"),
            3,
            "none of the adapters that were passed is in the pack",
        )

    def test_an_adapter_is_not_verified(self, cli, place):
        assert_refused(
            cli("inspect", place / "in" / "beta", "--verify", place / "in"), 3, "is an adapter, and --verify"
        )

    def test_what_is_not_there(self, cli, place):
        assert cli("inspect", place / "nowhere", "--verify", place / "in").code == 3
        assert cli("inspect", place / "pack", "--verify", place / "nowhere").code == 3


@needs_fork
def test_by_way_of_the_hub(place):
    load_command()
    importlib.import_module("huggingface_hub.hf_api")
    (place / "commits").mkdir()
    (place / "here").mkdir()
    with running(FakeHub({}, room=place / "commits")) as hub:
        online = client(hub, place / "home")
        succeeded(online("push", place / "pack", "org/coded", HF_TOKEN="hf_writer"))
        succeeded(online("pull", "org/coded", "-o", place / "pulled"))
        succeeded(online("inspect", "org/coded"))
    assert files(place / "pulled") == files(place / "pack")


def files(folder):
    """What a pack is; its card and lock are not."""
    return {name: data for name, data in contents(folder).items() if name not in (".lock", "README.md")}


class TestHeads:
    def test_are_verified(self, cli, tmp_path):
        make_adapter(tmp_path / "in" / "a", seed=1, head=(5, 310))
        succeeded(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", "--head-error", "0.05"))
        table = succeeded(cli("inspect", tmp_path / "pack", "--verify", tmp_path / "in")).out
        assert re.search(r"heads\s+holds", table)
        assert re.search(r" a .* 0\.0[45]\d+\s+yes", table)
        found = json_of(cli("inspect", tmp_path / "pack", "--verify", tmp_path / "in", "--json"))["adapters"]["a"]
        assert 0.04 < found["head_error"] <= 0.05
        assert found["recorded_head_error"] == pytest.approx(found["head_error"])
        assert found["heads_hold"] is True

    def test_are_exact_if_asked_for(self, cli, tmp_path):
        make_adapter(tmp_path / "in" / "a", seed=1, head=(5, 310))
        succeeded(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", "--exact-heads"))
        assert "heads" not in succeeded(cli("inspect", tmp_path / "pack", "--verify", tmp_path / "in")).out
        assert "exact; on neither side" in succeeded(cli("inspect", tmp_path / "pack")).out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--exact-heads", "--head-error", "0.1"], "pass one of them"),
            (["--head-error", "1.5"], "--head-error is a relative error, at least 0 and below 1"),
            (["-k", "4", "--head-error", "0.1"], "--head-error 0.1 has no effect"),
        ],
    )
    def test_options_that_contradict(self, cli, tmp_path, options, message):
        make_adapter(tmp_path / "in" / "a", seed=1, head=(5, 31))
        assert_refused(cli("fit", tmp_path / "in", "-o", tmp_path / "pack", *options), 3, message)
