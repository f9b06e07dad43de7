"""Power cuts at every moment: a pack is the old one or the new one, an adapter too, and what is done stays done."""

import shutil

import pytest

import children
import eigenlorax as ex
from adapters import make_adapters
from children import load_command, needs_fork
from eigenlorax.cli import main
from eigenlorax.core import atomic_files, checkpoint, keys
from eigenlorax.errors import PackMissingError
from outcomes import contents, succeeded
from powercuts import cuts, record
from runs import make_run, write_states

pytestmark = [pytest.mark.slow, needs_fork]

MANIFEST = keys.MANIFEST
PACKS = {
    "fit": "fit {in} -o {place}/pack -k 3 --overwrite --no-report",
    "a first fit": "fit {in} -o {place}/some/where -k 3 --no-report",
    "extend": "add {place}/pack zeta={in}/gamma --extend 1 --warn-above 1",
    "remove": "remove {place}/pack beta",
    "track": "track {in}/run --name run -o {place}/pack",
    "prune": "prune {place}/pack run --keep-last 1",
}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Adapters in `in`, and a place with a pack of two of them and their exports."""
    folder = tmp_path_factory.mktemp("made")
    sources = make_adapters(folder / "in", "alpha beta gamma")
    checkpoints = make_run(folder / "in" / "run", (10, 20, 30))
    write_states(checkpoints, max_steps=30)
    pack = ex.fit(sources[:2], n_components=4)
    # `track` appends the third
    for path in checkpoints[:2]:
        pack.append(path)
    pack.save(folder / "place" / "pack")
    ex.fit(sources, n_components=2).export(folder / "place" / "out")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A command on a copy of the place, recorded in a process of its own, which has to end as one that succeeds."""

    def of(arguments, check):
        place = shutil.copytree(made / "place", tmp_path / "place")
        (tmp_path / "cuts").mkdir()

        def command():
            with pytest.raises(SystemExit) as left:
                main(arguments.format(**{"in": made / "in", "place": place}).split())
            assert not left.value.code

        def recorded():
            recording = record(place, command)
            for at_the_end, found in cuts(recording, tmp_path / "cuts"):
                check(found, contents(place), at_the_end)

        succeeded(children.run(recorded))

    return of


def is_whole(pack):
    try:
        opened = ex.Pack.open(pack)
    except PackMissingError:
        return False
    opened.verify()
    return True


@pytest.mark.parametrize("verb", PACKS)
def test_a_pack_is_the_old_one_or_the_new_one(made, run, verb):
    name = "some/where" if verb == "a first fit" else "pack"
    old = contents(made / "place")

    def check(found, new, at_the_end):
        allowed = [new] if at_the_end else [new, old]
        manifests = [one.get(f"{name}/{MANIFEST}") for one in allowed]
        there = contents(found).get(f"{name}/{MANIFEST}")
        assert there in manifests
        assert is_whole(found / name) == (there is not None)

    run(PACKS[verb], check)


@pytest.mark.parametrize("exchanged", [True, False], ids=["by an exchange", "by two renames"])
def test_an_adapter_is_the_old_one_or_the_new_one(made, run, monkeypatch, exchanged):
    if not exchanged:
        monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
    names = ["alpha", "beta", "gamma"]

    def check(found, new, at_the_end):
        for name in names:
            if not exchanged:
                atomic_files.recover(found / "out" / name)
            there = contents(found / "out" / name)
            wanted, before = (
                {
                    path.removeprefix(f"out/{name}/"): data
                    for path, data in one.items()
                    if path.startswith(f"out/{name}/")
                }
                for one in (new, old)
            )
            assert there == wanted or (there == before and not at_the_end)

    old = contents(made / "place")
    run("export {place}/pack -o {place}/out --overwrite", check)


def test_adapters_in_a_folder_that_was_not_there_are_whole(run):
    def check(found, new, at_the_end):
        there = contents(found / "fresh" / "loras")
        if at_the_end:
            assert {f"fresh/loras/{name}": data for name, data in there.items()}.items() <= new.items()
            assert {"alpha", "beta"} <= there.keys()
        for name in ("alpha", "beta"):
            assert name not in there or f"{name}/adapter_model.safetensors" in there

    run("export {place}/pack -o {place}/fresh/loras", check)


def test_modules_that_were_kept_are_kept(tmp_path):
    key = {"fit": 1}

    def keep(place):
        with checkpoint.open_checkpoint(place / "kept", key) as kept:
            for number in range(3):
                kept.keep(number, b"%d" % number)

    def recorded():
        place = tmp_path / "place"
        place.mkdir()
        (tmp_path / "cuts").mkdir()
        recording = record(place, lambda: keep(place))
        for at_the_end, found in cuts(recording, tmp_path / "cuts"):
            with checkpoint.open_checkpoint(found / "kept", key) as kept:
                there = [kept.find(number, 10) for number in range(3)]
            assert there == [b"0", b"1", b"2"] or not at_the_end
            assert set(there) <= {b"0", b"1", b"2", None}

    succeeded(children.run(recorded))
