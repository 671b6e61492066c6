"""Packs: the decoded pixels of many images in a few large files, so that reading an image is a copy.

A pack is a folder written by `python -m kdjax.data.pack`:

    00000.arrayrecord, 00001.arrayrecord, ...   one record per image: its uint8 pixels, height x width x channels
    pack.json                                   the index, written last: a folder that has it is complete

Grey images are stored with one channel and all others with three, so a pack yields the same pixels as its files, in
colour and in grey. An image that could not be decoded stays in the index with the reason. So the pack keeps the names,
and hence the order, of the original folder.

An image in a pack has a path like a file's, `PACK/pack.json/NAME`, which no file can have. It works wherever an image
path does.

This module defines the format, its reader, and the writing of shards. The caches of `kdjax.data.cache` use the same
kind of shards and index. Nothing is opened before the first record is read. Open shards are shared by threads but never
sent to another process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from kdjax.files import printable, whole_file, write_text
from kdjax.names import brief

SUFFIX = ".arrayrecord"
JOURNAL = "pack.unfinished.jsonl"  # of an unfinished pack: one line per shard

# Every record gets its own chunk, so that it can be read without its neighbours. Compressing pixels would save little
# and cost the speed that packs are for.
_WRITING = "group_size:1,uncompressed"
_LONGEST = 4096  # characters of a path; Python parses numbers of this many digits
_REASON = 500  # characters of the reason why an image is damaged
_OPEN = 128  # shards a process keeps open: some systems limit open files to 256
# No read-ahead: images are read in random order.
_READING = "readahead_buffer_size:0,max_parallelism:0"


class PackError(ValueError):
    """A pack or cache that cannot be written or used, or a record in it that cannot be read."""


@dataclass(frozen=True)
class Kind:
    """A kind of shard folder, as its index and messages describe it."""

    name: str
    index: str  # the file's name
    format: str  # the index's own "format" entry
    version: int
    program: str  # that writes it

    @property
    def make_again(self) -> str:
        return f"remove the {self.name} and make it again with `{self.program}`"

    def read_index(self, folder: str) -> dict[str, Any]:
        """Returns the index's content, with a `shards` list and a supported version.

        Raises:
          PackError: there is none, or it cannot be used.
        """
        path = os.path.join(folder, self.index)
        if not os.path.isfile(path):
            raise PackError(
                f"the {self.name} {folder!r} is unfinished; run the same `{self.program}` again to continue it"
            )
        try:
            with open(path, encoding="utf-8") as file:
                index = json.load(file)
        except OSError as error:
            raise PackError(f"{path!r} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise PackError(f"{path!r} is damaged or cut short ({error}); {self.make_again}") from None
        if not isinstance(index, dict) or index.get("format") != self.format:
            raise PackError(f"{path!r} is not the index of a {self.name}; rename it if {folder!r} is not one")
        if index.get("version") != self.version:
            raise PackError(
                f"the {self.name} {folder!r} has version {brief(index.get('version'))} and this kdjax reads version"
                f" {self.version}; install the kdjax that made it, or {self.make_again}"
            )
        if not isinstance(index.get("shards"), list):
            raise PackError(f"{path!r} is damaged (it has no list of shards); {self.make_again}")
        return index

    def write_index(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Writes the index, which completes the folder.

        Raises:
          PackError: it cannot be written.
        """
        path = folder / self.index
        with _reported(path):
            write_text(path, json.dumps({"format": self.format, "version": self.version, **content}) + "\n")

    def damaged(self, folder: str, error: Exception) -> PackError:
        """Returns the error to raise for an index with unexpected content."""
        path = os.path.join(folder, self.index)
        return PackError(f"{path!r} is damaged ({type(error).__name__}: {error}); {self.make_again}")

    def check_files(self, folder: str, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Checks that the shards exist; `sizes` are their bytes, in order.

        Returns:
          The device and inode of each.

        Raises:
          PackError: some are missing or have another size.
        """
        faults, files = [], []
        for number, size in enumerate(sizes):
            file = file_name(number)
            try:
                state = os.stat(os.path.join(folder, file))
            except OSError as error:
                faults.append(f"{file}: {error.strerror}")
                continue
            files.append((state.st_dev, state.st_ino))
            if not stat.S_ISREG(state.st_mode):
                faults.append(f"{file}: not a file")
            elif state.st_size != size:
                faults.append(f"{file}: {state.st_size:,} bytes; it should have {size:,}")
        if faults:
            rest = [f"  ... and {len(faults) - 10} more"] if len(faults) > 10 else []
            faults = [f"  {fault}" for fault in faults[:10]] + rest
            raise PackError(
                "\n".join(
                    [
                        f"the {self.name} {folder!r} is not complete:",
                        *faults,
                        f"copy these files again, or {self.make_again}",
                    ]
                )
            )
        return files


PACK = Kind("pack", "pack.json", "kdjax pack", 1, "python -m kdjax.data.pack")
INDEX = PACK.index


class Record(NamedTuple):
    """An image's location and shape."""

    shard: int
    number: int  # index of the record in its shard
    height: int
    width: int
    channels: int  # 1 or 3

    @property
    def bytes(self) -> int:
        return self.height * self.width * self.channels


class Pack:
    """The index of a pack.

    Raises:
      PackError: it is unfinished, damaged or of a newer version, or a shard is missing or has another size; the message
        says what to do.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._inside = os.path.join(folder, INDEX, "")
        self._records: dict[str, Record] = {}
        self._damaged: dict[str, str] = {}
        shards = PACK.read_index(folder)["shards"]
        try:
            count = 0
            for number, shard in enumerate(shards):
                records, damaged = parse_shard(shard, number)
                self._records |= records
                self._damaged |= damaged
                count += len(records) + len(damaged)
            if len(self._records.keys() | self._damaged.keys()) < count:
                raise ValueError("a name appears twice")
            sizes = [shard["bytes"] for shard in shards]
        except MALFORMED as error:
            raise PACK.damaged(folder, error) from None
        self._files = PACK.check_files(folder, sizes)

    def names(self, recursive: bool) -> tuple[list[str], list[str]]:
        """Returns all image names, unordered, and the names of other files, of which a pack has none.

        Without `recursive`, only those not in a sub-folder.
        """
        return [name for name in (*self._records, *self._damaged) if recursive or "/" not in name], []

    def has(self, name: str) -> bool:
        return name in self._records or name in self._damaged

    def path(self, name: str) -> str:
        return self._inside + name

    def identity(self, name: str) -> tuple[int, ...] | None:
        """Returns what identifies an image: its shard file and its record there; None if unknown."""
        if (record := self._records.get(name)) is None:
            return None
        device, inode = self._files[record.shard]
        return (device, inode, record.number) if inode else None

    def read(self, name: str) -> np.ndarray:
        """Returns the pixels, uint8 (height, width, 1 or 3).

        Raises:
          PackError: there is no such image, it could not be decoded when the pack was made, or the shard is damaged.
        """
        if name in self._damaged:
            raise PackError(f"damaged when it was packed: {printable(self._damaged[name][:_REASON])}")
        if (record := self._records.get(name)) is None:
            raise PackError(f"no such image in the pack {self.folder!r}")
        data = read_bytes(os.path.join(self.folder, file_name(record.shard)), record.number, record.bytes)
        return np.frombuffer(data, np.uint8).reshape(record.height, record.width, record.channels).copy()


# What `parse_shard`, and code that uses its results, raises on a malformed index.
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


def parse_shard(shard: Any, number: int) -> tuple[dict[str, Record], dict[str, str]]:
    """Parses the index entry of shard `number`: its images by name, and why others are damaged.

    Rejects anything that a shard of its size could not hold, and names that lead out of a folder.

    Raises:
      One of `MALFORMED`.
    """
    file, size, images, damaged = (shard[key] for key in ("file", "bytes", "images", "damaged"))
    if file != file_name(number):
        raise ValueError(f"shard {number} is called {brief(file)}, not {file_name(number)!r}")
    if not is_count(size) or not isinstance(images, list) or not isinstance(damaged, dict):
        raise TypeError(f"shard {number} has {brief(size)} bytes, {brief(images)} and {brief(damaged)}")
    records = {}
    for name, place, height, width, channels in images:
        record = records[name] = Record(number, place, height, width, channels)
        if not (all(type(value) is int for value in record) and 0 <= place < len(images)):
            raise ValueError(f"{brief(name)} is record {brief(place)} of {len(images)}")
        if height < 1 or width < 1 or channels not in (1, 3) or record.bytes > size:
            raise ValueError(f"{brief(name)} has the shape {brief(record[2:])} in a shard of {size:,} bytes")
    if len(records) < len(images):
        raise ValueError("a name appears twice")
    for name in (*records, *damaged):
        if fault := name_fault(name) if isinstance(name, str) else "is not text":
            raise ValueError(f"the name {brief(name)} {fault}")
    if not all(isinstance(reason, str) for reason in damaged.values()):
        raise TypeError(f"the reasons in {brief(damaged)} are not text")
    return records, damaged


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a JSON value is an integer of at least `least`."""
    return type(value) is int and value >= least


def name_fault(name: str) -> str | None:
    """Returns why a name from a list, template or index cannot be a file in a folder; None if it can."""
    if not name or "\0" in name or len(name) > _LONGEST:
        return "is empty" if not name else "has a NUL in it" if "\0" in name else "is longer than any path"
    parts = name.replace(os.sep, "/").split("/")
    if not parts[0] or ".." in parts or os.path.splitdrive(name)[0]:  # absolute, or with a drive letter
        return "leads outside the folder"
    try:
        name.encode(errors="surrogateescape")  # non-UTF-8 bytes become exactly these surrogates
    except UnicodeEncodeError:
        return "has characters that file names cannot have"
    return None


def is_pack(folder: str) -> bool:
    """Whether the folder is a pack, finished or not."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (INDEX, JOURNAL))


def open_pack(folder: str) -> Pack:
    """Reads a pack's index, once per process; see `Pack`."""
    folder = folder.rstrip(os.sep)
    _packs[folder] = pack = Pack(folder)
    return pack


def split_path(path: str) -> tuple[str, str] | None:
    """Splits a path from `Pack.path` into the pack and the image's name; None for a file's path."""
    mark = f"{os.sep}{INDEX}{os.sep}"
    end = path.find(mark)
    while end >= 0:
        folder = path[:end]
        if folder in _packs or not os.path.isdir(path[: end + len(mark)]):  # a folder may have that name, too
            return folder, path[end + len(mark) :]
        end = path.find(mark, end + 1)
    return None


def read_record(folder: str, name: str) -> np.ndarray:
    """Like `Pack.read`, but opens the pack if this process has not done so yet."""
    return _opened(folder).read(name)


def identity(path: str) -> tuple[int, ...] | None:
    """Returns an identity shared by all paths to one image, a file or an entry of a pack; None if unknown."""
    try:
        if (place := split_path(path)) is not None:
            return _opened(place[0]).identity(place[1])
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    # Some file systems have no inodes.
    return (state.st_dev, state.st_ino, state.st_size) if state.st_ino else None


def _opened(folder: str) -> Pack:
    return _packs.get(folder) or open_pack(folder)


def read_bytes(path: str, number: int, size: int) -> bytes:
    """Returns a record of a shard, which must have `size` bytes.

    Raises:
      PackError: the shard is damaged, or the record has another size.
    """
    name = os.path.basename(path)
    try:
        (data,) = _reader(path).read([number])
    except (RuntimeError, OSError) as error:
        raise PackError(f"{name} is damaged or cannot be read: {error}") from None
    if len(data) != size:
        raise PackError(f"record {number} of {name} has {len(data)} bytes and should have {size}")
    return data


def file_name(number: int) -> str:
    """Returns a shard's file name."""
    return f"{number:05}{SUFFIX}"


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that appends a record to a new shard, which gets its final name after the `with` block.

    Raises:
      PackError: ArrayRecord is not installed, or the shard cannot be written, for example because the disk is full.
    """
    module = array_record()
    count = 0

    def write(record: bytes) -> None:
        nonlocal count
        with _reported(path):
            writer.write(record)
        count += 1

    with whole_file(path) as temporary:
        with _reported(path):
            writer = module.ArrayRecordWriter(str(temporary), _WRITING)
        yield write
        with _reported(path):
            writer.close()
            if (arrived := count_records(temporary)) != count:
                raise OSError(f"{arrived} of {count} records arrived")


def count_records(path: Path) -> int:
    """Returns the number of records in a shard; 0 if it is not a shard."""
    reader = array_record().ArrayRecordReader(str(path))
    if not reader.ok():
        return 0  # without closing it, which would raise
    count = reader.num_records()
    reader.close()
    return count


def array_record() -> ModuleType:
    """Imports the ArrayRecord library on demand, because it does not exist for every platform.

    Raises:
      PackError: it is not installed.
    """
    try:
        from array_record.python import array_record_module  # ty: ignore[missing-module-member] (an extension)
    except ImportError as error:
        raise PackError(
            f"packs and caches need the package array-record, which cannot be imported ({error}): pip install"
            " array-record. It exists for Linux and Macs with Apple silicon; elsewhere use folders of images and no"
            " cache"
        ) from None
    return array_record_module


_packs: dict[str, Pack] = {}  # opened by this process, by folder


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Converts write errors of the library and the system into a `PackError`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise PackError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None


@functools.lru_cache(maxsize=_OPEN)
def _reader(path: str) -> Any:
    reader = array_record().ArrayRecordReader(path, options=_READING)
    if not reader.ok():
        reader.read([0])  # raises what the constructor swallows
    return reader
