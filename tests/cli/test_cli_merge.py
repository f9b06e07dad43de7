"""`eigenlorax merge`: adapters of a pack and of folders, what is printed, and what is refused."""

import pytest

import eigenlorax as ex
from adapters import make_adapter, make_adapters
from eigenlorax.errors import OptionError
from outcomes import assert_refused, contents, json_of, succeeded


@pytest.fixture
def folders(tmp_path):
    return make_adapters(tmp_path / "in", "alpha beta gamma", rank=2, head=(3, 7))


@pytest.fixture
def pack_folder(folders, tmp_path):
    return ex.fit(folders, n_components=6, dtype="float32").save(tmp_path / "pack")


def test_adapters_of_a_pack_are_merged_as_in_python(cli, pack_folder, tmp_path):
    arguments = ("--method", "ties", "--weights", "1,0.5", "--rank", 3, "--density", 0.4)
    found = json_of(cli("merge", pack_folder, "beta", "alpha", *arguments, "-o", tmp_path / "out", "--json"))
    wanted = ex.Pack.open(pack_folder).merge(["beta", "alpha"], "ties", weights=[1, 0.5], rank=3, density=0.4)
    assert found["written"] == str(tmp_path / "out")
    assert found["weights"] == {"beta": 1.0, "alpha": 0.5}
    assert (found["method"], found["density"], found["rank"]) == ("ties", 0.4, 3)
    assert (found["cut_error"], found["full_rank"]) == (pytest.approx(wanted.cut_error), wanted.full_rank)
    assert [source["kept"] for source in found["sources"]] == [s.kept for s in wanted.comparison.sources]
    assert found["heads"]["alpha"] == ["base_model.model.classifier.weight"]
    written = ex.read_adapter(tmp_path / "out")
    assert written.ranks == (3,)
    for module, factors in written.modules.items():
        assert factors.down.equal(wanted.adapter.modules[module].down)


def test_folders_are_merged_without_a_pack(cli, folders, tmp_path):
    out = succeeded(cli("merge", *folders, "-o", tmp_path / "out", "--head", "beta")).out
    rows = [line.split() for line in out.splitlines()]
    sources = [row for row in rows if row and row[0] in ("alpha", "beta", "gamma") and len(row) == 6]
    merged = ex.merge(folders, head="beta")
    assert [row[2] for row in sources] == [f"{source.kept:.3f}" for source in merged.comparison.sources]
    assert ex.read_adapter(tmp_path / "out").heads.keys() == merged.heads["beta"].keys()


def test_the_notes_say_what_became_of_heads_and_of_equal_adapters(cli, folders, tmp_path):
    copy = make_adapter(tmp_path / "copy", seed=1, rank=2)
    done = succeeded(cli("merge", *folders, copy, "-o", tmp_path / "out"))
    notes = " ".join(done.err.split())
    assert "heads cannot be merged. Those of alpha, beta, gamma are in head.NAME.safetensors" in notes
    assert "alpha and copy have the same update, up to its size." in notes
    assert (tmp_path / "out" / "head.gamma.safetensors").is_file()


@pytest.mark.parametrize("max_error", [None, 0.05])
def test_the_result_is_added_to_the_pack(cli, folders, tmp_path, max_error):
    size = {"n_components": 3, "dtype": "float32"} if max_error is None else {"max_error": max_error}
    pack = ex.fit(folders, **size).save(tmp_path / "pack")
    found = json_of(cli("merge", pack, "alpha", "beta", "-o", tmp_path / "out", "--add", "both", "--json"))
    assert found["added"]["both"]["delta_error"] <= (max_error or 1e-6)
    opened = ex.Pack.open(pack)
    assert "both" in opened.names
    assert ex.read_adapter(tmp_path / "out").ranks == opened["both"].ranks


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["alpha"], "name two or more adapters of the pack after it. It has: alpha, beta, gamma."),
        (["alpha", "alpha"], "'alpha' is listed twice"),
        (["alpha", "nobody"], "no adapter named 'nobody'"),
        (["alpha", "beta", "--method", "tie"], "Did you mean 'ties'?"),
        (["alpha", "beta", "--weights", "1,x"], "--weights '1,x': expected a number for each adapter"),
        (["alpha", "beta", "--weights", "1"], "1 numbers for 2 adapters"),
        (["alpha", "beta", "--rank", "0"], "rank must be from 1 to"),
        (["alpha", "beta", "--density", "0.5"], "mean keeps all entries"),
        (["alpha", "beta", "--add", "gamma"], "the pack already has an adapter or history 'gamma'"),
        (["alpha", "beta", "--add", "a/b"], "adapter name 'a/b' is not allowed"),
    ],
)
def test_what_is_refused(cli, pack_folder, tmp_path, arguments, part):
    before = contents(pack_folder)
    done = cli("merge", pack_folder, *arguments, "-o", tmp_path / "out")
    assert_refused(done, done.code, part)
    assert done.code != 0
    assert not (tmp_path / "out").exists()
    assert contents(pack_folder) == before


def test_nothing_is_left_where_the_result_cannot_be_added(cli, pack_folder, tmp_path, monkeypatch):
    from eigenlorax.cli import merge

    def full(*arguments):
        raise OptionError("the disk is full")

    monkeypatch.setattr(merge, "_add", full)
    done = cli("merge", pack_folder, "alpha", "beta", "-o", tmp_path / "out", "--add", "both")
    assert_refused(done, done.code, "the disk is full")
    assert not (tmp_path / "out").exists()


def test_a_folder_cannot_take_the_result(cli, folders, tmp_path):
    done = cli("merge", *folders, "-o", tmp_path / "out", "--add", "both")
    assert_refused(done, done.code, "--add adds the merged LoRA to a pack")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = cli("merge", *folders, "-o", tmp_path / "out", "--overwrite")
    assert_refused(done, done.code, "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
