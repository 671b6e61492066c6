"""Packs: the decoded pixels of many images in a few large files, so that reading an image is a copy.

A pack is a folder that `python -m kdjax.data.pack` wrote:

    00000.arrayrecord, 00001.arrayrecord, ...   one record an image: its uint8 pixels, height x width x channels
    pack.json                                   the index; written last, so a folder that has it is complete

Grey images are stored with one channel and all others with three, so that a pack gives the pixels that the files
would give, in colour and in grey. An image that could not be decoded stays in the index with its reason: the pack has
the names, and so the order, of the folder it was made from.

An image in a pack has a path like that of a file, `PACK/pack.json/NAME`, which no file can have. Everything that takes
the path of an image takes it too.

This module is the format and its reader. Nothing in it is open before the first image is read, and an open shard is
never sent to another process; threads share it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

INDEX = "pack.json"
JOURNAL = "pack.unfinished.jsonl"  # of a pack in the making: one line a shard
FORMAT = "kdjax pack"
VERSION = 1

_OPEN = 128  # shards that a process keeps open: the limit of files is as low as 256 on some systems
# No reading ahead: images are wanted in random order.
_READING = "readahead_buffer_size:0,max_parallelism:0"


class PackError(ValueError):
    """A pack that cannot be used, or an image in it that cannot be read."""


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
        shards = read_index(folder)["shards"]
        try:
            for shard in shards:
                for name, number, height, width, channels in shard["images"]:
                    self._records[name] = Record(shard["file"], number, height, width, channels)
                self._damaged |= shard["damaged"]
            sizes = {shard["file"]: shard["bytes"] for shard in shards}
        except (KeyError, TypeError, ValueError) as error:
            raise PackError(f"{_index(folder)!r} is damaged ({error!r}); {_PACK_AGAIN}") from None
        faults = [fault for file, size in sizes.items() if (fault := _fault(os.path.join(folder, file), size))]
        if faults:
            rest = [f"  ... and {len(faults) - 10} more"] if len(faults) > 10 else []
            faults = [f"  {fault}" for fault in faults[:10]] + rest
            raise PackError(
                "\n".join(
                    [f"the pack {folder!r} is not complete:", *faults, f"copy these files again, or {_PACK_AGAIN}"]
                )
            )

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
        try:
            (data,) = _reader(os.path.join(self.folder, record.shard)).read([record.number])
        except (RuntimeError, OSError) as error:
            raise PackError(f"{record.shard} is damaged or cannot be read: {error}") from None
        shape = record.height, record.width, record.channels
        if len(data) != np.prod(shape):
            raise PackError(f"record {record.number} of {record.shard} has {len(data)} bytes and should be {shape}")
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


def read_index(folder: str) -> dict[str, Any]:
    """The content of the index, with a `shards` list and of a version that can be read.

    Raises:
      PackError: there is none, or it cannot be used.
    """
    path = _index(folder)
    if not os.path.exists(path):
        raise PackError(
            f"the pack {folder!r} is unfinished; start the same `python -m kdjax.data.pack` again: it continues"
        )
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
    except OSError as error:
        raise PackError(f"{path!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PackError(f"{path!r} is damaged or cut short ({error}); {_PACK_AGAIN}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise PackError(f"{path!r} is not the index of a pack; rename it if {folder!r} is a folder of images")
    if index.get("version") != VERSION:
        raise PackError(
            f"the pack {folder!r} has version {index.get('version')!r} and this kdjax reads version {VERSION};"
            " install the kdjax that made it, or pack the images again"
        )
    if not isinstance(index.get("shards"), list):
        raise PackError(f"{path!r} is damaged (it has no list of shards); {_PACK_AGAIN}")
    return index


def array_record() -> ModuleType:
    """The library of the shards, imported when one is wanted: it does not exist for every platform.

    Raises:
      PackError: it is not installed.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise PackError(
            f"packs need the package array-record, which cannot be imported ({error}): pip install array-record; it"
            " exists for Linux and for Macs with Apple silicon; elsewhere use folders of images"
        ) from None
    return array_record_module


_packs: dict[str, Pack] = {}  # of this process, by folder
_PACK_AGAIN = "remove the pack and make it again with `python -m kdjax.data.pack`"


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
