"""Reads and writes `.safetensors`, with torch's names and layouts, as other tools expect.

The format is a JSON header followed by the tensors. It is read here rather than with the safetensors library, which
copies every tensor and accepts a header of any size. It is written with the library. The header's metadata contains
`kdjax`, a JSON object with architecture and hyper-parameters, which other tools ignore.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import safetensors.numpy

from kdjax.models.reading import WeightsError
from kdjax.names import brief
from kdjax.weights.tensors import BFLOAT16, Storage, Tensor, row_major_strides

# The library allows 100 MB; parsed JSON takes about twenty times its size. A network of 1,300 tensors has 130 KB.
MAX_HEADER_BYTES = 4 << 20

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def is_safetensors_file(data: bytes) -> bool:
    """Whether the bytes begin with the length of a JSON header that fits within them."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def read_safetensors_file(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """Returns the tensors by name, and the header's `kdjax` entry (None if another tool wrote the file).

    Raises:
      WeightsError: the header is damaged or absurdly long, or the tensors are not contiguous.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise WeightsError(f"its header has {length:,} bytes; {MAX_HEADER_BYTES:,} is the limit")
    content = memoryview(data)[8 + length :]
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_repetition)
        metadata = header.pop("__metadata__", {})
        tensors, places = {}, []
        for name, entry in header.items():
            tensors[name], *place = _tensor(name, entry, content)
            places.append(place)
        about = metadata.get("kdjax")
        about = None if about is None else json.loads(about, object_pairs_hook=_without_repetition)
    except WeightsError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise WeightsError(
            f"it is a damaged .safetensors file ({type(error).__name__}: {error!s:.100}); download or write it again"
        ) from None
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise WeightsError("it is a damaged .safetensors file: its tensors overlap, or leave bytes unused")
        end = stop
    if end != len(content):
        raise WeightsError(f"it is a damaged .safetensors file: {len(content) - end} bytes too many at the end")
    return tensors, about


def safetensors_file_bytes(state_dict: dict[str, np.ndarray], about: dict[str, Any]) -> bytes:
    """Returns a `.safetensors` file with float32 arrays in torch's layout, and `about` as JSON in the header."""
    return safetensors.numpy.save(state_dict, metadata={"kdjax": json.dumps(about)})


def _tensor(name: str, entry: dict[str, Any], content: memoryview) -> tuple[Tensor, int, int]:
    """Returns a tensor listed in the header, and where its bytes begin and end."""
    if entry["dtype"] not in DTYPES:
        raise WeightsError(
            f"{brief(name, 120)} is of type {brief(entry['dtype'])}, wanted one of {', '.join(DTYPES)}; re-save it as"
            " float32"
        )
    dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= len(content):
        raise ValueError("a tensor reaches beyond the end of the file")
    storage = Storage(dtype, (stop - start) // dtype.itemsize, lambda: content[start:stop], "little")
    if len(shape) > 32 or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("an invalid shape")
    tensor = Tensor(storage, 0, shape, row_major_strides(shape))
    if tensor.numel * dtype.itemsize != stop - start:
        raise ValueError("a tensor whose shape and bytes disagree")
    return tensor, start, stop


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return result
