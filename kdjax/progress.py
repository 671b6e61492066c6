"""Speed, progress and remaining time of long-running work."""

from __future__ import annotations

import sys
import time

_SECONDS = 10  # between two lines


class Pace:
    """Measures the speed of some work and estimates the time remaining.

    Args:
      total: the amount of work, in any unit.
      done: how much of it was already done.

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
        """Restarts the measurement, after time spent on something else."""
        self._since, self._before = time.monotonic(), self.done

    def advance(self, work: float = 1.0) -> None:
        """Adds finished work."""
        self.done += work

    @property
    def is_timed(self) -> bool:
        """Whether any work was done since the measurement started."""
        return self.done > self._before

    @property
    def rate(self) -> float:
        """Work per second; nan if none was timed."""
        if not self.is_timed:
            return float("nan")
        return (self.done - self._before) / (time.monotonic() - self._since)

    def left(self, begun: float = 0.0) -> str:
        """Returns the remaining time, formatted by `clock`. `begun` is how much of the current item is done."""
        timed = self.done + begun - self._before
        return clock((time.monotonic() - self._since) * (self.total - self.done - begun) / timed)

    def is_due(self, seconds: float) -> bool:
        """Whether `seconds` have passed since this last returned True: time for another line."""
        now = time.monotonic()
        if now - self._told < seconds:
            return False
        self._told = now
        return True


class Progress:
    """Prints to stderr, every ten seconds, how much is done and the time remaining.

    Args:
      count: the number of items.
      work: their total cost, in any unit.
      what: what the items are called, in the plural.
      silent: print nothing.
    """

    def __init__(self, count: int, work: float, what: str = "images", *, silent: bool = False) -> None:
        self._count, self._what, self._silent = count, what, silent
        self._done, self._pace = 0, Pace(work)

    def advance(self, work: float) -> None:
        """Counts one finished item, which cost `work`."""
        self._done += 1
        self._pace.advance(work)
        self.show()

    def show(self, work: float = 0.0, detail: str = "") -> None:
        """Prints a line if one is due. `work` of the current item is done, and `detail` describes it."""
        if self._silent or not self._pace.done + work or not self._pace.is_due(_SECONDS):
            return
        parts = [f"{self._done} of {self._count} {self._what}", detail, f"{self._pace.left(work)} left"]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
