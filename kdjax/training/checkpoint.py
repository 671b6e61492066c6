"""Checkpoints of a training run, by Orbax: the latest few, and the best by validation PSNR.

A checkpoint is the whole state of the step. The data pipeline needs none of its own: it is a pure function of the
seed and the sample number, and the next sample follows from the step. A checkpoint appears whole or not at all, so a
killed run finds its last complete one. One that the disk damaged later is put aside, and the run continues from the one
before. All processes of a run save and restore, in a folder that they share. Orbax types stay inside this file.
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
    """A checkpoint that cannot be written or read, or belongs to another run; the message says what to do."""


class Checkpoints:
    """The folder of a run's checkpoints; use it as a context manager, so that pending writes end.

    Args:
      directory: created when missing.
      keep: how many of the latest checkpoints stay; the one with the best PSNR stays besides.

    Raises:
      CheckpointError: there are checkpoints and all of them are damaged.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        # Orbax reports every file at INFO, at WARNING that a checkpoint between validations has no metrics, and at
        # ERROR the traceback of what it raises as well, some of it through asyncio.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _stop_leaks()
        # By one process, before any of them looks which checkpoints there are.
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
        # When one array cannot be written, Orbax closes its event loop, and every other array that is on its way then
        # prints the traceback of that. What went wrong is raised.
        self._hook = sys.unraisablehook

        def report(unraisable: sys.UnraisableHookArgs) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                self._hook(unraisable)

        sys.unraisablehook = report
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Closing waits for the other processes. After an error that they do not know of they would not come.
            if kind is None or issubclass(kind, AgreedError) or jax.process_count() == 1:
                self._manager.close()
        except (ValueError, OSError) as error:
            if kind is None:  # else what ended the run says more
                raise self._not_written(error) from error
        finally:
            sys.unraisablehook = self._hook

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest validation PSNR; None when none was validated."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, *, psnr: float | None = None) -> None:
        """Writes the state after `step` in the background; a step that is already there is left alone.

        Args:
          state: a dataclass of arrays, or a dict of such.

        Raises:
          CheckpointError: this one or the one before, which was still being written, failed; the disk is full.
        """
        if step in self._manager.all_steps():
            return
        metrics = None if psnr is None else {BEST_METRIC: psnr}
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)), metrics=metrics)
        except (ValueError, OSError) as error:
            raise self._not_written(error) from error

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, with the structure, types and shardings of the state `like`.

        Raises:
          CheckpointError: it holds other arrays than `like`.
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
            f"a checkpoint could not be written to {self._manager.directory}: {error}. Make room or mend the disk; the"
            f" same command continues, and {last}"
        )


@functools.cache
def _stop_leaks() -> None:
    """Keeps memory from growing with every checkpoint through TensorStore; does nothing where TensorStore is mended.

    TensorStore never frees the keys and values of the dictionaries that it makes from JSON: so do all versions from
    0.1.71 to 0.1.86 that were tried (benchmarks/tensorstore_json.py). Orbax (0.12.8) asks for one for every array that
    it writes, and twice a checkpoint for a list of them, and has no option not to. The first question gets the same
    answer here without TensorStore. The second only tells Orbax's log and telemetry how many bytes reached the disk; it
    is left out.
    """
    spec_type = tensorstore.KvStore.Spec
    answer = spec_type({"driver": "file", "path": "/a/path/"}).to_json()
    if sys.getrefcount(answer["path"]) <= 2:  # of the dictionary and of this call
        return
    with_leak = spec_type.to_json

    def to_json(spec: tensorstore.KvStore.Spec, *args: Any, **options: Any) -> Any:
        if not args and not options:
            with contextlib.suppress(ValueError):  # what is a path to another driver may be none to that of files
                plain = {"driver": "file", "path": spec.path}
                if spec_type(plain) == spec:
                    return plain
        return with_leak(spec, *args, **options)

    # Other versions may have neither, or not let go of it; it is only about memory.
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
    """Renames checkpoints that cannot be read, as long as another one can, and returns why none can be used, or "".

    Truncated and missing files are seen, flipped bits inside the arrays are not. It is done before Orbax looks at the
    folder, since a damaged file makes it raise something that tells little, or print hundreds of lines.
    """
    steps = [path for path in directory.glob("*") if path.name.isdigit() and path.is_dir()]
    faults = {path: fault for path in steps if (fault := _fault(path))}
    if steps and len(faults) == len(steps):
        return (
            f"no checkpoint in {directory} can be read: {'; '.join(faults.values())}. Look at the disk; give a new"
            " --workdir, or remove that folder to start anew"
        )
    for path, fault in faults.items():
        aside = path.with_name(f"{path.name}.damaged")
        log.warning(f"WARNING: THE CHECKPOINT OF STEP {int(path.name):,} IS DAMAGED AND PUT ASIDE AS {aside}: {fault}")
        shutil.rmtree(aside, ignore_errors=True)  # of the same step, from before
        try:
            path.rename(aside)
        except OSError as error:
            return f"the damaged checkpoint {path} cannot be put aside: {error}. Remove it; the same command continues"
    return ""


def _fault(path: Path) -> str:
    """What keeps a checkpoint from being read; empty when nothing does."""
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
