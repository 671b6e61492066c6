"""Checkpoints of a training run, with Orbax: the latest few, and the best by validation PSNR.

A checkpoint is the whole state of the step. The data pipeline has no state to save: it is a pure function of the seed
and the sample number, and the next sample follows from the step. A checkpoint appears complete or not at all, so a
killed run resumes from its last complete one. One that the disk damages later is set aside, and the run resumes from
the one before. All processes of a run save and restore, in a shared folder. Orbax types stay inside this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from kdjax.sharding import AgreedError, exchange, is_first

BEST_METRIC = "psnr"

log = logging.getLogger("kdjax")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or belongs to another run; the message says what to do."""


class Checkpoints:
    """The folder of a run's checkpoints; use it as a context manager so that pending writes finish.

    Args:
      directory: created if missing.
      keep: how many of the latest checkpoints to keep, besides the one with the best PSNR.

    Raises:
      CheckpointError: if there are checkpoints and all are damaged.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        # Orbax logs every file at INFO, warns that checkpoints between validations have no metrics, and logs at ERROR
        # the traceback of whatever it also raises, some of it through asyncio.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _stop_leaks()
        # One process does this, before any of them lists the checkpoints.
        if problem := exchange(_put_damaged_aside(directory) if is_first() else "")[0]:
            raise CheckpointError(problem)
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[BEST_METRIC], n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                best_fn=lambda metrics: metrics[BEST_METRIC],
                best_mode="max",
                cleanup_tmp_directories=True,  # what a killed run left half-written
            ),
        )

    def __enter__(self) -> Self:
        # If one array cannot be written, Orbax closes its event loop, and every other array in flight then prints a
        # traceback. The original error is raised anyway.
        self._hook = sys.unraisablehook

        def report(unraisable: sys.UnraisableHookArgs) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                self._hook(unraisable)

        sys.unraisablehook = report
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Closing waits for the other processes. After an error only this one has seen, they would never come.
            if kind is None or issubclass(kind, AgreedError) or jax.process_count() == 1:
                self._manager.close()
        except (ValueError, OSError) as error:
            if kind is None:  # otherwise the exception that ended the run is more helpful
                raise self._not_written(error) from error
        finally:
            sys.unraisablehook = self._hook

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest validation PSNR; None if none was validated."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, *, psnr: float | None = None) -> None:
        """Writes the state after `step` in the background; does nothing if that step is already saved.

        Args:
          state: a dataclass of arrays, or a dict of such dataclasses.

        Raises:
          CheckpointError: if this write, or the previous one still in progress, failed, for example on a full disk.
        """
        if step in self._manager.all_steps():
            return
        metrics = None if psnr is None else {BEST_METRIC: psnr}
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)), metrics=metrics)
        except (ValueError, OSError) as error:
            raise self._not_written(error) from error

    def restore(self, like: Any) -> Any:
        """Restores the newest checkpoint with the structure, dtypes and shardings of the state `like`.

        Raises:
          CheckpointError: if its arrays do not match `like`.
        """
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _as_dict(like)
        )
        try:
            restored = self._manager.restore(self.latest, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint {self._manager.directory / str(self.latest)} does not fit this run; was the optimizer"
                f" changed? Give a new --workdir, or remove that folder to continue from the one before. ({error})"
            ) from error
        return restored if isinstance(like, dict) else dataclasses.replace(like, **restored)

    def _not_written(self, error: Exception) -> CheckpointError:
        complete = self._manager.all_steps(read=True)
        last = f"the last complete one is of step {max(complete):,}" if complete else "there is no complete one yet"
        return CheckpointError(
            f"a checkpoint could not be written to {self._manager.directory}: {error}. Free some space or check the"
            f" disk, then run the same command to continue; {last}"
        )


@functools.cache
def _stop_leaks() -> None:
    """Works around a TensorStore memory leak per checkpoint; does nothing if TensorStore has fixed it.

    TensorStore never frees the keys and values of dictionaries it makes from JSON, in all versions tried, 0.1.71 to
    0.1.86 (benchmarks/tensorstore_json.py). Orbax (0.12.8) requests one for every array it writes, and twice per
    checkpoint a list of them, with no way to opt out. The first request is answered here without TensorStore. The
    second only tells Orbax's log and telemetry how many bytes reached the disk, so it is dropped.
    """
    spec_type = tensorstore.KvStore.Spec
    answer = spec_type({"driver": "file", "path": "/a/path/"}).to_json()
    if sys.getrefcount(answer["path"]) <= 2:  # one from the dictionary, one from this call
        return
    with_leak = spec_type.to_json

    def to_json(spec: tensorstore.KvStore.Spec, *args: Any, **options: Any) -> Any:
        if not args and not options:
            with contextlib.suppress(ValueError):  # another driver's path may not be valid for files
                plain = {"driver": "file", "path": spec.path}
                if spec_type(plain) == spec:
                    return plain
        return with_leak(spec, *args, **options)

    # Other versions may lack either or refuse the assignment; then only memory suffers.
    with contextlib.suppress(AttributeError, TypeError):
        spec_type.to_json = to_json  # ty: ignore[invalid-assignment] (it has fewer options)
    with contextlib.suppress(ImportError):
        orbax = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
        if hasattr(orbax, "get_tensorstore_raw_bytes"):
            orbax.get_tensorstore_raw_bytes = lambda *_, **__: 0  # ty: ignore[invalid-assignment] (and its own type)


def _as_dict(state: Any) -> dict[str, Any]:
    if isinstance(state, dict):
        return state
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _put_damaged_aside(directory: Path) -> str:
    """Renames unreadable checkpoints, provided a readable one is left; returns why none can be used, or "".

    Detects truncated and missing files, but not flipped bits inside arrays. Runs before Orbax looks at the folder,
    since a damaged file makes Orbax raise something unhelpful or print hundreds of lines.
    """
    steps = [path for path in directory.glob("*") if path.name.isdigit() and path.is_dir()]
    faults = {path: fault for path in steps if (fault := _fault(path))}
    if steps and len(faults) == len(steps):
        return (
            f"no checkpoint in {directory} can be read: {'; '.join(faults.values())}. Check the disk; give a new"
            " --workdir, or remove that folder to start over"
        )
    for path, fault in faults.items():
        aside = path.with_name(f"{path.name}.damaged")
        log.warning(f"WARNING: THE CHECKPOINT OF STEP {int(path.name):,} IS DAMAGED AND WAS MOVED TO {aside}: {fault}")
        shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
        try:
            path.rename(aside)
        except OSError as error:
            return (
                f"the damaged checkpoint {path} cannot be moved aside: {error}. Remove it and run the same command to"
                " continue"
            )
    return ""


def _fault(path: Path) -> str:
    """Returns what makes a checkpoint unreadable; empty if nothing does."""
    arrays = path / "default"
    described = [arrays / "_METADATA", *(arrays / "array_metadatas").glob("*"), *path.glob("metrics/metrics")]
    try:
        for file in described:
            json.loads(file.read_bytes())
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": arrays.absolute().as_uri() + "/"}).result()
        for read in [store.read(name) for name in store.list().result()]:
            read.result()
    except (ValueError, OSError) as error:
        return f"{path.name}: {error}"
    return ""
