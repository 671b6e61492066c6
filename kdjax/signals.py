"""Graceful shutdown on SIGTERM (schedulers, `kill`) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class Stopped(Exception):
    """Raised when a program shuts down gracefully after a signal.

    Args:
      name: the signal, such as "SIGTERM".
      where: how far the program got, such as "at step 6 of 100".
    """

    def __init__(self, name: str, where: str = "") -> None:
        super().__init__(f"stopped by {name}{' ' * bool(where)}{where}; run the same command to continue")
        self.exit_code = 128 + signal.Signals[name]


class StopSignals:
    """While active, the first SIGTERM or SIGINT only sets `requested`; a second one kills the program."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
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
