"""Loads a run's teacher: one file, or several whose images are averaged, optionally with self-ensemble (x8).

Either way the step sees one function `apply(params, x, sigma) -> (output, features)`. Features are those of the first
file, for the image as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import jax
import jax.numpy as jnp

from kdjax import config, data, models
from kdjax.config import ConfigError
from kdjax.models import Apply, Params
from kdjax.models.ensemble import self_ensemble
from kdjax.teacher.foreign import Backend, Cached, Folder, backend_of, open_backend
from kdjax.weights import Loaded, load_weights

_ENSEMBLE = ", averaged over the eight flips and rotations"


@final
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to run.

    Attributes:
      files: the files it was loaded from, the first one first; none if another program runs it.
      params: {"0": parameters of the first, "1": ...}, the first argument of both functions.
      apply: in the config's precision, for training; use `apply_float32` for measuring.
      identity: sha256 of the files and how they are combined; equal for equal teachers.
      foreign: the network that another program runs; None if kdjax runs it.
    """

    files: tuple[Loaded, ...]
    params: Params
    apply: Apply
    apply_float32: Apply
    identity: str
    foreign: Backend | None = None

    @property
    def paths(self) -> list[str]:
        """The names of its files."""
        return [self.foreign.path] if self.foreign else [file.path for file in self.files]

    @property
    def can_run(self) -> bool:
        """Whether it can be run; False if another program has given its answers, to a cache or as images."""
        return not isinstance(self.foreign, Cached | Folder)

    @property
    def model(self) -> models.Model:
        """The first network, whose features the terms see.

        Raises:
          ConfigError: another program runs it.
        """
        if self.foreign:
            raise ConfigError(
                f"{self.foreign.path} ({self.foreign.about}) is not a network of kdjax, so no student can begin as the"
                " shrunk teacher"
            )
        return self.files[0].model


def load_teacher(options: config.Teacher, student: models.Model) -> Teacher:
    """Loads the teacher of a config.

    Raises:
      ConfigError: if no file is named, a network takes or returns another kind of image than the student, or `mix` does
        not match the number of files.
      WeightsError: if a file cannot be read.
    """
    if options.outputs:
        images = Folder(options.outputs, channels=student.network.channels, scale=student.network.scale)
        apply = images.make_apply()
        return Teacher((), {}, apply, apply, images.identity, images)
    if not options.weights:
        raise ConfigError(
            'a teacher is needed: set config.teacher.weights to a .pth or .safetensors file or to "embedded", or set'
            " the weights of the distillation terms to 0"
        )
    if backend := backend_of(options.weights, options.backend):
        return _load_foreign(options, backend, student)
    if options.features:
        raise ConfigError(
            f"config.teacher.features={options.features!r} is for a teacher that another program runs (.onnx, or"
            " config.teacher.backend='spandrel'); of a teacher of kdjax, terms name features themselves"
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
        identity += _ENSEMBLE
    return Teacher(files, params, combined(options.dtype), combined("float32"), identity)


def _load_foreign(options: config.Teacher, backend: str, student: models.Model) -> Teacher:
    """Opens a teacher that another program runs; see `load_teacher`."""
    unused = {"also": (), "mix": (), "hparams": {}, "key": "auto", "dtype": "float32"}
    if given := [name for name, default in unused.items() if getattr(options, name) != default]:
        raise ConfigError(f"config.teacher.{given[0]} is not for a teacher that another program runs; leave it out")
    cache = data.open_cache(options.cache) if options.cache else None
    network = open_backend(options.weights, backend, options.features, cache)
    for what, attribute in (("colour channels", "channels"), ("times enlargement", "scale")):
        theirs, ours = getattr(network, attribute), getattr(student.network, attribute)
        if theirs != ours:
            raise ConfigError(
                f"the teacher {options.weights} has {theirs} {what}, the student {ours}; they must be equal"
            )
    apply = network.make_apply()
    identity = f"sha256 {hashlib.sha256(Path(options.weights).read_bytes()).hexdigest()}, run by {backend}"
    if options.self_ensemble:
        apply, identity = self_ensemble(apply), f"{identity}{_ENSEMBLE}"
    return Teacher((), {}, apply, apply, identity, network)


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
