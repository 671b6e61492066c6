"""The common result of all file readers: a tensor with a known shape that is copied out of the file only on demand.

A checkpoint may hold two sets of weights and an optimizer state; only the wanted set becomes arrays.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from kdjax.models.reading import WeightsError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_DIMS = 32
MAX_NUMEL = 2**48
MAX_TENSORS = 20_000  # per set of weights; the largest supported published network has 1,300
MAX_KEY = 500  # characters of a tensor's name


class Storage:
    """`numel` consecutive scalars, still in the file's bytes.

    Args:
      dtype: the scalar type, native byte order.
      numel: number of scalars.
      read: returns exactly numel * itemsize bytes, without copying them; called at most once.
      byteorder: of the bytes, "little" or "big".
    """

    def __init__(self, dtype: np.dtype, numel: int, read: Callable[[], memoryview], byteorder: str) -> None:
        self.dtype, self.numel, self.byteorder = dtype, numel, byteorder
        self._read = read
        self._raw: memoryview | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def raw(self) -> memoryview:
        if self._raw is None:
            raw = self._read()
            if len(raw) != self.nbytes:
                raise WeightsError(f"a storage of {self.nbytes} bytes was declared, {len(raw)} bytes were found")
            self._raw = raw
        return self._raw

    def view(self, offset: int, numel: int) -> Storage:
        """Returns scalars offset..offset+numel of this storage."""
        if offset < 0 or numel < 0 or offset + numel > self.numel:
            raise WeightsError(f"a view of {numel} scalars at {offset} reaches beyond its storage of {self.numel}")
        start, stop = offset * self.dtype.itemsize, (offset + numel) * self.dtype.itemsize
        return Storage(self.dtype, numel, lambda: self.raw()[start:stop], self.byteorder)


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage, with every reachable index checked; offset and strides count scalars."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if max(len(self.shape), len(self.stride)) > MAX_DIMS:
            raise WeightsError(f"a tensor has {len(self.shape)} dimensions; {MAX_DIMS} is the limit")
        integers = (self.offset, *self.shape, *self.stride)
        if any(type(n) is not int or not 0 <= n < 2**63 for n in integers) or len(self.shape) != len(self.stride):
            raise WeightsError(
                "a tensor has a shape, offset or strides that torch never writes; wanted one stride per dimension and"
                " no negative number; the file is damaged"
            )
        if self.numel > MAX_NUMEL:
            raise WeightsError(f"a tensor of shape {self.shape} is absurdly large")
        reach = self.offset
        if self.numel:
            reach += 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        if reach > self.storage.numel:
            raise WeightsError(
                f"a tensor of shape {self.shape} and strides {self.stride} at {self.offset} reaches scalar {reach}"
                f" of a storage of {self.storage.numel}; the file is damaged"
            )

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """Wraps an array as if it came from a file."""
        array = np.asarray(array, order="C")
        content = array.reshape(-1).view(np.uint8).data
        storage = Storage(array.dtype, array.size, lambda: content, sys.byteorder)
        return cls(storage, 0, array.shape, row_major_strides(array.shape))

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f" or self.dtype == BFLOAT16

    def array(self) -> np.ndarray:
        """Returns a contiguous copy, independent of the file; the cost is that of the tensor, not of its storage."""
        if not self.numel:
            return np.zeros(self.shape, self.dtype)
        words = np.frombuffer(self.storage.raw(), f"u{self.dtype.itemsize}")[self.offset :]
        steps = tuple(step * self.dtype.itemsize for step in self.stride)
        # Safe: __post_init__ bounded the largest reachable index, and none is negative.
        copy = np.lib.stride_tricks.as_strided(words, self.shape, steps, writeable=False).copy()
        if self.storage.byteorder != sys.byteorder:
            copy.byteswap(inplace=True)
        return copy.view(self.dtype)


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides, in scalars, of a contiguous array; a size of 0 counts as 1, as in torch."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def check_cost(state: Mapping[Any, Any], file_bytes: int) -> None:
    """Rejects a set of tensors that needs far more memory or time than its file's size explains, before copying any.

    A tensor stored under several names, or one that repeats its scalars, counts every time.

    Raises:
      WeightsError: it expands to more than four times the file, has too many tensors, or absurdly long names.
    """
    if len(state) > MAX_TENSORS:
        raise WeightsError(f"it has {len(state):,} entries, more than {MAX_TENSORS:,}, so it is not a state dict")
    if any(len(key) > MAX_KEY for key in state if type(key) is str):
        raise WeightsError(f"the name of a tensor has more than {MAX_KEY} characters, so it is not a state dict")
    unfolded = 4 * sum(value.numel for value in state.values() if isinstance(value, Tensor))  # as float32
    if unfolded > 4 * file_bytes + (64 << 10):
        raise WeightsError(
            f"its tensors unfold to {unfolded:,} bytes, far more than the {file_bytes:,} of the file (views that repeat"
            " their storage); save copies of them: tensor.clone()"
        )
