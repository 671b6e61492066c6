"""Reads and writes `.safetensors` through the safetensors library: torch's names and layouts, as other tools expect.

The header's metadata holds `kdjax`, a JSON object with architecture and hyper-parameters; other tools ignore it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from kdjax.weights.tensors import BFLOAT16, Storage, Tensor, WeightsError, row_major_strides

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
    """Whether the bytes begin with the length of a JSON header that lies within them."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def read_safetensors_file(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """The tensors by name, and what `kdjax` wrote into the header (None when another tool wrote the file)."""
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"it is a damaged .safetensors file ({error}); get or write it again") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{name[:120]!r} is of type {entry['dtype']}, wanted one of {', '.join(DTYPES)}; re-save it as float32"
            )
        tensors[name] = _tensor(DTYPES[entry["dtype"]], entry["data"], tuple(entry["shape"]))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header.get("__metadata__", {}).get("kdjax")
    return tensors, None if about is None else json.loads(about)


def safetensors_file_bytes(state_dict: dict[str, np.ndarray], about: dict[str, Any]) -> bytes:
    """A `.safetensors` with float32 arrays in torch's layout, and `about` as JSON in the header."""
    return safetensors.numpy.save(state_dict, metadata={"kdjax": json.dumps(about)})


def _tensor(dtype: np.dtype, content: bytes, shape: tuple[int, ...]) -> Tensor:
    storage = Storage(dtype, len(content) // dtype.itemsize, lambda: content, "little")
    return Tensor(storage, 0, shape, row_major_strides(shape))
