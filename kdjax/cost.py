"""What running a program costs: compile time, memory, time per pass, and the machine it was measured on.

A pass is one call of the compiled model that returns only its image, so XLA drops unused features. Weights and input
are on the device before the clock starts, and it stops when the result is ready there. Machines are noisy: models to be
compared run in turns, and times are quartiles.

`measure` does all this for several models at one size. Multiply-accumulates come from `kdjax.macs`. `Planned` wraps a
training step and compares its memory with the machine's before it runs. The memory a config asks for is checked even
earlier, before networks and batches are created.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models
from kdjax.config import Config, ConfigError
from kdjax.memory import host_memory
from kdjax.names import brief

log = logging.getLogger("kdjax")

# Upper bounds on hyper-parameters: blocks are created one by one, and each level doubles the channels of the one
# before.
_MOST_CHANNELS, _MOST_BLOCKS, _MOST_LEVELS = 1024, 256, 16
_CHANNELS, _LEVELS = (
    ("num_in_ch", "num_out_ch", "img_channel", "num_feat", "num_grow_ch", "width", "feature_channels", "ranks"),
    ("num_level",),
)
_COPIES = 5  # of a student's parameters in training: parameters, EMA, gradient, Adam's two moments
_WORKER_BYTES = 100 << 20  # of an idle decoding process: Python, NumPy, Grain

WARM_UP = 3  # runs that do not count: they warm up caches, thread pools and GPU clocks


class OutOfMemory(Exception):
    """A program does not fit into device memory; the message says how much it needs and how much there is."""


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Median and lower and upper quartile of a set of measurements."""

    low: float
    median: float
    high: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a compiled program uses per device in one pass, as planned by XLA.

    Attributes:
      arguments: weights and input.
      outputs: the image; for a training step, the next state.
      temporaries: peak of all intermediates. Scratch memory that libraries allocate at run time is unknown to XLA: on a
        CPU, that of convolutions is not included.
      peak: the sum of the three, minus outputs that alias arguments.
    """

    arguments: int
    outputs: int
    temporaries: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A model compiled for one input shape.

    Attributes:
      run: runs one pass; returns the float32 image when it is ready. Raises `OutOfMemory`.
      seconds: time spent tracing and compiling.
      memory: None if the backend does not report it.
    """

    run: Callable[[], jax.Array]
    seconds: float
    memory: Memory | None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Timed passes of a model: the `seconds` of each, and figures derived from them.

    Attributes:
      milliseconds: per pass, which is one batch.
      images_per_second, megapixels_per_second: from the median; megapixels are those of the input.
      speed_up: time of the first model over this one's, turn by turn; None if the first did not fit into memory.
    """

    seconds: list[float]
    milliseconds: Quartiles
    images_per_second: float
    megapixels_per_second: float
    speed_up: Quartiles | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a model at one size, batch size and precision.

    A field is None if it could not be measured; `problem` says why. `macs` are per image.
    """

    model: str
    height: int
    width: int
    batch: int
    dtype: str
    macs: int
    compile_seconds: float | None = None
    memory: Memory | None = None
    timing: Timing | None = None
    problem: str = ""


def measure(
    networks: Mapping[str, models.Model],
    *,
    size: tuple[int, int],
    batch: int = 1,
    dtype: str = "float32",
    repeats: int = 20,
) -> list[Cost]:
    """Measures all models, by name, on `batch` images of `size` (height, width), in turns.

    A model that does not fit into memory gets a `problem`; the others are still measured.

    Raises:
      ValueError: if a network does not accept images of this size.
    """
    rows: dict[str, Cost] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, model in networks.items():
        image = (*size, model.network.channels)
        try:
            macs = model.network.count_macs(*size)
            rows[name] = Cost(name, *size, batch, dtype, macs)
            compiled = compile_model(model, (batch, *image), dtype=jnp.dtype(dtype))
        except OutOfMemory as error:
            rows[name] = dataclasses.replace(rows[name], problem=f"out of memory: {error}")
            continue
        except (ValueError, TypeError) as error:  # networks fail in various ways on sizes they do not accept
            raise ValueError(f"{name} cannot be run on an image of {size[0]}x{size[1]}: {error}") from error
        rows[name] = dataclasses.replace(rows[name], compile_seconds=compiled.seconds, memory=compiled.memory)
        runs[name] = compiled.run
    seconds = time_in_turns(runs, repeats=repeats)
    first = seconds.get(next(iter(networks)))
    for name in runs:
        if name in seconds:
            change = {"timing": _timing(seconds[name], first, batch, size)}
        else:
            change = {"problem": "out of memory: while running"}
        rows[name] = dataclasses.replace(rows[name], **change)
    return list(rows.values())


def compile_model(model: models.Model, shape: tuple[int, int, int, int], *, dtype: jnp.dtype = jnp.float32) -> Compiled:
    """Compiles a model for an NHWC shape on the default device, with random pixels as its input.

    Args:
      dtype: of weights and activations; input and output are float32.

    Raises:
      OutOfMemory: if it does not fit.
      ValueError: if the network does not accept this shape.
    """
    apply = model.network.make_apply(dtype=dtype)
    image_only = jax.jit(lambda params, x: apply(params, x, 25.0)[0])
    with telling_out_of_memory():
        params = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), model.params))
        started = time.perf_counter()
        executable = image_only.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
        seconds = time.perf_counter() - started
        memory = planned_memory(executable)
        check_it_fits(memory)
        image = jax.block_until_ready(jax.random.uniform(jax.random.key(0), shape))

    def run() -> jax.Array:
        with telling_out_of_memory():
            return jax.block_until_ready(executable(params, image))

    return Compiled(run, seconds, memory)


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Returns the seconds of `repeats` calls of every run, in turns: A B A B ..., after `warm_up` uncounted turns.

    Other load on the machine then affects all runs alike, and the ratios within a turn are more reliable than ratios of
    medians. A run that raises `OutOfMemory` is dropped and missing from the result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name in list(seconds):
            started = time.perf_counter()
            try:
                runs[name]()
            except OutOfMemory:
                del seconds[name]
                continue
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@contextmanager
def telling_out_of_memory(needs: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Converts the out-of-memory errors of JAX and NumPy to `OutOfMemory`, appending what `needs` returns."""
    try:
        yield
    except (MemoryError, OutOfMemory, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = (str(error).splitlines() or ["no memory"])[0]
        raise OutOfMemory(f"{said.rstrip('.')}; {needs()}" if needs() else said) from None


class Planned:
    """A jitted function that compiles on its first call, and again for arguments of other shapes or dtypes.

    On compiling it logs the memory it uses and warns if that may not fit. On a CPU all devices share one memory, so it
    must hold what they use together.

    Args:
      jitted: from `jax.jit`; its result must have the sharding of the next call's argument.
      what: what one call is, for messages, such as "a step".
    """

    def __init__(self, jitted: jax.stages.Wrapped, what: str) -> None:
        self._jitted, self._what, self._compiled = jitted, what, None
        self.needs = ""

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function.

        Raises:
          OutOfMemory: if it does not fit; either before running, or because running it failed.
        """
        with telling_out_of_memory():
            if self._compiled is not None:
                try:
                    return self._compiled(*arguments)
                except TypeError as error:  # raised before anything runs or is donated
                    log.info(f"compiling anew: {str(error).splitlines()[-1]}")
            self._compiled = self._compile(arguments)
            return self._compiled(*arguments)

    def _compile(self, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        compiled = self._jitted.lower(*arguments).compile()
        memory = planned_memory(compiled)
        if memory is None:
            return compiled
        devices = {device for leaf in jax.tree.leaves(arguments) for device in leaf.sharding.addressable_devices}
        count = len(devices) if jax.default_backend() == "cpu" else 1
        there, free = device_memory()
        inside = f"{amount(memory.temporaries)} of them for intermediate results"
        if count > 1:
            self.needs = f"{self._what} takes {amount(count * memory.peak)}: {amount(memory.peak)} for each of {count}"
            self.needs += f" devices, {inside}"
        else:
            self.needs = f"{self._what} takes {amount(memory.peak)} on each device, {inside}"
        self.needs += f"; {amount(there)} are available" if there else ""
        log.info(f"memory: {self.needs}")
        check_it_fits(memory, self._what, devices=count)
        if free and count * (memory.peak - memory.arguments) > free:
            log.warning(
                f"WARNING: THERE MAY BE TOO LITTLE MEMORY: only {amount(free)} are free now; a machine that runs out"
                " ends the program without a message"
            )
        return compiled


def amount(count: float) -> str:
    """Formats a number of bytes: "1.50 GiB", "20 MiB"."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Returns the quartiles of at least one value, with linear interpolation."""
    return Quartiles(*np.percentile(values, (25, 50, 75)).tolist())


def describe_machine() -> dict[str, Any]:
    """Describes the conditions of a measurement: device, host, load, versions, date."""
    device = jax.devices()[0]
    return {
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # last minute, all processes
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def planned_memory(executable: jax.stages.Compiled) -> Memory | None:
    """Returns the memory a compiled program uses; None if the backend does not report it."""
    plan = executable.memory_analysis()
    if plan is None:
        return None
    parts = plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes
    return Memory(*parts, peak=sum(parts) - plan.alias_size_in_bytes)


def device_memory() -> tuple[int, int]:
    """Returns the bytes available to programs: on an accelerator JAX's limit, on a CPU the machine's memory.

    Returns:
      Total and currently free bytes; 0 if unknown.
    """
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = stats.get("bytes_limit", 0)
        return limit, max(0, limit - stats.get("bytes_in_use", 0))
    return host_memory()


def check_network_fits(network: models.Network) -> None:
    """Rejects a student too large to train here, before any of its parameters is created.

    Raises:
      ConfigError: if it does not fit; the message says what would.
    """
    for name, value in network.hparams.items() if network.architecture.is_checked else ():
        most = _MOST_CHANNELS if name in _CHANNELS else _MOST_LEVELS if name in _LEVELS else _MOST_BLOCKS
        numbers = value if isinstance(value, tuple) else (value,)
        longest = _MOST_BLOCKS + 2 if name == "ranks" else _MOST_LEVELS  # one for every convolution of a stack
        if len(numbers) > longest:
            raise ConfigError(f"config.student.hparams.{name} has {len(numbers):,} numbers; {longest} is the limit")
        if any(type(number) is int and number > most for number in numbers):
            raise ConfigError(f"config.student.hparams.{name}={brief(value)} must be at most {most}")
    shown = f"config.student.hparams={brief(network.hparams, 200)}"
    try:
        count = models.count_params(network.abstract_params)
    except (TypeError, OverflowError) as error:  # from sizes beyond 64 bits, or from a user's own class
        raise ConfigError(f"config.student: {network.arch} cannot be made with {shown}: {error}") from error
    there, _ = device_memory()
    # On a CPU every device keeps its own copy in the same memory.
    needed = 4 * count * _COPIES * (jax.local_device_count() if jax.default_backend() == "cpu" else 1)
    if there and needed > there:
        raise ConfigError(
            f"config.student: {network.arch} with {shown} has {count:,} parameters; training them takes"
            f" {amount(needed)} at least, and {amount(there)} are available"
        )


def check_data_fits(config: Config, *, channels: int, scale: int, process_count: int = 1) -> None:
    """Rejects batches, validation crops and decoding processes that do not fit into memory, before creating any.

    Args:
      channels, scale: of the student.

    Raises:
      ConfigError: if they do not fit; the message names the keys that ask for too much.
    """
    options, workers, crop = config.data, config.data.workers, config.val.crop
    side = max(options.crop, options.canvas)
    rows = -(-options.batch_size // process_count)
    # Batches prefetched, plus those in the making: see `kdjax.data.pipeline`.
    batches = 2 + 3 * workers if workers else 8
    pixels = side**2 + (side // scale) ** 2 * bool(options.lq)
    asks = {
        f"config.data.workers={workers:,}, as processes that decode images": workers * _WORKER_BYTES,
        f"config.data.batch_size={options.batch_size:,} of squares of {side:,} pixels (config.data.crop and canvas),"
        f" {batches:,} batches ahead": batches * rows * pixels * channels,
        f"config.val.crop={crop:,}, as the side of an image": 5 * channels * crop**2,  # in 8 bits and in float32
    }
    there, _ = host_memory()
    for what, needed in asks.items():
        if there and needed > there:
            raise ConfigError(f"{what}, takes {amount(needed)} at least, and the machine has {amount(there)}")


def check_it_fits(memory: Memory | None, what: str = "a pass", *, devices: int = 1) -> None:
    """On a CPU, rejects what exceeds the machine's memory: Linux would overcommit and then kill the process.

    Raises:
      OutOfMemory: if `devices` that each use `memory` need more than there is.
    """
    if memory is None or jax.default_backend() != "cpu":
        return
    there, _ = device_memory()
    if there and devices * memory.peak > there:
        raise OutOfMemory(f"{what} takes {amount(devices * memory.peak)}, the machine has {amount(there)}")


def allocator_peak() -> int | None:
    """Returns the peak bytes in use on an accelerator since the process started; None on a CPU, which does not count.

    It cannot be reset, so it belongs to the most demanding model run so far, and includes XLA's autotuning while
    compiling.
    """
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _timing(seconds: list[float], first: list[float] | None, batch: int, size: tuple[int, int]) -> Timing:
    milliseconds = quartiles([1000 * value for value in seconds])
    rate = 1000 * batch / milliseconds.median
    ratios = quartiles([theirs / ours for theirs, ours in zip(first, seconds, strict=True)]) if first else None
    return Timing(seconds, milliseconds, rate, rate * math.prod(size) / 1e6, ratios)


def _cpu_name() -> str:
    """Returns the processor's name; JAX only says "cpu"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
