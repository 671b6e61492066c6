"""The columns of a study: a training config per column and seed, and which of them can be trained together."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from kdjax import config as config_lib
from kdjax import distill, macs, models
from kdjax.config import Config, ConfigError
from kdjax.models import Params
from kdjax.names import nearest, pick
from kdjax.training import preparation


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study: a training config for every column and seed."""

    name: str
    seeds: tuple[int, ...]
    curve_images: int  # number of validation images for the curve; results use all of them
    runs: dict[tuple[str, int], Config]  # by column and seed
    compute_of: Mapping[str, str]  # column -> the column whose multiply-accumulates it has to match; see `ready`


def parse(values: Mapping[str, Any]) -> Study:
    """Parses a study from a nested mapping with name, seeds, curve_images, base and columns.

    Raises:
      ValueError: if a key is unknown, there are no columns or seeds, or a column is not a valid training config.
    """
    wanted = ("name", "seeds", "curve_images", "base", "columns")
    for key in values:
        if key not in wanted:
            raise ConfigError(f"study key {key!r} does not exist{nearest(key, wanted)} (keys: {', '.join(wanted)})")
    columns, seeds = values.get("columns", {}), tuple(values.get("seeds", (0,)))
    if not columns or not seeds:
        raise ConfigError(f"a study needs columns and seeds, got {len(columns)} columns and seeds={seeds}")
    if not isinstance(values.get("base"), Mapping):
        raise ConfigError(f"study key 'base' is {values.get('base')!r}; it must be a training config, as in configs/")
    curve_images = values.get("curve_images", 16)
    if type(curve_images) is not int or curve_images < 1:
        raise ConfigError(f"study key 'curve_images' is {curve_images!r}; it must be a whole number, at least 1")
    compute_of = {column: changes["compute_of"] for column, changes in columns.items() if "compute_of" in changes}
    settings = {}
    for column, changes in columns.items():
        settings[column] = _merge(values["base"], {key: changes[key] for key in changes if key != "compute_of"})
    runs = {
        (column, seed): _parse_column(column, settings[column] | {"seed": seed, "name": column})
        for seed in seeds
        for column in columns
    }
    for column, other in compute_of.items():
        if other not in columns:
            raise ConfigError(
                f"column {column!r}: compute_of={other!r} is not a column{nearest(other, columns)}"
                f" (columns: {', '.join(columns)})"
            )
        if other in compute_of:
            raise ConfigError(
                f"column {column!r}: compute_of={other!r}, which itself has a compute_of; name that column"
            )
    name = values.get("name", "study")
    config_lib.check_name(name, "study key 'name'")
    return Study(name, seeds, curve_images, runs, compute_of)


def ready(study: Study, columns: Sequence[str] | None = None) -> Study:
    """Returns the study with every column's batch size and steps resolved for these devices.

    A column with `compute_of` gets as many steps as it takes to match the other column's multiply-accumulates.

    Args:
      columns: those to be trained; None for all.

    Raises:
      ValueError: if a column does not exist.
    """
    known = dict.fromkeys(column for column, _ in study.runs)
    for column in columns or ():
        pick(known, column, "column")
    runs = {key: preparation.on_these_devices(config) for key, config in study.runs.items()}
    first = study.seeds[0]
    for column, other in study.compute_of.items():
        if columns and column not in columns:
            continue
        factor = _compute(runs[other, first]) / _compute(runs[column, first])
        for seed in study.seeds:
            runs[column, seed] = _stretch(runs[column, seed], factor)
    return dataclasses.replace(study, runs=runs, compute_of={})


def groups(configs: Mapping[str, Config]) -> Iterable[dict[str, Config]]:
    """Groups the columns that can be trained in one step: only students, their losses and their learning differ."""
    groups: dict[str, dict[str, Config]] = {}
    for column, config in configs.items():
        values = config_lib.to_dict(config)
        student = models.network(config.student.arch, config.student.hparams)
        shared = {key: values[key] for key in ("seed", "teacher", "degrade", "data", "val")}
        shared |= {"steps": config.train.steps, "log": values["log"], "every": values["checkpoint"]}
        shared |= {"channels": student.channels, "scale": student.scale}
        groups.setdefault(json.dumps(shared, sort_keys=True), {})[column] = config
    return groups.values()


def step_macs(setup: preparation.Setup, teacher_params: Params | None) -> int:
    """Returns the multiply-accumulates of one step of this run alone, with measuring shares spread over the steps."""
    state = jax.eval_shape(functools.partial(distill.init_state, setup.recipe), setup.student.params)
    frozen = distill.make_frozen(setup.recipe.terms, teacher_params)
    batch, key = preparation.batch_shapes(setup), jax.random.key(0)

    def count(recipe: distill.Recipe, state: distill.State) -> int:
        return macs.count(functools.partial(distill.train_step, recipe), state, frozen, batch, key)

    terms = tuple(dataclasses.replace(term, share=0.0) for term in setup.recipe.terms)
    plain = count(dataclasses.replace(setup.recipe, terms=terms), dataclasses.replace(state, balance={}))
    if not state.balance:
        return plain
    return plain + (count(setup.recipe, state) - plain) // distill.SHARES_EVERY


def _compute(config: Config) -> int:
    """Returns the multiply-accumulates of the whole training."""
    setup = preparation.prepare(config)
    return config.train.steps * step_macs(setup, setup.teacher and setup.teacher.params)


def _parse_column(column: str, settings: Mapping[str, Any]) -> Config:
    """Like `kdjax.config.parse`, but errors name the column."""
    try:
        return config_lib.parse(settings)
    except ConfigError as error:
        raise ConfigError(f"column {column!r}: {error}") from None


def _stretch(config: Config, factor: float) -> Config:
    """Returns the config with `factor` times the steps, and its learning rate schedule stretched to match."""
    rate = config.train.lr
    if isinstance(rate, dict):
        rate = dict(rate)
        if "steps" in rate:
            rate["steps"] = round(rate["steps"] * factor)
        for key in ("milestones", "boundaries"):
            if key in rate:
                rate[key] = tuple(round(step * factor) for step in rate[key])
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=round(config.train.steps * factor), lr=rate)
    )


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with the `changes` merged in, group by group.

    The sizes of a student of another architecture replace those of the base's, since they have other names.
    """
    merged = dict(base)
    if changes.get("arch", base.get("arch")) != base.get("arch"):
        merged["hparams"] = {}
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
