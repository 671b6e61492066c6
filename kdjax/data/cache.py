"""Caches: a run's samples with the teacher's answers, read from disk instead of running the teacher.

A cache is a folder written by `python -m kdjax.cache`:

    00000.arrayrecord, 00001.arrayrecord, ...   one record per sample: its fields' arrays, concatenated
    cache.json                                  the index, written last: a folder that has it is complete

Sample n of the run is record n % `shard_samples` of shard n // `shard_samples`. A run longer than its cache repeats it:
the first round keeps the samples' order, and every later round has its own order, which follows from the seed, as the
stream of `kdjax.data.pipeline` does. A damaged record is replaced by another one and reported once.

This module defines the format, its reader and the order of the samples.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16)
import numpy as np

from kdjax.batch import Batch
from kdjax.data import shards
from kdjax.data.samples import DRAWS, ENDLESS, block_of_process, epoch_order
from kdjax.data.sources import DataError
from kdjax.names import brief
from kdjax.streams import SAMPLES, Kind, generator

CACHE = shards.Kind("cache", "cache.json", "kdjax cache", 1, "python -m kdjax.cache")
PLAN = "cache.unfinished.json"  # index of an unfinished cache, without the shards
FEATURE = "feature "  # prefix of the fields that hold teacher features
_IMAGE = ("uint8", "float16")
# Allowed types and number of dimensions by field name; see `kdjax.teacher.cache`.
_FIELDS = {"gt": (_IMAGE, 3), "lq": (_IMAGE, 3), "labelled": (("bool",), 0), "output": (("float16",), 3)}
_FEATURES = (("bfloat16",), 3)
_DEPTH = 10  # maximum nesting of settings


@dataclass(frozen=True)
class Field:
    """An array stored in every record: "gt", "lq", "labelled", "output" or "feature NAME"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @functools.cached_property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Cache:
    """The index of a complete cache, and the reader of its records.

    Attributes:
      settings: what determined the samples and which teacher answered; see `kdjax.teacher.cache`.
    """

    folder: str
    samples: int
    shard_samples: int
    fields: tuple[Field, ...]
    settings: Mapping[str, Any]

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the stored teacher features."""
        return tuple(field.name.removeprefix(FEATURE) for field in self.fields if field.name.startswith(FEATURE))

    def place(self, number: int) -> tuple[str, int]:
        """Returns a sample's shard and its record number there."""
        shard, record = divmod(number, self.shard_samples)
        return os.path.join(self.folder, shards.file_name(shard)), record

    def read(self, number: int) -> Batch:
        """Returns a sample: gt, lq and labelled if stored, and teacher: {output, features: {name: array}}.

        Raises:
          PackError: its record is damaged.
        """
        data = shards.read_bytes(*self.place(number), sum(field.bytes for field in self.fields))
        arrays, start = {}, 0
        for field in self.fields:
            count = field.bytes // np.dtype(field.dtype).itemsize
            arrays[field.name] = np.frombuffer(data, field.dtype, count, start).reshape(field.shape)
            start += field.bytes
        return as_row(arrays)


def as_row(arrays: Mapping[str, Any]) -> Batch:
    """Converts arrays by field name to a batch's structure, with the teacher's arrays in their own group."""
    features = {name.removeprefix(FEATURE): array for name, array in arrays.items() if name.startswith(FEATURE)}
    row = {name: arrays[name] for name in ("gt", "lq", "labelled") if name in arrays}
    return cast(Batch, row | {"teacher": {"output": arrays["output"], "features": features}})


def open_cache(folder: str) -> Cache:
    """Opens the cache in a folder.

    Raises:
      DataError: there is none, or it is unfinished or damaged; the message says what to do.
    """
    try:
        if not os.path.isdir(folder):
            raise shards.PackError(f"the folder {brief(folder, 300)} does not exist; `{CACHE.program}` writes a cache")
        if not any(os.path.exists(os.path.join(folder, name)) for name in (CACHE.index, PLAN)):
            raise shards.PackError(f"{folder!r} is not a cache: it has no {CACHE.index}; `{CACHE.program}` writes one")
        index = CACHE.read_index(folder)
        try:
            cache, sizes = _parse(folder, index)
        except shards.MALFORMED as error:
            raise CACHE.damaged(folder, error) from None
        CACHE.check_files(folder, sizes)
    except shards.PackError as error:
        raise DataError(f"cached teacher: {error}") from None
    return cache


def _parse(folder: str, index: Mapping[str, Any]) -> tuple[Cache, list[int]]:
    """Parses an index; returns the cache and the size of each shard in bytes.

    Rejects claims that shards of this size cannot hold.

    Raises:
      One of `shards.MALFORMED`.
    """
    fields = tuple(_parse_field(*entry) for entry in index["fields"])
    if len(named := {field.name for field in fields}) < len(fields) or not {"gt", "output"} <= named:
        raise ValueError(f"its fields are {brief([field.name for field in fields])}")
    samples, in_shard, settings = index["samples"], index["shard_samples"], index["settings"]
    if not shards.is_count(samples, 1) or not shards.is_count(in_shard, 1):
        raise ValueError(f"{brief(samples)} samples in shards of {brief(in_shard)}")
    if not isinstance(settings, dict) or not _is_shallow(settings, _DEPTH):
        raise TypeError(f"its settings are {brief(settings)}")
    sizes = [shard["bytes"] for shard in index["shards"]]
    if len(sizes) != -(-samples // in_shard):
        raise ValueError(f"{len(sizes)} shards of {in_shard} samples for {samples}")
    record = sum(field.bytes for field in fields)
    for number, (shard, size) in enumerate(zip(index["shards"], sizes, strict=True)):
        count = min(in_shard, samples - number * in_shard)
        if shard["file"] != shards.file_name(number) or not shards.is_count(size, count * record):
            raise ValueError(f"shard {number} is {brief(shard['file'])} of {brief(size)} bytes, for {count} samples")
    return Cache(folder, samples, in_shard, fields, settings), sizes


def _parse_field(name: str, dtype: str, shape: list[int]) -> Field:
    dtypes, sides = _FEATURES if name.startswith(FEATURE) else _FIELDS[name]
    if dtype not in dtypes or len(shape) != sides or not all(shards.is_count(side, 1) for side in shape):
        raise ValueError(f"the field {brief(name)} is {brief(dtype)} of shape {brief(shape)}")
    return Field(name, dtype, tuple(shape))


def _is_shallow(value: object, depth: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in parts)


class CachedBatches:
    """Maps a step to this process's part of the batch: a source for Grain, like `Batches`."""

    def __init__(self, cache: Cache, *, batch_size: int, seed: int, process_index: int, process_count: int) -> None:
        self._cache, self._batch_size, self._seed = cache, batch_size, seed
        self._block = block_of_process(batch_size, process_index, process_count)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> Batch:
        return _stacked([self._row(step * self._batch_size + position) for position in self._block])

    def _row(self, number: int) -> Batch:
        turn, chosen = divmod(number, self._cache.samples)
        if turn:
            chosen = int(epoch_order(self._cache.samples, self._seed, Kind.CACHED.order, turn)[chosen])
        random = generator(self._seed, Kind.CACHED.sample, number)
        damaged, reason = -1, ""
        for _ in range(DRAWS):
            try:
                row = self._cache.read(chosen)
            except shards.PackError as error:
                damaged = chosen if damaged < 0 else damaged
                reason = str(error)
                chosen = int(random.random() * self._cache.samples)
            else:
                return row | {"index": np.int32(chosen % SAMPLES), "damaged": np.int64(damaged)}
        raise DataError(
            f"{DRAWS} records in a row of the cache {self._cache.folder!r} cannot be read; the last one: {reason};"
            f" {CACHE.make_again}"
        )

    def explain(self, number: int) -> tuple[str, str, str]:
        """Returns a damaged sample's short name, what is damaged, and why."""
        path, record = self._cache.place(number)
        name, where = f"{number} of the cache", f"record {record} of {path}"
        try:
            self._cache.read(number)
        except shards.PackError as error:
            return name, where, f"{where}: {error}"
        return name, where, f"{where}: could not be read at first, but could on a second try"


def _stacked(rows: list[Any]) -> Any:
    """Stacks nested dicts of arrays along a new first axis."""
    if isinstance(rows[0], dict):
        return {key: _stacked([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)
