"""Caches the teacher's outputs for a run's samples on disk, so that training can skip the teacher:

    python -m kdjax.cache --config configs/denoise.py --output CACHE --samples 100000 [--config.data.crop=64 ...]
    python -m kdjax.train --config configs/denoise.py --config.teacher.cache=CACHE [--config.data.crop=64 ...]

The samples are the first ones of the run itself: same images, crops, flips and noise. Each is stored with the teacher's
output, in float16, and those teacher features that the config's loss terms read, in bfloat16. See
`kdjax.teacher.cache` for the storage rules and the reasons for them, `kdjax.data.cache` for the format.

The program first reports how much space it needs. It can be killed at any time: the same command resumes after the last
complete shard. Several processes, on one host or many, can share the work: give each --num_processes and its own
--process_id, and it writes its own shards. They need not run at the same time and do not wait for one another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import commandline, sharding
from kdjax import config as config_lib
from kdjax.config import ConfigError
from kdjax.data import DataError, shards
from kdjax.data.cache import CACHE, PLAN, Field
from kdjax.files import FolderInUse, locked, read_json, remove_leftovers, write_json
from kdjax.progress import Pace
from kdjax.signals import Stopped
from kdjax.teacher import cache as teacher_cache
from kdjax.training import preparation

log = logging.getLogger("kdjax")

SHARD_BYTES = 256 * 2**20
_LOCK = ".lock"  # suffix of lock files, whose names start with a dot
_SPARE = 1.02  # overhead of the format, as a factor on the bytes of the records


@dataclasses.dataclass(frozen=True)
class CacheJob:
    """A cache to be written; everything but the free disk space has been checked."""

    setup: preparation.Setup
    out: Path
    samples: int
    shard_samples: int
    fields: tuple[Field, ...]
    answer: teacher_cache.Answer

    @property
    def sample_bytes(self) -> int:
        return sum(field.bytes for field in self.fields)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    def count(self, shard: int) -> int:
        """Returns the number of samples in a shard."""
        return min(self.shard_samples, self.samples - shard * self.shard_samples)

    def index(self) -> dict[str, Any]:
        """Returns the contents of the index, without the shards."""
        return {
            "samples": self.samples,
            "shard_samples": self.shard_samples,
            "batch_size": self.setup.config.data.batch_size,  # it decides where unlabelled images are
            "fields": [[field.name, field.dtype, list(field.shape)] for field in self.fields],
            "settings": preparation.sample_settings(self.setup),
        }


def plan(setup: preparation.Setup, out: Path, samples: int, *, shard_bytes: int = SHARD_BYTES) -> CacheJob:
    """Plans to write the first `samples` samples of a run to the folder `out`.

    Args:
      shard_bytes: approximate size of a shard; shards hold whole batches.

    Raises:
      ConfigError: if there is no teacher, a term needs the live teacher, or `out` already holds something else.
    """
    if setup.teacher is None or not any(term.needs_teacher for term in setup.recipe.terms):
        raise ConfigError("no loss term of the config uses the teacher, so there is nothing to cache")
    if not setup.teacher.can_run:
        raise ConfigError(f"config.teacher.outputs={setup.teacher.paths[0]!r} has the answers already; train with it")
    if samples < 1:
        raise ConfigError(f"--samples={samples}; it must be 1 or more")
    answer = teacher_cache.make_answer(setup.config, setup.recipe, setup.teacher, side=preparation.loaded_side(setup))
    fields = teacher_cache.make_fields(answer, setup.teacher.params, preparation.batch_shapes(setup))
    batch = setup.config.data.batch_size
    in_shard = batch * max(1, shard_bytes // (batch * sum(field.bytes for field in fields)))
    job = CacheJob(setup, out, samples, in_shard, fields, answer)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output={out} is a file; give a folder that is new, empty, or left by the same command")
    for name in (CACHE.index, PLAN):
        if (out / name).exists():
            _check_same(job, name)
            return job
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(f"--output={out} holds other files; give a folder that is new or empty")
    return job


def _check_same(job: CacheJob, name: str) -> None:
    """Refuses a folder that holds, or was meant to hold, another cache."""
    before = CACHE.read_index(str(job.out)) if name == CACHE.index else _read_plan(job.out / name)
    now = job.index()
    if differences := config_lib.changes({key: before.get(key) for key in now}, now):
        raise ConfigError(
            "\n".join(
                [
                    f"--output={job.out} holds another cache (cached -> now):",
                    *(f"  {difference}" for difference in differences),
                    "repeat its flags to continue it, choose another --output, or remove that folder",
                ]
            )
        )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ConfigError(f"{error}; remove {path.parent}, or give another --output") from None


def describe(job: CacheJob) -> str:
    """Describes the contents and size of the cache for the user."""
    parts = [f"{f.name} {f.dtype} {'x'.join(map(str, f.shape)) or '1'}: {f.bytes:,}" for f in job.fields]
    if not any(field.name == "lq" for field in job.fields):
        parts.append("lq: 0, since its noise is drawn again")
    return (
        f"a sample takes {job.sample_bytes:,} bytes ({'; '.join(parts)}); {job.samples:,} samples take"
        f" {megabytes(job.samples * job.sample_bytes)} in {job.shards} shards"
    )


def write(
    job: CacheJob,
    *,
    process_index: int = 0,
    process_count: int = 1,
    tell: Callable[[str], None] = log.info,
    tell_every: float = 5.0,
) -> bool:
    """Writes the missing shards of this process; whichever process finds the last shard written writes the index.

    Returns:
      Whether the cache is complete; if not, other processes are still writing.

    Raises:
      ConfigError: if there is not enough disk space, or another process writes the same part.
      shards.PackError: if a shard cannot be written.
      DataError: if images cannot be read.
      FloatingPointError: if the teacher's output is not finite in float16.
    """
    if (job.out / CACHE.index).exists():
        return True
    job.out.mkdir(parents=True, exist_ok=True)
    with _one_writer(job.out, f".process-{process_index}-of-{process_count}"):
        _write_own(job, process_index, process_count, tell, tell_every)
    if not all(is_written(job, shard) for shard in range(job.shards)):
        return False
    files = [job.out / shards.file_name(shard) for shard in range(job.shards)]
    sizes = [{"file": path.name, "bytes": path.stat().st_size} for path in files]
    CACHE.write_index(job.out, job.index() | {"shards": sizes})
    for path in (job.out / PLAN, *job.out.glob(f".*{_LOCK}")):
        path.unlink(missing_ok=True)
    return True


def _write_own(
    job: CacheJob, process_index: int, process_count: int, tell: Callable[[str], None], tell_every: float
) -> None:
    """Writes the missing shards of this process."""
    missing = [shard for shard in range(job.shards) if not is_written(job, shard)]
    check_room(job, sum(job.count(shard) for shard in missing))
    write_json(job.out / PLAN, job.index())
    if len(missing) < job.shards:
        tell(f"{job.shards - len(missing)} of {job.shards} shards are already written")
    # Consecutive shards, so that the data stream need not be reopened for each.
    block = range(process_index * job.shards // process_count, (process_index + 1) * job.shards // process_count)
    own = [shard for shard in missing if shard in block]
    pace = Pace(sum(job.count(shard) for shard in own))
    with contextlib.closing(_records(job, own)) as records:
        for shard in own:
            path = job.out / shards.file_name(shard)
            with _one_writer(job.out, f".{path.stem}"):
                remove_leftovers(path)
                with shards.new_shard(path) as append:
                    for _ in range(job.count(shard)):
                        append(next(records))
                        pace.advance()
                        if pace.is_due(tell_every):
                            how_far = f"{pace.done:,.0f} of {pace.total:,} samples  {pace.rate:.1f} samples/s"
                            tell(f"{how_far}  {pace.left()} left  shard {path.name}")


@contextlib.contextmanager
def _one_writer(folder: Path, part: str) -> Iterator[None]:
    """Locks a part of the cache, in case two processes were given the same work."""
    try:
        with locked(folder, part + _LOCK):
            yield
    except FolderInUse as error:
        raise ConfigError(
            f"--output={error}. Processes that share the work each need their own --process-id, and the same"
            " --num-processes"
        ) from None


def is_written(job: CacheJob, shard: int) -> bool:
    """Returns whether a shard exists, with all of its samples."""
    path = job.out / shards.file_name(shard)
    return path.exists() and shards.count_records(path) == job.count(shard)


def check_room(job: CacheJob, samples: int) -> None:
    """Raises ConfigError if the disk has no room for this many samples."""
    free = shutil.disk_usage(job.out).free
    needed = int(samples * job.sample_bytes * _SPARE)
    if needed > free:
        fit = int(free / _SPARE / job.sample_bytes)
        raise ConfigError(
            f"--output={job.out}: {megabytes(needed)} are needed and {megabytes(free)} are free, room for {fit:,}"
            " samples; lower --samples, choose a folder on another disk, or use fewer features (config.terms)"
        )


def _records(job: CacheJob, own: list[int]) -> Generator[bytes]:
    """Yields the records of these shards, one by one; the teacher runs one batch ahead of the disk."""
    setup = job.setup
    mesh = setup.mesh
    assert setup.teacher is not None  # `plan` refuses a config without one
    params = sharding.replicate(setup.teacher.params, mesh)
    key = sharding.replicate(jax.random.key(setup.config.seed), mesh)
    answer = sharding.on_mesh(mesh, jax.jit(job.answer))
    batch_size = setup.config.data.batch_size

    def answers() -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields the number of each batch's first sample, with the batch's fields."""
        position = 0
        while position < len(own):
            end = position + 1
            while end < len(own) and own[end] == own[end - 1] + 1:
                end += 1
            steps = range(
                own[position] * job.shard_samples // batch_size,
                -(-min(job.samples, (own[end - 1] + 1) * job.shard_samples) // batch_size),
            )
            with preparation.open_batches(setup, start_step=steps.start) as batches:
                for step in steps:
                    yield step * batch_size, answer(params, sharding.shard_batch(next(batches), mesh), key)
            position = end

    previous = None
    for current in answers():
        if previous is not None:
            yield from _rows(job, *previous)
        previous = current
    if previous is not None:
        yield from _rows(job, *previous)


def _rows(job: CacheJob, first: int, fields: dict[str, jax.Array]) -> Iterator[bytes]:
    """Yields the records of a batch, up to the last sample."""
    arrays = jax.device_get(fields)
    for row in range(min(len(arrays["gt"]), job.samples - first)):
        if not np.isfinite(arrays["output"][row]).all():
            raise FloatingPointError(
                f"the teacher's output for sample {first + row} is not finite in float16; check its weights"
                " (config.teacher) and its precision (config.teacher.dtype)"
            )
        yield b"".join(np.ascontiguousarray(arrays[field.name][row]).tobytes() for field in job.fields)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e10 else f"{size / 1e9:,.1f} GB"


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.cache", __doc__)
    parser.add_config()
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the cache")
    parser.add_argument("--samples", required=True, type=int, metavar="N", help="how many samples of the run to keep")
    parser.add_processes("share the work")
    parser.set_defaults(num_processes=1, process_id=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options, values = parser.parse(arguments)
    if options.num_processes < 1 or not 0 <= options.process_id < options.num_processes:
        parser.error(
            f"--process-id {options.process_id} is not one of 0 ... {options.num_processes - 1}, with --num-processes"
            f" {options.num_processes}"
        )
    commandline.start_logging()
    started = time.monotonic()
    try:
        config = config_lib.parse(values)
        sharding.use_all_cores(config.data.batch_size)
        setup = preparation.prepare(teacher_cache.without_cache(preparation.on_these_devices(config)))
        job = plan(setup, options.output, options.samples)
        assert setup.teacher is not None
        log.info(f"teacher: {setup.teacher.identity}, {preparation.describe_teacher(setup.teacher)}")
        log.info(describe(job))
        preparation.check_answers(setup)
        complete = write(job, process_index=options.process_id, process_count=options.num_processes)
    except (ValueError, OSError, FloatingPointError, DataError) as error:
        commandline.fail(str(error))
    except KeyboardInterrupt:
        raise Stopped("SIGINT") from None
    if complete:
        log.info(
            f"complete after {time.monotonic() - started:.0f} s; train with --config.teacher.cache={options.output}"
        )
    else:
        log.info(f"this process finished after {time.monotonic() - started:.0f} s; others are still writing")


if __name__ == "__main__":
    commandline.run(main)
