"""What a teacher cache stores for a run's samples, and whether a cache fits a run.

A cached sample is what the step sees once all randomness is resolved: gt cut to the crop, lq, and the teacher's
outputs. It is stored as follows; uint8 and redrawing the noise lose nothing:

    gt       uint8; float16 where a sharpened gt was cut from a canvas
    lq       omitted where noise was added to the stored gt: it is redrawn from the sample number
             uint8 where it is 8-bit data (files, JPEG, the Real-ESRGAN process)
             float16 where noise was added on a canvas, of which only the crop is stored, or alongside pairs of files
    output   float16: its steps from 0.5 to 1 are 1/2048; those of bfloat16, at the same size, are 1/256, as coarse as 8
             bits
    feature  bfloat16, as its range is not fixed; only teacher features that a loss term reads
    labelled bool, if the run has unlabelled images. `is_paired` is not needed: lq is stored ready-made

`settings` is everything that determines this. It is stored in the cache and compared when a run reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import config as config_lib
from kdjax import data, degradations, distill, models, ops
from kdjax.batch import Batch
from kdjax.config import Config, ConfigError
from kdjax.data.cache import CACHE, FEATURE, Field, as_row
from kdjax.models import Params
from kdjax.teacher.load import Teacher
from kdjax.terms import Term

Answer = Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]


def settings(
    config: Config,
    student: models.Model,
    teacher: Teacher | None,
    kinds: Mapping[str, Sequence[data.ImagePair]],
    *,
    side: int,
) -> dict[str, Any]:
    """Returns everything that determines a run's samples and the teacher's outputs for them, as JSON values.

    Images are identified by name, in order, so that a folder can be moved or packed.

    Args:
      kinds: the images: "gt", "unlabelled" and "unpaired".
      side: of the squares that are loaded, in pixels.
    """
    options = config.data
    sampled = config_lib.deciding(options, config_lib.SAMPLES) | {"canvas": side, "lq": bool(options.lq)}
    for name, pairs in kinds.items():
        names = hashlib.sha256("\n".join(pair.name for pair in pairs).encode(errors="surrogatepass")).hexdigest()[:16]
        sampled[name] = f"{len(pairs)} images (names {names})" if pairs else ""
    for name in ("unlabelled", "unpaired"):
        if not kinds[name]:
            del sampled[f"{name}_part"]
    makes_lq = not options.lq or bool(options.unpaired)
    found = {
        **config_lib.deciding(config, config_lib.SAMPLES),
        "student": {"scale": student.network.scale, "channels": student.network.channels},
        "data": sampled,
        "degrade": degradations.preset(**config.degrade) if makes_lq else {},
        "teacher": teacher
        and {
            "identity": teacher.identity,
            "key": [file.key for file in teacher.files],
            "hparams": [file.model.hparams for file in teacher.files],
            "dtype": config.teacher.dtype,
        },
    }
    return json.loads(json.dumps(found))


def features_read(terms: Iterable[Term]) -> tuple[str, ...]:
    """Returns the teacher features that a cache for these terms must hold.

    Raises:
      ConfigError: if a term runs the teacher on images not known in advance.
    """
    terms = list(terms)
    if asking := [term.name for term in terms if term.loss.asks]:
        raise ConfigError(
            f"nothing can replace the teacher for the loss terms {', '.join(asking)}: they ask it about images that"
            " are made in training; set their weights to 0, or train with config.teacher.cache=''"
        )
    return tuple(dict.fromkeys(name for term in terms for name in term.loss.reads))


def open_for(
    config: Config, recipe: distill.Recipe, teacher: Teacher | None, wanted: Mapping[str, Any]
) -> tuple[data.Cache, distill.Recipe]:
    """Opens the cache named by `config.teacher.cache`; returns it and a recipe that trains from it without the teacher.

    Args:
      wanted: the `settings` of the run.

    Raises:
      ConfigError: if the cache is of other samples or another teacher, lacks a feature, or cannot serve a term.
      data.DataError: if it is missing, unfinished or damaged.
    """
    folder = config.teacher.cache
    if teacher is None or not any(term.needs_teacher for term in recipe.terms):
        raise ConfigError(
            f"config.teacher.cache={folder!r}, but no loss term uses the teacher; remove the cache, or give a term"
            " such as output a weight above 0"
        )
    needed = features_read(recipe.terms)
    cache = data.open_cache(folder)
    another = f"or write another cache: `{CACHE.program} --output FOLDER` with the flags of this run"
    if differences := config_lib.changes(cache.settings, wanted):
        raise ConfigError(
            "\n".join(
                [
                    f"the cache {folder!r} does not fit this run (cached -> now):",
                    *(f"  {difference}" for difference in differences),
                    f"run with the settings of the cache, {another}",
                ]
            )
        )
    if missing := [name for name in needed if name not in cache.features]:
        users = ", ".join(term.name for term in recipe.terms if set(missing) & set(term.loss.reads))
        raise ConfigError(
            f"the cache {folder!r} lacks the teacher's features {', '.join(missing)}, which the loss terms {users}"
            f" read; it has {', '.join(cache.features) or 'none'}: change the terms, {another}"
        )
    gt = next(field for field in cache.fields if field.name == "gt")
    return cache, dataclasses.replace(recipe, teacher=None, sharpen=recipe.sharpen and gt.dtype == "uint8")


def without_cache(config: Config) -> Config:
    """Returns the same config with the live teacher instead of a cache."""
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, cache=""))


def make_answer(config: Config, recipe: distill.Recipe, teacher: Teacher, *, side: int) -> Answer:
    """Makes `answer(teacher parameters, batch, key) -> {field: array (b, ...)}`, in the dtypes that are stored.

    Args:
      side: of the squares that are loaded, in pixels.

    Raises:
      ConfigError: if a loss term needs the live teacher.
    """
    names = features_read(recipe.terms)
    cuts = side > recipe.crop
    stored_gt = jnp.float16 if cuts and recipe.sharpen else jnp.uint8
    made_8_bit = recipe.degrade is None or degradations.is_8_bit(config.degrade)
    keeps_lq = bool(config.data.lq) or cuts or made_8_bit
    stored_lq = jnp.uint8 if made_8_bit else jnp.float16

    def stored(image: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return ops.to_uint8(image) if dtype == jnp.uint8 else image.astype(dtype)

    def answer(params: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        gt, lq = distill.make_pair(recipe, batch, key)
        output, features = distill.forward(teacher.apply, params, lq, distill.noise_levels(recipe, batch, key))
        # Without a canvas, gt is stored unchanged and sharpened in the step.
        fields = {"gt": stored(gt, stored_gt) if cuts else batch["gt"]}
        fields |= {"lq": stored(lq, stored_lq)} if keeps_lq else {}
        fields |= {"labelled": batch["labelled"]} if "labelled" in batch else {}
        fields["output"] = output.astype(jnp.float16)
        return fields | {FEATURE + name: features[name].astype(jnp.bfloat16) for name in names}

    return answer


def make_fields(answer: Answer, params: Params, batch: Batch) -> tuple[Field, ...]:
    """Returns the fields of a record, in order; `batch` is one that `answer` takes, or its shapes."""
    shapes = jax.eval_shape(answer, params, batch, jax.random.key(0))
    return tuple(Field(name, str(shape.dtype), shape.shape[1:]) for name, shape in shapes.items())


def batch_shapes(config: Config, student: models.Model, *, side: int, cache: data.Cache | None = None) -> Batch:
    """Returns the shapes of a training batch, made of squares of `side` pixels or read from a cache."""
    number = lambda dtype: jax.ShapeDtypeStruct((config.data.batch_size,), dtype)  # noqa: E731
    if cache:
        fields = {f.name: jax.ShapeDtypeStruct((config.data.batch_size, *f.shape), f.dtype) for f in cache.fields}
        return as_row(fields) | {"index": number(jnp.int32)}
    image = lambda side: jax.ShapeDtypeStruct(  # noqa: E731
        (config.data.batch_size, side, side, student.network.channels), jnp.uint8
    )
    batch: Batch = {"gt": image(side), "index": number(jnp.int32)}
    if config.data.lq:
        batch["lq"] = image(side // student.network.scale)
    if config.teacher.outputs:
        batch["teacher"] = {"output": image(side), "features": {}}
    if config.data.unlabelled:
        batch["labelled"] = number(bool)
    if config.data.unpaired:
        batch["is_paired"] = number(bool)
    return batch
