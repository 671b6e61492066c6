"""A data set's places on the disk: folders and packs as sources of named images.

Links inside a folder are followed wherever they lead. Files and folders whose names start with a dot are ignored. Names
are the file system's bytes, even if they are not UTF-8. A pack (`kdjax.data.shards`) has the names of the folder it was
made from.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from kdjax.data.images import IMAGE_SUFFIXES
from kdjax.data.shards import PackError, is_pack, name_fault, open_pack
from kdjax.files import printable
from kdjax.names import brief

NAME = 300  # characters of a name shown in a message
_LINE = 1000  # and of a line
_LISTED = 10  # lines of each kind
_VISITS = 1000  # of one folder through links; a few links to each other can spell any number of paths


class DataError(ValueError):
    """Data that cannot be used; the message says what was given, what was wanted and what to do."""


class Source(Protocol):
    """Named images: a folder of files, or a pack."""

    folder: str

    def names(self, recursive: bool) -> tuple[list[str], list[str]]:
        """Returns the names of all images and of all other files, unordered.

        Without `recursive`, only those not in a sub-folder.
        """

    def has(self, name: str) -> bool:
        """Whether there is such an image; never true for a name that leads outside the folder."""

    def path(self, name: str) -> str: ...


def open_source(folder: str, role: str) -> Source:
    try:
        return open_pack(folder) if is_pack(folder) else _Folder(folder)
    except PackError as error:
        raise DataError(f"{role}: {error}") from None


def list_images(source: Source, recursive: bool, role: str) -> tuple[list[str], list[str]]:
    """Returns the image names, in natural order and never empty, and the paths of all other files."""
    try:
        names, others = source.names(recursive)
    except OSError as error:
        raise DataError(f"{role}: the folder {error.filename!r} cannot be read: {error.strerror}") from error
    if not names:
        depth = "and its sub-folders" if recursive else "(sub-folders were not searched)"
        count = len(others)
        raise DataError(
            f"{role}: no image in {source.folder!r} {depth}; looked for {', '.join(IMAGE_SUFFIXES)} and saw "
            f"{count} other file{'' if count == 1 else 's'}"
        )
    return sorted(names, key=_natural), [source.path(name) for name in sorted(others, key=_natural)]


def existing(path: str | os.PathLike[str], role: str) -> str:
    """Returns the path of an existing file or folder as text, with ~ expanded."""
    path = os.fspath(path)
    if not path:
        raise DataError(f"{role}: no path given; give a folder or an image file")
    try:
        path = os.path.expanduser(path)
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        looked_for = brief(os.path.abspath(path), _LINE)
        raise DataError(f"{role}: {brief(path, NAME)} does not exist (looked for {looked_for})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or another character not allowed in paths
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{role}: {brief(path, NAME)} cannot be used: {reason}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{role}: {path!r} is neither a file nor a folder")
    return path


class _Folder:
    """The images below a folder; names are relative paths with forward slashes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def names(self, recursive: bool) -> tuple[list[str], list[str]]:
        images: list[str] = []
        others: list[str] = []
        visits: Counter[tuple[int, int]] = Counter()
        waiting: list[tuple[str, tuple]] = [("", ())]  # sub-folders, each with its parents, innermost first
        while waiting:
            inside, above = waiting.pop()
            state = os.stat(self.path(inside))
            here = state.st_dev, state.st_ino
            if any(here == other for other in _chain(above)):  # a link to one of its parents
                continue
            visits[here] += 1
            if visits[here] > _VISITS:
                raise OSError(0, f"links lead to it in more than {_VISITS:,} ways", self.path(inside))
            with os.scandir(self.path(inside)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        if recursive:
                            waiting.append((f"{inside}{entry.name}/", (here, above)))
                    else:
                        (images if entry.name.lower().endswith(IMAGE_SUFFIXES) else others).append(inside + entry.name)
        return images, others

    def has(self, name: str) -> bool:
        return name_fault(name) is None and os.path.isfile(self.path(name))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _chain(above: tuple) -> Iterator[tuple[int, int]]:
    while above:
        folder, above = above
        yield folder


def _natural(name: str) -> tuple[list[list[str | int]], str]:
    """Returns a sort key that compares digits as numbers, folder by folder; the text distinguishes 1 from 01."""
    # With one group, re.split alternates text, digits, text, so the same position always has the same type.
    parts = [re.split(r"([0-9]+)", part.lower()) for part in name.split("/")]
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], name


def shortened(items: Sequence[str]) -> list[str]:
    """Returns the first items, one per line, and the number of the others."""
    rest = len(items) - _LISTED
    return [f"  {one_line(item)}" for item in items[:_LISTED]] + ([f"  ... and {rest} more"] if rest > 0 else [])


def one_line(text: str) -> str:
    """Returns the text as one line of a message, whatever characters its file names contain."""
    text = printable(text[:_LINE] + ("..." if len(text) > _LINE else ""))
    return text.replace("\n", "\\n").replace("\t", "\\t")
