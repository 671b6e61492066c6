"""Choosing by name, and naming files: an unknown name fails with the nearest valid one and the list of all."""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def pick(table: Mapping[str, T], name: object, what: str) -> T:
    """`table[name]`.

    Raises:
      ValueError: there is no such name; `what` says in the message what was looked for.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {what} {brief(name)}{nearest(name, table)} (known: {', '.join(table)})")


def nearest(name: object, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name most like `name`, or '' when none is."""
    near = get_close_matches(name[:100] if isinstance(name, str) else brief(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def brief(value: object, length: int = 60) -> str:
    """`repr(value)`, shortened to `length` characters, at a cost that does not grow with the value.

    Python's own repr of a few nested lists that share their entries can take gigabytes.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, length, length
    try:
        text = short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"<a {type(value).__name__}>"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def png_name(name: str) -> str:
    """The name, in a folder of pictures, of one made from the image `name`, which may have folders before it.

    a.jpg becomes a.jpg.png, since there may be an a.png; what is then too long for a file system is cut, and told from
    others by a hash.
    """
    folder, slash, file = name.rpartition("/")
    if not file.lower().endswith(".png"):
        file += ".png"
    if len(os.fsencode(file)) > 255:
        file = f"{file[:50]}-{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}.png"
    return folder + slash + file


def named_paths(
    texts: Sequence[str], option: str, *, folders: bool = False, reserved: Collection[str] = ()
) -> dict[str, str]:
    """Name -> path, of NAME=PATH or PATH, which is named as the file without its suffix, or as the folder.

    Where that repeats, as "student" does, the folder it is in goes before it: "run1_student".

    Args:
      option: what the texts were given to, for the message.
      reserved: what nothing may be called.

    Raises:
      ValueError: two of one name, or a reserved one.
    """
    # Of a path such as runs/lr=1/student.pth, or of one that exists, what is before "=" is no name.
    matches = [None if Path(text).exists() else re.fullmatch(r"(\w[\w.+-]*)=(.+)", text) for text in texts]
    given = [match.groups() if match else ("", text) for match, text in zip(matches, texts, strict=True)]
    places = [Path(os.path.abspath(path)) for _, path in given]
    defaults = [place.name if folders else place.stem for place in places]
    paths: dict[str, str] = {}
    for (name, path), place, default in zip(given, places, defaults, strict=True):
        name = name or (default if defaults.count(default) == 1 else f"{place.parent.name}_{default}")
        if name in paths or name in reserved:
            taken = f"is also the name of {paths[name]}" if name in paths else "stands for something else"
            raise ValueError(f"{path}: {name!r} {taken}; give it another name: {option} NAME={path}")
        paths[name] = path
    return paths
