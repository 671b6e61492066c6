"""Lookup by name with helpful errors (the nearest valid name and the full list), and names for output files."""

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
    """Returns `table[name]`.

    Raises:
      ValueError: unknown name. `what` tells the message what kind of thing was looked up.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {what} {brief(name)}{nearest(name, table)} (known: {', '.join(table)})")


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the closest known name, or '' if none is close."""
    near = get_close_matches(name[:100] if isinstance(name, str) else brief(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def brief(value: object, length: int = 60) -> str:
    """Returns `repr(value)` cut to `length` characters, in bounded time and memory.

    A plain `repr` of a few nested lists that share entries can take gigabytes.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, length, length
    try:
        text = short.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"<a {type(value).__name__}>"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def png_name(name: str) -> str:
    """Returns the PNG file name for a picture made from the image `name`, which may include folders.

    a.jpg becomes a.jpg.png, because a.png may exist too. Names too long for the file system are cut and end in a hash
    that keeps them unique.
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
    """Parses NAME=PATH or PATH texts into {name: path}. The default name is the file's stem, or the folder's name.

    If that name repeats ("student" often does), the parent folder is prepended: "run1_student".

    Args:
      option: the option the texts were given to, for error messages.
      reserved: names that may not be used.

    Raises:
      ValueError: a duplicate or reserved name.
    """
    # In a path that exists, or one such as runs/lr=1/student.pth, the text before "=" is not a name.
    matches = [None if Path(text).exists() else re.fullmatch(r"(\w[\w.+-]*)=(.+)", text) for text in texts]
    given = [match.groups() if match else ("", text) for match, text in zip(matches, texts, strict=True)]
    places = [Path(os.path.abspath(path)) for _, path in given]
    defaults = [place.name if folders else place.stem for place in places]
    paths: dict[str, str] = {}
    for (name, path), place, default in zip(given, places, defaults, strict=True):
        name = name or (default if defaults.count(default) == 1 else f"{place.parent.name}_{default}")
        if name in paths or name in reserved:
            taken = f"is also the name of {paths[name]}" if name in paths else "already means something else"
            raise ValueError(f"{path}: {name!r} {taken}; give it another name: {option} NAME={path}")
        paths[name] = path
    return paths
