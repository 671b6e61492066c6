"""The training step: teacher, student, every loss term, gradients, optimizer and EMA in one pure function.

    total loss = sum over terms of weight(step) x value(student, teacher, batch)

A term is a name, a function and a weight schedule. The step knows no files, no config object and no model classes:
`Recipe` holds the functions, `State` the arrays that change. The teacher's parameters are an argument of the step;
they are never in the state, the optimizer or a checkpoint. The caller jits:

    step = jax.jit(functools.partial(train_step, recipe), donate_argnums=0)
    state, metrics = step(state, teacher_params, batch, key)

A batch has `gt` (b, h, w, c), uint8 or float in [0, 1], and either `lq` (the same, h and w over the scale) or `index`
(b,), the global numbers of its samples, from which the noise is drawn: the noise of a sample depends on the key and
its number only, not on devices, processes or workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax import losses, ops
from kdjax.degradations import Degrade
from kdjax.models import Apply, Params
from kdjax.names import pick
from kdjax.schedules import Schedule, is_zero, make_schedule

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Forward(NamedTuple):
    """What a network returned: its image (b, h, w, c) and its named features."""

    output: jax.Array
    features: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Term:
    """One part of the loss: `value(student, teacher, batch)` is a scalar; `teacher` is None unless it is needed."""

    name: str
    value: Callable[[Forward, Forward | None, Batch], jax.Array]
    weight: Schedule
    needs_teacher: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about a run that is not an array.

    `degrade(key, image)` makes the lq of one (h, w, c) image where a batch has none. `learning_rate` is here only to
    be reported; the optimizer already contains it.
    """

    student: Apply
    teacher: Apply | None
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    learning_rate: Schedule
    ema_decay: float
    degrade: Degrade | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training changes. `params` is {"student": ..., "adapters": ...}; `params_ema` mirrors the student."""

    step: jax.Array
    params: Params
    params_ema: Params
    opt_state: optax.OptState


def _task(*, criterion: str, **options: float) -> Callable[..., jax.Array]:
    """The student's image against the clean one."""
    compare = losses.make_criterion(criterion, **options)
    return lambda student, teacher, batch: jnp.mean(compare(student.output, batch["gt"]))


def _output(*, criterion: str, **options: float) -> Callable[..., jax.Array]:
    """The student's image against the teacher's."""
    compare = losses.make_criterion(criterion, **options)
    return lambda student, teacher, batch: jnp.mean(compare(student.output, teacher.output))


# name -> (builder of the value function from the term's options, whether it needs the teacher)
TERMS: dict[str, tuple[Callable[..., Callable[..., jax.Array]], bool]] = {
    "task": (_task, False),
    "output": (_output, True),
}


def make_terms(specs: Mapping[str, Mapping[str, Any]]) -> tuple[Term, ...]:
    """Terms from a config's dict: `{"output": dict(weight=2.0, criterion="l1"), ...}`.

    A term whose weight is zero everywhere is left out, and with the last one that needs it, the teacher.

    Raises:
      ValueError: an unknown term, option or criterion; or nothing left to train on.
    """
    terms = []
    for name, spec in specs.items():
        build, needs_teacher = pick(TERMS, name, "loss term")
        options = dict(spec)
        try:
            weight = options.pop("weight")
            schedule, value = make_schedule(weight), build(**options)
        except KeyError:
            raise ValueError(f"loss term {name!r} has no weight; give a number or a schedule") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"loss term {name!r}: {error}") from None
        if not is_zero(weight):
            terms.append(Term(name, value, schedule, needs_teacher))
    if not terms:
        raise ValueError(f"no loss term has a weight above 0 (given: {', '.join(specs) or 'none'})")
    return tuple(terms)


def make_optimizer(
    name: str,
    learning_rate: Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """Adam as torch has it, eps 1e-8 outside the root.

    Args:
      name: "adam" (weight decay is added to the gradient: torch's Adam, L2) or "adamw" (decoupled decay).
      grad_clip: the largest norm of the whole gradient; 0 for no clipping.

    Raises:
      ValueError: an unknown name.
    """
    b1, b2 = betas
    optimizers = {
        "adam": lambda: optax.chain(
            optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
            optax.adam(learning_rate, b1, b2),
        ),
        "adamw": lambda: optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay),
    }
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, pick(optimizers, name, "optimizer")())


def init_state(recipe: Recipe, student_params: Params) -> State:
    """The state before the first update; the EMA starts as a copy of the student."""
    params = {"student": student_params, "adapters": {}}
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A real copy: donating one buffer through two leaves would fail.
        params_ema=jax.tree.map(jnp.copy, student_params),
        opt_state=recipe.optimizer.init(params),
    )


def train_step(
    recipe: Recipe, state: State, teacher_params: Params | None, batch: Batch, key: jax.Array
) -> tuple[State, Metrics]:
    """One update.

    Args:
      teacher_params: None when the recipe has no teacher.
      batch: see the module's docstring.
      key: the run's key for noise; the same at every step.

    Returns:
      The next state, and scalars: `loss/total`, `loss/NAME` (raw) and `weight/NAME` of every term, `lr`, `grad_norm`,
      and `finite`, false when the loss or the gradient is not a finite number.
    """
    gt, lq = make_pair(recipe.degrade, batch, key)
    batch = batch | {"gt": gt, "lq": lq}
    # Outside the gradient: the teacher is a constant of the loss.
    teacher = None if recipe.teacher is None else Forward(*recipe.teacher(teacher_params, lq))
    weights = {term.name: term.weight(state.step) for term in recipe.terms}

    def total_loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        student = Forward(*recipe.student(params["student"], lq))
        values = {term.name: term.value(student, teacher, batch) for term in recipe.terms}
        return sum(weights[name] * value for name, value in values.items()), values

    (total, values), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    metrics = {
        "loss/total": total,
        **{f"loss/{name}": value for name, value in values.items()},
        **{f"weight/{name}": weight for name, weight in weights.items()},
        "lr": recipe.learning_rate(state.step),
        "grad_norm": grad_norm,
        "finite": jnp.isfinite(total) & jnp.isfinite(grad_norm),
    }
    next_state = State(
        step=state.step + 1,
        params=params,
        params_ema=optax.incremental_update(params["student"], state.params_ema, 1 - recipe.ema_decay),
        opt_state=opt_state,
    )
    return next_state, metrics


def make_pair(degrade: Degrade | None, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The batch's clean and degraded images as float [0, 1]; `lq` is made from `gt` where the batch has none."""
    gt = ops.to_float(batch["gt"])
    if "lq" in batch:
        return gt, ops.to_float(batch["lq"])
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["index"])
    return gt, jax.vmap(degrade)(keys, gt)


def eval_step(apply: Apply, params: Params, lq: jax.Array) -> jax.Array:
    """The restored images as uint8 (b, h*scale, w*scale, c)."""
    return ops.to_uint8(apply(params, ops.to_float(lq))[0])
