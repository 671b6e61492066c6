"""The types of a loss term: what it may look at, and what it is built from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from kdjax.models import Params
from kdjax.schedules import Schedule


class Forward(NamedTuple):
    """A network's output: its image (b, h, w, c) and its named features."""

    output: jax.Array
    features: dict[str, jax.Array]


class Context(NamedTuple):
    """What a term may look at in one step; images are float (b, h, w, c).

    Attributes:
      student: the student's output for `lq`.
      teacher: the teacher's output for `lq`, a constant; None if no term needs it. The type omits the None: a term that
        looks at the teacher has declared `needs_teacher`, so it is there.
      gt: the clean images.
      lq: the degraded images.
      labelled: (b, 1, 1, 1), None if all samples have a clean image. 0 where there is none; elsewhere the weight that
        turns a mean over the whole batch into a mean over the samples with a clean image, however the batch is split.
      ask_teacher: runs the teacher on other images; gradients flow to the images. None whenever `teacher` is.
      keys: (b,) random keys that depend only on the run and the sample number.
    """

    student: Forward
    teacher: Forward
    gt: jax.Array
    lq: jax.Array
    labelled: jax.Array | None
    ask_teacher: Callable[[jax.Array], Forward]
    keys: jax.Array


class Setting(NamedTuple):
    """What a term is built from: output shapes of the networks, the shape of lq, and a key.

    `student` and `teacher` hold `jax.ShapeDtypeStruct`s for a training batch; `key` initialises adapters. `teacher` is
    None if no term needs one; as in `Context`, the type omits that.
    """

    student: Forward
    teacher: Forward
    lq: tuple[int, ...]
    key: jax.Array


class Loss(NamedTuple):
    """A built loss: `value(context, adapters, frozen)` is a float32 scalar.

    `adapters` are trained with the student and never exported. `frozen` holds constants of another network (VGG). Both
    are passed back to `value` as arguments, since arrays that large must not become constants of a compiled program.
    `reads` names the features of `context.teacher` that `value` uses, and `asks` says whether it calls
    `context.ask_teacher`; together they decide what a teacher cache must hold, and whether a cache can be used at all.
    `is_mean` says that the value is a mean over samples, so that a batch may be split.
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
      name: unique within a recipe; the metric is called `loss/NAME`.
      weight: schedule of the weight; unused if `share` is set.
      share: fraction of the update to keep the term at (`kdjax.distill.update_norms`); 0 for a term with a weight.
      sometimes_off: the weight can be 0; then the term is skipped, and so is the teacher if no other term needs it.
      needs_teacher: whether the term looks at `context.teacher`.
    """

    name: str
    loss: Loss
    weight: Schedule
    share: float = 0.0
    sometimes_off: bool = False
    needs_teacher: bool = False
