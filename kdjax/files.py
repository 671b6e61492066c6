"""Atomic file writes, folders locked to one writer, and names that are safe to print.

Everything kdjax writes goes through `whole_file`, except what Orbax writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import socket
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

LOCK = ".kdjax.lock"  # in every folder that allows one writer at a time
_PREFIX = ".kdjax-"  # for temporary files
_LONGEST_SUFFIX = 16  # anything longer is part of the name, not a format


class FolderInUse(ValueError):
    """Another program is writing to the folder; the message says which."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder, with the same suffix, for the `with` block to write.

    On success the file is flushed to disk and renamed to `path`. If the block raises, the temporary file is removed and
    `path` is left untouched. The temporary name starts with a dot, so leftovers of a killed process are not mistaken
    for data, and it is short, so any name the file system allows can be written.
    """
    path = Path(path)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    temporary = path.with_name(f"{_temporary_prefix(path)}{secrets.token_hex(4)}{suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # otherwise a power cut can undo the rename
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files of `whole_file` left behind by killed processes.

    Use it only where this process is the sole writer: it also removes the temporary files of live processes.

    Args:
      path: a file, for its own temporary files; or a folder, for all of them at any depth.
    """
    path = Path(path)
    folder, pattern = (path, f"{_PREFIX}*") if path.is_dir() else (path.parent, f"{_temporary_prefix(path)}*")
    for leftover in folder.rglob(pattern) if folder == path else folder.glob(pattern):
        leftover.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file atomically.

    Lone surrogates (how Python represents file names that are not valid UTF-8) are written as backslash escapes.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def finite(value: Any) -> Any:
    """Returns the value with every nested inf and nan replaced by None, since JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict if the file does not exist.

    Raises:
      ValueError: the file is not a JSON object, for example because a power cut or a full disk truncated it.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} is damaged: {size} bytes that are not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a JSON {type(value).__name__}, not an object")
    return value


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], name: str = LOCK) -> Iterator[None]:
    """Locks an existing `folder` for this process. The operating system releases the lock when the process ends.

    Half-written files of killed processes are removed first.

    Args:
      name: the lock file, which stays in the folder. Programs that share a folder lock parts of it under other names;
        nothing is removed then, because another program may be writing it.

    Raises:
      FolderInUse: another process holds the lock.
      OSError: the folder is not writable.
    """
    path = Path(folder) / name
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderInUse(
            f"{folder} is being written by {_holder(path)}; wait for it, stop it, or choose another folder"
        ) from None
    try:
        with contextlib.suppress(OSError):  # only used in the other program's message
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        if name == LOCK:
            remove_leftovers(folder)
        yield
    finally:
        lock.release()


def printable(text: str) -> str:
    """Returns the text with everything that could control a terminal or reorder its output as visible escapes.

    Names in weight files and folders can contain any character. Tabs and newlines are kept.

    Examples:
      >>> printable("a\\x1b[2Jb")
      'a\\\\x1b[2Jb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _is_harmless(character) else _escaped(character) for character in text)


def _is_harmless(character: str) -> bool:
    # Cc: control characters. Cf: format characters, such as the right-to-left override. Cs: bytes of a name that is not
    # UTF-8. The zero-width (non-)joiners are kept: ordinary words of several scripts, and emoji, need them.
    return character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a non-UTF-8 byte, as os.fsdecode represents it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _temporary_prefix(path: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if not path.is_dir():  # Windows cannot open folders and does not need this
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder. A file that cannot be synced has not been written.
        if not path.is_dir():
            raise error
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"
