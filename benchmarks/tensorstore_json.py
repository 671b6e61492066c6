"""Measures what TensorStore leaks from dictionaries it makes from JSON; without kdjax, Orbax or JAX:

    python benchmarks/tensorstore_json.py

Every line is one call, repeated 10,000 times with its result discarded, and what stays allocated per call, which should
be nothing. With TensorStore 0.1.86 every key and value of a dictionary stays: the conversion hands its reference to
`PyDict_SetItem`, which takes its own instead of stealing it. `kdjax.training.checkpoint` works around this for the
calls Orbax makes at each checkpoint.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import tensorstore

CALLS = 10_000


def left_over(call: Callable[[], object]) -> tuple[float, float]:
    """Returns the blocks and bytes of Python memory that stay allocated per call."""
    call()
    gc.collect()
    tracemalloc.start()
    blocks, size = sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]
    for _ in range(CALLS):
        call()
    gc.collect()
    left = (sys.getallocatedblocks() - blocks) / CALLS, (tracemalloc.get_traced_memory()[0] - size) / CALLS
    tracemalloc.stop()
    return left


def main() -> None:
    spec = tensorstore.KvStore.Spec({"driver": "file", "path": "/tmp/a/path/of/some/length/"})
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": "memory://"}, shape=[4], dtype="float32", create=True
    ).result()
    array[...] = np.ones(4, np.float32)
    calls: dict[str, Callable[[], object]] = {
        "repr(KvStore.Spec)": lambda: repr(spec),
        "KvStore.Spec.to_json()": lambda: spec.to_json(),
        "schema.to_json()": lambda: array.schema.to_json(),
        "experimental_collect_matching_metrics()": lambda: tensorstore.experimental_collect_matching_metrics(
            "/tensorstore/"
        ),
    }
    for name, call in calls.items():
        blocks, size = left_over(call)
        print(f"{name:42} {blocks:7.2f} blocks {size:9.1f} bytes a call")


if __name__ == "__main__":
    main()
