"""Trains a student, or without distillation terms a teacher:

    python -m kdjax.train --config configs/denoise.py [--workdir DIR] [--config.train.steps=N ...]

`kdjax.training.preparation` turns the config into data, networks and the recipe of the step; here is the loop of step,
log, validate, save. The same command started again continues from the last checkpoint. In the run's folder:

    config.json      the whole config          train.log       what was printed
    metrics.jsonl    the numbers by step       checkpoints/    the state: the latest ones and the best
    val/STEP/*.png   input | student | teacher | clean
    student.pth, student.safetensors           the EMA student, at the end
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax

from kdjax import commandline, cost, data, distill, models, sharding
from kdjax import config as config_lib
from kdjax.commandline import fail
from kdjax.config import Config, ConfigError
from kdjax.files import read_json, write_json
from kdjax.progress import clock
from kdjax.signals import Stopped, StopSignals
from kdjax.terms import needs_teacher
from kdjax.training import agreement, preparation
from kdjax.training.checkpoint import CheckpointError, Checkpoints
from kdjax.training.logbook import Logbook
from kdjax.training.monitor import Monitor
from kdjax.training.preparation import Setup, check_same_run, identity, open_batches, report
from kdjax.weights import WeightsError, save_model

log = logging.getLogger("kdjax")

STUDENT_SUFFIXES = (".pth", ".safetensors")


class NonFiniteLoss(sharding.AgreedError):
    """The loss or its gradient is not a finite number; the message has the step and every value."""


def train(setup: Setup, monitor: Monitor, workdir: Path) -> str:
    """Trains to the last step, and returns one line that says what came of it.

    Raises:
      Stopped: a signal came; the state is saved.
      NonFiniteLoss: the run diverged; its last checkpoint is from before.
      ConfigError: `workdir` holds a run with another student or teacher.
      cost.OutOfMemory: the step, a validation or the data takes more memory than there is.
      data.DataError: hardly any training image can be read.
    """
    config, recipe = setup.config, setup.recipe
    state = sharding.replicate(distill.init_state(recipe, setup.student.params), setup.mesh)
    teacher_params = setup.teacher.params if recipe.teacher else None
    frozen = sharding.replicate(distill.make_frozen(recipe.terms, teacher_params), setup.mesh)
    on_mesh = functools.partial(sharding.on_mesh, setup.mesh)
    replicated = sharding.replicated(setup.mesh)
    train_step = functools.partial(distill.train_step, recipe)
    planned = cost.Planned(jax.jit(train_step, donate_argnums=0, out_shardings=replicated), "a step")
    step_fn = on_mesh(planned)
    diagnose_fn = on_mesh(jax.jit(functools.partial(distill.diagnose, recipe)))
    key = sharding.replicate(jax.random.key(config.seed), setup.mesh)

    def result_of(step: int) -> dict[str, object]:
        """What is known of the finished run, if all its files are there."""
        return sharding.exchange(finished_result(workdir, step) if sharding.is_first() else {})[0]

    with StopSignals() as stop, Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        if checkpoints.latest is not None:
            check_same_run(setup, workdir)
            state = checkpoints.restore(state)
        step = int(state.step)
        if sharding.is_first():
            write_json(workdir / "run.json", identity(setup))
            write_json(workdir / "config.json", config_lib.to_dict(config))
            report(setup)
            monitor.report()
        log.info(f"continuing at step {step:,}" if step else f"training {config.train.steps:,} steps")
        with (
            open_batches(setup, start_step=step) as batches,
            Logbook(
                workdir,
                resume_step=step,
                name=config.name,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
            ) as logbook,
            cost.telling_out_of_memory(lambda: planned.needs),
        ):

            def validate() -> float | None:
                """The student's PSNR; at the last step also the files of the result. None when a signal came."""
                psnr = monitor.validate(step, state.params_ema, workdir, logbook, keep_going=lambda: not stop.requested)
                if psnr is not None and step >= config.train.steps and sharding.is_first():
                    export(setup.student, state.params_ema, workdir)
                    summary = f"step {step:,}: {monitor.summary()} (PSNR / SSIM)"
                    write_json(workdir / "result.json", {"step": step, "summary": summary})
                return psnr

            ended = False  # in the middle of a validation, by a signal to one of the processes
            has_files = step < config.train.steps or bool(result_of(step))
            if step and is_validated(config, step) and not (logbook.has(step, "val/student_psnr") and has_files):
                ended = validate() is None  # which was ended before, or whose files are gone
            pending: list[tuple[int, distill.Metrics]] = []
            progress = Progress(step, config)
            stop_all = sharding.SharedFlag(setup.mesh)
            while step < config.train.steps and not ended and not stop_all.update(stop.requested):
                batch = sharding.shard_batch(next(batches), setup.mesh)
                logs = (step + 1) % config.log.every == 0
                diagnosis = diagnose_fn(state, frozen, batch, key) if logs and config.log.diagnose else {}
                state, metrics = step_fn(state, frozen, batch, key)
                step += 1
                pending.append((step, metrics))
                # Wait for the step before last, not for this one: the device never idles, and the host never runs
                # far ahead with batches in memory.
                jax.block_until_ready(pending[-3:][0][1])
                progress.count(step)

                # The order matters: numbers are checked before they are saved, and everything is written before the
                # checkpoint from which a killed run would continue after it.
                validates = is_validated(config, step)
                saves = step % config.checkpoint.every == 0 or validates
                if logs or saves:
                    values = fetch(pending)
                if logs:
                    log.info(progress.line(values))
                    damaged = {name for names in sharding.exchange(list(batches.damaged)) for name in names}
                    rate = {"images_per_second": progress.rate, "damaged_images": float(len(damaged))}
                    more = {name: float(value) for name, value in jax.device_get(diagnosis).items()}
                    logbook.write(step, values | more | rate)
                psnr = validate() if validates else None
                ended = validates and psnr is None
                if saves:
                    checkpoints.save(state, psnr=psnr)
                if logs or saves:
                    progress.restart()
            if pending:
                fetch(pending)
            checkpoints.save(state)  # where a signal came between two checkpoints
    result = result_of(step)
    if not result:
        signal_name = next(filter(None, sharding.exchange(stop.name)), "")
        raise Stopped(signal_name, f"at step {step:,} of {config.train.steps:,}")
    return f"{result['summary']}; saved as {workdir / 'student.pth'} and .safetensors"


def finished_result(workdir: Path, step: int) -> dict[str, object]:
    """What `result.json` says of a run that ended at this step; empty where a file of the result is missing."""
    try:
        result = read_json(workdir / "result.json")
    except ValueError as error:  # emptied by a power cut, for example; it is written again
        log.warning(f"WARNING: {error}")
        return {}
    whole = all((workdir / f"student{suffix}").is_file() for suffix in STUDENT_SUFFIXES)
    return result if whole and result.get("step") == step else {}


def is_validated(config: Config, step: int) -> bool:
    """Whether the student is validated after this step."""
    return step % config.val.every == 0 or step >= config.train.steps


def export(student: models.Model, params: models.Params, workdir: Path) -> None:
    """Writes the student with these parameters as `student.pth` and `student.safetensors`."""
    trained = dataclasses.replace(student, params=jax.device_get(params))
    for suffix in STUDENT_SUFFIXES:
        save_model(trained, workdir / f"student{suffix}")


def fetch(pending: list[tuple[int, distill.Metrics]]) -> dict[str, float]:
    """Fetches what the device reported since the last call and empties the list; returns the last step's numbers.

    Raises:
      NonFiniteLoss: at one of the steps the loss or the gradient was not finite.
    """
    fetched = jax.device_get(pending)
    pending.clear()
    for step, metrics in fetched:
        if not metrics["finite"]:
            values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items() if name != "finite")
            raise NonFiniteLoss(
                f"step {step:,}: the loss or its gradient is not finite ({values}). Lower the learning rate, add"
                " warm-up or gradient clipping, or look at the data of this step; the checkpoints are from before"
            )
    return {name: float(value) for name, value in fetched[-1][1].items() if name != "finite"}


class Progress:
    """How fast the run is, and its line in the log."""

    def __init__(self, step: int, config: Config) -> None:
        self._steps, self._batch_size = config.train.steps, config.data.batch_size
        self._weights_shown = tuple(config.terms)
        self._first = step + 1
        self._compiling_since = time.monotonic()
        self.rate = float("nan")
        self.restart()

    def restart(self) -> None:
        """Starts timing anew, after work that is not training."""
        self._since, self._counted = time.monotonic(), 0

    def count(self, step: int) -> None:
        """Counts a step; the first one only tells how long compiling took."""
        self._step = step
        if step == self._first:
            log.info(f"first step after {time.monotonic() - self._compiling_since:.1f} s (compiled)")
            self.restart()
            return
        self._counted += 1
        self.rate = self._counted * self._batch_size / (time.monotonic() - self._since)

    def line(self, values: dict[str, float]) -> str:
        """One line with step, loss terms, weights, learning rate, speed and time left."""
        parts = [f"step {self._step:,}/{self._steps:,}", f"loss {values['loss/total']:.5f}"]
        for name in self._weights_shown:
            if f"loss/{name}" in values:
                parts.append(f"{name} {values[f'loss/{name}']:.5f} x{values[f'weight/{name}']:g}")
        parts.append(f"lr {values['lr']:.2e}")
        if self.rate == self.rate:  # not nan: at least one step was timed
            left = clock((self._steps - self._step) * self._batch_size / self.rate)
            parts += [f"{self.rate:.1f} images/s", f"{left} left"]
        return "  ".join(parts)


def shared_facts(setup: Setup, monitor: Monitor) -> dict[str, object]:
    """What must be the same on all processes of a run: options, versions, and digests of what was read from files."""
    names: dict[str, object] = {
        what: f"{len(found)}, digest {agreement.digest(found)}"
        for what, found in (
            ("training images", [pair.name for pair in setup.pairs]),
            ("unlabelled images", [pair.name for pair in setup.unlabelled]),
            ("unpaired images", [pair.name for pair in setup.unpaired]),
            ("validation images", [sample.name for sample in monitor.samples]),
        )
    }
    names["cached samples"] = setup.cache and setup.cache.samples
    terms = [(term.loss.frozen, term.loss.adapters) for term in setup.recipe.terms]
    weights = {"initial weights": agreement.digest(jax.tree.leaves((setup.student.params, terms)))}
    versions = {"jax": jax.__version__, "device": jax.local_devices()[0].device_kind}
    return {"config": config_lib.to_dict(setup.config)} | identity(setup) | names | weights | versions


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.train", __doc__)
    parser.add_config()
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--coordinator-address", default="", metavar="HOST:PORT",
        help="of process 0, for several processes without a launcher",
    )  # fmt: skip
    parser.add_processes("the run has; 1 stays alone under any launcher")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options, values = make_parser().parse(arguments)
    commandline.start_logging()  # without a file: nothing is written for a config that is refused
    try:
        joined = sharding.connect(options.coordinator_address, options.num_processes, options.process_id)
    except sharding.ProcessError as error:
        fail(str(error))
    process = jax.process_index() if joined else 0
    commandline.start_logging(process=process)
    problem, workdir = "", Path()
    try:
        config = config_lib.parse(values)
        if not joined:  # several processes must have equal numbers of devices, whatever their hosts are
            sharding.use_all_cores(config.data.batch_size // config.train.accumulate)
        config = preparation.on_these_devices(config)
        with cost.telling_out_of_memory():
            setup = preparation.prepare(config)
            monitor = Monitor(config.val, setup.student, setup.teacher)
        workdir = (options.workdir or Path("runs") / config.name).absolute()
    except (ValueError, OSError) as error:  # what the user gave; a traceback would hide the message
        problem = str(error)
    except cost.OutOfMemory as error:
        problem = f"out of memory: {error}. {how_to_save_memory(config)}"
    try:
        agreement.check(problem, lambda: shared_facts(setup, monitor), workdir)
        with agreement.one_writer(workdir, lambda: preparation.claim(setup, workdir)):
            commandline.start_logging(workdir, process=process)
            log.info(train(setup, monitor, workdir))
    except Stopped as stopped:
        log.info(stopped)
        sys.exit(stopped.exit_code)
    except (sharding.AgreedError, ConfigError) as error:  # which all processes meet
        fail(str(error))
    except cost.OutOfMemory as error:
        fail(f"out of memory: {error}. {how_to_save_memory(config)}", alone=jax.process_count() > 1)
    except (CheckpointError, WeightsError, data.DataError, data.ImageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, data.ImageError) else error  # a picture of the validation
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        more = f": make room for {workdir}; the same command continues" if full else ""
        # At once after a checkpoint that was not written: Orbax may wait for parts of it for minutes.
        fail(f"{error}{more}", alone=jax.process_count() > 1 or isinstance(error, CheckpointError))
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        if sharding.lost_another(error):
            fail(
                "another process of this run has ended, or its host cannot be reached; look at what it printed. Start"
                f" all of them again with the same command to continue from the last checkpoint. ({error})",
                alone=True,
            )
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}", alone=True)


def how_to_save_memory(config: Config, prefix: str = "config.") -> str:
    """What the user can change, what costs least first; flags begin with `prefix`."""
    parts, asks_teacher = config.train.accumulate, needs_teacher(config.terms) and not config.teacher.cache
    ways = [
        f"train.accumulate={2 * parts} (the batch in {2 * parts} parts, one after another, with the same update)",
        "student.remat=True (activations are computed again in place of kept)" * (not config.student.remat),
        "teacher.dtype=bfloat16" * (asks_teacher and config.teacher.dtype != "bfloat16"),
        "teacher.cache=DIR, from python -m kdjax.cache" * asks_teacher,
        f"a smaller data.batch_size (now {config.data.batch_size}) or data.crop (now {config.data.crop})",
        f"a smaller data.cache_mb (now {config.data.cache_mb})" * (jax.default_backend() == "cpu"),
    ]
    return f"Set with --{prefix}KEY=VALUE: {'; '.join(filter(None, ways))}. See docs/memory.md"


if __name__ == "__main__":
    commandline.run(main)
