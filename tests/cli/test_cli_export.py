"""`eigenlorax export`: what comes out is a LoRA again; where it may go; what is refused before anything is written."""

import os

import pytest
import torch
from safetensors.torch import load_file

import children
import eigenlorax as ex
import reference
from adapters import change_tensors, make_adapter, make_adapters
from children import KILLED, at_change, kill, needs_fork, no_more_room
from eigenlorax.cli.main import IO_ERROR, main
from outcomes import assert_refused, assert_usage_error, contents, json_of, succeeded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = [CONFIG, WEIGHTS]


class TestWhatComesOut:
    def test_is_the_adapter_as_far_as_the_subspace_holds_it(self, cli, pack):
        found = json_of(cli("export", pack, "-o", pack.parent / "out", "--json"))
        out = pack.parent / "out"
        assert found["written"] == {name: str(out / name) for name in ("alpha", "beta", "gamma")}
        assert found["adapters"].keys() == found["written"].keys()
        for name, record in ex.Pack.open(pack).records.items():
            source, back = ex.read_adapter(pack.parent / "in" / name), ex.read_adapter(out / name)
            assert reference.delta_error(source, back) == pytest.approx(record.delta_error, rel=1e-5)
            assert sorted(path.name for path in (out / name).iterdir()) == FILES
            assert (out / name / CONFIG).read_bytes() == (pack.parent / "in" / name / CONFIG).read_bytes()
            assert load_file(out / name / WEIGHTS).keys() == load_file(pack.parent / "in" / name / WEIGHTS).keys()

    def test_loses_nothing_where_the_subspace_holds_all(self, cli, pack):
        succeeded(cli("fit", pack.parent / "in", "-o", pack, "--energy", 1, "--overwrite"))
        succeeded(cli("export", pack, "beta", "-o", pack.parent / "out"))
        source, back = (ex.read_adapter(pack.parent / parent / "beta") for parent in ("in", "out"))
        assert reference.delta_error(source, back) < 1e-5

    def test_can_be_fitted_again_and_loses_nothing_more(self, cli, pack):
        succeeded(cli("export", pack, "-o", pack.parent / "out"))
        found = json_of(cli("fit", pack.parent / "out", "-o", pack.parent / "again", "-k", 4, "--json"))
        assert found["in_fit"]["worst"] < 1e-5

    def test_the_table_says_where_and_what_was_lost(self, cli, pack):
        out = succeeded(cli("export", pack, "beta", "-o", pack.parent / "out")).out
        assert out.startswith(f"written to {pack.parent / 'out'}\n")
        assert " beta " in out
        assert f"{ex.Pack.open(pack).records['beta'].delta_error:.4f}" in out
        assert "alpha" not in out

    def test_what_rounding_adds_to_a_bound_is_said(self, cli, pack):
        make_adapters(pack.parent / "brain", "a b", shared=2, dtype=torch.bfloat16)
        succeeded(cli("fit", pack.parent / "brain", "-o", pack, "--max-error", 0.1, "--overwrite"))
        done = cli("export", pack, "-o", pack.parent / "out", "--json")
        figures = json_of(done)["adapters"]
        opened = ex.Pack.open(pack)
        for name, found in figures.items():
            errors = opened.export_errors(name)
            assert found == {
                "dtype": "bfloat16",
                "delta_error": opened.records[name].delta_error,
                "rounding": opened.export_rounding(name),
                "error_bound": errors.bound,
            }
        above = [name for name, found in figures.items() if found["error_bound"] > 0.1]
        worst = max(found["error_bound"] for found in figures.values())
        assert 0.1 < worst < 0.105
        assert f"{len(above)} of 2 exported adapters may exceed it" in done.err
        assert f"at most {worst:.5f}" in done.err
        table = succeeded(cli("export", pack, "-o", pack.parent / "out", "--overwrite"))
        assert "bfloat16" in table.out
        assert f"{worst:.4f}" in table.out
        wide = cli("export", pack, "-o", pack.parent / "out", "--overwrite", "--dtype", "float32")
        assert "float32" in succeeded(wide).out
        assert "note:" not in wide.err

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_has_the_dtype_asked_for(self, cli, pack, dtype):
        succeeded(cli("export", pack, "beta", "-o", pack.parent / "out", "--dtype", dtype))
        tensors = load_file(pack.parent / "out" / "beta" / WEIGHTS)
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}

    def test_the_same_bytes_each_time(self, cli, pack):
        for place in ("one", "two"):
            succeeded(cli("export", pack, "-o", pack.parent / place))
        assert contents(pack.parent / "one") == contents(pack.parent / "two")

    def test_a_name_given_twice_is_given_once(self, cli, pack):
        found = json_of(cli("export", pack, "beta", "beta", "-o", pack.parent / "out", "--json"))
        assert list(found["written"]) == ["beta"]


class TestWhatIsRefused:
    @pytest.mark.parametrize("name", ["delta", "Beta", "../in/beta", "", "adapters/beta", "*"])
    def test_a_name_that_is_not_there(self, cli, pack, name):
        before = contents(pack.parent)
        done = cli("export", pack, "alpha", name, "-o", pack.parent / "out")
        assert_refused(done, 3, f"no adapter named {name!r}", "alpha, beta, gamma")
        assert contents(pack.parent) == before

    @pytest.mark.parametrize("dtype", ["half", "int8", "", "torch.float16"])
    def test_a_dtype_that_is_none(self, cli, pack, dtype):
        before = contents(pack.parent)
        done = cli("export", pack, "-o", pack.parent / "out", "--dtype", dtype)
        assert_refused(done, 3, "float64, float32, float16, bfloat16", dtype)
        assert contents(pack.parent) == before

    def test_a_dtype_too_narrow_for_the_numbers(self, cli, pack):
        loud = make_adapter(pack.parent / "loud", seed=1)
        change_tensors(loud, lambda found: [v.mul_(1e6) for v in found.values()])
        succeeded(cli("fit", loud, "-o", pack, "-k", 4, "--overwrite"))
        before = contents(pack.parent)
        done = cli("export", pack, "-o", pack.parent / "out", "--dtype", "float16")
        assert_refused(done, 3, "'loud'", "too large for float16", "wider dtype")
        assert contents(pack.parent) == before
        succeeded(cli("export", pack, "-o", pack.parent / "out", "--dtype", "bfloat16"))

    @pytest.mark.parametrize("given", ["nowhere", "in", "in/beta", "new"])
    def test_what_is_not_a_pack(self, cli, pack, given):
        before = contents(pack.parent)
        done = cli("export", pack.parent / given, "-o", pack.parent / "out")
        assert_refused(done, 4, f"{pack.parent / given} is not a pack", "subspace_config.json", "eigenlorax fit")
        assert contents(pack.parent) == before

    def test_no_place_to_write_to(self, cli, pack):
        assert_usage_error(cli("export", pack), "--output")
        assert_usage_error(cli("export", "-o", pack.parent / "out"), "PACK")


class TestWhereItGoes:
    def test_into_a_folder_that_is_there(self, cli, pack):
        (pack.parent / "out").mkdir()
        (pack.parent / "out" / "mine.txt").write_text("mine")
        succeeded(cli("export", pack, "beta", "-o", pack.parent / "out"))
        assert sorted(path.name for path in (pack.parent / "out").iterdir()) == ["beta", "mine.txt"]

    def test_not_over_an_adapter_that_is_there(self, cli, pack):
        succeeded(cli("export", pack, "gamma", "-o", pack.parent / "out"))
        before = contents(pack.parent)
        done = cli("export", pack, "-o", pack.parent / "out")
        assert_refused(done, 4, pack.parent / "out" / "gamma", "not empty", "--overwrite")
        assert contents(pack.parent) == before

    def test_over_it_with_overwrite(self, cli, pack):
        succeeded(cli("export", pack, "-o", pack.parent / "out"))
        wanted = contents(pack.parent / "out")
        succeeded(cli("export", pack, "gamma", "-o", pack.parent / "out", "--overwrite", "--dtype", "float16"))
        assert contents(pack.parent / "out") != wanted
        succeeded(cli("export", pack, "-o", pack.parent / "out", "--overwrite"))
        assert contents(pack.parent / "out") == wanted

    def test_never_over_a_folder_of_somebody_else(self, cli, pack):
        (pack.parent / "out" / "beta").mkdir(parents=True)
        (pack.parent / "out" / "beta" / "thesis.tex").write_text("mine")
        before = contents(pack.parent)
        done = cli("export", pack, "-o", pack.parent / "out", "--overwrite")
        assert_refused(done, 4, pack.parent / "out" / "beta", "'thesis.tex'", "would be deleted")
        assert contents(pack.parent) == before

    def test_never_over_an_adapter_with_more_in_its_folder(self, cli, pack):
        # a training folder holds checkpoints beside the adapter, and may be the very source
        succeeded(cli("export", pack, "-o", pack.parent / "out"))
        (pack.parent / "out" / "beta" / "checkpoint-5").mkdir()
        before = contents(pack.parent)
        done = cli("export", pack, "-o", pack.parent / "out", "--overwrite")
        assert_refused(done, 4, pack.parent / "out" / "beta", "'checkpoint-5'", "would be deleted")
        assert contents(pack.parent) == before

    @pytest.mark.parametrize("below", ["", "adapters", "more"])
    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_never_into_a_pack(self, cli, pack, below, overwrite):
        before = contents(pack.parent)
        done = cli("export", pack, "-o", pack / below, *overwrite)
        assert_refused(done, 4, f"is in the pack {pack}")
        assert contents(pack.parent) == before

    def test_never_into_a_pack_by_a_link(self, cli, pack):
        (pack.parent / "link").symlink_to(pack / "adapters")
        before = contents(pack.parent)
        assert_refused(cli("export", pack, "-o", pack.parent / "link", "--overwrite"), 4, "is in the pack")
        assert contents(pack.parent) == before

    def test_never_over_a_pack_that_has_an_adapter_s_name(self, cli, pack):
        other = pack.parent / "out" / "beta"
        succeeded(cli("fit", pack.parent / "new", "-o", other, "-k", 2))
        before = contents(pack.parent)
        assert_refused(cli("export", pack, "-o", pack.parent / "out", "--overwrite"), 4, other)
        assert contents(pack.parent) == before

    def test_not_to_a_file(self, cli, pack):
        (pack.parent / "file").write_text("mine")
        for target in ("file", "file/below"):
            assert_refused(cli("export", pack, "-o", pack.parent / target), 4, pack.parent / "file", "not a folder")
        (pack.parent / "out").mkdir()
        (pack.parent / "out" / "gamma").write_text("mine")
        assert_refused(cli("export", pack, "-o", pack.parent / "out"), 4, pack.parent / "out" / "gamma", "not a folder")
        assert os.listdir(pack.parent / "out") == ["gamma"]

    def test_not_through_a_link_that_has_an_adapter_s_name(self, cli, pack):
        (pack.parent / "out").mkdir()
        (pack.parent / "out" / "beta").symlink_to(pack.parent / "in" / "beta")
        before = contents(pack.parent)
        for overwrite in ([], ["--overwrite"]):
            assert_refused(cli("export", pack, "-o", pack.parent / "out", *overwrite), 4, "is a link")
        assert contents(pack.parent) == before

    def test_not_to_a_name_too_long_for_the_disk(self, cli, pack):
        done = cli("export", pack, "-o", pack.parent / ("o" * 300))
        assert_refused(done, IO_ERROR, "File name too long", "o" * 300)


@needs_fork
def test_what_a_killed_export_has_left_goes_with_the_next_one_into_that_folder(cli, pack):
    out = pack.parent / "out"

    def killed():
        # the folder, one beside `alpha`, and a file in that
        at_change(4, out, kill)
        main(["export", str(pack), "alpha", "-o", str(out)])

    assert children.run(killed).code == KILLED
    (left,) = out.iterdir()
    assert left.name.startswith(".writing-")
    succeeded(cli("export", pack, "gamma", "-o", out))
    assert [path.name for path in out.iterdir()] == ["gamma"]


@needs_fork
def test_a_disk_that_gets_full_leaves_whole_adapters_or_none(cli, pack):
    succeeded(cli("export", pack, "-o", pack.parent / "wanted"))
    wanted = contents(pack.parent / "wanted")
    written = []
    for n in range(1, 50, 3):
        out = pack.parent / str(n)

        def filled(n=n, out=out):
            at_change(n, out, no_more_room)
            main(["export", str(pack), "-o", str(out)])

        done = children.run(filled)
        there = contents(out)
        if done.code == 0:
            break
        assert_refused(done, IO_ERROR, "File too large", out, "Nothing was left half-written")
        assert there.items() <= wanted.items()
        names = [name for name in there if "/" not in name]
        assert all(f"{name}/{file}" in there for name in names for file in FILES)
        assert names or not out.exists()
        written.append(len(names))
    assert there == wanted
    assert sorted(set(written)) == [0, 1, 2]
