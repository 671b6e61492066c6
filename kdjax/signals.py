"""Ending a program in order when it is asked to: SIGTERM (schedulers, `kill`) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class Stopped(Exception):
    """A program ended in order because a signal asked it to.

    Args:
      name: of the signal, such as "SIGTERM".
      where: what had been done by then, such as "at step 6 of 100".
    """

    def __init__(self, name: str, where: str = "") -> None:
        super().__init__(f"stopped by {name}{' ' * bool(where)}{where}; the same command continues")
        self.exit_code = 128 + signal.Signals[name]


class StopSignals:
    """While active, the first SIGTERM or SIGINT only sets `requested`; a second one ends the program at once."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self.name)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
