"""The training loop: step, log, validate, save, for any number of students trained side by side.

A run has one student, a study several. They see the same batches, share one forward pass of the teacher, and are always
at the same step. Programs customise the loop by passing functions: `validate` and `is_whole`.

The order matters. Metrics are checked before they are written, and everything is written and validated before saving
the checkpoint that a killed run resumes from. So an interrupted run leaves the same files as an uninterrupted one.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

from kdjax import cost, distill, sharding
from kdjax.config import Config
from kdjax.models import Params
from kdjax.progress import Pace
from kdjax.signals import StopSignals
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.logbook import Logbook
from kdjax.training.preparation import Setup, open_batches

log = logging.getLogger("kdjax")

_T = TypeVar("_T")
States = dict[str, distill.State]  # by student
Values = dict[str, float]  # metrics of one step, by name
# (step, states) -> the PSNR that selects the best checkpoint, or None if a signal ended the validation early; equal on
# all processes.
Validate = Callable[[int, States], float | None]


class NonFiniteLoss(sharding.AgreedError):
    """The loss of `student`, or its gradient, is not finite; the message has the step and the values."""

    def __init__(self, student: str, message: str) -> None:
        super().__init__(message)
        self.student = student


def start(setups: Mapping[str, Setup], checkpoints: Checkpoints) -> States:
    """Returns the states from the newest checkpoint, or initial ones, on all devices.

    Raises:
      CheckpointError: if the checkpoint is not of these students.
    """
    mesh = _first(setups).mesh
    initial = {name: distill.init_state(setup.recipe, setup.student.params) for name, setup in setups.items()}
    states = sharding.replicate(initial, mesh)
    return states if checkpoints.latest is None else _by_name(setups, checkpoints.restore(_saved(states)))


def step_of(states: States) -> int:
    """Returns how many updates the students have had."""
    return int(_first(states).step)


def train(
    setups: Mapping[str, Setup],
    states: States,
    teacher_params: Params | None,
    *,
    logbooks: Mapping[str, Logbook],
    checkpoints: Checkpoints,
    stop: StopSignals,
    validate: Validate,
    is_whole: Callable[[int], bool] = lambda step: True,
) -> States:
    """Trains the students to the last step, or until a signal arrives, and saves their states.

    Args:
      setups: by student; all share data, batches, length and teacher.
      states: from `start`; their buffers are donated.
      teacher_params: None if no student needs a teacher.
      logbooks: by student, opened at the step of `states`.
      validate: called where `is_validated` says so. It writes `val/student_psnr` to every logbook.
      is_whole: whether all files that `validate` writes at a step exist, for a run that resumes there.

    Returns:
      The states at the last step, or where the signal arrived.

    Raises:
      NonFiniteLoss: if a student diverged; the last checkpoint is from before that.
      cost.OutOfMemory: if the step, a validation or the data needs more memory than there is.
      data.DataError: if hardly any training image can be read.
      CheckpointError: if a checkpoint cannot be written.
    """
    config, mesh = _first(setups).config, _first(setups).mesh
    recipes = {name: setup.recipe for name, setup in setups.items()}
    constants = {name: distill.make_frozen(recipe.terms, None)["terms"] for name, recipe in recipes.items()}
    frozen = sharding.replicate({"teacher": teacher_params, "terms": constants}, mesh)
    jitted = jax.jit(
        functools.partial(distill.joint_step, recipes), donate_argnums=0, out_shardings=sharding.replicated(mesh)
    )
    planned = cost.Planned(jitted, "a step" if len(setups) == 1 else f"a step of {len(setups)} students")
    step_fn = sharding.on_mesh(mesh, planned)
    diagnose_fns = {
        name: sharding.on_mesh(mesh, jax.jit(functools.partial(distill.diagnose, recipe)))
        for name, recipe in recipes.items()
    }
    key = sharding.replicate(jax.random.key(config.seed), mesh)
    step, steps = step_of(states), config.train.steps
    log.info(f"continuing at step {step:,}" if step else f"training {steps:,} steps")

    with (
        cost.telling_out_of_memory(lambda: planned.needs),
        open_batches(_first(setups), start_step=step) as batches,
    ):
        ended = False  # a signal to one of the processes ended a validation early
        if step and is_validated(config, step):
            validated = all([logbook.has(step, "val/student_psnr") for logbook in logbooks.values()])
            if not (validated and is_whole(step)):  # the validation was cut short, or its files are gone
                ended = validate(step, states) is None
        pending: list[tuple[int, dict[str, distill.Metrics]]] = []
        timer = StepTimer(config, step)
        stop_all = sharding.SharedFlag(mesh)
        while step < steps and not ended and not stop_all.update(stop.requested):
            batch = sharding.shard_batch(next(batches), mesh)
            logs = (step + 1) % config.log.every == 0
            diagnoses = {}
            if logs and config.log.diagnose:
                for name, diagnose in diagnose_fns.items():
                    own = {"teacher": frozen["teacher"], "terms": frozen["terms"][name]}
                    diagnoses[name] = diagnose(states[name], own, batch, key)
            states, metrics = step_fn(states, frozen, batch, key)
            step += 1
            pending.append((step, metrics))
            # Wait for the step before last, not for this one: the device never idles, and the host never runs far ahead
            # with batches in memory.
            jax.block_until_ready(pending[-3:][0][1])
            timer.count()

            validates = is_validated(config, step)
            saves = step % config.checkpoint.every == 0 or validates
            if not (logs or saves):
                continue
            values = fetch(pending)
            if logs:
                log.info(describe(step, setups, values, timer.pace))
                damaged = {name for names in sharding.exchange(list(batches.damaged)) for name in names}
                rate = {"images_per_second": timer.pace.rate, "damaged_images": float(len(damaged))}
                for name, logbook in logbooks.items():
                    logbook.write(step, values[name] | _on_host(diagnoses.get(name, {})) | rate)
            psnr = validate(step, states) if validates else None
            ended = validates and psnr is None
            if saves:
                checkpoints.save(step, _saved(states), psnr=psnr)
            timer.pace.restart()
        if pending:
            fetch(pending)
        checkpoints.save(step, _saved(states))  # if a signal arrived between two checkpoints
    return states


def is_validated(config: Config, step: int) -> bool:
    """Returns whether the students are validated after this step."""
    return step % config.val.every == 0 or step >= config.train.steps


def fetch(pending: list[tuple[int, dict[str, distill.Metrics]]]) -> dict[str, Values]:
    """Fetches the metrics pending on the device, and empties the list.

    Returns:
      The metrics of the last step, by student.

    Raises:
      NonFiniteLoss: if a student's loss or gradient was not finite at one of the steps.
    """
    fetched = jax.device_get(pending)
    pending.clear()
    for step, metrics in fetched:
        for student, own in metrics.items():
            if not own["finite"]:
                values = ", ".join(f"{name} {value:.6g}" for name, value in own.items() if name != "finite")
                raise NonFiniteLoss(
                    student,
                    f"step {step:,}: the loss or its gradient is not finite ({values}). Lower the learning rate, add"
                    " warm-up or gradient clipping, or check the data of this step; the checkpoints are from before it",
                )
    last = fetched[-1][1]
    return {student: _on_host({k: v for k, v in own.items() if k != "finite"}) for student, own in last.items()}


class StepTimer:
    """Times the steps of a run. `pace` counts images; the first step is excluded, as it is mostly compiling."""

    def __init__(self, config: Config, step: int) -> None:
        self._batch_size, self._is_first = config.data.batch_size, True
        self.pace = Pace(config.train.steps * self._batch_size, step * self._batch_size)
        self._started = time.monotonic()

    def count(self) -> None:
        """Counts one step."""
        self.pace.advance(self._batch_size)
        if self._is_first:
            log.info(f"first step after {time.monotonic() - self._started:.1f} s (compiled)")
            self.pace.restart()
            self._is_first = False


def describe(step: int, setups: Mapping[str, Setup], values: Mapping[str, Values], pace: Pace) -> str:
    """Formats a line with step, losses, speed and time left; a single student also shows terms and learning rate."""
    parts = [f"step {step:,}/{_first(setups).config.train.steps:,}"]
    for name, own in values.items():
        parts.append(f"{f'{name}: ' if len(values) > 1 else ''}loss {own['loss/total']:.5f}")
    if len(values) == 1:
        for term in _first(setups).config.terms:
            if f"loss/{term}" in own:
                parts.append(f"{term} {own[f'loss/{term}']:.5f} x{own[f'weight/{term}']:g}")
        parts.append(f"lr {own['lr']:.2e}")
    if pace.is_timed:
        parts += [f"{pace.rate:.1f} images/s", f"{pace.left()} left"]
    return "  ".join(parts)


def _first(by_name: Mapping[str, _T]) -> _T:
    """Returns the first value, standing for all students where they agree."""
    return next(iter(by_name.values()))


def _saved(states: States) -> distill.State | States:
    """Returns what a checkpoint stores: for a run its student's state, for a study all states by name."""
    return _first(states) if len(states) == 1 else states


def _by_name(setups: Mapping[str, Setup], saved: distill.State | States) -> States:
    return saved if isinstance(saved, dict) else dict.fromkeys(setups, saved)


def _on_host(values: distill.Metrics) -> Values:
    return {name: float(value) for name, value in jax.device_get(values).items()}
