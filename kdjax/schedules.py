"""Schedules: pure functions of the number of updates already applied, for learning rates and loss weights.

A schedule is written in a config as a number (constant) or as a dict with a `name`:

    2e-4
    dict(name="multistep", value=5.0, milestones=(50_000, 100_000), gamma=0.5)
    dict(name="cosine", value=2e-4, steps=250_000, final=1e-7)

and any of them may have `warmup=N`: linear from value/N at update 0 to the full value at update N - 1. (BasicSR's
MultiStep never leaves its last warm-up value, value*(N-1)/N; here the full value is reached.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax.names import pick

Schedule = Callable[[jax.Array | int], jax.Array]


def constant(value: float) -> Schedule:
    """`value` at every update."""
    return lambda count: jnp.asarray(value, jnp.float32)


def multistep(value: float, milestones: Sequence[int], gamma: float = 0.5) -> Schedule:
    """`value` times `gamma` for every milestone that `count` has reached (torch's MultiStepLR)."""
    factors: dict[int, float] = {}
    for milestone in milestones:  # a milestone named twice decays twice, as in BasicSR
        factors[milestone] = factors.get(milestone, 1.0) * gamma
    return optax.piecewise_constant_schedule(value, factors)


def cosine(value: float, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from `value` at update 0 to `final` at update `steps`, and `final` from then on."""
    if steps < 1:
        raise ValueError(f"a cosine schedule needs steps >= 1, got {steps}")

    def schedule(count: jax.Array | int) -> jax.Array:
        progress = jnp.minimum(count, steps) / steps
        return final + 0.5 * (value - final) * (1 + jnp.cos(jnp.pi * progress))

    return schedule


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "multistep": multistep,
    "cosine": cosine,
}


def make_schedule(spec: float | Mapping[str, Any]) -> Schedule:
    """The schedule that `spec` describes; see the module's docstring for what it may be.

    Raises:
      ValueError: an unknown name or argument, a missing argument, or a negative warm-up.
    """
    if isinstance(spec, int | float):
        return constant(spec)
    options = dict(spec)
    name = options.pop("name", None)
    warmup = options.pop("warmup", 0)
    build = pick(SCHEDULES, name, "schedule")
    if warmup < 0:
        raise ValueError(f"schedule {name!r}: warmup={warmup} must not be negative")
    try:
        schedule = build(**options)
    except TypeError as error:  # an argument that the schedule does not take, or one that is missing
        raise ValueError(f"schedule {dict(spec)}: {error}") from None
    if not warmup:
        return schedule
    return lambda count: schedule(count) * jnp.minimum(1.0, (count + 1) / warmup)


def is_zero(spec: float | Mapping[str, Any]) -> bool:
    """Whether the schedule is 0 at every update, so that what it weights need not be computed."""
    if isinstance(spec, int | float):
        return spec == 0
    return spec.get("value") == 0 and spec.get("final", 0) == 0
