"""How long a verb takes: said before it, or from its first steps; and a bar that is never still."""

import pytest

import terminals
from eigenlorax.cli import console, durations
from outcomes import succeeded

pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as the first item, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(durations.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def inside(pack, monkeypatch):
    monkeypatch.chdir(pack.parent)
    return pack.parent


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (59, "59 seconds"),
        (89, "89 seconds"),
        (91, "2 minutes"),
        (5000, "83 minutes"),
        (7300, "2 hours"),
    ],
)
def test_durations_in_words(seconds, words):
    assert durations.in_words(seconds) == words


class TestSteps:
    def test_their_times_tell_how_long_a_stage_takes(self, clock):
        times = durations.StageTimes(is_announced=False)
        assert times.remaining("training", 0, 100) == 0
        clock[0] = 1.9
        assert times.remaining("training", 1, 100) == 0
        clock[0] = 4.0
        assert times.remaining("training", 2, 100) == 196

    def test_a_stage_that_starts_again_is_timed_anew(self, clock):
        times = durations.StageTimes(is_announced=False)
        times.remaining("survey", 0, 10)
        clock[0] = 50.0
        assert times.remaining("survey", 0, 10) == 0
        clock[0] = 53.0
        assert times.remaining("survey", 5, 10) == 3

    def test_more_than_a_minute_is_announced_once(self):
        times = durations.StageTimes(is_announced=False)
        assert [times.must_announce(seconds) for seconds in (0.0, 59.0, 61.0, 80.0)] == [False, False, True, False]
        assert not durations.StageTimes(is_announced=True).must_announce(600.0)

    def test_the_note_is_printed_while_the_bar_is_shown(self, clock):
        def work():
            with console.working() as progress:
                progress("training", 0, 100)
                clock[0] = 5.0
                progress("training", 1, 100)

        assert "note: training: about 8 minutes left." in terminals.without_escapes(terminals.shown(work)[1])


@pytest.mark.parametrize(
    ("line", "action"),
    [
        ("fit in -o fresh -k 4", "The fit"),
        ("fit one=in/alpha in/beta -o fresh --max-error 0.3", "The fit"),
        ("export pack -o out", "The export"),
        ("refit pack -o fresh -k 3", "The fit"),
        ("report pack -a in", "The report"),
    ],
)
def test_a_verb_begins_with_an_estimate(cli, inside, monkeypatch, line, action):
    assert " takes about " not in succeeded(cli(*line.split())).err
    monkeypatch.setattr(durations, "WORTH_SAYING", 1e-9)
    done = succeeded(cli(*line.split(), *(["--overwrite"] * (line[:6] != "report"))))
    assert done.err.startswith(f"note: {action} takes about ")
    assert done.err.count(" takes about ") == 1


def test_the_terminal_is_not_still_before_and_after_the_stages():
    """A bar named "working", whose timer runs."""

    def work():
        with console.working() as progress:
            progress("reading", 0, 2)
            progress("reading", 2, 2)

    shown = terminals.without_escapes(terminals.shown(work)[1])
    assert shown.index("working") < shown.index("reading")
    assert "2/2" in shown[shown.rindex("working") :]
