"""Files and folders that appear whole or not at all: what `folder` builds on, and exports, which have nothing else."""

import errno
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import children
from children import KILLED, at_change, kill, needs_fork
from eigenlorax.core import atomic_files, staging
from eigenlorax.errors import PackBusyError, PackExistsError
from outcomes import contents, succeeded

if sys.platform != "win32":
    import fcntl

FILES = {"config.json": b"{}", "weights": b"\0" * 3000, "empty": b""}
OTHERS = {"config.json": b"[]", "weights": b"\1" * 2000}


class TestWriteFile:
    def test_replaces_in_one_step_and_leaves_nothing_else(self, tmp_path):
        for data in (b"one", b"", b"three"):
            atomic_files.write_file(tmp_path / "file", data)
            assert contents(tmp_path) == {"file": data}

    def test_of_a_folder_s_name_is_refused_and_leaves_nothing(self, tmp_path):
        (tmp_path / "place").mkdir()
        before = contents(tmp_path)
        with pytest.raises(IsADirectoryError):
            atomic_files.write_file(tmp_path / "place", b"data")
        assert contents(tmp_path) == before

    def test_in_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            atomic_files.write_file(tmp_path / "no" / "file", b"data")
        assert contents(tmp_path) == {}

    def test_a_block_that_fails_before_it_puts_it_in_place_leaves_the_old_one(self, tmp_path):
        atomic_files.write_file(tmp_path / "file", b"old")

        def fail():
            with atomic_files.stage_file(tmp_path / "file", b"new"):
                assert len(contents(tmp_path)) == 2
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert contents(tmp_path) == {"file": b"old"}


class TestWriteFolder:
    def test_makes_its_parents(self, tmp_path):
        atomic_files.write_folder(tmp_path / "a" / "b", FILES)
        assert contents(tmp_path / "a" / "b") == FILES

    def test_replaces_one_of_its_kind_whole_on_request_only(self, tmp_path):
        atomic_files.write_folder(tmp_path / "a", FILES)
        with pytest.raises(PackExistsError, match="a exists and is not empty.*--overwrite"):
            atomic_files.write_folder(tmp_path / "a", OTHERS)
        assert contents(tmp_path / "a") == FILES
        atomic_files.write_folder(tmp_path / "a", {**FILES, **OTHERS}, overwrite=True)
        assert contents(tmp_path / "a") == {**FILES, **OTHERS}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_takes_an_empty_one(self, tmp_path):
        (tmp_path / "a").mkdir()
        atomic_files.write_folder(tmp_path / "a", FILES)
        assert contents(tmp_path / "a") == FILES

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_never_replaces_what_is_something_else(self, tmp_path, overwrite):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").write_text("mine")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("a")
        (tmp_path / "dangling").symlink_to("gone")
        before = contents(tmp_path)
        for place in ("a", "file", "file/below", "link", "dangling"):
            with pytest.raises(PackExistsError, match=str(tmp_path)):
                atomic_files.write_folder(tmp_path / place, FILES, overwrite=overwrite)
        assert contents(tmp_path) == before

    @needs_fork
    @pytest.mark.parametrize("happen", ["killed", "refused"])
    @pytest.mark.parametrize("replaced", ["nothing", "by an exchange", "by two renames"])
    def test_is_there_whole_or_not_at_all_wherever_it_is_stopped(self, tmp_path, monkeypatch, happen, replaced):
        def refuse():
            sys.stdout.write("reached")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if replaced == "by two renames":
            monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
        seen = set()
        for n in range(1, 60):
            place = tmp_path / str(n) / "a"
            place.parent.mkdir()
            if replaced != "nothing":
                atomic_files.write_folder(place, OTHERS)

            def stopped(n=n, place=place):
                at_change(n, place.parent, kill if happen == "killed" else refuse)
                try:
                    atomic_files.write_folder(place, FILES, overwrite=True)
                except OSError:
                    sys.exit(6)

            done = children.run(stopped)
            if done.code == 0 and not done.out:
                break
            there = contents(place)
            left = [path for path in place.parent.iterdir() if path != place]
            # a folder that is replaced by two renames is aside between them, and back when anybody asks
            aside = replaced == "by two renames" and not place.exists()
            if aside:
                assert done.code == KILLED
                atomic_files.recover(place)
                there = contents(place)
                assert there == OTHERS
            seen.add("aside" if aside else "new" if there == FILES else "old" if there == OTHERS else "none")
            assert there in ({}, FILES, OTHERS)
            if done.code == 6:
                assert left == []
                assert there == ({} if replaced == "nothing" else OTHERS)
            # the next writer of the same folder leaves nothing beside it
            atomic_files.write_folder(place, FILES, overwrite=True)
            assert contents(place) == FILES
            assert list(place.parent.iterdir()) == [place]
        assert contents(place) == FILES
        wanted = {"none"} if replaced == "nothing" else {"old"}
        wanted |= {"aside"} if (replaced, happen) == ("by two renames", "killed") else set()
        # some changes are not needed, such as the removal of what was replaced
        wanted |= {"new"} if (replaced, happen) != ("nothing", "killed") else set()
        assert seen == wanted

    def test_what_a_killed_writer_left_is_swept(self, tmp_path):
        (tmp_path / f"{atomic_files.STAGING_PREFIX}1").mkdir()
        (tmp_path / f"{atomic_files.STAGING_PREFIX}1" / "file").write_text("half")
        (tmp_path / f"{atomic_files.STAGING_PREFIX}2").write_text("half")
        (tmp_path / "mine").write_text("mine")
        atomic_files.remove_abandoned(tmp_path)
        assert contents(tmp_path) == {"mine": b"mine"}


class TestStaging:
    """What writers that were killed have left goes, and what belongs to one at work stays."""

    def left(self, path, make):
        """What a process that was killed has claimed for `path`."""

        def die():
            with staging.claim(path, make) as beside:
                sys.stdout.write(str(beside))
                sys.stdout.flush()
                kill()

        done = children.run(die)
        assert done.code == KILLED
        return Path(done.out)

    @needs_fork
    @pytest.mark.parametrize("make", [staging.create_file, staging.create_folder])
    def test_what_a_killed_writer_has_left_goes_with_the_next_one_of_the_same_path(self, tmp_path, make):
        left = self.left(tmp_path / "a", make)
        other = self.left(tmp_path / "b", make)
        atomic_files.write_file(tmp_path / "a", b"data")
        assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "a"])
        (tmp_path / "a").unlink()
        atomic_files.write_folder(tmp_path / "a", FILES)
        assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "a"])
        assert left != other

    @needs_fork
    def test_a_sweep_takes_what_killed_writers_have_left_of_any_path_and_nothing_else(self, tmp_path):
        for name in ("a", "b"):
            self.left(tmp_path / name, staging.create_folder)
        mine = [".writing-notes", ".writing-0123456789abcdef", ".writing-01234567-old", "01234567-0"]
        for name in mine:
            (tmp_path / name).mkdir()
        (tmp_path / ".writing-01234567-5").symlink_to(".writing-notes")
        with staging.claim(tmp_path / "a", staging.create_folder) as in_use:
            staging.remove_abandoned(tmp_path)
            assert {path.name for path in tmp_path.iterdir()} == {*mine, ".writing-01234567-5", in_use.name}
            assert staging.is_in_use(in_use)
            atomic_files.remove_abandoned(tmp_path)
            assert {path.name for path in tmp_path.iterdir()} == {"01234567-0", in_use.name}

    def test_writers_of_one_path_do_not_touch_each_other(self, tmp_path):
        with (
            atomic_files.stage_file(tmp_path / "a", b"first") as first,
            atomic_files.stage_file(tmp_path / "a", b"second") as second,
        ):
            second()
            atomic_files.write_file(tmp_path / "a", b"third")
            first()
        assert contents(tmp_path) == {"a": b"first"}

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")
    def test_a_new_folder_at_the_path_of_a_replaced_one_is_not_removed(self, tmp_path, monkeypatch):
        replaced = tmp_path / ".writing-01234567-0"
        held = staging.create_folder(replaced)
        fcntl.flock(held, fcntl.LOCK_EX)
        lock = fcntl.flock

        def lock_while_another_writer_begins(descriptor, operation):
            try:
                lock(descriptor, operation)
            except BlockingIOError:
                os.close(held)
                replaced.rmdir()
                replaced.mkdir()
                raise

        monkeypatch.setattr(fcntl, "flock", lock_while_another_writer_begins)
        staging.remove(replaced)
        assert list(tmp_path.iterdir()) == [replaced]

    @needs_fork
    @pytest.mark.parametrize("exchanged", [True, False])
    def test_many_that_write_one_folder_at_once_leave_one_of_theirs(self, tmp_path, monkeypatch, exchanged):
        if not exchanged:
            monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
        whole = [{"config.json": b"%d" % number, "weights": b"%d" % number} for number in range(4)]
        atomic_files.write_folder(tmp_path / "a", whole[0])

        def write(number):
            for _ in range(20):
                # two that have only renames may come between those of each other, and one is refused then
                with suppress(() if exchanged else OSError):
                    atomic_files.write_folder(tmp_path / "a", whole[number], overwrite=True)

        writers = [children.start(lambda number=number: write(number)) for number in range(4)]
        for wait in writers:
            succeeded(wait())
        atomic_files.recover(tmp_path / "a")
        staging.remove_abandoned(tmp_path)
        assert contents(tmp_path / "a") in whole
        assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@needs_fork
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to be root, to be another user")
def test_a_folder_that_may_be_written_to_and_not_listed_is_written_to(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o333)

    def write():
        os.chdir(place)
        os.setuid(12345)
        staging.remove_abandoned(Path())
        atomic_files.write_file(Path("file"), b"data")
        atomic_files.write_folder(Path("folder"), FILES)

    succeeded(children.run(write))
    place.chmod(0o755)
    assert sorted(path.name for path in place.iterdir()) == ["file", "folder"]


@needs_fork
@pytest.mark.parametrize("before", [b"old", None])
def test_a_file_is_the_old_one_or_the_new_one_wherever_its_writer_is_killed(tmp_path, before):
    seen = set()
    for n in range(1, 20):
        path = tmp_path / str(n) / "file"
        path.parent.mkdir()
        if before is not None:
            path.write_bytes(before)

        def killed(n=n, path=path):
            at_change(n, path.parent, kill)
            atomic_files.write_file(path, b"new")

        done = children.run(killed)
        seen.add(path.read_bytes() if path.exists() else None)
        atomic_files.write_file(path, b"new")
        assert contents(path.parent) == {"file": b"new"}
        if done.code == 0:
            break
    assert seen == {before, b"new"}


class TestMade:
    def test_what_was_not_there_goes_again_after_an_error(self, tmp_path):
        (tmp_path / "a").mkdir()

        def fail(inside=None):
            with atomic_files.ensure_folder(tmp_path / "a" / "b" / "c"):
                if inside:
                    (tmp_path / "a" / "b" / inside).write_text("mine")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert contents(tmp_path) == {"a": None}
        with pytest.raises(KeyboardInterrupt):
            fail("somebody's")
        assert contents(tmp_path) == {"a": None, "a/b": None, "a/b/somebody's": b"mine"}


class TestRemove:
    def test_files_folders_links_and_nothing(self, tmp_path):
        (tmp_path / "folder" / "below").mkdir(parents=True)
        (tmp_path / "folder" / "below" / "file").write_text("x")
        (tmp_path / "file").write_text("x")
        (tmp_path / "target").mkdir()
        (tmp_path / "link").symlink_to("target")
        for name in ("folder", "file", "link", "nothing"):
            atomic_files.remove(tmp_path / name)
        assert contents(tmp_path) == {"target": None}


class TestLock:
    def test_one_thread_may_take_it_twice(self, tmp_path):
        with atomic_files.lock(tmp_path / ".lock", 0.1), atomic_files.lock(tmp_path / ".lock", 0.1):
            pass

    def test_another_thread_waits_and_then_says_so(self, tmp_path):
        failed = []

        def other():
            try:
                with atomic_files.lock(tmp_path / ".lock", 0.1):
                    pass
            except PackBusyError as error:
                failed.append(str(error))

        with atomic_files.lock(tmp_path / ".lock", 0.1):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert len(failed) == 1
        assert f"another process is writing to {tmp_path}" in failed[0]
        other()
        assert len(failed) == 1

    def test_an_error_names_the_folder(self, tmp_path):
        folder = tmp_path / "folder"
        folder.write_bytes(b"a file")
        with pytest.raises(NotADirectoryError) as caught, atomic_files.lock(folder / ".lock", 0.1):
            pass
        assert caught.value.filename == str(folder)

    @needs_fork
    def test_one_that_is_killed_holds_it_no_more(self, tmp_path):
        def die():
            with atomic_files.lock(tmp_path / ".lock", 0.1):
                kill()

        assert children.run(die).code == KILLED
        with atomic_files.lock(tmp_path / ".lock", 0.1):
            pass
