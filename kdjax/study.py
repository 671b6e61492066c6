"""Compares ways of distilling with each other and with training without a teacher, over several seeds:

    python -m kdjax.study --config configs/study_denoise.py
    python -m kdjax.study --config configs/study_denoise.py --columns scratch output --config.seeds="(0, 1, 2)"

The config has a training config, `base`, and `columns`: name -> what that column changes in it. Runs of one seed have
the same initial weights, images, crops and noise, and those with the same data and length are trained together, in one
step with a single forward pass of the teacher. In the study's folder (studies/NAME by default):

    seed0/output/       config.json  metrics.jsonl  result.json  student.pth  student.safetensors
    results.json  results.md  results.png

A run that has its result is not run again, so columns and seeds can be added later; one that was interrupted
continues. `scratch` is the column that the others are compared with. A column with `compute_of="NAME"` is trained for
as many steps as make its multiply-accumulates those of column NAME.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import commandline, cost, distill, macs, metrics, models, sharding, train, validation
from kdjax import config as config_lib
from kdjax.config import Config, ConfigError
from kdjax.data import DataError
from kdjax.files import locked, read_json, whole_file, write_json, write_text
from kdjax.markdown import literal
from kdjax.names import nearest, pick
from kdjax.report import ladder
from kdjax.signals import Stopped, StopSignals
from kdjax.teacher.load import Teacher, load_teacher
from kdjax.training import preparation
from kdjax.training.checkpoint import CheckpointError, Checkpoints
from kdjax.training.logbook import Logbook, finite
from kdjax.training.monitor import Monitor
from kdjax.validation import Sample

log = logging.getLogger("kdjax")


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study: a training config for every column and seed."""

    name: str
    seeds: tuple[int, ...]
    curve_images: int  # on how many validation images the curve is measured; the result is measured on all
    runs: dict[tuple[str, int], Config]  # by column and seed
    compute_of: Mapping[str, str]  # column -> the column whose multiply-accumulates it has to get; see `ready`


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What every student is compared with: PSNR of teacher and input over the validation images, in dB, and the
    teacher's images."""

    teacher_psnr: float
    input_psnr: float
    teacher_outputs: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns that are trained together: all but the student, its losses and its learning is the same."""

    setups: dict[str, preparation.Setup]
    teacher: Teacher
    frozen: dict[str, Any]  # {"teacher": parameters, "terms": {column: constants of its terms}}
    samples: list[Sample]

    @property
    def first(self) -> preparation.Setup:
        """The setup that stands for all where they are the same."""
        return next(iter(self.setups.values()))

    @property
    def config(self) -> Config:
        return self.first.config

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.first.mesh

    def frozen_of(self, column: str) -> dict[str, Any]:
        """The constants of one column's step."""
        return {"teacher": self.frozen["teacher"], "terms": self.frozen["terms"][column]}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
    """The states of the students that are trained together, which are all at the same step."""

    step: jax.Array
    by_column: dict[str, distill.State]


def parse(values: Mapping[str, Any]) -> Study:
    """The study of a nested mapping with name, seeds, curve_images, base and columns.

    Raises:
      ValueError: an unknown key, no columns or seeds, or a column that is no valid training config.
    """
    wanted = ("name", "seeds", "curve_images", "base", "columns")
    for key in values:
        if key not in wanted:
            raise ConfigError(f"study key {key!r} does not exist{nearest(key, wanted)} (keys: {', '.join(wanted)})")
    columns, seeds = values.get("columns", {}), tuple(values.get("seeds", (0,)))
    if not columns or not seeds:
        raise ConfigError(f"a study needs columns and seeds, got {len(columns)} columns and seeds={seeds}")
    if not isinstance(values.get("base"), Mapping):
        raise ConfigError(f"study key 'base' is {values.get('base')!r}; it must be a training config, as in configs/")
    curve_images = values.get("curve_images", 16)
    if type(curve_images) is not int or curve_images < 1:
        raise ConfigError(f"study key 'curve_images' is {curve_images!r}; it must be a whole number, at least 1")
    compute_of = {column: changes["compute_of"] for column, changes in columns.items() if "compute_of" in changes}
    settings = {}
    for column, changes in columns.items():
        settings[column] = _merge(values["base"], {key: changes[key] for key in changes if key != "compute_of"})
    runs = {
        (column, seed): _parse_column(column, settings[column] | {"seed": seed, "name": column})
        for seed in seeds
        for column in columns
    }
    for column, other in compute_of.items():
        if other not in columns:
            raise ConfigError(
                f"column {column!r}: compute_of={other!r} is no column{nearest(other, columns)}"
                f" (columns: {', '.join(columns)})"
            )
        if other in compute_of:
            raise ConfigError(
                f"column {column!r}: compute_of={other!r}, which has a compute_of itself; name that column"
            )
    name = values.get("name", "study")
    config_lib.check_name(name, "study key 'name'")
    return Study(name, seeds, curve_images, runs, compute_of)


def ready(study: Study, columns: Sequence[str] | None = None) -> Study:
    """The study with every column's batch and steps as they are on these devices.

    A column with a `compute_of` gets as many steps as make its multiply-accumulates those of the other column.

    Args:
      columns: that will be trained; None for all.

    Raises:
      ValueError: there is no such column.
    """
    known = dict.fromkeys(column for column, _ in study.runs)
    for column in columns or ():
        pick(known, column, "column")
    runs = {key: preparation.on_these_devices(config) for key, config in study.runs.items()}
    first = study.seeds[0]
    for column, other in study.compute_of.items():
        if columns and column not in columns:
            continue
        factor = _compute(runs[other, first]) / _compute(runs[column, first])
        for seed in study.seeds:
            runs[column, seed] = _stretch(runs[column, seed], factor)
    return dataclasses.replace(study, runs=runs, compute_of={})


def check_folder(workdir: Path) -> None:
    """Refuses a folder whose files the study would replace.

    Raises:
      ConfigError: it has results of something else.
    """
    try:
        before = read_json(workdir / "results.json")
    except ValueError:  # emptied by a power cut, for example; it is written anew
        before = {}
    foreign = [name for name in ("results.json", "results.md", "results.png", "train.log") if (workdir / name).exists()]
    ours = "rows" in before and "results" in before
    if foreign and not ours and not list(workdir.glob("seed*/*/config.json")):
        raise ConfigError(
            f"{workdir} holds {', '.join(foreign)}, and no study of kdjax, which would replace them; give a new"
            " --workdir, or move these files away"
        )


def run(study: Study, workdir: Path, columns: Sequence[str] | None = None) -> str:
    """Trains what has no result yet and writes the tables; returns one line that says what came of it.

    Args:
      columns: train these alone; None trains all. The tables have all that have a result.

    Raises:
      Stopped: a signal came; the same command continues.
    """
    baselines: dict[str, Baseline] = {}
    with StopSignals() as stop:
        for seed in study.seeds:
            missing = {}
            for (column, of_seed), config in study.runs.items():
                wanted = of_seed == seed and (not columns or column in columns)
                if wanted and not is_finished(config, workdir / f"seed{seed}" / column):
                    missing[column] = config
            for group in _groups(missing):
                train_together(group, workdir / f"seed{seed}", study.curve_images, stop, baselines)
                write_results(study, workdir)
                if stop.requested:
                    raise Stopped(stop.name)
    return write_results(study, workdir)


def is_finished(config: Config, folder: Path) -> bool:
    """Whether the run in `folder` has its result.

    Raises:
      ConfigError: it is a run with another config, or the folder holds something else.
    """
    try:
        before = read_json(folder / "config.json")
        result = read_json(folder / "result.json")
    except ValueError as error:  # emptied by a power cut, for example
        log.warning(f"WARNING: {error}. This run is trained again")
        return False
    if not before:
        if foreign := [name for name in preparation.RUN_FILES if (folder / name).exists()]:
            raise ConfigError(
                f"{folder} holds {', '.join(foreign)}, and no config.json of a run, which would replace them; give a"
                " new --workdir, rename the column, or move these files away"
            )
        return False
    with contextlib.suppress(ConfigError):  # a key that is new since then has its default
        before = config_lib.to_dict(config_lib.parse(before))
    # What is logged, and how often a checkpoint is written, changes nothing.
    changes = [c for c in config_lib.changes(before, config_lib.to_dict(config)) if not c.startswith(("log.", "check"))]
    if changes:
        raise ConfigError(
            f"{folder} holds a run with another config ({'; '.join(changes)}); give a new --workdir, rename the column,"
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
    """Trains the columns of a group to their end, or until a signal, and writes their results.

    `baselines` keeps what was measured of the teacher for the next group: a large one takes minutes.

    Raises:
      ValueError, OSError: a config cannot be carried out.
      train.NonFiniteLoss: a student diverged.
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
    if int(states.step) == config.train.steps:
        results = {c: make_result(group, c, states.by_column[c], baseline, folder / c) for c in configs}
        # All at once: columns that have their result leave the group, and the others' checkpoint goes by its name.
        for column, result in results.items():
            write_json(folder / column / "result.json", result)
        shutil.rmtree(checkpoint_folder)


def make_group(configs: Mapping[str, Config]) -> Group:
    """Networks and data of the columns; one teacher, whether or not the first column needs it."""
    setups = {column: preparation.prepare(config) for column, config in configs.items()}
    first = next(iter(setups.values()))
    teacher = load_teacher(first.config.teacher, first.student)
    terms = {column: distill.make_frozen(s.recipe.terms, None)["terms"] for column, s in setups.items()}
    frozen = sharding.replicate({"teacher": teacher.params, "terms": terms}, first.mesh)
    samples = Monitor(first.config.val, first.student, teacher).samples
    return Group(setups, teacher, frozen, samples)


def train_group(group: Group, folder: Path, checkpoints: Checkpoints, curve_images: int, stop: StopSignals) -> States:
    """The loop of `train.train` for several students at once; returns their states at the last step, or at a signal."""
    config, mesh = group.config, group.mesh
    recipes = {column: setup.recipe for column, setup in group.setups.items()}
    jitted = jax.jit(functools.partial(joint_step, recipes), donate_argnums=0, out_shardings=sharding.replicated(mesh))
    planned = cost.Planned(jitted, f"a step of {len(recipes)} columns")
    step_fn = sharding.on_mesh(mesh, planned)
    diagnose_fns = {column: jax.jit(functools.partial(distill.diagnose, recipe)) for column, recipe in recipes.items()}
    key = sharding.replicate(jax.random.key(config.seed), mesh)
    by_column = {column: distill.init_state(s.recipe, s.student.params) for column, s in group.setups.items()}
    states = sharding.replicate(States(next(iter(by_column.values())).step.copy(), by_column), mesh)
    if checkpoints.latest is not None:
        states = checkpoints.restore(states)
    step, started = int(states.step), time.monotonic()
    curve_samples = group.samples[:: max(1, len(group.samples) // curve_images)][:curve_images]
    pending: dict[str, list[tuple[int, distill.Metrics]]] = {column: [] for column in recipes}

    def fetch(column: str) -> dict[str, float]:
        """As `train.fetch`, with a message that says which of the students diverged."""
        try:
            return train.fetch(pending[column])
        except train.NonFiniteLoss as error:
            raise train.NonFiniteLoss(f"column {column!r}, seed {config.seed}: {error}") from None

    with contextlib.ExitStack() as stack:
        stack.enter_context(cost.telling_out_of_memory(lambda: planned.needs))
        logbooks = {}
        for column, setup in group.setups.items():
            (folder / column).mkdir(parents=True, exist_ok=True)
            write_json(folder / column / "config.json", config_lib.to_dict(setup.config))
            logbook = Logbook(folder / column, resume_step=step, name=column, tensorboard=False, wandb="")
            logbooks[column] = stack.enter_context(logbook)
        batches = stack.enter_context(preparation.open_batches(group.first, start_step=step))
        while step < config.train.steps and not stop.requested:
            batch = sharding.shard_batch(next(batches), mesh)
            logs = (step + 1) % config.log.every == 0
            diagnoses = {}
            if logs and config.log.diagnose:
                for column, diagnose in diagnose_fns.items():
                    diagnoses[column] = diagnose(states.by_column[column], group.frozen_of(column), batch, key)
            states, metrics_by_column = step_fn(states, group.frozen, batch, key)
            step += 1
            for column, values in metrics_by_column.items():
                pending[column].append((step, values))
            jax.block_until_ready(pending[column][-3:][0][1])  # as in `train.train`
            validates = train.is_validated(config, step)
            saves = step % config.checkpoint.every == 0 or validates
            if not (logs or saves):
                continue
            for column, logbook in logbooks.items():
                values = fetch(column)
                if logs:
                    diagnosis = jax.device_get(diagnoses.get(column, {}))
                    logbook.write(step, values | {name: float(value) for name, value in diagnosis.items()})
            log.info(f"step {step:,}/{config.train.steps:,} after {time.monotonic() - started:.0f} s")
            if validates:
                for column, logbook in logbooks.items():
                    psnr = mean_psnr(recipes[column].student, states.by_column[column].params_ema, curve_samples)
                    logbook.write(step, {"val/student_psnr": psnr})
                    log.info(f"  {column}: {psnr:.3f} dB on {len(curve_samples)} images")
            if saves:
                checkpoints.save(states)
        for column in recipes:
            if pending[column]:
                fetch(column)
        checkpoints.save(states)  # where a signal came between two checkpoints
    return states


def make_result(group: Group, column: str, state: distill.State, baseline: Baseline, folder: Path) -> dict[str, Any]:
    """Writes a finished student, and returns the account of its run."""
    setup = group.setups[column]
    train.export(setup.student, state.params_ema, folder)
    result = measure(setup.recipe.student, state.params_ema, group.samples, baseline.teacher_outputs)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    result |= {
        "teacher_psnr": baseline.teacher_psnr,
        "input_psnr": baseline.input_psnr,
        "column": column,
        "seed": setup.config.seed,
        "steps": setup.config.train.steps,
        "macs_per_step": step_macs(setup, state, group.frozen_of(column), preparation.batch_shapes(setup)),
        "teacher": group.teacher.identity,
        "student": preparation.describe(setup.student),
        "curve": [[row["step"], row["val/student_psnr"]] for row in rows if "val/student_psnr" in row],
    }
    log.info(f"{column}, seed {setup.config.seed}: {result['psnr']:.3f} dB")
    return finite(result)


def joint_step(
    recipes: Mapping[str, distill.Recipe],
    states: States,
    frozen: Mapping[str, Any],
    batch: distill.Batch,
    key: jax.Array,
) -> tuple[States, dict[str, distill.Metrics]]:
    """One update of every student, from one batch and one forward pass of the teacher."""
    steps = [states.by_column[column].step for column in recipes]
    scene = distill.observe(recipes.values(), steps, frozen, batch, key)
    updated, metrics_by_column = {}, {}
    for column, recipe in recipes.items():
        state = states.by_column[column]
        constants = {"teacher": frozen["teacher"], "terms": frozen["terms"][column]}
        updated[column], metrics_by_column[column] = distill.learn(recipe, state, constants, scene)
    return States(states.step + 1, updated), metrics_by_column


def step_macs(setup: preparation.Setup, state: distill.State, frozen: Mapping[str, Any], batch: distill.Batch) -> int:
    """Multiply-accumulates of one step of this run on its own, with the measuring of shares spread over the steps."""

    def count(recipe: distill.Recipe, state: distill.State) -> int:
        return macs.count(functools.partial(distill.train_step, recipe), state, frozen, batch, jax.random.key(0))

    terms = tuple(dataclasses.replace(term, share=0.0) for term in setup.recipe.terms)
    plain = count(dataclasses.replace(setup.recipe, terms=terms), dataclasses.replace(state, balance={}))
    if not state.balance:
        return plain
    return plain + (count(setup.recipe, state) - plain) // distill.SHARES_EVERY


def measure_baseline(samples: list[Sample], teacher: Teacher) -> Baseline:
    """What the teacher makes of the validation images."""
    outputs = restore_all(teacher.apply_float32, teacher.params, samples)
    scored = statistics.fmean(metrics.psnr(o, sample.gt) for o, sample in zip(outputs, samples, strict=True))
    return Baseline(scored, validation.input_score(samples).psnr, outputs)


def measure(
    apply: models.Apply, params: models.Params, samples: list[Sample], teacher_outputs: list[np.ndarray]
) -> dict[str, float]:
    """What a finished student reaches on all validation images."""
    outputs = restore_all(apply, params, samples)
    score = validation.mean_score([validation.score(o, s.gt) for o, s in zip(outputs, samples, strict=True)])
    like = statistics.fmean(metrics.psnr(ours, theirs) for ours, theirs in zip(outputs, teacher_outputs, strict=True))
    return {"psnr": score.psnr, "ssim": score.ssim, "psnr_student_teacher": like, "images": len(samples)}


def mean_psnr(apply: models.Apply, params: models.Params, samples: list[Sample]) -> float:
    """The mean PSNR over some images."""
    outputs = restore_all(apply, params, samples)
    return statistics.fmean(metrics.psnr(o, sample.gt) for o, sample in zip(outputs, samples, strict=True))


def restore_all(apply: models.Apply, params: models.Params, samples: list[Sample]) -> list[np.ndarray]:
    """The restored images, in the order of the samples."""
    restored = dict(validation.restore(apply, jax.device_get(params), [sample.lq for sample in samples]))
    return [restored[i] for i in range(len(samples))]


def write_results(study: Study, workdir: Path) -> str:
    """Writes the account of all runs that have a result; returns one line about it."""
    paths = [workdir / f"seed{seed}" / column / "result.json" for column, seed in study.runs]
    results = [result for path in paths if (result := _result(path))]
    if not results:
        return "no run has finished yet"
    teacher_psnr = statistics.fmean(result["teacher_psnr"] for result in results)
    input_psnr = statistics.fmean(result["input_psnr"] for result in results)
    rows = ladder.summarise(results, teacher_psnr)
    write_json(
        workdir / "results.json",
        finite(
            {
                "teacher_psnr": teacher_psnr,
                "input_psnr": input_psnr,
                "rows": [dataclasses.asdict(row) for row in rows],
                "results": results,
            }
        ),
    )
    table = ladder.markdown(rows, teacher_psnr=teacher_psnr, input_psnr=input_psnr)
    student, teacher = literal(results[0]["student"]), literal(results[0]["teacher"])
    about = f"{student}; {results[0]['images']} validation images; teacher {teacher}."
    write_text(workdir / "results.md", f"# {literal(study.name)}\n\n{table}\nStudent: {about}\n")
    try:
        with whole_file(workdir / "results.png") as temporary:
            ladder.plot(rows, results, temporary, teacher_psnr=teacher_psnr)
    except ImportError:
        log.info("no picture: matplotlib is not installed (pip install 'kdjax[plot]')")
    return f"{len(results)} of {len(study.runs)} runs have a result: {workdir / 'results.md'}"


def _result(path: Path) -> dict[str, Any]:
    """The result of a run; empty where there is none yet, or a damaged one, whose run is trained again."""
    try:
        return read_json(path)
    except ValueError:
        return {}


def _groups(configs: Mapping[str, Config]) -> Iterable[dict[str, Config]]:
    """The columns that can be trained in one step: all but the student, its losses and its learning is the same."""
    groups: dict[str, dict[str, Config]] = {}
    for column, config in configs.items():
        values = config_lib.to_dict(config)
        student = models.network(config.student.arch, config.student.hparams)
        shared = {key: values[key] for key in ("seed", "teacher", "degrade", "data", "val")}
        shared |= {"steps": config.train.steps, "log": values["log"], "every": values["checkpoint"]}
        shared |= {"channels": student.channels, "scale": student.scale}
        groups.setdefault(json.dumps(shared, sort_keys=True), {})[column] = config
    return groups.values()


def _compute(config: Config) -> int:
    """Multiply-accumulates of the whole training."""
    setup = preparation.prepare(config)
    state = distill.init_state(setup.recipe, setup.student.params)
    frozen = distill.make_frozen(setup.recipe.terms, setup.teacher and setup.teacher.params)
    return config.train.steps * step_macs(setup, state, frozen, preparation.batch_shapes(setup))


def _parse_column(column: str, settings: Mapping[str, Any]) -> Config:
    """As `kdjax.config.parse`, whose errors then name the column."""
    try:
        return config_lib.parse(settings)
    except ConfigError as error:
        raise ConfigError(f"column {column!r}: {error}") from None


def _stretch(config: Config, factor: float) -> Config:
    """The config with `factor` times the steps, and its learning rate's schedule stretched as well."""
    rate = config.train.lr
    if isinstance(rate, dict):
        stretch: Callable[[int], int] = lambda count: round(count * factor)  # noqa: E731
        rate = dict(rate)
        for key in ("steps", "milestones", "boundaries"):
            if key in rate:
                rate[key] = stretch(rate[key]) if key == "steps" else tuple(map(stretch, rate[key]))
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=round(config.train.steps * factor), lr=rate)
    )


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the `changes`, group by group."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.study", __doc__)
    parser.add_config("base.", "configs/study_denoise.py")
    add = parser.add_argument
    add("--workdir", type=Path, metavar="DIR", help="folder of the study (default: studies/NAME)")
    add("--columns", nargs="+", metavar="NAME", help="train these columns alone, now (default: all)")
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
    except (ValueError, OSError, train.NonFiniteLoss, CheckpointError, DataError) as error:
        commandline.fail(str(error), alone=isinstance(error, CheckpointError))  # as in train
    except cost.OutOfMemory as error:
        advice = train.how_to_save_memory(next(iter(study.runs.values())), "config.base.")
        commandline.fail(f"out of memory: {error}. {advice}, or have fewer columns")


if __name__ == "__main__":
    commandline.run(main)
