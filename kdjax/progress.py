"""How fast long work goes, how far it is, and how long the rest of it takes."""

from __future__ import annotations

import sys
import time

_SECONDS = 10  # between two lines


class Pace:
    """The speed of some work, and the time that the rest of it takes at this speed.

    Args:
      total: how much work there is, in any unit.
      done: how much of it was there before.

    Examples:
      >>> pace = Pace(total=1000)  # images, bytes, whatever is counted
      >>> pace.advance(10)
      >>> pace.is_timed, pace.rate > 0
      (True, True)
    """

    def __init__(self, total: float, done: float = 0.0) -> None:
        self.total, self.done = total, done
        self.restart()
        self._told = self._since

    def restart(self) -> None:
        """Measures the speed anew, after time that was spent on something else."""
        self._since, self._before = time.monotonic(), self.done

    def advance(self, work: float = 1.0) -> None:
        """Counts work that is done."""
        self.done += work

    @property
    def is_timed(self) -> bool:
        """Whether any work was done since the speed is measured."""
        return self.done > self._before

    @property
    def rate(self) -> float:
        """Work per second; nan where none was timed."""
        if not self.is_timed:
            return float("nan")
        return (self.done - self._before) / (time.monotonic() - self._since)

    def left(self, begun: float = 0.0) -> str:
        """The time that the rest takes, as `clock` writes it; of the work at hand, `begun` is done."""
        timed = self.done + begun - self._before
        return clock((time.monotonic() - self._since) * (self.total - self.done - begun) / timed)

    def is_due(self, seconds: float) -> bool:
        """Whether so much time has passed since this was last true: whether it is time for another line."""
        now = time.monotonic()
        if now - self._told < seconds:
            return False
        self._told = now
        return True


class Progress:
    """Says on stderr, every ten seconds, how much is done, and how long the rest takes at this speed.

    Args:
      count: how many things there are to do.
      work: what they cost together, in any unit.
      what: their name, in the plural.
      silent: says nothing.
    """

    def __init__(self, count: int, work: float, what: str = "images", *, silent: bool = False) -> None:
        self._count, self._what, self._silent = count, what, silent
        self._done, self._pace = 0, Pace(work)

    def advance(self, work: float) -> None:
        """Counts one, which cost `work`."""
        self._done += 1
        self._pace.advance(work)
        self.show()

    def show(self, work: float = 0.0, detail: str = "") -> None:
        """Says it if it is time to, with `work` of the one at hand done, of which `detail` tells."""
        if self._silent or not self._pace.done + work or not self._pace.is_due(_SECONDS):
            return
        parts = [f"{self._done} of {self._count} {self._what}", detail, f"{self._pace.left(work)} left"]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
