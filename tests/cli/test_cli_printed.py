"""What every verb prints of packs, adapters, models, rows and paths whose every text would control a terminal."""

import os
import shlex
import shutil
import unicodedata

import pytest
from test_cli_help import VERBS

import eigenlorax as ex
import lora_files
import terminals
from adapters import make_adapter, make_adapters
from children import needs_fork, python, run
from eigenlorax.cli import main
from eigenlorax.core import printable
from outcomes import json_of

HOSTILE = "x\x1b[31m\x1b]8;;http://evil\x1b\\\x9b2J\x00\x07\x7f\x85\r\t\u061c\u200e\u202e\u2066\u2028[red]bold[/red]:smile:\ud800"
# what can be written as UTF-8, the name of a file, and modules
TEXT = HOSTILE.replace("\ud800", "")
PATH = TEXT.replace("/", "|").replace("\0", "") + "\nnote: forged\udcff"
MODULES = {f"encoder.{TEXT}.0.query": (17, 11), "layer.value": (13, 23)}

# a fault in a verb
RAISES = """
import ast, sys
from eigenlorax.cli import env, main
def fault():
    raise ValueError(ast.literal_eval(sys.argv[1]))
env.collect = fault
main(["env"])
"""


def controls(text):
    """What of a text is no line break, and controls a terminal, by Unicode's own tables."""
    return {
        char
        for char in text
        if char != "\n"
        and (
            unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(char) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
            or unicodedata.name(char, "") in ("LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK", "ARABIC LETTER MARK")
        )
    }


class TestPrintable:
    @pytest.mark.parametrize("convert", [printable.one_line, printable.multi_line])
    def test_of_all_characters_those_that_control_are_escaped(self, convert):
        every = "".join(map(chr, range(0x110000)))
        escaped = (controls(every) | {"\n"}) - (set("\n\t") if convert is printable.multi_line else set())
        assert convert(every) == "".join(ascii(char)[1:-1] if char in escaped else char for char in every)

    def test_the_rest_stays_as_it_is(self):
        assert printable.one_line("größe 漢字 👩‍💻 [red]\\x1b") == "größe 漢字 👩‍💻 [red]\\x1b"


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made") / PATH
    make_adapters(place / "in", "alpha beta gamma", modules=MODULES, base=HOSTILE, head=(2, 31), rank=4)
    make_adapter(place / "in" / PATH, seed=8)
    (place / "in" / PATH / "adapter_config.json").write_text("[")
    make_adapter(place / "new", seed=9, modules=MODULES, base=HOSTILE, rank=4)
    make_adapter(place / "of-another", seed=9, base=f"other {HOSTILE}", revision=HOSTILE)
    lora_files.write(
        place / "style.safetensors",
        lora_files.planted({"unet.mid_block.attentions.0.proj_in": (71, 67)}, seed=1),
        "kohya",
        metadata={TEXT: TEXT},
    )
    with pytest.warns(ex.errors.SkippedAdapterWarning):
        ex.fit(place / "in", n_components=3, skip_bad=True, same_base=True).save(place / "pack")
    pack = ex.Pack.empty()
    for step in (10, 20):
        checkpoint = place / "run" / f"checkpoint-{step}"
        make_adapter(checkpoint, seed=step, modules=MODULES, base=HOSTILE, head=(2, 31), rank=4)
        pack.append(checkpoint, name="run", step=step, metrics={TEXT: 0.5}, lossless=True)
    pack.save(place / "history")
    return place


@pytest.fixture
def place(_made, tmp_path, monkeypatch):
    """The current folder, whose name is hostile, has adapters, and a pack of them, with hostile texts."""
    folder = tmp_path / PATH
    shutil.copytree(_made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trained(_trainable, tmp_path, monkeypatch):
    """The same with a base model, a pack for it, and rows whose labels are hostile."""
    import trainable

    folder = tmp_path / PATH
    folder.mkdir()
    shutil.copytree(_trainable / "bert", folder / f"bert{PATH}")
    trainable.bert_pack(folder / "pack", folder / f"bert{PATH}")
    rows = trainable.keyword_rows(40, seed=3, labels=(f"bad{TEXT}", f"good{TEXT}"))
    trainable.write_jsonl(folder / "rows.jsonl", rows)
    trainable.write_jsonl(folder / f"{PATH}.jsonl", rows[:10])
    trainable.write_jsonl(
        folder / "eval.jsonl", trainable.keyword_rows(9, seed=4, labels=(f"bad{TEXT}", f"good{TEXT}"))
    )
    monkeypatch.chdir(folder)
    return folder


LINES = [
    "fit IN -o NEW -k 3 --skip-bad --no-report",
    "fit IN -o NEW -k 3 --skip-bad --exclude-module encoder.* --warn-above 0",
    "fit IN -o NEW",
    "fit IN OF-ANOTHER -o NEW --skip-bad",
    "fit NOWHERE -o NEW",
    "report PACK",
    "report PACK -a IN -o NEW.md --left-out 2",
    "report PACK -o NEW",
    "inspect PACK",
    "inspect PACK --verify IN",
    "inspect IN/alpha",
    "inspect STYLE",
    "inspect NOWHERE",
    "export PACK -o NEW",
    "export PACK NOWHERE -o NEW",
    "convert IN/alpha NEW --to peft",
    "convert IN/alpha NEW --to mlx",
    "add PACK NEWCOMER --warn-above 0",
    "add PACK OF-ANOTHER",
    "add PACK OF-ANOTHER --same-base",
    "remove PACK alpha",
    "remove PACK NOWHERE",
    "augment PACK --n-extra 2 --seed 3 -o NEW",
    "augment PACK --n-extra 2 --seed 3 -o PACK",
    "refit PACK -a IN -o NEW -k 2",
    "refit PACK -o PACK",
    "merge PACK alpha beta -o NEW --method ties",
    "merge IN/alpha IN/beta -o NEW",
    "merge PACK alpha NOWHERE -o NEW",
    "find PACK NOWHERE",
    "find PACK --like alpha",
    "find PACK --like NOWHERE",
    "push PACK NOWHERE",
    "pull NOWHERE -o NEW",
    "track RUN -o NEW",
    "track RUN -o PACK",
    "track NOWHERE -o NEW",
    "log HISTORY",
    "log NOWHERE",
    "diff HISTORY run@10 run@latest",
    "diff HISTORY run@10 NOWHERE",
    "prune HISTORY run --keep-last 1",
    "prune HISTORY NOWHERE --keep-last 1",
    "restore HISTORY run@10 -o NEW",
    "restore HISTORY NOWHERE -o NEW",
    "serve-check PACK --model NOWHERE",
    "app --host NOWHERE",
    "app --max-upload NOWHERE",
    "demo --keep PLACE",
    "env",
    "env NOWHERE",
    "NOWHERE",
    "--NOWHERE",
    "fit --NOWHERE",
    "fit IN -o NEW -k NOWHERE",
]
TRAINED = [
    "train PACK --task text-classification --train ROWS --eval eval.jsonl --epochs 1 --rank 2 -o NEW",
    "train PACK --task NOWHERE --train ROWS -o NEW",
    "evaluate PACK a0 --data ROWS --labels LABELS",
    "evaluate PACK NOWHERE --data ROWS",
    "compare PACK --train rows.jsonl --eval eval.jsonl --methods head --seeds 1 --epochs 1 --learning-rates 0.1 "
    "-o NEW.json",
    "compare PACK --train NOWHERE --eval eval.jsonl -o NEW.json",
    "serve-check PACK",
]


def arguments(line, place):
    """The words of a line, with paths in this place, all of which are hostile, for names in capitals."""
    names = {
        "PLACE": place,
        "PACK": place / "pack",
        "IN": place / "in",
        "OF-ANOTHER": place / "of-another",
        "NEWCOMER": place / "new",
        "RUN": place / "run",
        "HISTORY": place / "history",
        "STYLE": place / "style.safetensors",
        "ROWS": place / f"{PATH}.jsonl",
        "LABELS": f"a{PATH},b{PATH}",
        "NOWHERE": f"no{PATH}",
        "NEW": place / f"new{PATH}",
    }
    for word in shlex.split(line):
        dashes, stem, suffix = word[: len(word) - len(word.lstrip("-"))], *os.path.splitext(word.lstrip("-"))
        yield f"{dashes}{names[stem]}{suffix}" if stem in names else word


def assert_printable(done):
    assert controls(done.out + done.err) == set()
    assert "Traceback" not in done.err


@pytest.mark.parametrize("line", LINES)
def test_of_hostile_adapters(place, line):
    done = terminals.run(*arguments(line, place), kind="dumb")
    assert_printable(done)
    # no line of the output is somebody else's
    assert "\nnote: forged" not in done.out + done.err


@pytest.mark.parametrize("line", TRAINED)
def test_of_hostile_models_and_rows(trained, line):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[train]'")
    assert_printable(terminals.run(*arguments(line, trained), kind="dumb"))


def test_every_verb_is_among_them():
    assert {line.split()[0] for line in LINES + TRAINED} >= set(VERBS)


def test_brackets_are_no_markup_and_escapes_are_shown(place, cli):
    out = cli("inspect", place / "pack").out
    assert out.splitlines()[0].rstrip() == printable.one_line(f"pack {place / 'pack'}")
    assert printable.one_line(HOSTILE) in out
    assert "[red]bold[/red]:smile:" in out


def test_json_has_the_texts_themselves_in_escapes(place, cli):
    done = cli("inspect", place / "in" / "alpha", "--json")
    assert controls(done.out) == set()
    assert json_of(done)["base_model"] == HOSTILE


@needs_fork
class TestInAProcessOfItsOwn:
    @pytest.mark.parametrize("target", ["pack", "nowhere"])
    def test_piped(self, place, target):
        assert_printable(run(lambda: main(["inspect", str(place / target)])))

    def test_a_traceback(self, place):
        ran = python("-c", RAISES, ascii(HOSTILE))
        # Python's own message, whose lines and tabs stay
        assert controls(ran.stderr) <= {"\t"}
        assert "Traceback" in ran.stderr
        assert r"x\x1b[31m" in ran.stderr
