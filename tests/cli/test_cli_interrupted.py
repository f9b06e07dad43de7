"""Ctrl-C: one line that says what is left, exit code 130, and nothing half-written."""

import pytest

import children
from adapters import make_adapters
from children import KILLED, at_change, kill, load_command, needs_fork
from eigenlorax.cli import main
from eigenlorax.codec import encoder
from eigenlorax.fitting import coded_checkpoint, jobs
from eigenlorax.pack.pack import Pack
from outcomes import assert_refused, contents, json_of, succeeded

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path):
    make_adapters(tmp_path / "in", "alpha beta gamma")
    return tmp_path


def interrupt(*_args, **_options):
    raise KeyboardInterrupt


def interrupted_at(monkeypatch, call):
    """Modules are fitted until the one of this number, from 0."""
    do, done = jobs.fit_loaded, []

    def until(loaded, *rest):
        done.append(loaded)
        return interrupt() if len(done) > call else do(loaded, *rest)

    monkeypatch.setattr(jobs, "fit_loaded", until)


def assert_says(done, said):
    assert (done.code, done.out, done.err) == (130, "", f"Interrupted. {said}\n")


@pytest.mark.parametrize("output", ["pack", "some/where/else"])
@pytest.mark.parametrize("options", [("-k", 6), ("--ratio", 4)], ids=["components", "bytes"])
def test_a_fit_that_has_kept_nothing_leaves_nothing(cli, place, monkeypatch, output, options):
    before = contents(place)
    # however slow the machine is, no result is worth keeping
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 60.0)
    monkeypatch.setattr(encoder.CollectionEncoder, "encode", interrupt)
    interrupted_at(monkeypatch, 0)
    assert_says(cli("fit", place / "in", "-o", place / output, *options), "No pack was written, and nothing was left.")
    assert contents(place) == before


def test_a_fit_goes_on_from_the_modules_that_it_has_kept(cli, place, monkeypatch):
    kept = place / "some" / ".pack.fitting"
    with monkeypatch.context() as patched:
        interrupted_at(patched, 1)
        done = cli("fit", place / "in", "-o", place / "some" / "pack", "-k", 6)
    assert_says(done, f"No pack was written. 1 finished part is kept in {kept}: run the same command to continue.")
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    done = succeeded(cli("fit", place / "in", "-o", place / "some" / "pack", "-k", 6))
    assert "note: 1 of 3 modules were read from the checkpoint of an interrupted fit." in done.err
    assert not kept.exists()


def test_a_pack_that_was_there_is_as_it_was(cli, place, monkeypatch):
    succeeded(cli("fit", place / "in", "-o", place / "pack", "-k", 6))
    before = contents(place)
    monkeypatch.setattr(coded_checkpoint, "KEPT_FROM", 60.0)
    monkeypatch.setattr(Pack, "save", interrupt)
    done = cli("fit", place / "in", "-o", place / "pack", "--ratio", 4, "--overwrite")
    assert_says(done, f"{place / 'pack'} is unchanged, and nothing was left.")
    assert contents(place) == before


def test_a_pack_is_whole_before_its_report_is_made(cli_with_reports, place, monkeypatch):
    pytest.importorskip("matplotlib")
    from eigenlorax.reports import stored

    monkeypatch.setattr(stored, "write", interrupt)
    done = cli_with_reports("fit", place / "in", "-o", place / "pack", "-k", 6)
    assert_says(done, f"{place / 'pack'} is written and complete, except perhaps for its report.")
    assert json_of(cli_with_reports("inspect", place / "pack", "--json"))["adapters"] == 3


class TestKept:
    """The folder of fitted modules goes with the first writer to the pack that comes after it."""

    @pytest.fixture
    def kept(self, place):
        return place / ".pack.fitting"

    @pytest.fixture
    def killed_at_the_end(self, place, kept):
        """A fit that was killed when its pack was written, before it had removed what it had kept."""
        load_command()
        for n in range(1, 40):

            def run(n=n):
                at_change(n, kept, kill)
                main(["fit", str(place / "in"), "-o", str(place / "pack"), "-k", "6", "--no-report"])

            assert children.run(run).code == KILLED
            if (place / "pack" / "subspace_config.json").exists():
                assert kept.exists()
                return
        pytest.fail("it was not killed at the end")

    @needs_fork
    @pytest.mark.parametrize("verb", ["fit", "fit --overwrite", "remove"])
    def test_it_goes_where_the_fit_was_killed_after_its_pack_was_written(
        self, cli, place, kept, killed_at_the_end, verb
    ):
        if verb == "remove":
            succeeded(cli("remove", place / "pack", "alpha"))
        else:
            done = cli("fit", place / "in", "-o", place / "pack", "-k", 6, *verb.split()[1:])
            assert done.code == (0 if verb != "fit" else 4)
        assert sorted(path.name for path in place.iterdir()) == ["in", "pack"]
        Pack.open(place / "pack").verify()

    def test_it_stays_for_a_fit_that_goes_on_in_the_place_of_an_older_pack(self, cli, place, kept, monkeypatch):
        fit = ("fit", place / "in", "-o", place / "pack", "-k", 6)
        succeeded(cli(*fit))
        with monkeypatch.context() as patched:
            interrupted_at(patched, 1)
            assert cli(*fit, "--overwrite").code == 130
        assert_refused(cli(*fit), 4, "is a pack already")
        assert "1 of 3 modules were read from the checkpoint" in succeeded(cli(*fit, "--overwrite")).err
        assert not kept.exists()

    def test_another_folder_of_that_name_stays(self, cli, place, kept):
        kept.mkdir()
        (kept / "thesis.txt").write_text("mine")
        for size in (("--ratio", 4), ("-k", 6)):
            assert_refused(cli("fit", place / "in", "-o", place / "pack", *size), 3, "is not a checkpoint of a fit")
        assert contents(kept) == {"thesis.txt": b"mine"}
