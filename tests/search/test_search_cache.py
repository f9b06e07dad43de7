"""Indexes that are kept: the same results, no second build, other states of a pack, damage, read-only folders."""

import os
import shutil

import pytest
import torch

import eigenlorax as ex
from eigenlorax.pack import folder
from eigenlorax.search import cache, documents, similarity_index
from planted import random_adapter, random_collection

pytestmark = pytest.mark.usefixtures("module_without_shape_checks")


@pytest.fixture(scope="module")
def _saved(tmp_path_factory):
    return ex.fit(random_collection(5), n_components=6, warn_above=1).save(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture
def path(_saved, tmp_path, monkeypatch):
    """A pack, large enough for its indexes to be kept in an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST", 5)
    return shutil.copytree(_saved, tmp_path / "pack")


@pytest.fixture
def built(monkeypatch):
    """Names of the functions that built an index, in order."""
    calls = []
    of_folder, from_pack = documents.of_folder, ex.SimilarityIndex.from_pack

    def counted_texts(opened):
        calls.append("texts")
        return of_folder(opened)

    def counted_updates(pack, progress=None):
        calls.append("updates")
        return from_pack(pack, progress=progress)

    monkeypatch.setattr(documents, "of_folder", counted_texts)
    monkeypatch.setattr(similarity_index.SimilarityIndex, "from_pack", counted_updates)
    return calls


def both(path):
    opened = folder.open_pack(path)
    texts = cache.text_index(opened).find("a3", top=3)
    updates = cache.similarity_index(ex.Pack.from_folder(opened), opened)
    return texts, updates.names, updates.sketches


def same(one, other):
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


def test_the_second_time_nothing_is_built(path, built):
    first = both(path)
    assert built == ["texts", "updates"]
    assert same(both(path), first)
    assert built == ["texts", "updates"]


def test_a_small_pack_leaves_nothing(path, built, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST", 6)
    first = both(path)
    assert same(both(path), first)
    assert len(built) == 4
    assert not cache.cache_folder().exists()


def test_a_changed_pack_has_an_index_of_its_own(path, built):
    both(path)
    with ex.Pack.edit(path) as pack:
        pack.remove("a1")
        pack.add(random_adapter("a9", 77), warn_above=1)
    assert both(path)[1] == ("a0", "a2", "a3", "a4", "a9")
    assert built == ["texts", "updates"] * 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, None], ids=["empty", "zeros", "one bit"])
def test_a_damaged_file_is_replaced(path, built, damage):
    first = both(path)
    files = sorted(cache.cache_folder().iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(damage if damage is not None else content[:-1] + bytes([content[-1] ^ 1]))
    assert same(both(path), first)
    assert built == ["texts", "updates"] * 2
    assert [file.read_bytes() for file in files] == contents


def test_where_nothing_can_be_written_it_is_built_each_time(path, built):
    # a file in place of the folder: root may write to any folder
    cache.cache_folder().parent.mkdir(parents=True)
    cache.cache_folder().write_text("")
    assert same(both(path), both(path))
    assert len(built) == 4


def test_the_oldest_files_are_removed(path, monkeypatch):
    monkeypatch.setattr(cache, "MAX_FILES", 2)
    cache.cache_folder().mkdir(parents=True)
    for age, name in enumerate(("old", "older"), start=1):
        (cache.cache_folder() / f"{name}.index").write_bytes(b"")
        os.utime(cache.cache_folder() / f"{name}.index", (1000 - age, 1000 - age))
    both(path)
    assert sorted(file.name.partition("-")[0] for file in cache.cache_folder().iterdir()) == ["texts", "updates"]


def test_the_pack_is_left_as_it_is(path):
    before = sorted(path.rglob("*"))
    both(path)
    assert sorted(path.rglob("*")) == before
