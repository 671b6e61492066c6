"""Choosing by name: an unknown name fails with the nearest valid one and the list of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def pick(table: Mapping[str, T], name: object, what: str) -> T:
    """`table[name]`.

    Raises:
      ValueError: there is no such name; `what` says in the message what was looked for.
    """
    if name in table:
        return table[name]  # type: ignore[index]
    raise ValueError(f"unknown {what} {name!r}{nearest(name, table)} (known: {', '.join(table)})")


def nearest(name: object, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name most like `name`, or '' when none is."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
