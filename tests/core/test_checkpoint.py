"""What an interrupted fit has kept, damaged in every way: the pack is that of a fit that was not interrupted."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import eigenlorax as ex
from adapters import make_adapters
from eigenlorax.core import atomic_files, checkpoint
from eigenlorax.errors import OptionError
from eigenlorax.fitting import fitted_module, jobs
from outcomes import contents

KINDS = {
    "floats": {"n_components": 5},
    "energy": {"energy": 0.7, "dtype": "float16"},
    "integers": {"n_components": 5, "dtype": "int8"},
    "fewer components": {"n_components": 4},
}
FLIPS = {"floats": 20, "integers": 8, "fewer components": 8}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class StoppedError(Exception):
    pass


def stop_after_one(stage, done, total):
    if stage == "fitting modules" and done == 1:
        raise StoppedError


def stop_after_two(stage, done, total):
    if stage == "fitting modules" and done == 2:
        raise StoppedError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("sources"), "alpha beta gamma")


@pytest.fixture(scope="module")
def stopped(sources, tmp_path_factory):
    """What each kind of fit keeps that was stopped after two of three modules, and what its pack has to be."""
    found = {}

    def of(kind):
        if kind not in found:
            place = tmp_path_factory.mktemp("stopped")
            with pytest.raises(StoppedError):
                ex.fit(sources, checkpoint=place / "kept", progress=stop_after_two, **KINDS[kind])
            found[kind] = place / "kept", contents(ex.fit(sources, **KINDS[kind]).save(place / "pack"))
        return found[kind]

    return of


@pytest.fixture
def resumed(sources, stopped, tmp_path):
    """Goes on with a fit whose files `damage` has changed; how many modules were read, once the pack is right."""

    def run(damage, kind="floats"):
        kept, wanted = stopped(kind)
        for name in ("kept", "pack"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        damage(shutil.copytree(kept, tmp_path / "kept"))
        pack = ex.fit(sources, checkpoint=tmp_path / "kept", **KINDS[kind])
        assert contents(pack.save(tmp_path / "pack")) == wanted
        return sum(int(note.partition(" ")[0]) for note in pack.notes if "checkpoint" in note)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_is_taken(resumed, kind):
    assert resumed(lambda kept: None, kind) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLIPS)
def test_a_flipped_bit_anywhere_never_changes_the_pack(resumed, kind):
    drawn = random.Random(0)

    def flip(kept):
        path = drawn.choice(sorted(path for path in kept.iterdir() if path.stat().st_size))
        data = bytearray(path.read_bytes())
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)

    # a module is fitted again, or all of them are where the bit is in the key
    assert {resumed(flip, kind) for _ in range(FLIPS[kind])} <= {0, 1}


def swap(kept):
    first, second = kept / "00000.safetensors", kept / "00001.safetensors"
    first.rename(kept / "x")
    second.rename(first)
    (kept / "x").rename(second)


def replaced_by(put):
    """Something else in the place of the first module."""

    def damage(kept):
        path = kept / "00000.safetensors"
        (kept.parent / "outside").write_bytes(path.read_bytes())
        path.unlink()
        put(path)

    return damage


def changed(change):
    def damage(kept):
        path = kept / "00000.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def grow(path):
    path.touch()
    os.truncate(path, 2**42)


@pytest.mark.parametrize(
    ("damage", "there"),
    {
        "cut": (changed(lambda data: data[:-1]), 1),
        "cut in half": (changed(lambda data: data[: len(data) // 2]), 1),
        "empty": (changed(lambda data: b""), 1),
        "longer": (changed(lambda data: data + b"\0"), 1),
        "of a release without digests": (changed(lambda data: data[32:]), 1),
        "swapped with another": (swap, 0),
        "a link to its bytes": (replaced_by(lambda path: path.symlink_to("../outside")), 1),
        "a link to nothing": (replaced_by(lambda path: path.symlink_to("nothing")), 1),
        "a link to a device without an end": (replaced_by(lambda path: path.symlink_to("/dev/zero")), 1),
        "a pipe": (replaced_by(os.mkfifo), 1),
        "four terabytes": (replaced_by(grow), 1),
        "without its key": (lambda kept: (kept / "fit.json").unlink(), 0),
        "whose key is a pipe": (lambda kept: [(kept / "fit.json").unlink(), os.mkfifo(kept / "fit.json")], 0),
    }.values(),
    ids=lambda value: None,
)
def test_what_is_not_as_it_was_kept_is_not_there(resumed, damage, there):
    assert resumed(damage) == there


def test_what_another_fit_has_kept_is_not_there(resumed, stopped):
    other, _ = stopped("fewer components")

    def damage(kept):
        for name in ("00000.safetensors", "00001.safetensors"):
            shutil.copy(other / name, kept / name)

    assert resumed(damage) == 0


@pytest.fixture(scope="module")
def done(sources):
    """The first job of a fit of each kind, and what became of it."""
    found, do = {}, jobs.fit_loaded
    for kind, options in KINDS.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                jobs, "fit_loaded", lambda one, *rest, kind=kind: found.setdefault(kind, (one.job, do(one, *rest)))[1]
            )
            with pytest.raises(StoppedError):
                ex.fit(sources, progress=stop_after_one, **options)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_comes_back_from_its_bytes_and_from_those_of_no_other_job(done, kind):
    job, fitted = done[kind]
    data = fitted_module.to_bytes(fitted)
    assert len(data) <= fitted_module.max_bytes(job)
    assert fitted_module.to_bytes(fitted_module.from_bytes(data, job)) == data
    narrower = [replace(update, spec=replace(update.spec, in_features=10)) for update in job.updates]
    others = [replace(job, updates=tuple(updates)) for updates in (job.updates[:2], narrower)]
    others += [other for other, _ in done.values() if other.fitter.storage.dtype != job.fitter.storage.dtype]
    assert [fitted_module.from_bytes(data, other) for other in others] == [None] * len(others)
    assert fitted_module.from_bytes(data[:-1], job) is None


def test_single_lora_files_are_no_checkpoint(sources, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"the only copy")
    with pytest.raises(OptionError, match=r"is not a checkpoint of a fit: it contains 'style.safetensors'"):
        ex.fit(sources, n_components=5, checkpoint=tmp_path)
    assert contents(tmp_path) == {"style.safetensors": b"the only copy"}


def test_a_folder_that_has_the_name_of_a_module_is_left_alone(sources, tmp_path):
    (tmp_path / "00000.safetensors").mkdir()
    with pytest.raises(OptionError, match=r"is not a checkpoint of a fit: it contains '00000.safetensors'"):
        ex.fit(sources, n_components=5, checkpoint=tmp_path)


def test_a_link_to_a_folder_is_refused(sources, stopped, tmp_path):
    there, _ = stopped("floats")
    shutil.copytree(there, tmp_path / "there")
    (tmp_path / "kept").symlink_to("there")
    before = contents(tmp_path)
    with pytest.raises(
        OptionError, match="kept is a link; a checkpoint must be a folder. Pass the path of the folder itself"
    ):
        ex.fit(sources, n_components=5, checkpoint=tmp_path / "kept")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("folder", "wanted"),
    [("a/pack", "a/.pack.fitting"), ("a/pack/", "a/.pack.fitting"), ("a/b/..", ".a.fitting"), (".", None)],
)
def test_the_place_of_a_pack_s_checkpoint_is_beside_it(folder, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = tmp_path / wanted if wanted else tmp_path.parent / f".{tmp_path.name}.fitting"
    assert checkpoint.default_folder(Path(folder)) == found


class TestReadPlain:
    @pytest.mark.parametrize("size", [0, 1, 100])
    def test_a_file_of_at_most_so_many_bytes(self, tmp_path, size):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert atomic_files.read_regular_file(tmp_path / "file", size) == b"x" * size
        if size:
            assert atomic_files.read_regular_file(tmp_path / "file", size - 1) is None

    @pytest.mark.parametrize("name", ["none", "folder", "link", "link to a folder", "pipe", "file/below"])
    def test_nothing_else(self, tmp_path, name):
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("file")
        (tmp_path / "link to a folder").symlink_to("folder")
        os.mkfifo(tmp_path / "pipe")
        assert atomic_files.read_regular_file(tmp_path / name, 10) is None
