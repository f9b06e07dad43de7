"""The cache of folders: its bound, what processes that end or are killed leave in it, and who may have its folder."""

import grp
import os
import pwd
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from children import at_change, kill, needs_fork, no_more_room, run
from eigenlorax.errors import CacheFullError, OptionError
from eigenlorax.serving.vllm import cache
from eigenlorax.serving.vllm.cache import Cache, prepare

pytestmark = [pytest.mark.slow, needs_fork]
FILES = {"a.bin": b"12345", "b.bin": b"678"}
SERVER = """
import sys, time
from pathlib import Path
from eigenlorax.serving.vllm.cache import Cache, prepare
prepare(Path(sys.argv[1]))
held = Cache(Path(sys.argv[1]))
print(held.folder("one", 0, lambda: {"a.bin": b"12345"}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path):
    prepare(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def server(root):
    """Starts a process with a cache in `root`; it ends when its input does."""
    started = []

    def start():
        one = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(one)
        return one, one.stdout.readline().strip()

    yield start
    for one in started:
        one.kill()
        one.communicate(timeout=20)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def entries(root):
    return sorted(path.name for path in root.iterdir())


def never():
    raise AssertionError("nothing is to be made")


def test_a_folder_is_made_once(root):
    one = Cache(root)
    folder = one.folder("one", 0, lambda: FILES)
    assert content(folder) == FILES
    assert one.folder("one", 10**12, never) == folder


def test_only_its_user_can_look_into_it(root):
    folder = Cache(root).folder("one", 0, lambda: FILES)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_when_it_is_full_new_folders_are_refused_and_old_ones_given_out(root):
    one = Cache(root, limit=10)
    folder = one.folder("one", 0, lambda: FILES)
    with pytest.raises(CacheFullError, match=r"has 8 of 10 bytes, and 3 would be added.*EIGENLORAX_CACHE_BYTES"):
        one.folder("two", 0, lambda: {"c.bin": b"abc"})
    assert one.folder("one", 0, never) == folder
    assert content(one.folder("three", 0, lambda: {"d.bin": b"ab"})) == {"d.bin": b"ab"}


def test_nothing_is_made_that_will_certainly_not_fit(root):
    with pytest.raises(CacheFullError, match="no room for one"):
        Cache(root, limit=10).folder("one", 11, never)


def test_without_a_limit_it_may_have_half_of_what_is_free(root, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(100, 40, 60))
    assert Cache(root).limit == 30


def test_an_error_in_the_making_leaves_nothing_that_counts(root):
    one = Cache(root, limit=10)
    with pytest.raises(ValueError, match="not today"):
        one.folder("one", 0, lambda: (_ for _ in ()).throw(ValueError("not today")))
    assert content(one.folder("one", 0, lambda: FILES)) == FILES


def test_a_disk_that_is_full_is_a_cache_that_is_full(root):
    def fill():
        no_more_room()
        one = Cache(root)
        # RLIMIT_FSIZE lets files grow to 200 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(CacheFullError, match="a disk that is full"):
            one.folder("one", 0, lambda: {"a.bin": b"x" * 1000})
        assert [path.name for path in one._folder.iterdir()] == []
        assert content(one.folder("two", 0, lambda: FILES)) == FILES

    done = run(fill)
    assert done.code == 0, done.err


@pytest.mark.parametrize("n", range(1, 6))
def test_a_process_that_is_killed_while_it_writes_leaves_no_folder_of_that_name(root, n):
    def killed():
        one = Cache(root)
        at_change(n, one._folder, kill)
        one.folder("one", 0, lambda: FILES)

    run(killed)
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    found = [path for path in folder.iterdir() if not path.name.startswith(".writing-")]
    assert all(content(path) == FILES for path in found)
    prepare(root)
    assert entries(root) == []


def test_what_a_killed_server_has_left_goes_when_the_next_one_begins(root, server):
    one, folder = server()
    one.send_signal(signal.SIGKILL)
    one.wait(timeout=20)
    assert os.path.isdir(folder)
    prepare(root)
    assert entries(root) == []


def test_what_a_living_server_has_stays(root, server):
    _, first = server()
    _, second = server()
    prepare(root)
    assert os.path.isdir(first)
    assert os.path.isdir(second)
    assert os.path.dirname(first) != os.path.dirname(second)


def test_a_server_that_ends_takes_its_own_folder_with_it(root, server):
    one, _ = server()
    _, other = server()
    one.communicate("", timeout=20)
    assert entries(root) == [
        os.path.basename(os.path.dirname(other)),
        f"{os.path.basename(os.path.dirname(other))}.lock",
    ]


def test_a_cache_of_this_very_process_stays(root):
    folder = Cache(root).folder("one", 0, lambda: FILES)
    prepare(root)
    assert content(folder) == FILES


def test_the_end_of_a_fork_is_not_the_end_of_the_cache(root):
    one = Cache(root)
    folder = one.folder("one", 0, lambda: FILES)
    assert run(one._end).code == 0
    prepare(root)
    assert content(folder) == FILES


def test_servers_that_begin_at_once_do_not_sweep_each_other(root, server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(server()[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 4
    assert all(os.path.isdir(folder) for folder in found)


def test_one_folder_is_made_at_a_time(root):
    one, at_work, most = Cache(root), [], []

    def make():
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.02)
        at_work.pop()
        return FILES

    threads = [threading.Thread(target=one.folder, args=(f"n{i % 3}", 0, make)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_other_files_in_its_folder_are_left_alone(root):
    (root / "notes.txt").write_text("mine")
    for name in ("server-prod", "eigenlorax-server-prod", "eigenlorax-server-0123456789abcdef-2"):
        (root / f"{name}.lock").touch()
        (root / name).mkdir()
        (root / name / "precious.txt").write_text("mine")
    before = entries(root)
    prepare(root)
    assert entries(root) == before
    assert len(list(root.glob("*/precious.txt"))) == 3


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(
        OptionError,
        match=f"other users can write to it .its mode is {mode:o}.. .*EIGENLORAX_CACHE",
    ):
        prepare(tmp_path / "open")


def test_one_where_nobody_can_remove_what_is_of_others_will_do(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    prepare(tmp_path / "open")


@pytest.mark.parametrize("below", ["cache", "a/b/cache"])
@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_one_below_a_folder_that_others_can_write_to_is_refused(tmp_path, mode, below):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    for _ in range(2):
        with pytest.raises(
            OptionError,
            match=rf"users can rename files in its parent {tmp_path}/open .*its mode is {mode:o}.*EIGENLORAX_CACHE",
        ):
            prepare(tmp_path / "open" / below)


@pytest.mark.parametrize("links", ["link", "second"])
def test_nor_one_behind_a_link_in_such_a_folder(tmp_path, links):
    for name in ("safe", "open"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "open" / "link").symlink_to("../safe")
    (tmp_path / "second").symlink_to("open/link")
    (tmp_path / "open").chmod(0o777)
    place = tmp_path / "open" / "link" if links == "link" else tmp_path / "second"
    with pytest.raises(OptionError, match=f"other users can rename files in its parent {tmp_path}/open"):
        prepare(place / "cache")


def test_below_folders_and_links_that_others_cannot_change_it_is_fine(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "here").symlink_to(tmp_path / "shared")
    (tmp_path / "shared" / "there").symlink_to("../here/../shared")
    prepare(tmp_path / "here" / "there" / "a" / "cache")
    assert stat.S_IMODE((tmp_path / "shared" / "a").stat().st_mode) == 0o700


def test_a_group_that_is_the_user_s_own_may_write_to_a_folder_above(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o775)
    user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid((tmp_path / "mine").stat().st_gid)
    if (user.pw_name, user.pw_gid) != (group.gr_name, group.gr_gid):
        pytest.skip("this user has no group of its own")
    prepare(tmp_path / "mine" / "cache")
    with monkeypatch.context() as patched:
        of_two = grp.struct_group((*group[:3], [user.pw_name, "somebody"]))
        patched.setattr(grp, "getgrgid", lambda number: of_two)
        with pytest.raises(OptionError, match="other users can rename"):
            prepare(tmp_path / "mine" / "cache")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to be root")
@pytest.mark.parametrize("what", ["folder", "link"])
def test_nor_one_below_what_belongs_to_somebody_else(tmp_path, what):
    (tmp_path / "folder").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("folder")
    os.chown(tmp_path / what, 12345, 12345, follow_symlinks=False)
    with pytest.raises(OptionError, match=f"its parent {tmp_path}/{what} belongs to another user"):
        prepare(tmp_path / what / "cache")


def test_a_link_to_itself_on_the_way_is_an_error_of_ours(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OptionError, match="cannot be a cache: .*Too many levels"):
        prepare(tmp_path / "loop" / "cache")


def test_a_link_is_refused(tmp_path):
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(OptionError, match="cannot be a cache: it is a link"):
        prepare(tmp_path / "link")


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="cannot be a cache: it is not a folder"):
        prepare(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to be root")
def test_the_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(OptionError, match="it belongs to another user"):
        prepare(tmp_path / "theirs")


def test_by_default_it_is_in_memory_where_there_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    name = f"eigenlorax-{os.geteuid()}"
    for is_memory, free, wanted in (
        (True, 2 * 10**9, cache._MEMORY),
        (True, 64 * 10**6, tmp_path),
        (False, 2 * 10**9, tmp_path),
    ):
        monkeypatch.setattr(cache, "_is_memory", lambda path, found=is_memory: found)
        monkeypatch.setattr(cache.os, "access", lambda path, mode: True)
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path, n=free: cache.shutil._ntuple_diskusage(n, 0, n))
        assert cache.default_root() == wanted / name
