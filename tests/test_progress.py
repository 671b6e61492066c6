"""How far the work is, by a clock of its own."""

import math
from collections.abc import Callable

import pytest

from kdjax.progress import Pace, Progress, clock


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_says_how_long_the_rest_takes(at: Callable[[float], None], capsys: pytest.CaptureFixture) -> None:
    progress = Progress(4, 100.0)
    for seconds, work in ((5.0, 10), (20.0, 10), (25.0, 30), (40.0, 50)):
        at(seconds)
        progress.advance(work)
    assert capsys.readouterr().err == "2 of 4 images, 0:01:20 left\n4 of 4 images, 0:00:00 left\n"


def test_says_how_far_the_one_at_hand_is(at: Callable[[float], None], capsys: pytest.CaptureFixture) -> None:
    progress = Progress(2, 8.0, "files")
    at(10.0)
    progress.show()  # nothing is done, so nothing is known
    progress.show(1.0, "50% of a.png")
    progress.show(2.0, "100% of a.png")  # too early
    progress.advance(2.0)
    at(30.0)
    progress.show(2.0, "33% of b.png")
    wanted = "0 of 2 files, 50% of a.png, 0:01:10 left\n1 of 2 files, 33% of b.png, 0:00:30 left\n"
    assert capsys.readouterr().err == wanted


def test_can_be_silent(at: Callable[[float], None], capsys: pytest.CaptureFixture) -> None:
    progress = Progress(1, 1.0, silent=True)
    at(60.0)
    progress.advance(1.0)
    assert capsys.readouterr().err == ""


def test_pace_leaves_out_what_was_there_and_the_time_before_a_restart(at: Callable[[float], None]) -> None:
    pace = Pace(100, done=20)
    assert not pace.is_timed and math.isnan(pace.rate) and not pace.is_due(5)
    at(5.0)
    pace.advance(10)
    assert (pace.rate, pace.left(), pace.left(begun=10)) == (2.0, "0:00:35", "0:00:15")
    assert pace.is_due(5) and not pace.is_due(5)
    pace.restart()
    assert not pace.is_timed
    at(6.0)
    pace.advance(10)
    assert (pace.rate, pace.left()) == (10.0, "0:00:06")


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3661, 360_000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]
