"""A run's metrics: always in `metrics.jsonl`, optionally in TensorBoard and Weights & Biases.

One JSON object per line, with the `step` first. A resumed run first drops the lines after the step it resumes from, so
a killed run leaves the same file as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Self

import numpy as np

from kdjax import sharding
from kdjax.files import finite, write_text

log = logging.getLogger("kdjax")


class Logbook:
    """Writes the metrics of a run; use it as a context manager. With several processes only the first one writes.

    Args:
      workdir: the run's folder.
      resume_step: keep the lines up to this step and continue after them; 0 starts over.
      tensorboard: also write event files to `workdir/tensorboard` (extra `tb`).
      wandb: also report to this Weights & Biases project (extra `wandb`); "" disables it.
    """

    def __init__(
        self, workdir: Path, *, resume_step: int, name: str, tensorboard: bool = False, wandb: str = ""
    ) -> None:
        self._file = self._tensorboard = self._wandb = None
        self._kept: list[dict[str, Any]] = []
        if not sharding.is_first():
            return
        path = workdir / "metrics.jsonl"
        self._kept = [row for row in _rows(path) if row["step"] <= resume_step] if resume_step else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in self._kept))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        if wandb:
            import wandb as wandb_module

            run_id = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:12]  # the same after a restart
            self._wandb = wandb_module.init(project=wandb, name=name, dir=str(workdir), id=run_id, resume="allow")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def has(self, step: int, name: str) -> bool:
        """Returns whether this step's metric was logged before the run was resumed; all processes must call it."""
        return sharding.exchange(any(row["step"] == step and name in row for row in self._kept))[0]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes metrics of one step; non-finite values become null in the JSON.

        Metrics that were already logged when the run resumed are not written twice.
        """
        if any(row["step"] == step and values.keys() <= row.keys() for row in self._kept):
            return
        if self._file:
            self._file.write(json.dumps(finite({"step": step, **values})) + "\n")
            self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Sends a uint8 (h, w, c) image to TensorBoard and Weights & Biases, if enabled."""
        if self._tensorboard:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            import wandb as wandb_module

            self._wandb.log({name: wandb_module.Image(image)}, step=step)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of the file; a killed process may leave a partial last line, a bad disk anything."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **row})
        except (ValueError, KeyError, TypeError):
            log.warning(f"WARNING: a line of {path} is damaged and was skipped: {line[:40]!r}")
    return rows
