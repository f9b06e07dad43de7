"""Links in a pack's folder: whatever is one, and whatever writes to the pack, nothing outside of it is changed."""

import os
import shutil

import pytest

import eigenlorax as ex
from children import needs_fork
from eigenlorax.core import keys
from eigenlorax.errors import PackExistsError
from eigenlorax.pack import report_files
from outcomes import assert_refused, contents, succeeded

pytestmark = needs_fork

VERBS = {
    "add": ["add", "{pack}", "{new}"],
    "extend": ["add", "{pack}", "{new}", "--extend", "1"],
    "remove": ["remove", "{pack}", "beta"],
    "fit": ["fit", "{sources}", "-o", "{pack}", "-k", "3", "--overwrite"],
    "refit": ["refit", "{pack}", "-o", "{pack}", "-k", "3", "--overwrite"],
    "augment": ["augment", "{pack}", "--n-extra", "2", "--seed", "1", "-o", "{pack}", "--overwrite"],
}
REPORT = b"Made by eigenlorax 0.1 from the subspace of fingerprint 0123"


def put_outside(path, outside):
    """Move a part of the pack out of it, and link it."""
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def link_to(data):
    def place(path, outside):
        path.unlink(missing_ok=True)
        (outside / "file").write_bytes(data)
        path.symlink_to(outside / "file")

    return place


def link_to_nothing(path, outside):
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "nothing")


def second_name(path, outside):
    path.unlink(missing_ok=True)
    (outside / "file").write_bytes(b"mine")
    os.link(outside / "file", path)


def link_to_an_adapter(path, outside):
    pack = path.parent if (path.parent / keys.MANIFEST).exists() else path.parents[1]
    shutil.copytree(pack / "adapters" / "alpha", outside / "alpha")
    path.symlink_to(outside / "alpha")


REFUSED = {
    "the adapters": ("adapters", put_outside, "a link to"),
    "the lock": (keys.LOCK, link_to(b"mine"), "Remove it"),
    "the lock, to nothing": (keys.LOCK, link_to_nothing, "Remove it"),
    "the lock, by a second name": (keys.LOCK, second_name, "Remove it"),
}
TAKEN = {
    "an adapter": ("adapters/beta", put_outside),
    "the file of an adapter": ("adapters/beta/adapter_model.safetensors", put_outside),
    "the bases": ("{subspace}", put_outside),
    "bases of before": ("subspace-00000000.safetensors", link_to(b"mine")),
    "the manifest": (keys.MANIFEST, put_outside),
    "the card": (keys.CARD, put_outside),
    "a report": (keys.REPORT_PAGE, link_to(REPORT)),
    "an adapter that is not listed": ("adapters/zeta", link_to_an_adapter),
    "what a killed writer has left": (".writing-0", link_to_an_adapter),
    "what a killed writer has left of an adapter": ("adapters/.writing-0", link_to_an_adapter),
}


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


@pytest.fixture
def run(cli, pack):
    """A verb on the pack."""

    def of(verb):
        places = {"pack": pack, "new": pack.parent / "new", "sources": pack.parent / "in"}
        return cli(*(word.format(**places) for word in VERBS[verb]))

    return of


def linked(pack, outside, name, place):
    (subspace,) = pack.glob("subspace-*.safetensors")
    place(pack / name.format(subspace=subspace.name), outside)
    return contents(outside)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("what", REFUSED)
def test_a_link_that_a_writer_would_follow_is_refused(pack, outside, run, what, verb):
    name, place, said = REFUSED[what]
    before = linked(pack, outside, name, place)
    there = contents(pack)
    assert_refused(run(verb), 4, pack / name, said)
    assert contents(pack) == there
    assert contents(outside) == before


@pytest.mark.parametrize("verb", ["extend", "remove", "fit"])
@pytest.mark.parametrize("what", TAKEN)
def test_other_links_are_replaced_or_stay_and_nothing_changes_behind_them(pack, outside, run, what, verb):
    before = linked(pack, outside, *TAKEN[what])
    succeeded(run(verb))
    assert contents(outside) == before
    opened = ex.Pack.open(pack)
    opened.verify()
    assert "beta" not in opened.names or verb != "remove"


@pytest.mark.parametrize("what", ["the adapters", *TAKEN])
def test_readers_follow_links(cli, pack, outside, what):
    name, place, *_ = (REFUSED | TAKEN)[what]
    linked(pack, outside, name, place)
    ex.Pack.open(pack).verify()
    succeeded(cli("export", pack, "-o", pack.parent / "out"))


def test_packs_that_share_a_folder_of_adapters_do_not_destroy_each_other(cli, pack):
    other = shutil.copytree(pack, pack.parent / "other")
    shutil.rmtree(other / "adapters")
    (other / "adapters").symlink_to(pack / "adapters")
    before = contents(pack.parent)
    assert_refused(cli("remove", other, "alpha"), 4, other / "adapters", "replace the link by a copy of that folder")
    assert contents(pack.parent) == before


def test_a_folder_with_nothing_but_a_link_to_adapters_of_another_pack_is_no_place_for_a_new_one(cli, pack):
    (pack.parent / "fresh").mkdir()
    (pack.parent / "fresh" / "adapters").symlink_to(pack / "adapters")
    before = contents(pack)
    done = cli("fit", pack.parent / "in", "-o", pack.parent / "fresh", "-k", 2)
    assert_refused(done, 4, pack.parent / "fresh" / "adapters", "is a link to")
    assert contents(pack) == before


def test_an_edit_in_python_is_refused_before_it_begins(pack, outside):
    linked(pack, outside, "adapters", put_outside)
    with pytest.raises(PackExistsError, match="adapters is a link to"), ex.Pack.edit(pack):
        pytest.fail("it began")


def test_a_report_is_not_written_through_a_link_nor_in_its_place(cli, pack, outside):
    before = linked(pack, outside, keys.REPORT_FIGURES, link_to(b'{"schema": "eigenlorax-report"}'))
    done = cli("report", pack, "-o", pack / keys.REPORT_FIGURES)
    assert_refused(done, 4, pack / keys.REPORT_FIGURES, "is not replaced")
    assert contents(outside) == before


def test_a_file_without_an_end_is_no_report(pack):
    for name in keys.REPORTS:
        (pack / name).touch()
        os.truncate(pack / name, 2**42)
        assert not report_files.is_report(pack / name)
    with ex.Pack.edit(pack) as opened:
        opened.remove("beta")
    assert ex.Pack.open(pack).names == ["alpha", "gamma"]
