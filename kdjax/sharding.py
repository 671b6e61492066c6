"""One mesh, `("data",)`: the batch is split over it, everything else is replicated.

The axis type is Auto: under JAX's default Explicit type, per-sample crops, flips and blurs would raise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_MOST_CPU_DEVICES = 16  # each holds weights and activations of its own


def use_all_cores(batch_size: int = 0) -> None:
    """Makes every core of a CPU a device, of which each computes its part of the batch, as accelerators do.

    XLA keeps the cores busier so than with threads inside of each operation (`docs/performance.md`). To be called
    before anything else asks JAX for its devices; on other platforms it changes nothing, and a number of devices that
    the user has set (JAX_NUM_CPU_DEVICES) stays.

    Args:
      batch_size: what the number of devices must divide; 0 for nothing.
    """
    if jax.config.jax_num_cpu_devices > 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, _MOST_CPU_DEVICES)
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` (all of them by default)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch onto its devices; the first axes must divide by the device count."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of host arrays, equal on every process, onto every device."""
    return jax.device_put(tree, replicated(mesh))
