"""A pack's folder under bad luck: writers killed or out of disk at every step, two at once."""

import copy
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import children
import eigenlorax as ex
from adapters import make_adapter
from children import KILLED, at_change, kill, load_command, needs_fork, no_more_room
from eigenlorax.cli import main
from eigenlorax.cli.main import IO_ERROR
from eigenlorax.core import keys
from eigenlorax.errors import PackBusyError, PackMissingError
from eigenlorax.pack import folder
from outcomes import assert_refused, contents, succeeded

pytestmark = [pytest.mark.slow, needs_fork, pytest.mark.usefixtures("without_shape_checks")]

MANIFEST = keys.MANIFEST
# no verb here changes a folder in more steps than this
MANY = 100


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    # what is tested are killed processes, not power cuts
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    load_command()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of adapters: `one` and `two` share the name `beta`, not its content; `new` is to be added."""
    parent = tmp_path_factory.mktemp("sources")
    for place, seed in (("one/alpha", 1), ("one/beta", 2), ("two/beta", 3), ("two/gamma", 4), ("new/delta", 5)):
        make_adapter(parent / place, seed=seed, head=(2, 31) if seed == 2 else None)
    return parent


@pytest.fixture(scope="module")
def old(sources, tmp_path_factory):
    """A pack of `one` with a report on it, to be copied before it is changed."""
    pack = ex.fit(sources / "one", n_components=4).save(tmp_path_factory.mktemp("old") / "pack")
    (pack / keys.REPORT_PAGE).write_bytes(b"Made by eigenlorax 0 from the subspace of fingerprint 0")
    return pack


@pytest.fixture(scope="module")
def fitted(sources):
    """The pack of `two`, in memory."""
    return ex.fit(sources / "two", n_components=3)


@dataclass(frozen=True)
class Verb:
    """A change of the folder `pack`, by a call and by a command. `fresh`: there is no pack before.

    Commands give no note: where no file may get longer, it would be cut short on stderr, and the error with it.
    """

    call: Callable[[Path, Path, ex.Pack], object]
    arguments: str
    fresh: bool = False


def add(sources: Path, place: Path, fitted: ex.Pack) -> None:
    with ex.Pack.edit(place) as pack:
        pack.add(sources / "new" / "delta")
        pack.add(sources / "two" / "gamma", name="zeta")


def extend(sources: Path, place: Path, fitted: ex.Pack) -> None:
    with ex.Pack.edit(place) as pack:
        pack.add(sources / "new" / "delta", extend=1, warn_above=1.0)


def replace(sources: Path, place: Path, fitted: ex.Pack) -> None:
    with ex.Pack.edit(place) as pack:
        pack.remove("beta")
        pack.add(sources / "two" / "beta")


def remove(sources: Path, place: Path, fitted: ex.Pack) -> None:
    with ex.Pack.edit(place) as pack:
        pack.remove("beta")


VERBS = {
    "fit": Verb(
        lambda sources, place, fitted: fitted.save(place),
        "fit {sources}/two -o {pack} -k 3 --warn-above 1 --no-report",
        fresh=True,
    ),
    "fit --overwrite": Verb(
        lambda sources, place, fitted: fitted.save(place, overwrite=True),
        "fit {sources}/two -o {pack} -k 3 --overwrite --warn-above 1 --no-report",
    ),
    "add": Verb(add, "add {pack} {sources}/new/delta zeta={sources}/two/gamma --warn-above 1"),
    "add --extend": Verb(extend, "add {pack} {sources}/new/delta --extend 1 --warn-above 1"),
    "remove": Verb(remove, "remove {pack} beta"),
    "remove and add": Verb(replace, ""),
}
DIFFERENT = ["fit", "fit --overwrite", "add --extend", "remove and add"]
"""Those that change files in different ways."""


@pytest.fixture(params=VERBS)
def verb(request) -> Verb:
    return VERBS[request.param]


@pytest.fixture
def change(verb, sources, fitted) -> Callable[[Path], object]:
    """The verb's call, on a folder."""
    return lambda place: verb.call(sources, place, fitted)


@pytest.fixture
def places(verb, old, sources, tmp_path) -> Iterator[Path]:
    """Places for a pack, each with the old one unless the verb makes the first."""

    def several() -> Iterator[Path]:
        for n in range(1, MANY):
            place = tmp_path / str(n) / "pack"
            place.parent.mkdir()
            if not verb.fresh:
                shutil.copytree(old, place)
            yield place
        pytest.fail(f"it did not end after {MANY} changes")

    return several()


@pytest.fixture
def new(verb, places, change) -> dict:
    """What the verb makes of the folder where nothing disturbs it."""
    place = next(places)
    succeeded(children.run(lambda: change(place)))
    return contents(place)


def is_whole(place: Path) -> bool:
    """Whether there is a pack; every byte of it and every adapter must be readable."""
    try:
        pack = ex.Pack.open(place)
    except PackMissingError:
        return False
    pack.verify()
    for name in pack.names:
        assert all(factors.down.isfinite().all() for factors in pack.adapter(name).modules.values())
    return True


def assert_old_or_new(place: Path, before: dict, new: dict) -> bool:
    """A folder that holds the pack before, or the one after; whether it is the one after."""
    if not is_whole(place):
        assert MANIFEST not in before
        return False
    manifest = (place / MANIFEST).read_bytes()
    assert manifest in (before.get(MANIFEST), new[MANIFEST])
    return manifest == new[MANIFEST]


def save_again(place: Path) -> None:
    with ex.Pack.edit(place):
        pass


@pytest.mark.parametrize("verb", DIFFERENT, indirect=True)
def test_a_writer_killed_before_any_of_its_changes_leaves_the_old_pack_or_the_new_one(places, new, change):
    outcomes = []
    for n, place in enumerate(places, start=1):
        before = contents(place)

        def killed(n: int = n, place: Path = place) -> None:
            at_change(n, place, kill)
            change(place)

        done = children.run(killed)
        if done.code == 0:
            break
        assert done.code == KILLED, done
        outcomes.append(assert_old_or_new(place, before, new))
        # what is done already is not done again; but the next writer, whatever it does, tidies up
        retry = save_again if outcomes[-1] else change
        succeeded(children.run(lambda retry=retry, place=place: retry(place)))
        assert contents(place) == new, n
    # the moment at which the new pack takes the old one's place is one, and changes come before it and after it
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("verb", DIFFERENT, indirect=True)
def test_a_change_that_the_disk_refuses_leaves_the_old_pack_or_the_new_one(places, new, change):
    outcomes = []
    for n, place in enumerate(places, start=1):
        before, reached = contents(place), place.with_name("reached")

        def refused(n: int = n, place: Path = place, reached: Path = reached) -> None:
            at_change(n, place, lambda: [reached.touch(), fail()])
            try:
                change(place)
            except OSError as error:
                sys.exit(IO_ERROR if error.errno == errno.ENOSPC else str(error))

        done = children.run(refused)
        if not reached.exists():
            break
        assert done.code in (0, IO_ERROR), done
        outcomes.append(assert_old_or_new(place, before, new))
        if not outcomes[-1]:
            assert done.code == IO_ERROR
            assert contents(place) == before, n
    assert set(outcomes) == {False, True}


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("verb", ["fit", "add"], indirect=True)
def test_a_disk_that_gets_full_leaves_the_folder_as_it_was_and_is_one_message(verb, places, new, sources):
    refused = 0
    for n, place in enumerate(places, start=1):
        before = but_kept(place.parent)

        def filled(n: int = n, place: Path = place) -> None:
            at_change(n, place, no_more_room)
            main(verb.arguments.format(sources=sources, pack=place).split())

        done = children.run(filled)
        if done.code == 0:
            # it got full when all was written
            assert contents(place) == new
            break
        assert_refused(done, IO_ERROR, f"{os.strerror(errno.EFBIG)}: {place}", "Nothing was left half-written")
        assert but_kept(place.parent) == before
        refused += 1
    assert refused > 3


def but_kept(folder: Path) -> dict[str, bytes | str | None]:
    """What is in a folder beside the modules that a fit keeps, with which it goes on."""
    return {name: data for name, data in contents(folder).items() if ".fitting" not in name}


class TestTwoAtOnce:
    """Real processes. One is held before its n-th change until it may go on."""

    @pytest.fixture
    def place(self, old, tmp_path):
        return shutil.copytree(old, tmp_path / "pack")

    def held(self, n: int, place: Path, change: Callable[[], object], then: Callable[[], object] = int):
        """`change` in a process that has come to its n-th change of `place`; what lets it go on, and waits for it."""
        here, go = place.parent / "here", place.parent / "go"

        def wait_here() -> None:
            here.touch()
            while not go.exists():
                time.sleep(0.005)
            then()

        def run() -> None:
            at_change(n, place, wait_here)
            change()

        wait = children.start(run)
        patience = time.monotonic() + children.SECONDS
        while not here.exists():
            assert time.monotonic() < patience, f"there is no change number {n}"
            time.sleep(0.005)

        def let_go() -> children.Done:
            go.touch()
            return wait()

        return let_go

    def command(self, text: str, sources: Path, place: Path, patience: float = folder.LOCK_SECONDS):
        def run() -> None:
            folder.LOCK_SECONDS = patience
            main(text.format(sources=sources, pack=place).split())

        return run

    # its second change is the first under the lock
    @pytest.mark.parametrize("n", [2, 6, 15])
    def test_the_second_writer_waits_and_both_are_in_the_pack(self, place, sources, n):
        first = self.held(n, place, self.command("add {pack} {sources}/new/delta", sources, place))
        second = children.start(self.command("add {pack} {sources}/two/gamma", sources, place))
        time.sleep(0.2)
        succeeded(first())
        succeeded(second())
        assert ex.Pack.open(place).names == ["alpha", "beta", "delta", "gamma"]
        assert is_whole(place)

    @pytest.mark.parametrize(
        "text", ["add {pack} {sources}/two/gamma", "remove {pack} alpha", VERBS["fit --overwrite"].arguments]
    )
    def test_a_second_writer_that_does_not_want_to_wait_any_longer_says_so(self, place, sources, text):
        first = self.held(4, place, self.command("add {pack} {sources}/new/delta", sources, place))
        before = contents(place)
        second = children.run(self.command(text, sources, place, patience=0.1))
        assert_refused(second, 5, f"another process is writing to {place}", "run the command again")
        assert contents(place) == before
        succeeded(first())
        assert ex.Pack.open(place).names == ["alpha", "beta", "delta"]
        assert is_whole(place)

    def test_four_writers_lose_nothing(self, place, sources):
        writers = [
            children.start(self.command(f"add {{pack}} n{i}={{sources}}/new/delta", sources, place)) for i in range(4)
        ]
        for wait in writers:
            succeeded(wait())
        assert ex.Pack.open(place).names == ["alpha", "beta", "n0", "n1", "n2", "n3"]
        assert is_whole(place)

    def test_one_name_goes_to_one_of_two(self, place, sources):
        writers = [
            children.start(self.command(f"add {{pack}} x={{sources}}/{s}", sources, place))
            for s in ("new/delta", "two/gamma")
        ]
        done = sorted((wait() for wait in writers), key=lambda one: one.code)
        succeeded(done[0])
        assert_refused(done[1], 3, "already has an adapter named 'x'")
        assert is_whole(place)

    def test_the_first_of_two_first_fits_makes_the_pack(self, sources, tmp_path):
        place = tmp_path / "pack"
        first = self.held(5, place, self.command("fit {sources}/one -o {pack} -k 4 --no-report", sources, place))
        second = children.start(self.command("fit {sources}/two -o {pack} -k 4 --no-report", sources, place))
        time.sleep(0.5)
        succeeded(first())
        assert_refused(second(), 4, "is a pack already", "--overwrite")
        assert ex.Pack.open(place).names == ["alpha", "beta"]
        assert is_whole(place)

    def test_a_first_fit_that_fails_leaves_the_folder_to_the_one_that_waits(self, sources, tmp_path):
        place = tmp_path / "pack"
        place.mkdir()
        first = self.held(5, place, self.command("fit {sources}/one -o {pack} -k 4 --no-report", sources, place), fail)
        second = children.start(self.command("fit {sources}/two -o {pack} -k 4 --no-report", sources, place))
        time.sleep(0.5)
        assert_refused(first(), IO_ERROR, os.strerror(errno.ENOSPC))
        succeeded(second())
        assert ex.Pack.open(place).names == ["beta", "gamma"]
        assert is_whole(place)

    def test_a_reader_of_a_pack_that_was_replaced_is_told(self, place, fitted):
        opened, again = ex.Pack.open(place), ex.Pack.open(place)
        fitted.save(place, overwrite=True)
        for read in (opened.verify, lambda: again.adapter("beta"), lambda: again.subspace):
            with pytest.raises(PackBusyError, match=f"{place} was changed by another process.*Open it again"):
                read()

    def test_so_is_one_of_the_command(self, place, fitted):
        verify = folder.PackFolder.verify

        def inspect() -> None:
            folder.PackFolder.verify = lambda self: [fitted.save(place, overwrite=True), verify(self)]
            main(["inspect", str(place)])

        assert_refused(children.run(inspect), 5, f"{place} was changed by another process", "Open it again")

    def test_what_was_read_already_stays(self, place, fitted):
        opened = ex.Pack.open(place)
        adapter = opened.adapter("beta")
        fitted.save(place, overwrite=True)
        assert adapter.modules["encoder.layer.1.query"].down.shape == (3, 29)

    def test_readers_get_a_whole_answer_or_are_told_while_writers_replace_it(self, place, sources):
        # each has its own k, so that an answer that mixes two shows; more of them than are replaced in one reading
        packs = [ex.fit(sources / "one", n_components=k) for k in range(1, 7)]
        copy.copy(packs[-1]).save(place, overwrite=True)
        stop = place.parent / "stop"

        def write() -> None:
            while not stop.exists():
                for pack in packs:
                    # a copy that is not on disk: this very pack would have to be opened again
                    copy.copy(pack).save(place, overwrite=True)

        writer = children.start(write)
        whole = told = 0
        try:
            while whole < 15 or (told < 1 and whole < 300):
                try:
                    pack = ex.Pack.open(place)
                    pack.verify()
                    adapter, bases = pack.packed("beta"), pack.subspace.modules["encoder.layer.0.query"]
                except PackBusyError:
                    told += 1
                    continue
                k = pack.fit_info.n_components
                assert {c.down.shape for c in adapter.coefficients.values()} == {(3, k)}
                assert bases.down.k == k
                whole += 1
        finally:
            stop.touch()
        succeeded(writer())
        assert whole >= 15
