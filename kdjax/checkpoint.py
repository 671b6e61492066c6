"""Checkpoints of a training run, by Orbax: the latest few, and the best by validation PSNR.

A checkpoint is the whole state of the step. The data pipeline needs none of its own: it is a pure function of the
seed and the sample number, and the next sample follows from the step. A checkpoint appears whole or not at all, so a
killed run finds its last complete one. All processes of a run save and restore, in a folder that they share. Orbax
types stay inside this file.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from kdjax.sharding import AgreedError

BEST_METRIC = "psnr"


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run; the message says what to do."""


class Checkpoints:
    """The folder of a run's checkpoints; use it as a context manager, so that pending writes end.

    Args:
      directory: created when missing.
      keep: how many of the latest checkpoints stay; the one with the best PSNR stays besides.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        # Orbax reports every file at INFO, and at WARNING that a checkpoint between validations has no metrics.
        logging.getLogger("absl").setLevel(logging.ERROR)
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
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes. After an error that they do not know of they would not come.
        if kind is None or issubclass(kind, AgreedError) or jax.process_count() == 1:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest validation PSNR; None when none was validated."""
        return self._manager.best_step()

    def save(self, state: Any, *, psnr: float | None = None) -> None:
        """Writes the state in the background under its own step; a step that is already there is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        metrics = None if psnr is None else {BEST_METRIC: psnr}
        self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)), metrics=metrics)

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, with the structure, types and shardings of the state `like`.

        Raises:
          CheckpointError: it cannot be read, or holds other arrays than `like`.
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
        return dataclasses.replace(like, **restored)


def _as_dict(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
