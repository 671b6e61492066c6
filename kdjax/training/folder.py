"""A run's folder: which run it belongs to, whether it may be continued, and the result files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kdjax import config as config_lib
from kdjax import models
from kdjax.config import ConfigError
from kdjax.files import read_json, write_json
from kdjax.training.preparation import Setup
from kdjax.weights import save_model

log = logging.getLogger("kdjax")

_STUDENT_SUFFIXES = (".pth", ".safetensors")
# What a run writes into its folder. `run.json` is written first and marks the folder as a run's.
RUN_FILES = (
    "config.json", "metrics.jsonl", "train.log", "baseline.json", "result.json", "student.pth", "student.safetensors",
    "checkpoints", "val", "tensorboard",
)  # fmt: skip


def identity(setup: Setup) -> dict[str, object]:
    """Returns what a checkpoint depends on but does not contain."""
    return {
        "student": {"arch": setup.student.arch, "hparams": setup.student.hparams},
        "teacher": setup.teacher and {"files": setup.teacher.paths, "identity": setup.teacher.identity},
    }


def claim(setup: Setup, workdir: Path) -> None:
    """Claims a folder for this run, or checks that it already belongs to a run.

    Raises:
      ConfigError: if it holds unrelated files that the run would replace.
    """
    path = workdir / "run.json"
    foreign = [name for name in RUN_FILES if (workdir / name).exists()]
    try:
        before = read_json(path)
    except ValueError as error:
        if path.read_bytes().strip(b"\0\n ") and not (workdir / "checkpoints").is_dir():
            raise ConfigError(f"{error}, so {workdir} may not be the folder of a run; give a new --workdir") from None
        log.warning(
            f"WARNING: {error}. It will be rewritten; whether student and teacher are the same as before cannot be"
            " checked"
        )
    else:
        if before and not before.keys() >= {"student", "teacher"}:
            foreign = ["run.json", *foreign]
        elif before:
            return
        if foreign:
            raise ConfigError(
                f"{workdir} holds {', '.join(foreign)}, which kdjax would overwrite, and no run; give a"
                " new --workdir, or move these files"
            )
    write_json(path, identity(setup))


def check_same_run(setup: Setup, workdir: Path) -> None:
    """Refuses to continue a run with another student or another teacher file."""
    before, now = read_json(workdir / "run.json"), identity(setup)
    same = {
        "student": _is_student(before.get("student") or {}, setup.student),
        "teacher": (before.get("teacher") or {}).get("identity") == (setup.teacher and setup.teacher.identity),
    }
    changed = [f"{what}: {before.get(what)} before, {now[what]} now" for what, is_same in same.items() if not is_same]
    if changed:
        raise ConfigError(f"{workdir} holds a run with another {'; '.join(changed)}; give a new --workdir")
    try:
        config_before = read_json(workdir / "config.json")
    except ValueError as error:
        log.warning(f"WARNING: {error}. It will be rewritten")
        return
    for change in config_lib.changes(config_before, config_lib.to_dict(setup.config)):
        log.info(f"config changed since the last start: {change}")


def _is_student(entry: Mapping[str, Any], student: models.Model) -> bool:
    """Whether an entry of run.json is this student, in JSON's types and with the hyper-parameters of its time."""
    if entry.get("arch") != student.arch:
        return False
    try:
        return student.network.architecture.complete(entry.get("hparams", {})) == student.hparams
    except ValueError:
        return False


def export(student: models.Model, params: models.Params, workdir: Path) -> None:
    """Writes the student with these parameters as `student.pth` and `student.safetensors`."""
    trained = dataclasses.replace(student, params=jax.device_get(params))
    for suffix in _STUDENT_SUFFIXES:
        save_model(trained, workdir / f"student{suffix}")


def finished_result(workdir: Path, step: int) -> dict[str, object]:
    """Returns `result.json` of a run that ended at this step; empty if a result file is missing."""
    try:
        result = read_json(workdir / "result.json")
    except ValueError as error:  # emptied by a power cut, for example; it is written again
        log.warning(f"WARNING: {error}")
        return {}
    whole = all((workdir / f"student{suffix}").is_file() for suffix in _STUDENT_SUFFIXES)
    return result if whole and result.get("step") == step else {}
