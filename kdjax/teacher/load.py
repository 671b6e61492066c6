"""Loads a run's teacher: one file, or several whose images are averaged, optionally with self-ensemble (x8).

Either way the step sees one function `apply(params, x, sigma) -> (output, features)`. Features are those of the first
file, for the image as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import final

import jax
import jax.numpy as jnp

from kdjax import config, models
from kdjax.config import ConfigError
from kdjax.models import Apply, Params
from kdjax.models.ensemble import self_ensemble
from kdjax.weights import Loaded, load_weights


@final
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to run.

    Attributes:
      files: the files it was loaded from, the first one first.
      params: {"0": parameters of the first, "1": ...}, the first argument of both functions.
      apply: in the config's precision, for training; use `apply_float32` for measuring.
      identity: sha256 of the files and how they are combined; equal for equal teachers.
    """

    files: tuple[Loaded, ...]
    params: Params
    apply: Apply
    apply_float32: Apply
    identity: str

    @property
    def model(self) -> models.Model:
        """The first network, whose features the terms see."""
        return self.files[0].model


def load_teacher(options: config.Teacher, student: models.Model) -> Teacher:
    """Loads the teacher of a config.

    Raises:
      ConfigError: if no file is named, a network takes or returns another kind of image than the student, or `mix` does
        not match the number of files.
      WeightsError: if a file cannot be read.
    """
    if not options.weights:
        raise ConfigError(
            'a teacher is needed: set config.teacher.weights to a .pth or .safetensors file or to "embedded", or set'
            " the weights of the distillation terms to 0"
        )
    files = tuple(load_weights(path, key=options.key, **options.hparams) for path in (options.weights, *options.also))
    for file in files:
        for what, attribute in (("colour channels", "channels"), ("times enlargement", "scale")):
            theirs, ours = getattr(file.model.network, attribute), getattr(student.network, attribute)
            if theirs != ours:
                raise ConfigError(
                    f"the teacher {file.path} has {theirs} {what}, the student {ours}; they must be equal"
                )
    mix = options.mix or (1.0,) * len(files)
    if len(mix) != len(files) or not all(isinstance(part, int | float) and part > 0 for part in mix):
        raise ConfigError(
            f"config.teacher.mix={options.mix!r} must have one positive number per teacher, {len(files)} in all"
        )

    def combined(dtype: str) -> Apply:
        each = [file.model.network.make_apply(dtype=jnp.dtype(dtype)) for file in files]
        if options.self_ensemble:
            each = [self_ensemble(apply) for apply in each]
        return average(each, mix)

    params = {str(i): file.model.params for i, file in enumerate(files)}
    identity = ", ".join(f"sha256 {file.sha256}" for file in files)
    if len(files) > 1:
        identity += f", averaged with weights {', '.join(f'{part:g}' for part in mix)}"
    if options.self_ensemble:
        identity += ", averaged over the eight flips and rotations"
    return Teacher(files, params, combined(options.dtype), combined("float32"), identity)


def average(applies: Sequence[Apply], mix: Sequence[float]) -> Apply:
    """Averages several networks' images with weights, keeping the features of the first; params are {"0": ..., ...}."""
    parts = [part / math.fsum(mix) for part in mix]

    def apply(
        params: Params, x: jax.Array, sigma: jax.Array | float | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        results = [each(params[str(i)], x, sigma) for i, each in enumerate(applies)]
        mean = sum(part * output for part, (output, _) in zip(parts, results, strict=True))
        return jnp.asarray(mean), results[0][1]

    return apply
