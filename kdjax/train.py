"""Trains a student or, without distillation terms, a teacher:

    python -m kdjax.train --config configs/denoise.py [--workdir DIR] [--config.train.steps=N ...]

`kdjax.training.preparation` turns the config into data, networks and the step's recipe, and `kdjax.training.loop`
trains. Running the same command again resumes from the last checkpoint. The run's folder contains:

    config.json      the whole config          train.log       what was printed
    metrics.jsonl    metrics by step           checkpoints/    the state: the latest ones and the best
    val/STEP/*.png   input | student | teacher | clean
    student.pth, student.safetensors           the EMA student, at the end
"""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax

from kdjax import commandline, cost, data, sharding
from kdjax import config as config_lib
from kdjax.commandline import fail
from kdjax.config import ConfigError
from kdjax.files import write_json
from kdjax.signals import Stopped, StopSignals
from kdjax.training import agreement, folder, loop, preparation
from kdjax.training.advice import how_to_save_memory
from kdjax.training.checkpoint import CheckpointError, Checkpoints
from kdjax.training.logbook import Logbook
from kdjax.training.monitor import Monitor
from kdjax.training.preparation import Setup
from kdjax.weights import WeightsError

log = logging.getLogger("kdjax")

_STUDENT = "student"  # the name of the only student


def train(setup: Setup, monitor: Monitor, workdir: Path) -> str:
    """Trains to the last step and returns a one-line summary of the result.

    Raises:
      Stopped: if a signal arrived; the state has been saved.
      ConfigError: if `workdir` holds a run with another student or teacher.
      loop.NonFiniteLoss, cost.OutOfMemory, data.DataError: see `loop.train`.
    """
    config, setups = setup.config, {_STUDENT: setup}

    def result_of(step: int) -> dict[str, object]:
        """Returns the result of the finished run, if all its files exist."""
        return sharding.exchange(folder.finished_result(workdir, step) if sharding.is_first() else {})[0]

    with StopSignals() as stop, Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        if checkpoints.latest is not None:
            folder.check_same_run(setup, workdir)
        states = loop.start(setups, checkpoints)
        if sharding.is_first():
            write_json(workdir / "run.json", folder.identity(setup))
            write_json(workdir / "config.json", config_lib.to_dict(config))
            preparation.report(setup)
            monitor.report()
            if setup.teacher and not setup.teacher.can_run:
                preparation.check_answers(setup)
        with Logbook(
            workdir,
            resume_step=loop.step_of(states),
            name=config.name,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
        ) as logbook:

            def validate(step: int, states: loop.States) -> float | None:
                """Returns the student's PSNR, or None on a signal; at the last step also writes the result files."""
                params = states[_STUDENT].params_ema
                psnr = monitor.validate(step, params, workdir, logbook, keep_going=lambda: not stop.requested)
                if psnr is not None and step >= config.train.steps and sharding.is_first():
                    folder.export(setup.student, params, workdir)
                    summary = f"step {step:,}: {monitor.summary()} (PSNR / SSIM)"
                    write_json(workdir / "result.json", {"step": step, "summary": summary})
                return psnr

            states = loop.train(
                setups,
                states,
                setup.teacher.params if setup.teacher and setup.recipe.teacher else None,
                logbooks={_STUDENT: logbook},
                checkpoints=checkpoints,
                stop=stop,
                validate=validate,
                is_whole=lambda step: step < config.train.steps or bool(result_of(step)),
            )
    step = loop.step_of(states)
    result = result_of(step)
    if not result:
        signal_name = next(filter(None, sharding.exchange(stop.name)), "")
        raise Stopped(signal_name, f"at step {step:,} of {config.train.steps:,}")
    return f"{result['summary']}; saved as {workdir / 'student.pth'} and .safetensors"


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.train", __doc__)
    parser.add_config()
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--coordinator-address", default="", metavar="HOST:PORT",
        help="address of process 0, for several processes without a launcher",
    )  # fmt: skip
    parser.add_processes("of the run; 1 ignores any launcher")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options, values = make_parser().parse(arguments)
    commandline.start_logging()  # no log file yet: a rejected config must write nothing
    try:
        joined = sharding.connect(options.coordinator_address, options.num_processes, options.process_id)
    except sharding.ProcessError as error:
        fail(str(error))
    process = jax.process_index() if joined else 0
    commandline.start_logging(process=process)
    problem, workdir = "", Path()
    try:
        config = config_lib.parse(values)
        if not joined:  # all processes need equal numbers of devices, whatever their hosts have
            sharding.use_all_cores(config.data.batch_size // config.train.accumulate)
        config = preparation.on_these_devices(config)
        with cost.telling_out_of_memory():
            setup = preparation.prepare(config)
            monitor = Monitor(
                config.val, setup.student, setup.teacher if setup.teacher and setup.teacher.can_run else None
            )
        workdir = (options.workdir or Path("runs") / config.name).absolute()
    except (ValueError, OSError) as error:  # caused by the user's input; a traceback would hide the message
        problem = str(error)
    except cost.OutOfMemory as error:
        problem = f"out of memory: {error}. {how_to_save_memory(config)}"
    try:
        agreement.check(problem, lambda: agreement.shared_facts(setup, monitor), workdir)
        with agreement.one_writer(workdir, lambda: folder.claim(setup, workdir)):
            commandline.start_logging(workdir, process=process)
            log.info(train(setup, monitor, workdir))
    except Stopped as stopped:
        log.info(stopped)
        sys.exit(stopped.exit_code)
    except (sharding.AgreedError, ConfigError) as error:  # raised on all processes
        fail(str(error))
    except cost.OutOfMemory as error:
        fail(f"out of memory: {error}. {how_to_save_memory(config)}", alone=jax.process_count() > 1)
    except (CheckpointError, WeightsError, data.DataError, data.ImageError, OSError) as error:
        _fail_if_another_is_lost(error)  # in the middle of a checkpoint
        cause = error.__cause__ if isinstance(error, data.ImageError) else error  # a validation image
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        more = f": make room in {workdir}; run the same command to continue" if full else ""
        # Exit at once if a checkpoint could not be written: Orbax may wait minutes for parts of it.
        fail(f"{error}{more}", alone=jax.process_count() > 1 or isinstance(error, CheckpointError))
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        _fail_if_another_is_lost(error)
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}", alone=True)


def _fail_if_another_is_lost(error: BaseException) -> None:
    if sharding.lost_another(error):
        fail(
            "another process of this run ended, or its host is unreachable; see what it printed. Restart all of them"
            f" with the same command to continue from the last checkpoint. ({error})",
            alone=True,
        )


if __name__ == "__main__":
    commandline.run(main)
