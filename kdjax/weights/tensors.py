"""What every file reader hands on: a tensor that knows its shape and is copied out of the file only when asked for.

A checkpoint may hold two sets of weights and an optimizer state; only the set that is wanted becomes arrays.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_DIMS = 32
MAX_NUMEL = 2**48


class WeightsError(ValueError):
    """A weight file that cannot be read or written; the message says what was found and what to do."""


class Storage:
    """`numel` scalars in a row, still in the bytes of the file.

    Args:
      dtype: the scalar type, native byte order.
      numel: how many scalars.
      read: returns exactly numel * itemsize bytes; called at most once.
      byteorder: of the bytes, "little" or "big".
    """

    def __init__(self, dtype: np.dtype, numel: int, read: Callable[[], bytes | memoryview], byteorder: str) -> None:
        self.dtype, self.numel, self.byteorder = dtype, numel, byteorder
        self._read = read
        self._raw: bytes | memoryview | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def raw(self) -> bytes | memoryview:
        if self._raw is None:
            raw = self._read()
            if len(raw) != self.nbytes:
                raise WeightsError(f"a storage of {self.nbytes} bytes was declared, {len(raw)} bytes were found")
            self._raw = raw
        return self._raw

    def view(self, offset: int, numel: int) -> Storage:
        """Scalars offset..offset+numel of this storage."""
        if offset < 0 or numel < 0 or offset + numel > self.numel:
            raise WeightsError(f"a view of {numel} scalars at {offset} leaves its storage of {self.numel}")
        start, stop = offset * self.dtype.itemsize, (offset + numel) * self.dtype.itemsize
        return Storage(self.dtype, numel, lambda: self.raw()[start:stop], self.byteorder)

    def array(self) -> np.ndarray:
        words = np.frombuffer(self.raw(), f"u{self.dtype.itemsize}")
        if self.byteorder != sys.byteorder:
            words = words.byteswap()
        return words.view(self.dtype)


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count scalars. Every index it can reach was checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if max(len(self.shape), len(self.stride)) > MAX_DIMS:
            raise WeightsError(f"a tensor has {len(self.shape)} dimensions, at most {MAX_DIMS} are read")
        integers = (self.offset, *self.shape, *self.stride)
        if any(type(n) is not int or not 0 <= n < 2**63 for n in integers) or len(self.shape) != len(self.stride):
            raise WeightsError(
                "a tensor has a shape, offset or strides that torch never writes; wanted one stride per dimension and"
                " no negative number; the file is damaged"
            )
        if self.numel > MAX_NUMEL:
            raise WeightsError(f"a tensor of shape {self.shape!r:.80} is absurdly large")
        reach = self.offset
        if self.numel:
            reach += 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if reach > self.storage.numel:
            raise WeightsError(
                f"a tensor of shape {self.shape} and strides {self.stride} at {self.offset} reaches scalar {reach}"
                f" of a storage of {self.storage.numel}; the file is damaged"
            )

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """A contiguous copy that no longer depends on the file."""
        if not self.numel:
            return np.zeros(self.shape, self.dtype)
        steps = tuple(step * self.dtype.itemsize for step in self.stride)
        flat = self.storage.array()[self.offset :]
        # Safe: __post_init__ bounded the largest reachable index, and none is negative.
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False).copy()


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in scalars, of a contiguous array; a size of 0 counts as 1, as in torch."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
