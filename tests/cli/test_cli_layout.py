"""Tables and sentences on terminals of several widths: each word of the widest is whole on the others."""

import re
import shlex
import shutil
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from test_cli_help import VERBS

import eigenlorax as ex
import terminals
from adapters import make_adapter, make_adapters
from eigenlorax.cli import layout
from outcomes import succeeded

WIDTHS = (120, 80, 60)
LONG = "a-folder-whose-name-is-long/and-another-one-in-it-that-is-longer"

words = st.text(st.sampled_from("ab,.é漢(0–9"), min_size=1, max_size=12)
texts = st.builds(
    lambda indent, found: indent + " ".join(found), st.sampled_from(["", "  "]), st.lists(words, min_size=1, max_size=4)
)
cells = st.one_of(texts, st.just(""))


def words_of(*lines):
    return [word for line in lines for word in line.split() if not set(word) <= set("─")]


@st.composite
def tables(draw):
    header = draw(st.lists(texts, min_size=1, max_size=4))
    rows = draw(st.lists(st.tuples(*[cells] * len(header)), max_size=3))
    numbers = draw(st.sets(st.integers(0, len(header) - 1)))
    return header, rows, numbers


class TestWrapped:
    @given(texts, st.integers(1, 60))
    def test_words_are_whole_in_their_order_and_lines_as_long_as_fits(self, text, width):
        lines = layout.wrapped(text, width)
        assert words_of(*lines) == text.split()
        indent = len(text) - len(text.lstrip(" "))
        assert all(cell_len(line) <= width or " " not in line.strip() for line in lines)
        for line, following in pairwise(lines):
            assert cell_len(line) + 1 + cell_len(following.split()[0]) > width
            assert len(following) - len(following.lstrip(" ")) == indent

    def test_of_no_terminal_is_one_line(self):
        assert layout.wrapped("word " * 999, None) == ["word " * 999]


class TestATable:
    @given(tables(), st.integers(1, 100))
    def test_words_are_whole_and_no_line_is_too_long_but_for_one_word(self, table, width):
        header, rows, numbers = table
        heads, body = layout.table(header, rows, numbers, width)
        found = words_of(*heads, *body)
        for row in rows:
            assert all(word in found for cell in row for word in cell.split())
        if heads:
            assert sorted(found) == sorted(words_of(*header, *(cell for row in rows for cell in row)))
            assert all(cell_len(line) <= width for line in [*heads, *body])
        else:
            # a name of a column may stand in front of a word
            assert all(cell_len(line) <= width or len(line.split()) == 1 for line in body)

    @given(tables())
    def test_of_no_terminal_is_a_line_a_row(self, table):
        header, rows, numbers = table
        heads, body = layout.table(header, rows, numbers, None)
        assert (len(heads), len(body)) == (2, len(rows))

    def test_headers_wrap_before_cells(self):
        header, rows = ("name", "delta error before"), [("a name of words", "0.5")]
        heads, body = layout.table(header, rows, [1], 30)
        assert [line.split() for line in heads[:-1]] == [["delta", "error"], ["name", "before"]]
        assert body == [f" a name of words{'0.5':>14}"]

    def test_numbers_do_not_wrap(self):
        heads, body = layout.table(("name", "error"), [("some words", "≤ 0.5")], [1], 13)
        assert (heads[0], body) == (" name   error", [" some   ≤ 0.5", " words"])

    def test_what_does_not_fit_is_a_list_of_fields(self):
        header, rows = ("name", "error", "none", "path"), [("one", "0.5", "", "/a/long/path"), ("two", "1", "", "/b")]
        assert layout.table(header, rows, [1], 18) == (
            [],
            [" one", "   error  0.5", "   path", "       /a/long/path", "", " two", "   error  1", "   path   /b"],
        )


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    names = "sentiment-of-reviews-of-films b-with-one-that-is-quite-as-long c"
    make_adapters(place / "in", names, base=f"an-organisation/{'a-model-' * 6}", head=(2, 31), rank=8)
    make_adapter(place / "new", seed=9, base=f"an-organisation/{'a-model-' * 6}", rank=2)
    ex.fit(place / "in", n_components=10).save(place / "pack")
    for step in (10, 20, 30):
        make_adapter(
            place / "run" / f"checkpoint-{step}", seed=step, base=f"an-organisation/{'a-model-' * 6}", head=(2, 31)
        )
    pack = ex.Pack.empty()
    for step in (10, 20, 30):
        pack.append(place / "run" / f"checkpoint-{step}", name="run", step=step, lossless=True)
    pack.save(place / "history")
    return place


@pytest.fixture
def place(_made, tmp_path, monkeypatch):
    """The current folder has adapters and a pack of them; their names, and all paths, are long."""
    shutil.copytree(_made, tmp_path / LONG)
    monkeypatch.chdir(tmp_path / LONG)
    return tmp_path / LONG


@pytest.fixture
def trained(_trainable, tmp_path, monkeypatch):
    """The current folder has what trains coefficients."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[train]'")
    import trainable

    place = tmp_path / LONG
    place.mkdir(parents=True)
    trainable.copy_all(_trainable, place)
    monkeypatch.chdir(place)
    unseen = trainable.read_jsonl(place / "eval.jsonl")
    trainable.write_jsonl(place / "few.jsonl", trainable.keyword_rows(40, seed=3, without=unseen))
    return place


def figures(out):
    """Words with digits, and paths: but how long it took, which differs from run to run."""
    lines = [line for line in out.splitlines() if line.split()[:1] != ["seconds"]]
    return {word for word in words_of(*lines) if re.search(r"\d|/", word)}


def assert_whole(shown):
    """Every figure and path of the widest terminal is on all others, where lines break between words."""
    wide = figures(shown(400))
    assert wide
    for width in WIDTHS:
        out = shown(width)
        assert wide <= figures(out), f"{wide - figures(out)} at {width} columns:\n{out}"
        for line in out.splitlines():
            assert cell_len(line) <= width or len(line.split()) == 1 or line.startswith("  VLLM_")


def arguments(line, place):
    return [word.replace("PLACE", str(place)) for word in shlex.split(line)]


LINES = [
    "fit PLACE/in -o PLACE/new-pack -k 3 --no-report --overwrite",
    "fit PLACE/in -o PLACE/new-pack --max-error 0.5 --no-report --overwrite",
    "report PLACE/pack",
    "inspect PLACE/pack",
    "inspect PLACE/pack --verify PLACE/in",
    "inspect PLACE/in/c",
    "export PLACE/pack -o PLACE/out --overwrite",
    "convert PLACE/in/c PLACE/half --to peft --dtype float16 --overwrite",
    "augment PLACE/pack --n-extra 1 --seed 1 -o PLACE/wider --overwrite",
    "refit PLACE/pack -o PLACE/again -k 4 --overwrite",
    "merge PLACE/pack sentiment-of-reviews-of-films b-with-one-that-is-quite-as-long -o PLACE/sum --overwrite",
    "find PLACE/pack --like c",
    "log PLACE/history",
    "diff PLACE/history run@10 run@latest",
    "restore PLACE/history run@10 -o PLACE/out --overwrite",
    "env",
]
CHANGES = [
    "add PLACE/pack PLACE/new --extend 1",
    "remove PLACE/pack c",
    "track PLACE/run -o PLACE/pack",
    "prune PLACE/history run --keep-last 1",
]
REFUSED = ["push PLACE/pack PLACE/nowhere", "pull PLACE/nowhere -o PLACE/out", "inspect PLACE/nowhere"]
TRAINED = [
    "train PLACE/pack --task text-classification --train PLACE/few.jsonl --eval PLACE/eval.jsonl --epochs 2 "
    "--name trained --no-add -o PLACE/out",
    "evaluate PLACE/lm-pack a0 --data PLACE/lm-eval.jsonl --task causal-lm",
    "compare PLACE/pack --train PLACE/few.jsonl --eval PLACE/eval.jsonl --methods core,head --seeds 2 --epochs 2 "
    "--learning-rates 0.1 -o PLACE/out.json --resume",
    "serve-check PLACE/lm-pack",
]


@pytest.mark.parametrize("line", LINES)
def test_figures_are_whole(place, line):
    assert_whole(lambda width: succeeded(terminals.run(*arguments(line, place), columns=width)).out)


@pytest.mark.parametrize("line", CHANGES)
def test_figures_of_what_changes_a_pack_are_whole(place, line):
    def shown(width):
        for name in ("pack", "history"):
            shutil.rmtree(place / name)
            shutil.copytree(place / "before" / name, place / name)
        return succeeded(terminals.run(*arguments(line, place), columns=width)).out

    for name in ("pack", "history"):
        shutil.copytree(place / name, place / "before" / name)
    assert_whole(shown)


@pytest.mark.parametrize("line", REFUSED)
def test_paths_in_errors_are_whole(place, line):
    def shown(width):
        # the bar is erased before the error is printed, which a text without escapes does not show
        err = terminals.without_escapes(terminals.run(*arguments(line, place), columns=width).err)
        return err[err.index("error:") :]

    assert_whole(shown)


@pytest.mark.slow
@pytest.mark.parametrize("line", TRAINED)
def test_figures_of_trainings_are_whole(trained, line):
    def shown(width):
        shutil.rmtree(trained / "out", ignore_errors=True)
        return succeeded(terminals.run(*arguments(line, trained), columns=width)).out

    if "--resume" in line:
        # what is in the file is printed again, seconds too
        terminals.run(*arguments(line.replace("--resume", ""), trained))
    assert_whole(shown)


def test_figures_of_the_demo_are_whole(place):
    from eigenlorax.cli import demo
    from eigenlorax.train.demo import HELD_OUT, Demo, Outcome, descriptions
    from eigenlorax.train.demo_history import DemoHistory, DemoVersion
    from eigenlorax.train.demo_subspaces import Planted, SubspaceCheck
    from eigenlorax.train.new_task import Attempt

    outcomes = [Outcome(name, "task", 30, 0.867, 0.9, 0.625, 0.875, 0.1) for name in descriptions()]
    attempts = [Attempt("coefficients of the pack", 73_728, 0.925, 12.5), Attempt("LoRA", 1_234_567, 0.9, 100.0)]
    check = SubspaceCheck(32, {"a": 0.241}, dict.fromkeys(HELD_OUT, 0.954))
    planted = Planted(32, 24, 0.05, SubspaceCheck(32, {"a": 0.06}, {"b": 0.073}), 20.803, 0.0999)
    versions = [DemoVersion(500 * step, 0.962, 100_175, 0.0496, 0.453, 0.186) for step in range(4, 9)]
    baseline = "one shared basis of 12 components, 8 bits"
    history = DemoHistory(versions, 32, 2_983_120, 208_617, baseline, 480_192, 3000, 0.0499)
    found = Demo(place / "pack", ex.Pack.open("pack").summary, outcomes, check, history, planted, attempts)
    assert_whole(lambda width: terminals.shown(lambda: demo._print(found, 61.5), columns=width)[0])


def test_every_verb_is_among_them():
    lines = [*LINES, *CHANGES, *REFUSED, *TRAINED]
    assert {line.split()[0] for line in lines} | {"app", "demo"} == set(VERBS)


def test_nothing_is_wrapped_where_stdout_is_no_terminal(place, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    done = succeeded(cli("export", place / "pack", "-o", place / "out"))
    assert done.out.startswith(f"written to {place / 'out'}\n")
    done = cli("inspect", place / "no" / "where")
    assert done.err.count("\n") == 1


def test_colours_that_are_forced_make_no_terminal_of_a_pipe(place, cli, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = succeeded(cli("inspect", place / "pack")).out
    assert f"base model                 an-organisation/{'a-model-' * 6}" in terminals.without_escapes(out)
