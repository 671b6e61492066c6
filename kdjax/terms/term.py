"""What a loss term is, what it may look at, and what it is built for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from kdjax.models import Params
from kdjax.schedules import Schedule


class Forward(NamedTuple):
    """What a network returned: its image (b, h, w, c) and its named features."""

    output: jax.Array
    features: dict[str, jax.Array]


class Context(NamedTuple):
    """What a term may look at in one step; images are float (b, h, w, c).

    Attributes:
      student: what it returned for `lq`.
      teacher: what it returned for `lq`, a constant; None where no term needs it. The type leaves that out: a term that
        looks at the teacher has said `needs_teacher`, and then it is there.
      gt: the clean images.
      lq: the degraded images.
      labelled: (b, 1, 1, 1), 0 where only the teacher knows what the clean image is, and elsewhere the weight that
        makes a mean over the whole batch, however it is taken apart, one over the samples with a clean image; None
        where all have one.
      ask_teacher: what the teacher returns for other images; gradients flow to the images. None as `teacher` is.
      keys: (b,) random keys, which depend on the run and the number of the sample only.
    """

    student: Forward
    teacher: Forward
    gt: jax.Array
    lq: jax.Array
    labelled: jax.Array | None
    ask_teacher: Callable[[jax.Array], Forward]
    keys: jax.Array


class Setting(NamedTuple):
    """What a term is built for: `jax.ShapeDtypeStruct`s of what the networks return for a training batch, the shape
    of its lq, and a key for the initial values of adapters. `teacher` is None where no term needs one, which the type
    leaves out as `Context` does."""

    student: Forward
    teacher: Forward
    lq: tuple[int, ...]
    key: jax.Array


class Loss(NamedTuple):
    """A built loss: `value(context, adapters, frozen)` is a float32 scalar.

    `adapters` are trained with the student and never exported; `frozen` are constants of another network (VGG). Both
    are given back to `value` as arguments, since arrays of that size must not become constants of a compiled program.
    `reads` names the features of `context.teacher` that `value` looks at, and `asks` tells whether it uses
    `context.ask_teacher`: what a cache of the teacher has to hold, and whether one will do.
    `is_mean` tells that the value is a mean over samples, so that a batch may be taken in parts.
    """

    value: Callable[[Context, Params, Params], jax.Array]
    adapters: Params = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    frozen: Params = {}  # noqa: RUF012
    reads: tuple[str, ...] = ()
    asks: bool = False
    is_mean: bool = True


@dataclasses.dataclass(frozen=True)
class Term:
    """One part of the total loss: weight(step) x value.

    Attributes:
      name: unique among the terms of a recipe; metrics are called `loss/NAME`.
      weight: schedule of the weight; unused where `share` is set.
      share: the part of the total gradient norm that the term is kept at; 0 for a term with a weight.
      sometimes_off: the weight can be 0, and then neither this term nor, where no other needs it, the teacher is run.
      needs_teacher: `context.teacher` is there. A term that looks at it has to say so.
    """

    name: str
    loss: Loss
    weight: Schedule
    share: float = 0.0
    sometimes_off: bool = False
    needs_teacher: bool = False
