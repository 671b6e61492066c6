"""How far long work is, and how long the rest of it takes."""

from __future__ import annotations

import sys
import time

_SECONDS = 10  # between two lines


class Progress:
    """Says on stderr, every ten seconds, how much is done, and how long the rest takes at this speed.

    Args:
      count: how many things there are to do.
      work: what they cost together, in any unit.
      what: their name, in the plural.
      silent: says nothing.
    """

    def __init__(self, count: int, work: float, what: str = "images", *, silent: bool = False) -> None:
        self._count, self._work, self._what, self._silent = count, work, what, silent
        self._done, self._worked = 0, 0.0
        self._started = self._shown = time.monotonic()

    def advance(self, work: float) -> None:
        """Counts one, which cost `work`."""
        self._done, self._worked = self._done + 1, self._worked + work
        self.show()

    def show(self, work: float = 0.0, detail: str = "") -> None:
        """Says it if it is time to, with `work` of the one at hand done, of which `detail` tells."""
        now, worked = time.monotonic(), self._worked + work
        if now - self._shown < _SECONDS or not worked or self._silent:
            return
        self._shown = now
        left = clock((now - self._started) * (self._work / worked - 1))
        parts = [f"{self._done} of {self._count} {self._what}", detail, f"{left} left"]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
