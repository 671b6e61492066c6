"""Devices and processes: one mesh, `("data",)`, that splits the batch. Everything else is replicated.

The axis type is Auto: under JAX's default Explicit type, per-sample crops, flips and blurs would raise.

A run may have several processes, one per host or one per device, all started with the same command. `connect` joins
them; after it, `jax.devices()` lists the devices of all. Whatever every process must know or decide alike goes through
`exchange`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.batch import Batch

log = logging.getLogger("kdjax")

# A process that is silent for this many seconds counts as dead, and JAX ends the others.
_HEARTBEAT = 40
# Steps until a vote is read: by then the loop has waited for that step anyway.
_LATE = 2
_MOST_CPU_DEVICES = 16  # each holds its own weights and activations


class ProcessError(ValueError):
    """The processes of a run cannot be joined; the message says what to do."""


class AgreedError(RuntimeError):
    """An error that all processes raise at the same point, so they may still wait for one another."""


def connect(address: str = "", count: int | None = None, index: int | None = None) -> bool:
    """Joins the processes of a run; does nothing for a single process. Call it before any device is used.

    Args:
      address: host:port of process 0; JAX_COORDINATOR_ADDRESS if empty.
      count: number of processes; JAX_NUM_PROCESSES if None. 1 means a single process, whatever the launcher.
      index: index of this process, from 0; JAX_PROCESS_ID if None.

    Without count and index, JAX asks the launcher: Slurm and Open MPI (with more than one task), Kubernetes (an indexed
    Job or a JobSet) and Cloud TPU.

    Returns:
      Whether there are other processes.

    Raises:
      ProcessError: something is missing or contradictory, or the other processes did not connect.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    index = _number("JAX_PROCESS_ID") if index is None else index
    launcher = launcher_of(os.environ)
    if count == 1 or (count is None and index is None and not launcher):
        if address and count is None:
            raise ProcessError(
                f"a coordinator address is given ({address}), but no number of processes: give"
                " --num_processes and --process_id too (or JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
            )
        return False
    options: dict[str, Any] = {}
    if count is not None or index is not None:
        if not address or count is None or index is None:
            raise ProcessError(
                f"a run of several processes needs a coordinator address ({address or 'missing'}), number of"
                f" processes ({'missing' if count is None else count}) and number of this process"
                f" ({'missing' if index is None else index}): --coordinator_address=HOST:PORT of process 0,"
                " --num_processes=N, --process_id=0 ... N-1"
            )
        if not 0 <= index < count:
            raise ProcessError(f"process_id={index} is not one of 0 ... {count - 1}, with num_processes={count}")
        if not address.rpartition(":")[2].isdigit() or ":" not in address:
            raise ProcessError(f"coordinator_address={address!r} needs a port: HOST:PORT, the same for all processes")
        options = dict(num_processes=count, process_id=index, cluster_detection_method="deactivate")
        log.info(f"process {index} of {count}: waiting for the others at {address}")
    else:
        log.info(f"started by {launcher}: waiting for the other processes")
    # Otherwise JAX's own handler would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address or None, heartbeat_timeout_seconds=_HEARTBEAT, shutdown_timeout_seconds=_HEARTBEAT, **options
        )
    except ValueError as error:
        if launcher == "Cloud TPU" and not options:
            return False  # libtpu is installed, but this is not a TPU machine
        raise ProcessError(
            f"this process was started by {launcher}, but JAX could not find the others ({error}). Give"
            " --coordinator_address=HOST:PORT, --num_processes and --process_id, or --num_processes=1 to train alone."
            + (" Open MPI 5 does not tell its address." if launcher == "Open MPI" else "")
            + (" JAX needs the package kubernetes: pip install 'jax[k8s]'." if launcher == "Kubernetes" else "")
        ) from error
    except RuntimeError as error:
        if "before any JAX" in str(error):
            raise ProcessError(
                "the processes cannot be joined, because this one has used JAX's devices already: the config file, or a"
                " module that it imports, computes with JAX while it is loaded. Move that into a function that is"
                " called later"
            ) from error
        raise ProcessError(
            f"the processes could not connect at {address or 'the address of the launcher'}: check that"
            " all of them were started, can reach that host and port, and that no proxy variables interfere"
            f" ({error})"
        ) from error
    per_process = Counter(device.process_index for device in jax.devices())
    if len(set(per_process.values())) > 1:
        raise ProcessError(f"every process needs the same number of devices; they have {dict(per_process)}")
    return len(per_process) > 1


def launcher_of(environ: Mapping[str, str]) -> str:
    """Returns the launcher that started this process as one of several, if JAX can query it; otherwise "".

    A Slurm step with one task, or mpirun with one, counts as a single process: JAX would hide all its devices but one.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "Slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    if "tpu" in environ.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu"):
        return "Cloud TPU"
    return ""


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise ProcessError(f"{variable}={text!r} is not a whole number")
    return int(text) if text else None


def is_first() -> bool:
    """Whether this is the process that writes what a run writes once."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """Gathers `value` from all processes, in process order. Every process must call it; it waits for the slowest.

    Args:
      value: anything JSON can represent; floats round-trip exactly.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.pad(text, (0, (1 << longest.bit_length()) - len(text)))  # few distinct sizes, because each one compiles
    return [json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(padded)]


def share(count: int) -> range:
    """Returns this process's part of `range(count)`; the parts of all processes make up the whole."""
    index, processes = jax.process_index(), jax.process_count()
    return range(index * count // processes, (index + 1) * count // processes)


class SharedFlag:
    """A flag that any process can raise at any time and that all processes see at the same step."""

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = split_batch(mesh)
        self._any = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._votes: deque[jax.Array] = deque()

    def update(self, here: bool) -> bool:
        """Publishes this process's flag, once per step; returns whether any process had raised it two steps ago.

        In a single process the flag takes effect at once.
        """
        if jax.process_count() == 1:
            return here
        vote = np.full(jax.local_device_count(), here, np.int32)
        self._votes.append(self._any(jax.make_array_from_process_local_data(self._sharding, vote)))
        return len(self._votes) > _LATE and bool(self._votes.popleft())


def lost_another(error: BaseException) -> bool:
    """Whether the error means that another process has died."""
    if jax.process_count() == 1:
        return False
    signs = ("gloo", "nccl", "coordination service", "coordinationservice", "barrier", "heartbeat")
    return any(sign in str(error).lower() for sign in signs)


def use_all_cores(batch_size: int = 0) -> None:
    """Makes each CPU core a device that computes its part of the batch, as accelerators do.

    This keeps the cores busier than XLA's threads inside each operation (`docs/performance.md`). It must run before
    anything asks JAX for its devices: programs call this or `connect` first, and config files are data that need no
    device. It does nothing on other platforms, or if the user has set the number of devices (JAX_NUM_CPU_DEVICES).

    Args:
      batch_size: the number of devices must divide it; 0 for no constraint.
    """
    if getattr(jax.config, "jax_num_cpu_devices", -1) > 0:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, _MOST_CPU_DEVICES)
    try:
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
    except RuntimeError:  # JAX has already created its devices
        if jax.default_backend() == "cpu":
            log.warning(
                "WARNING: JAX'S DEVICES WERE IN USE BEFORE THE PROGRAM STARTED, so the cores of this CPU work as one"
                " device, which is slower: the config file, or a module that it imports, computes with JAX while it is"
                " loaded. Move that into a function that is called later"
            )


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a one-dimensional mesh over `devices` (default: all), with the devices of each process adjacent."""
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the jitted function, run with the mesh set so that `per_sample` finds it."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return call


def per_sample(function: Callable[..., Any], *batches: Any) -> Any:
    """Returns `function(*batches)`; no sample may depend on another, so each device computes its own.

    XLA splits most operations this way by itself. For others, such as FFTs, gathers and per-sample conditions, it would
    compute the whole batch on every device and move the images between them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*batches)
    split = PartitionSpec("data")
    # Unchecked: an inner loop may start from a constant, replicated across devices, and carry on with samples.
    return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(*batches)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts the same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts this process's part of a batch on its devices. The device count must divide the first axes."""
    sharding = split_batch(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of host arrays, equal in every process, on every device."""
    here = jax.device_put(tree, replicated(mesh.local_mesh))
    if mesh.local_mesh.size == mesh.size:
        return here

    def joined(leaf: jax.Array) -> jax.Array:
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), parts)

    return jax.tree.map(joined, here)
