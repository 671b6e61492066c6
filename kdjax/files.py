"""Files that appear whole or not at all, folders that one program writes at a time, and names that are safe to print.

Everything kdjax writes, other than through Orbax, goes through `whole_file`.
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

LOCK = ".kdjax.lock"  # in every folder that one program writes at a time
_PREFIX = ".kdjax-"  # of temporary files
_LONGEST_SUFFIX = 16  # a suffix longer than that is part of a name, not a format


class FolderInUse(ValueError):
    """Another program is writing into a folder; the message says which."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder, with the same suffix, for the `with` block to write.

    When the block ends, the file is flushed to the disk and renamed to `path`; when the block raises, it is removed and
    `path` stays as it was. The temporary name starts with a dot, so nobody takes what a killed process leaves behind
    for data, and it is short, so every name the file system allows can be written.
    """
    path = Path(path)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    temporary = path.with_name(f"{_temporary_prefix(path)}{secrets.token_hex(4)}{suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # else a power cut can undo the renaming
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files of `whole_file` that killed processes left behind.

    Only for what this process alone writes: the temporary file of a live one would go as well.

    Args:
      path: a file, for its own temporary files; or a folder, for those of everything in it, at any depth.
    """
    path = Path(path)
    folder, pattern = (path, f"{_PREFIX}*") if path.is_dir() else (path.parent, f"{_temporary_prefix(path)}*")
    for leftover in folder.rglob(pattern) if folder == path else folder.glob(pattern):
        leftover.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all.

    File names that are not valid UTF-8 (lone surrogates in Python) are written with backslashes.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def finite(value: Any) -> Any:
    """The value with None for every inf and nan inside it, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file.

    Raises:
      ValueError: the file is not a JSON object; it was emptied or cut short by a power cut or a full disk, for example.
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
    """Holds `folder`, which must exist, for this process; the operating system lets go of it however the process ends.

    What a killed process left half-written in the folder is removed first.

    Args:
      name: of the lock file, which stays in the folder. Programs that share a folder lock parts of it by other names;
        then nothing is removed, as another program may be writing it.

    Raises:
      FolderInUse: another process holds it.
      OSError: the folder cannot be written.
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
        with contextlib.suppress(OSError):  # only for the other program's message
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        if name == LOCK:
            remove_leftovers(folder)
        yield
    finally:
        lock.release()


def printable(text: str) -> str:
    """The text with everything that could steer a terminal, or reorder what it shows, as visible escapes.

    Names from weight files and folders can hold any character. Tabs and newlines stay.

    Examples:
      >>> printable("a\\x1b[2Jb")
      'a\\\\x1b[2Jb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _is_harmless(character) else _escaped(character) for character in text)


def _is_harmless(character: str) -> bool:
    # Cc: controls; Cf: formats, such as the right-to-left override; Cs: bytes of a name that is not UTF-8.
    # The zero-width (non-)joiners belong to ordinary words of several scripts, and to emoji.
    return character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode represents it
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _temporary_prefix(path: Path) -> str:
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if not path.is_dir():  # Windows does not open folders, and needs no such thing
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; a file that cannot be synced is not written.
        if not path.is_dir():
            raise error
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"
