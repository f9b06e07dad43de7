"""Files and folders that appear whole or not at all: what `folder` builds on, and exports, which have nothing else."""

import errno
import os
import sys
import threading

import pytest

import children
from children import KILLED, at_change, kill, needs_fork
from eigenlorax import store
from eigenlorax.errors import PackBusyError, PackExistsError
from outcomes import contents

FILES = {"config.json": b"{}", "weights": b"\0" * 3000, "empty": b""}
OTHERS = {"config.json": b"[]", "weights": b"\1" * 2000}


class TestWriteFile:
    def test_replaces_in_one_step_and_leaves_nothing_else(self, tmp_path):
        for data in (b"one", b"", b"three"):
            store.write_file(tmp_path / "file", data)
            assert contents(tmp_path) == {"file": data}

    def test_of_a_folder_s_name_is_refused_and_leaves_nothing(self, tmp_path):
        (tmp_path / "place").mkdir()
        before = contents(tmp_path)
        with pytest.raises(IsADirectoryError):
            store.write_file(tmp_path / "place", b"data")
        assert contents(tmp_path) == before

    def test_in_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            store.write_file(tmp_path / "no" / "file", b"data")
        assert contents(tmp_path) == {}

    def test_a_block_that_fails_before_it_puts_it_in_place_leaves_the_old_one(self, tmp_path):
        store.write_file(tmp_path / "file", b"old")

        def fail():
            with store.staged(tmp_path / "file", b"new"):
                assert len(contents(tmp_path)) == 2
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert contents(tmp_path) == {"file": b"old"}


class TestWriteFolder:
    def test_makes_its_parents(self, tmp_path):
        store.write_folder(tmp_path / "a" / "b", FILES)
        assert contents(tmp_path / "a" / "b") == FILES

    def test_replaces_one_of_its_kind_whole_on_request_only(self, tmp_path):
        store.write_folder(tmp_path / "a", FILES)
        with pytest.raises(PackExistsError, match="a exists and is not empty.*--overwrite"):
            store.write_folder(tmp_path / "a", OTHERS)
        assert contents(tmp_path / "a") == FILES
        store.write_folder(tmp_path / "a", {**FILES, **OTHERS}, overwrite=True)
        assert contents(tmp_path / "a") == {**FILES, **OTHERS}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_takes_an_empty_one(self, tmp_path):
        (tmp_path / "a").mkdir()
        store.write_folder(tmp_path / "a", FILES)
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
                store.write_folder(tmp_path / place, FILES, overwrite=overwrite)
        assert contents(tmp_path) == before

    @needs_fork
    @pytest.mark.parametrize("happen", ["killed", "refused"])
    @pytest.mark.parametrize("replaced", [False, True])
    def test_is_there_whole_or_not_at_all_wherever_it_is_stopped(self, tmp_path, happen, replaced):
        def refuse():
            sys.stdout.write("reached")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        seen = set()
        for n in range(1, 60):
            place = tmp_path / str(n) / "a"
            place.parent.mkdir()
            if replaced:
                store.write_folder(place, OTHERS)

            def stopped(n=n, place=place):
                at_change(n, place.parent, kill if happen == "killed" else refuse)
                try:
                    store.write_folder(place, FILES, overwrite=True)
                except OSError:
                    sys.exit(6)

            done = children.run(stopped)
            if done.code == 0 and not done.out:
                break
            there = contents(place)
            left = [path for path in place.parent.iterdir() if path != place]
            # a folder that is replaced is two renames: between them it is beside, whole, under a name of its own
            aside = replaced and not place.exists()
            seen.add("aside" if aside else "new" if there == FILES else "old" if there == OTHERS else "none")
            assert there in ({}, FILES, OTHERS)
            if aside:
                assert OTHERS in [contents(path) for path in left]
                assert done.code == KILLED
            if done.code == 6:
                assert left == []
                assert there == (OTHERS if replaced else {})
        assert contents(place) == FILES
        assert {"old" if replaced else "none"} <= seen
        assert "new" in seen or not replaced

    def test_what_a_killed_writer_left_is_swept(self, tmp_path):
        (tmp_path / f"{store.STAGING}1").mkdir()
        (tmp_path / f"{store.STAGING}1" / "file").write_text("half")
        (tmp_path / f"{store.STAGING}2").write_text("half")
        (tmp_path / "mine").write_text("mine")
        store.sweep_staging(tmp_path)
        assert contents(tmp_path) == {"mine": b"mine"}


class TestMade:
    def test_what_was_not_there_goes_again_after_an_error(self, tmp_path):
        (tmp_path / "a").mkdir()

        def fail(inside=None):
            with store.made(tmp_path / "a" / "b" / "c"):
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
            store.remove(tmp_path / name)
        assert contents(tmp_path) == {"target": None}


class TestLock:
    def test_one_thread_may_take_it_twice(self, tmp_path):
        with store.lock(tmp_path / ".lock", 0.1), store.lock(tmp_path / ".lock", 0.1):
            pass

    def test_another_thread_waits_and_then_says_so(self, tmp_path):
        failed = []

        def other():
            try:
                with store.lock(tmp_path / ".lock", 0.1):
                    pass
            except PackBusyError as error:
                failed.append(str(error))

        with store.lock(tmp_path / ".lock", 0.1):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert len(failed) == 1
        assert f"another process is writing to {tmp_path}" in failed[0]
        other()
        assert len(failed) == 1

    @needs_fork
    def test_one_that_is_killed_holds_it_no_more(self, tmp_path):
        def die():
            with store.lock(tmp_path / ".lock", 0.1):
                kill()

        assert children.run(die).code == KILLED
        with store.lock(tmp_path / ".lock", 0.1):
            pass
