"""What the config of a training run may say: every key, its default and its unit.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict` with the keys it wants to set; `parse` turns that
nested dict into these frozen dataclasses and refuses what does not fit. What a number means for the rest of the run
(does the batch divide, is there such a loss term) is checked where it is used, at start.

Paths may be the word "embedded": the photographs and the teacher inside the package.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from kdjax.names import nearest


class ConfigError(ValueError):
    """A key or value of the config is wrong; the message says which, and what would be right."""


# A plain number, or a dict for `kdjax.schedules.make_schedule`.
ScheduleSpec = float | dict


@dataclasses.dataclass(frozen=True)
class Student:
    arch: str = "srvggnetcompact"
    hparams: dict = dataclasses.field(default_factory=dict)  # of the architecture; missing ones take its default
    weights: str = ""  # a .pth or .safetensors to start from, or "teacher": a slice of it; "" starts from scratch
    remat: bool = False  # recompute activations per block in the backward pass: less memory, more time
    dtype: str = "float32"  # of the forward and backward pass; "bfloat16" on accelerators


@dataclasses.dataclass(frozen=True)
class Teacher:
    weights: str = ""  # a .pth or .safetensors, or "embedded"; "" when no loss term needs a teacher
    key: str = "auto"  # which state dict of the file: "auto" is params_ema, then params, then a bare one
    hparams: dict = dataclasses.field(default_factory=dict)  # only what the file cannot tell, such as act_type
    also: tuple = ()  # files of more teachers: their images are averaged, the features are the first one's
    mix: tuple = ()  # weights of that average, one for each teacher; () weighs them equally
    self_ensemble: bool = False  # average over the eight flips and turns: eight times the cost
    dtype: str = "float32"
    cache: str = ""  # folder of the teacher's answers that `python -m kdjax.cache` wrote; "" asks the teacher itself


@dataclasses.dataclass(frozen=True)
class Data:
    gt: str = ""  # folder of clean images; here and below a folder may also be a pack (kdjax.data.pack)
    lq: str = ""  # folder of their degraded partners; "" makes them from gt with `degrade`
    filename_tmpl: str = "{}"  # lq file stem from the gt file stem, for example "{}_noisy"
    meta_info: str = ""  # BasicSR list of files to use, one a line; "" takes the whole folder
    limit: int = 0  # how many images at most, spread over the folder; 0 takes all
    crop: int = 128  # side of the square training crop of gt, pixels
    canvas: int = 0  # side of the gt square that is loaded and degraded, from which the crop is cut; 0 means crop
    gt_usm: bool = False  # sharpen the target (unsharp mask), as Real-ESRGAN does
    batch_size: int = 16  # crops per step over all devices and processes together
    per_device: bool = False  # batch_size and workers are those of each accelerator (`num_gpu: auto` of a YAML)
    hflip: bool = True
    rot: bool = True  # with hflip, all 8 flips and quarter turns
    workers: int = 0  # decoding processes; 0 decodes in threads of the main process
    cache_mb: int = 512  # decoded images kept in memory, per process
    unlabelled: str = ""  # folder of degraded images without a clean partner (without lq: clean ones, used as if not)
    unlabelled_part: float = 0.5  # of every batch, where there are unlabelled images
    unpaired: str = ""  # folder of clean images beside the pairs of gt and lq, degraded with `degrade`
    unpaired_meta_info: str = ""  # list of those to use, as meta_info
    unpaired_part: float = 0.5  # of every batch, where there are unpaired images


@dataclasses.dataclass(frozen=True)
class Val:
    gt: str = ""
    lq: str = ""
    filename_tmpl: str = "{}"
    meta_info: str = ""
    sigma: float = 25.0  # of the noise added to gt where there is no lq, 0..255 scale, seed 0 per image
    degrade: dict = dataclasses.field(default_factory=dict)  # as config.degrade, instead of that noise
    crop: int = 0  # side of a centre crop, pixels; 0 validates whole images
    limit: int = 0  # how many images at most, spread over the folder; 0 takes all
    every: int = 5_000  # steps
    save_images: int = 4  # side-by-side pictures per validation


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 250_000
    optimizer: str = "adam"  # "adam" (weight decay as torch's Adam, L2) or "adamw"
    lr: ScheduleSpec = 2e-4
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # largest norm of the gradient; 0 does not clip
    ema_decay: float = 0.999
    accumulate: int = 1  # parts that a batch is taken in, one after another: less memory, the same update


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 100  # steps
    diagnose: bool = True  # then also each term's part of the gradient: a forward pass, and a backward pass a term
    tensorboard: bool = False  # needs the extra `tb`
    wandb: str = ""  # a Weights & Biases project; needs the extra `wandb`


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 5_000  # steps
    keep: int = 2  # latest ones; the best by validation PSNR is kept besides


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "run"  # the run's folder is runs/NAME unless --workdir says otherwise
    seed: int = 0
    student: Student = Student()
    teacher: Teacher = Teacher()
    terms: dict = dataclasses.field(default_factory=dict)  # loss terms, see kdjax.terms
    degrade: dict = dataclasses.field(default_factory=dict)  # see kdjax.degradations.make_degrade
    data: Data = Data()
    val: Val = Val()
    train: Train = Train()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()

    def __post_init__(self) -> None:
        positive = ("data.crop", "data.batch_size", "train.steps", "log.every", "val.every", "checkpoint.every")
        for path, least in [*((path, 1) for path in positive), ("checkpoint.keep", 1), ("train.accumulate", 1)]:
            _require(self, path, lambda value, least=least: value >= least, f"at least {least}")
        for path in ("data.limit", "data.workers", "data.cache_mb", "val.crop", "val.limit", "val.save_images", "seed"):
            _require(self, path, lambda value: value >= 0, "0 or more")
        for path in ("train.weight_decay", "train.grad_clip"):
            _require(self, path, lambda value: 0 <= value < float("inf"), "0 or more, and finite")
        _require(self, "train.ema_decay", lambda value: 0 <= value < 1, "from 0 up to, not including, 1")
        for path in ("data.unlabelled_part", "data.unpaired_part"):
            _require(self, path, lambda value: 0 < value < 1, "between 0 and 1")
        crop, clean = self.data.crop, self.data.gt or "FOLDER"
        _require(self, "data.canvas", lambda value: value == 0 or value >= crop, f"0, or at least data.crop={crop}")
        _require(
            self,
            "data.unpaired",
            lambda value: not value or self.data.lq,
            f"empty where config.data.lq is: clean images alone are config.data.gt; for pairs beside them set"
            f" config.data.lq to the partners of config.data.gt={clean!r}",
        )
        _require(
            self,
            "data.unpaired_meta_info",
            lambda value: not value or self.data.unpaired,
            "empty without config.data.unpaired, the folder that its names are in",
        )
        _require(self, "val.sigma", lambda value: 0 <= value <= 255, "from 0 to 255")
        _require(
            self,
            "train.betas",
            lambda value: len(value) == 2 and all(isinstance(beta, float) and 0 <= beta < 1 for beta in value),
            "two numbers from 0 up to, not including, 1",
        )
        for path in ("student.dtype", "teacher.dtype"):
            _require(self, path, lambda value: value in ("float32", "bfloat16"), '"float32" or "bfloat16"')


def parse(values: Mapping[str, Any]) -> Config:
    """The checked config of a nested mapping.

    Raises:
      ConfigError: an unknown key (the nearest valid one is named), a value of the wrong type or out of range.
    """
    return _parse(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values that JSON can hold."""
    return dataclasses.asdict(config)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'key: old -> new' for every value that differs between two nested dicts."""
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, f"{prefix}{key}.")
        elif _as_lists(old) != _as_lists(new):  # JSON has no tuples
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _parse(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            where = f"in {prefix[:-1]}" if prefix else "at the top level"
            raise ConfigError(
                f"config key {prefix + key!r} does not exist{nearest(key, fields)} (keys {where}: {', '.join(fields)})"
            )
        arguments[key] = _convert(value, hints[key], prefix + key)
    return cls(**arguments)


def _convert(value: Any, wanted: Any, path: str) -> Any:
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.{path} is {value!r}; it must be a group of keys")
        return _parse(wanted, value, path + ".")
    if isinstance(wanted, types.UnionType):
        # A schedule: a dict, or else a number.
        wanted = dict if isinstance(value, Mapping) else float
    if wanted is dict and isinstance(value, Mapping):
        return {key: _convert(entry, dict, f"{path}.{key}") if isinstance(entry, Mapping) else entry
                for key, entry in value.items()}  # fmt: skip
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not wanted:
        raise ConfigError(
            f"config.{path}={value!r} is of type {type(value).__name__}; it must be of type {wanted.__name__}"
        )
    return value


def _require(config: Config, path: str, holds: typing.Callable[[Any], bool], wanted: str) -> None:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    if not holds(value):
        raise ConfigError(f"config.{path}={value!r} must be {wanted}")
