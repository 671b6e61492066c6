"""Schedules for learning rates and loss weights: pure functions of the number of updates already applied.

A config writes a schedule as a number (constant) or as a dict with a `name`:

    2e-4
    dict(name="multistep", value=5.0, milestones=(50_000, 100_000), gamma=0.5)
    dict(name="piecewise", values=(5.0, 2.0, 1.0, 0.0), boundaries=(50_000, 100_000, 200_000))
    dict(name="linear", value=1.0, steps=100_000, final=0.0)
    dict(name="cosine", value=2e-4, steps=250_000, final=1e-7)

Any of them may have `warmup=N`: linear from value/N at update 0 to the full value at update N - 1. (BasicSR's MultiStep
never leaves its last warm-up value, value*(N-1)/N; here the full value is reached.) Values are computed in float32 and
must be finite in it. Update counts are 32-bit.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax.names import brief, pick

Schedule = Callable[[Any], jax.Array]  # takes an integer or an integer array, like optax.Schedule

_LAST_UPDATE, _LARGEST = 2**31 - 1, float(np.finfo(np.float32).max)
_MOST_PHASES = 1_000  # each is an operation in the compiled step
_COUNTS, _LISTS = ("steps", "warmup", "milestones", "boundaries"), ("milestones", "boundaries", "values")


def constant(value: float) -> Schedule:
    """Returns `value` at every update."""
    return lambda count: jnp.asarray(value, jnp.float32)


def multistep(value: float, milestones: Sequence[int], gamma: float = 0.5) -> Schedule:
    """Multiplies `value` by `gamma` at every milestone (torch's MultiStepLR)."""
    factors: dict[int, float] = {}
    for milestone in milestones:  # a repeated milestone decays twice, as in BasicSR
        factors[milestone] = factors.get(milestone, 1.0) * gamma
    schedule = optax.piecewise_constant_schedule(value, factors)
    return lambda count: jnp.asarray(schedule(count))


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """Piecewise constant: `values[0]` before update `boundaries[0]`, then `values[1]` until `boundaries[1]`, etc."""
    if len(values) != len(boundaries) + 1 or any(b <= a for a, b in itertools.pairwise(boundaries)):
        raise ValueError(
            f"a piecewise schedule needs rising boundaries and one more value than boundaries, got"
            f" values={brief(values)} and boundaries={brief(boundaries)}"
        )
    edges, levels = np.asarray(boundaries, np.int32), np.asarray(values, np.float32)
    return lambda count: jnp.asarray(levels)[jnp.sum(count >= edges)]


def linear(value: float, steps: int, final: float = 0.0) -> Schedule:
    """Linear from `value` at update 0 to `final` at update `steps`, then constant.

    Examples:
      >>> [float(linear(1.0, 4)(count)) for count in (0, 1, 4, 9)]
      [1.0, 0.75, 0.0, 0.0]
    """
    progress = _progress(steps)
    return lambda count: value + (final - value) * progress(count)


def cosine(value: float, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from `value` at update 0 to `final` at update `steps`, then constant."""
    progress = _progress(steps)
    return lambda count: final + 0.5 * (value - final) * (1 + jnp.cos(jnp.pi * progress(count)))


def _progress(steps: int) -> Schedule:
    return lambda count: jnp.minimum(count, steps) / steps


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "multistep": multistep,
    "piecewise": piecewise,
    "linear": linear,
    "cosine": cosine,
}


def make_schedule(spec: float | Mapping[str, Any]) -> Schedule:
    """Builds the schedule described by `spec`; the module docstring lists the forms.

    Raises:
      ValueError: an unknown name or argument, a missing argument, or a value of the wrong type or out of range.
    """
    if not isinstance(spec, Mapping):
        _check("", "a schedule", spec)
        return constant(spec)
    options = dict(spec)
    name = options.pop("name", None)
    build = pick(SCHEDULES, name, "schedule")
    known = inspect.signature(build).parameters
    for key, value in options.items():
        if key not in (*known, "warmup"):
            raise ValueError(
                f"schedule {name!r} has no {key!r} (it has: {', '.join(known)}, warmup); to replace a schedule of"
                f" another kind, give all of it, such as dict(name={name!r}, value=1e-3, ...)"
            )
        _check(f"schedule {name!r}: ", key, value)
    if needed := [key for key, one in known.items() if one.default is one.empty and key not in options]:
        raise ValueError(f"schedule {name!r} needs {' and '.join(needed)}, got {brief(dict(spec))}")
    warmup = options.pop("warmup", 0)
    schedule = build(**options)
    if not warmup:
        return schedule
    return lambda count: schedule(count) * jnp.minimum(1.0, (count + 1) / warmup)


def _check(where: str, key: str, value: Any) -> None:
    """Checks that a schedule's argument is a number of the right kind, or a list of them."""
    if key in _COUNTS:
        least = 1 if key == "steps" else 0
        kind, span = "whole number", f" from {least} to {_LAST_UPDATE:,}"
        fits = lambda number: type(number) is int and least <= number <= _LAST_UPDATE  # noqa: E731
    else:
        kind, span = "finite number", ""
        fits = lambda number: type(number) in (int, float) and abs(number) <= _LARGEST  # noqa: E731
    if key in _LISTS:
        right = isinstance(value, list | tuple) and len(value) <= _MOST_PHASES and all(map(fits, value))
        wanted = f"a list of at most {_MOST_PHASES:,} {kind}s{span}"
    else:
        right, wanted = fits(value), f"a {kind}{span}"
    if not right:
        raise ValueError(f"{where}{key}={brief(value)} must be {wanted}")


def is_zero(spec: float | Mapping[str, Any]) -> bool:
    """Whether the schedule is 0 at every update, so that the term it weights need not be built."""
    return not any(levels(spec))


def reaches_zero(spec: float | Mapping[str, Any]) -> bool:
    """Whether the schedule can be 0 at some update, so that the step must check before computing the term."""
    return not all(levels(spec))


def levels(spec: float | Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the values that a valid schedule holds or moves between."""
    if isinstance(spec, int | float):
        return (spec,)
    match spec["name"]:
        case "piecewise":
            return tuple(spec["values"])
        case "multistep":
            return (spec["value"], spec["value"] * spec.get("gamma", 0.5))
        case "linear" | "cosine":
            return (spec["value"], spec.get("final", 0.0))
    return (spec["value"],)
