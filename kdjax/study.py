"""Compares distillation methods with each other and with training without a teacher, over several seeds:

    python -m kdjax.study --config configs/study_denoise.py
    python -m kdjax.study --config configs/study_denoise.py --columns scratch output --config.seeds="(0, 1, 2)"

The config has a training config, `base`, and `columns`: name -> what that column changes in it. Runs of one seed share
initial weights, images, crops and noise. Those with the same data and length are trained together, in one step with a
single forward pass of the teacher. The study's folder (studies/NAME by default) contains:

    seed0/output/       config.json  metrics.jsonl  result.json  student.pth  student.safetensors
    results.json  results.md  results.png

Finished runs are not repeated, so columns and seeds can be added later; interrupted runs resume. All columns are
compared with the column `scratch`. A column with `compute_of="NAME"` is trained for as many steps as it takes to match
the multiply-accumulates of column NAME.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import commandline, cost, metrics, sharding, validation
from kdjax import config as config_lib
from kdjax.config import Config, ConfigError
from kdjax.data import DataError
from kdjax.files import finite, locked, read_json, write_json
from kdjax.models import Apply, Params
from kdjax.report import ladder
from kdjax.signals import Stopped, StopSignals
from kdjax.teacher.load import Teacher, load_teacher
from kdjax.training import loop, preparation
from kdjax.training.advice import how_to_save_memory
from kdjax.training.checkpoint import CheckpointError, Checkpoints
from kdjax.training.columns import Study, groups, parse, ready, step_macs
from kdjax.training.folder import RUN_FILES, export
from kdjax.training.logbook import Logbook
from kdjax.training.loop import NonFiniteLoss
from kdjax.training.monitor import Monitor
from kdjax.validation import Sample

log = logging.getLogger("kdjax")


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The reference for every student on the validation images.

    Holds the PSNR of teacher and input, in dB, and the teacher's images.
    """

    teacher_psnr: float
    input_psnr: float
    teacher_outputs: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns that are trained together: only students, their losses and their learning differ."""

    setups: dict[str, preparation.Setup]
    teacher: Teacher
    samples: list[Sample]

    @property
    def first(self) -> preparation.Setup:
        """Any one setup, standing for all where they agree."""
        return next(iter(self.setups.values()))

    @property
    def config(self) -> Config:
        return self.first.config


def check_folder(workdir: Path) -> None:
    """Refuses a folder containing files that the study would replace.

    Raises:
      ConfigError: if it holds unrelated results.
    """
    try:
        before = read_json(workdir / "results.json")
    except ValueError:  # emptied by a power cut, for example; it is written again
        before = {}
    # Not train.log, which is continued: a study that ended before its first result leaves one.
    foreign = [name for name in ("results.json", "results.md", "results.png") if (workdir / name).exists()]
    ours = "rows" in before and "results" in before
    if foreign and not ours and not list(workdir.glob("seed*/*/config.json")):
        raise ConfigError(
            f"{workdir} holds {', '.join(foreign)}, which kdjax would overwrite, and no study; give a"
            " new --workdir, or move these files"
        )


def run(study: Study, workdir: Path, columns: Sequence[str] | None = None) -> str:
    """Trains every run without a result and writes the tables; returns a one-line summary.

    Args:
      columns: train only these; None trains all. The tables include every run with a result.

    Raises:
      Stopped: if a signal arrived; the same command resumes.
    """
    baselines: dict[str, Baseline] = {}
    with StopSignals() as stop:
        for seed in study.seeds:
            missing = {}
            for (column, of_seed), config in study.runs.items():
                wanted = of_seed == seed and (not columns or column in columns)
                if wanted and not is_finished(config, workdir / f"seed{seed}" / column):
                    missing[column] = config
            for group in groups(missing):
                train_together(group, workdir / f"seed{seed}", study.curve_images, stop, baselines)
                write_results(study, workdir)
                if stop.requested:
                    raise Stopped(stop.name)
    return write_results(study, workdir)


def is_finished(config: Config, folder: Path) -> bool:
    """Returns whether the run in `folder` has a result.

    Raises:
      ConfigError: if it is a run with another config, or the folder holds something else.
    """
    try:
        before = read_json(folder / "config.json")
        result = read_json(folder / "result.json")
    except ValueError as error:  # emptied by a power cut, for example
        log.warning(f"WARNING: {error}. This run is trained again")
        return False
    if not before:
        if foreign := [name for name in RUN_FILES if (folder / name).exists()]:
            raise ConfigError(
                f"{folder} holds {', '.join(foreign)}, which kdjax would overwrite, and no config.json of a run;"
                " give a new --workdir, rename the column, or move these files"
            )
        return False
    with contextlib.suppress(ConfigError):  # keys added since then take their defaults
        before = config_lib.to_dict(config_lib.parse(before))
    # Logging and the checkpoint interval do not affect the result.
    changes = [c for c in config_lib.changes(before, config_lib.to_dict(config)) if not c.startswith(("log.", "check"))]
    if changes:
        raise ConfigError(
            f"{folder} holds a run with a different config ({'; '.join(changes)}); give a new --workdir, rename the"
            " column,"
            " or remove that folder"
        )
    return bool(result)


def train_together(
    configs: Mapping[str, Config],
    folder: Path,
    curve_images: int,
    stop: StopSignals,
    baselines: dict[str, Baseline] | None = None,
) -> None:
    """Trains the columns of a group to the end, or until a signal, and writes their results.

    `baselines` caches the teacher's measurements for the next group: with a large teacher they take minutes.

    Raises:
      ValueError, OSError: if a config cannot be carried out.
      NonFiniteLoss: if a student diverged.
    """
    group = make_group(configs)
    config = group.config
    log.info(f"seed {config.seed}: {', '.join(configs)}, {config.train.steps:,} steps, in {folder}")
    preparation.warn_of_other_degradation(group.first)
    baselines = {} if baselines is None else baselines
    subject = json.dumps([config_lib.to_dict(config)[part] for part in ("teacher", "val")])
    if subject not in baselines:
        baselines[subject] = measure_baseline(group.samples, group.teacher)
    baseline = baselines[subject]
    log.info(f"teacher {baseline.teacher_psnr:.3f} dB, input {baseline.input_psnr:.3f} dB")
    checkpoint_folder = folder / f"checkpoints-{'-'.join(configs)}"[:200]
    with Checkpoints(checkpoint_folder, keep=1) as checkpoints:
        states = train_group(group, folder, checkpoints, curve_images, stop)
    if loop.step_of(states) == config.train.steps:
        results = {c: make_result(group, c, states[c].params_ema, baseline, folder / c) for c in configs}
        # Together: a finished column leaves the group, whose checkpoint folder is named after its columns.
        for column, result in results.items():
            write_json(folder / column / "result.json", result)
        shutil.rmtree(checkpoint_folder)


def make_group(configs: Mapping[str, Config]) -> Group:
    """Creates networks and data for the columns; one teacher, even if the first column does not need it."""
    setups = {column: preparation.prepare(config) for column, config in configs.items()}
    first = next(iter(setups.values()))
    teacher = load_teacher(first.config.teacher, first.student)
    if not teacher.can_run:
        raise ConfigError(
            f"a study measures its teacher, and {teacher.paths[0]!r} has answers only; give a teacher that can be run"
        )
    return Group(setups, teacher, Monitor(first.config.val, first.student, teacher).samples)


def train_group(
    group: Group, folder: Path, checkpoints: Checkpoints, curve_images: int, stop: StopSignals
) -> loop.States:
    """Trains the columns to the end, or until a signal; logs each one's PSNR curve to its `metrics.jsonl`."""
    samples = group.samples[:: max(1, len(group.samples) // curve_images)][:curve_images]
    states = loop.start(group.setups, checkpoints)
    with contextlib.ExitStack() as stack:
        logbooks = {}
        for column, setup in group.setups.items():
            (folder / column).mkdir(parents=True, exist_ok=True)
            write_json(folder / column / "config.json", config_lib.to_dict(setup.config))
            logbook = Logbook(folder / column, resume_step=loop.step_of(states), name=column)
            logbooks[column] = stack.enter_context(logbook)

        def validate(step: int, states: loop.States) -> float:
            """Returns the mean PSNR of the columns."""
            found = []
            for column, logbook in logbooks.items():
                found.append(mean_psnr(group.setups[column].recipe.student, states[column].params_ema, samples))
                logbook.write(step, {"val/student_psnr": found[-1]})
                log.info(f"  {column}: {found[-1]:.3f} dB on {len(samples)} images")
            return statistics.fmean(found)

        try:
            return loop.train(
                group.setups,
                states,
                group.teacher.params,
                logbooks=logbooks,
                checkpoints=checkpoints,
                stop=stop,
                validate=validate,
            )
        except NonFiniteLoss as error:
            message = f"column {error.student!r}, seed {group.config.seed}: {error}"
            raise NonFiniteLoss(error.student, message) from None


def make_result(group: Group, column: str, params: Params, baseline: Baseline, folder: Path) -> dict[str, Any]:
    """Writes a finished student and returns the results of its run."""
    setup = group.setups[column]
    export(setup.student, params, folder)
    result: dict[str, Any] = {}
    result |= measure(setup.recipe.student, params, group.samples, baseline.teacher_outputs)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    result |= {
        "teacher_psnr": baseline.teacher_psnr,
        "input_psnr": baseline.input_psnr,
        "column": column,
        "seed": setup.config.seed,
        "steps": setup.config.train.steps,
        "macs_per_step": step_macs(setup, group.teacher.params),
        "teacher": group.teacher.identity,
        "student": preparation.describe(setup.student),
        "curve": [[row["step"], row["val/student_psnr"]] for row in rows if "val/student_psnr" in row],
    }
    log.info(f"{column}, seed {setup.config.seed}: {result['psnr']:.3f} dB")
    return finite(result)


def measure_baseline(samples: list[Sample], teacher: Teacher) -> Baseline:
    """Measures the teacher and the input on the validation images."""
    outputs = restore_all(teacher.apply_float32, teacher.params, samples)
    scored = statistics.fmean(metrics.psnr(o, sample.gt) for o, sample in zip(outputs, samples, strict=True))
    return Baseline(scored, validation.input_score(samples).psnr, outputs)


def measure(apply: Apply, params: Params, samples: list[Sample], teacher_outputs: list[np.ndarray]) -> dict[str, float]:
    """Measures a finished student on all validation images."""
    outputs = restore_all(apply, params, samples)
    score = validation.mean_score([validation.score(o, s.gt) for o, s in zip(outputs, samples, strict=True)])
    like = statistics.fmean(metrics.psnr(ours, theirs) for ours, theirs in zip(outputs, teacher_outputs, strict=True))
    return {"psnr": score.psnr, "ssim": score.ssim, "psnr_student_teacher": like, "images": len(samples)}


def mean_psnr(apply: Apply, params: Params, samples: list[Sample]) -> float:
    """Returns the mean PSNR over some images."""
    outputs = restore_all(apply, params, samples)
    return statistics.fmean(metrics.psnr(o, sample.gt) for o, sample in zip(outputs, samples, strict=True))


def restore_all(apply: Apply, params: Params, samples: list[Sample]) -> list[np.ndarray]:
    """Returns the restored images, in the order of the samples."""
    images, sigmas = [sample.lq for sample in samples], [sample.sigma for sample in samples]
    restored = dict(validation.restore(apply, jax.device_get(params), images, sigmas))
    return [restored[i] for i in range(len(samples))]


def write_results(study: Study, workdir: Path) -> str:
    """Writes the report of all runs that have a result; returns a one-line summary."""
    paths = [workdir / f"seed{seed}" / column / "result.json" for column, seed in study.runs]
    results = [result for path in paths if (result := _result(path))]
    if not results:
        return "no run has finished yet"
    ladder.write(study.name, results, workdir)
    return f"{len(results)} of {len(study.runs)} runs are finished: {workdir / 'results.md'}"


def _result(path: Path) -> dict[str, Any]:
    """Returns the result of a run; empty if there is none yet, or it is damaged and the run has to be repeated."""
    try:
        return read_json(path)
    except ValueError:
        return {}


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.study", __doc__)
    parser.add_config("base.", "configs/study_denoise.py")
    add = parser.add_argument
    add("--workdir", type=Path, metavar="DIR", help="folder of the study (default: studies/NAME)")
    add("--columns", nargs="+", metavar="NAME", help="train only these columns now (default: all)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options, values = make_parser().parse(arguments)
    commandline.start_logging()
    try:
        study = parse(values)
        sharding.use_all_cores(math.gcd(*(c.data.batch_size // c.train.accumulate for c in study.runs.values())))
        with cost.telling_out_of_memory():
            study = ready(study, options.columns)
            workdir = (options.workdir or Path("studies") / study.name).absolute()
            workdir.mkdir(parents=True, exist_ok=True)
            with locked(workdir):
                check_folder(workdir)
                commandline.start_logging(workdir)
                log.info(run(study, workdir, options.columns))
    except (ValueError, OSError, NonFiniteLoss, CheckpointError, DataError) as error:
        commandline.fail(str(error), alone=isinstance(error, CheckpointError))  # as in train
    except cost.OutOfMemory as error:
        advice = how_to_save_memory(next(iter(study.runs.values())), "config.base.")
        commandline.fail(f"out of memory: {error}. {advice}, or use fewer columns")


if __name__ == "__main__":
    commandline.run(main)
