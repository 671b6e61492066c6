"""Packs: the decoded pixels of many images in a few large files, so that reading an image is a copy.

A pack is a folder that `python -m kdjax.data.pack` wrote:

    00000.arrayrecord, 00001.arrayrecord, ...   one record an image: its uint8 pixels, height x width x channels
    pack.json                                   the index; written last, so a folder that has it is complete

Grey images are stored with one channel and all others with three, so that a pack gives the pixels that the files
would give, in colour and in grey. An image that could not be decoded stays in the index with its reason: the pack has
the names, and so the order, of the folder it was made from.

An image in a pack has a path like that of a file, `PACK/pack.json/NAME`, which no file can have. Everything that takes
the path of an image takes it too.

This module is the format, its reader, and how a shard is written; the caches of `kdjax.data.cached` have shards and an
index of the same kind. Nothing in it is open before the first record is read, and an open shard is never sent to
another process; threads share it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kdjax.files import whole_file, write_text

SUFFIX = ".arrayrecord"
JOURNAL = "pack.unfinished.jsonl"  # of a pack in the making: one line a shard

# Chunks of their own for every record, so that one can be read without its neighbours; compressing pixels would save
# little and cost the speed that packs are for.
_WRITING = "group_size:1,uncompressed"
_OPEN = 128  # shards that a process keeps open: the limit of files is as low as 256 on some systems
# No reading ahead: images are wanted in random order.
_READING = "readahead_buffer_size:0,max_parallelism:0"


class PackError(ValueError):
    """A pack or a cache that cannot be written or used, or a record in it that cannot be read."""


@dataclass(frozen=True)
class Kind:
    """What a folder of shards is, for its index and for messages."""

    name: str
    index: str  # the file's name
    format: str  # what the index says of itself
    version: int
    program: str  # that makes it

    @property
    def make_again(self) -> str:
        return f"remove the {self.name} and make it again with `{self.program}`"

    def read_index(self, folder: str) -> dict[str, Any]:
        """The content of the index, with a `shards` list and of a version that can be read.

        Raises:
          PackError: there is none, or it cannot be used.
        """
        path = os.path.join(folder, self.index)
        if not os.path.exists(path):
            raise PackError(
                f"the {self.name} {folder!r} is unfinished; start the same `{self.program}` again: it continues"
            )
        try:
            with open(path, encoding="utf-8") as file:
                index = json.load(file)
        except OSError as error:
            raise PackError(f"{path!r} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise PackError(f"{path!r} is damaged or cut short ({error}); {self.make_again}") from None
        if not isinstance(index, dict) or index.get("format") != self.format:
            raise PackError(
                f"{path!r} is not the index of a {self.name}; rename it if {folder!r} is a folder of something else"
            )
        if index.get("version") != self.version:
            raise PackError(
                f"the {self.name} {folder!r} has version {index.get('version')!r} and this kdjax reads version"
                f" {self.version}; install the kdjax that made it, or {self.make_again}"
            )
        if not isinstance(index.get("shards"), list):
            raise PackError(f"{path!r} is damaged (it has no list of shards); {self.make_again}")
        return index

    def write_index(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Writes the index, which makes the folder complete.

        Raises:
          PackError: it cannot be written.
        """
        path = folder / self.index
        with _reported(path):
            write_text(path, json.dumps({"format": self.format, "version": self.version, **content}) + "\n")

    def check_files(self, folder: str, sizes: Mapping[str, int]) -> None:
        """Looks whether the shards are there; `sizes` is file name -> bytes.

        Raises:
          PackError: some are missing or of another size.
        """
        faults = [fault for file, size in sizes.items() if (fault := _fault(os.path.join(folder, file), size))]
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


PACK = Kind("pack", "pack.json", "kdjax pack", 1, "python -m kdjax.data.pack")
INDEX = PACK.index


@dataclass(frozen=True)
class Record:
    """Where an image is, and its shape."""

    shard: str  # file name
    number: int  # of the record in its shard
    height: int
    width: int
    channels: int  # 1 or 3


class Pack:
    """The index of a pack.

    Raises:
      PackError: it is unfinished, damaged or of a newer version, or a shard is missing or has another size; the
        message says what to do.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._records: dict[str, Record] = {}
        self._damaged: dict[str, str] = {}
        shards = PACK.read_index(folder)["shards"]
        try:
            for shard in shards:
                for name, number, height, width, channels in shard["images"]:
                    self._records[name] = Record(shard["file"], number, height, width, channels)
                self._damaged |= shard["damaged"]
            sizes = {shard["file"]: shard["bytes"] for shard in shards}
        except (KeyError, TypeError, ValueError) as error:
            raise PackError(f"{_index(folder)!r} is damaged ({error!r}); {PACK.make_again}") from None
        PACK.check_files(folder, sizes)

    def names(self, recursive: bool) -> list[str]:
        """The names of all images, in no order; without `recursive`, of those that were in no sub-folder."""
        return [name for name in (*self._records, *self._damaged) if recursive or "/" not in name]

    def has(self, name: str) -> bool:
        return name in self._records or name in self._damaged

    def path(self, name: str) -> str:
        return os.path.join(_index(self.folder), name)

    def read(self, name: str) -> np.ndarray:
        """The pixels, uint8 (height, width, 1 or 3).

        Raises:
          PackError: there is no such image, it could not be decoded when the pack was made, or the shard is damaged.
        """
        if name in self._damaged:
            raise PackError(f"damaged when it was packed: {self._damaged[name]}")
        if (record := self._records.get(name)) is None:
            raise PackError(f"there is no such image in the pack {self.folder!r}")
        shape = record.height, record.width, record.channels
        data = read_bytes(os.path.join(self.folder, record.shard), record.number, int(np.prod(shape)))
        return np.frombuffer(data, np.uint8).reshape(shape).copy()


def is_pack(folder: str) -> bool:
    """Whether the folder is a pack, finished or not."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (INDEX, JOURNAL))


def open_pack(folder: str) -> Pack:
    """Reads the index of a pack, also when this process has read it before; see `Pack`."""
    folder = folder.rstrip(os.sep)
    _packs[folder] = pack = Pack(folder)
    return pack


def split_path(path: str) -> tuple[str, str] | None:
    """The pack and the name of an image in it, from `Pack.path`; None for the path of a file."""
    folder, inside, name = path.partition(f"{os.sep}{INDEX}{os.sep}")
    return (folder, name) if inside else None


def read_record(folder: str, name: str) -> np.ndarray:
    """`Pack.read` of a pack that is opened when this process has not done so yet."""
    return (_packs.get(folder) or open_pack(folder)).read(name)


def read_bytes(path: str, number: int, size: int) -> bytes:
    """A record of a shard, which should have `size` bytes.

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
    """The name of a shard."""
    return f"{number:05}{SUFFIX}"


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that adds a record to a new shard, for a `with` block; after it, the shard has its name.

    Raises:
      PackError: ArrayRecord is not installed, or the shard cannot be written: a full disk, for example.
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
    """How many records a shard has; 0 for what is no shard."""
    reader = array_record().ArrayRecordReader(str(path))
    if not reader.ok():
        return 0  # without closing it, which would raise
    count = reader.num_records()
    reader.close()
    return count


def array_record() -> ModuleType:
    """The library of the shards, imported when one is wanted: it does not exist for every platform.

    Raises:
      PackError: it is not installed.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise PackError(
            f"packs and caches need the package array-record, which cannot be imported ({error}): pip install"
            " array-record; it exists for Linux and for Macs with Apple silicon; elsewhere use folders of images and"
            " the teacher itself"
        ) from None
    return array_record_module


_packs: dict[str, Pack] = {}  # of this process, by folder


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turns what the library and the system raise while they write into a `PackError`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise PackError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _index(folder: str) -> str:
    return os.path.join(folder, INDEX)


def _fault(path: str, size: int) -> str | None:
    """What is wrong with a shard that should have `size` bytes."""
    try:
        found = os.path.getsize(path)
    except OSError as error:
        return f"{os.path.basename(path)}: {error.strerror}"
    return None if found == size else f"{os.path.basename(path)}: {found:,} bytes; it should have {size:,}"


@functools.lru_cache(maxsize=_OPEN)
def _reader(path: str) -> Any:
    reader = array_record().ArrayRecordReader(path, options=_READING)
    if not reader.ok():
        reader.read([0])  # raises what the constructor keeps to itself
    return reader
