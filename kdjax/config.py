"""What the config of a training run may say: every key, its default and its unit.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict` with the keys it wants to set; `parse` turns that
nested dict into these frozen dataclasses and refuses what does not fit. What a number means for the rest of the run
(does the batch divide, is there such a loss term) is checked where it is used, at start. Whatever the key, numbers are
finite in 32 bits, as which the devices compute with them, and texts are such as paths can be.

Paths may be the word "embedded": the photographs and the teacher inside the package.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.files import printable
from kdjax.names import brief, nearest
from kdjax.schedules import levels, make_schedule


class ConfigError(ValueError):
    """A key or value of the config is wrong; the message says which, and what would be right."""


# A plain number, or a dict for `kdjax.schedules.make_schedule`.
ScheduleSpec = float | dict

_LARGEST, _LARGEST_FLOAT = 2**31 - 1, float(np.finfo(np.float32).max)
_LONGEST_TEXT = 4096  # bytes, as of a path
_LONGEST_NAME = 200  # bytes; a file system allows 255
_DEEPEST = 16  # groups within groups
# The least and the largest value of every whole number.
_RANGES = {
    # Larger seeds would give JAX the random numbers of smaller ones.
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("data.crop", "data.batch_size", "train.steps", "train.accumulate"), (1, _LARGEST)),
    **dict.fromkeys(("log.every", "val.every", "checkpoint.every", "checkpoint.keep"), (1, _LARGEST)),
    **dict.fromkeys(("data.limit", "data.canvas", "data.workers", "data.cache_mb"), (0, _LARGEST)),
    **dict.fromkeys(("val.crop", "val.limit", "val.save_images"), (0, _LARGEST)),
}


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
        check_name(self.name, "config.name")
        for key, arch in (("student", self.student.arch), ("teacher.hparams", self.teacher.hparams.get("arch", True))):
            if not arch:
                raise ConfigError(
                    f"config.{key}.arch is empty, and a network of your own, which a YAML can only ask for, is imported"
                    f" when the command line names it: --config.{key}.arch=my_package.my_net:MyNet"
                )
        for path, (least, most) in _RANGES.items():
            fits = lambda value, least=least, most=most: least <= value <= most  # noqa: E731
            _require(self, path, fits, f"from {least} to {most:,}")
        for path in ("train.weight_decay", "train.grad_clip"):
            _require(self, path, lambda value: 0 <= value <= _LARGEST_FLOAT, "0 or more, and finite")
        try:
            make_schedule(self.train.lr)
        except ValueError as error:
            raise ConfigError(f"config.train.lr: {error}") from None
        _require(self, "train.lr", lambda value: min(levels(value)) >= 0, "never negative")
        for name, spec in self.terms.items():
            if not isinstance(spec, Mapping):
                raise ConfigError(f"config.terms.{name} is {brief(spec)}; it must be a group of keys")
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
            lambda value: len(value) == 2 and all(type(b) in (int, float) and 0 <= np.float32(b) < 1 for b in value),
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


def check_name(name: object, key: str) -> None:
    """Refuses what is not the plain name of a folder, so that no config decides where on the disk it is written.

    Raises:
      ConfigError: with the name of `key`.
    """
    plain = isinstance(name, str) and name.strip() not in ("", ".", "..") and printable(name) == name
    if not plain or set(name) & set("/\\\n\t") or len(name.encode()) > _LONGEST_NAME:
        raise ConfigError(
            f"{key}={brief(name)} must be the name of one folder: without slashes, backslashes and control characters,"
            f" not . or .., at most {_LONGEST_NAME} bytes. Another place is given as --workdir"
        )


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
                f"config key {brief(f'{prefix}{key}')} does not exist{nearest(key, fields)} (keys {where}:"
                f" {', '.join(fields)})"
            )
        arguments[key] = _convert(value, hints[key], prefix + key)
    return cls(**arguments)


def _convert(value: Any, wanted: Any, path: str) -> Any:
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise ConfigError(f"config.{path} is {brief(value)}; it must be a group of keys")
        return _parse(wanted, value, path + ".")
    value = _plain(value, path)
    if isinstance(wanted, types.UnionType):
        # A schedule: a dict, or else a number.
        wanted = dict if isinstance(value, dict) else float
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not wanted:
        raise ConfigError(
            f"config.{path}={brief(value)} is of type {type(value).__name__}; it must be of type {wanted.__name__}"
        )
    return value


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    """A value of any key, with dicts for mappings, if JSON can hold it and all numbers and texts in it can be used."""
    if depth > _DEEPEST:
        raise ConfigError(f"config.{path[:_LONGEST_NAME]}... has groups within groups, more than {_DEEPEST} deep")
    wanted = ""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not (isinstance(key, str) and _can_be_a_path(key))]:
            raise ConfigError(f"config.{path} has the key {brief(wrong[0])}; keys must be texts")
        return {key: _plain(entry, f"{path}.{key}", depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry, path, depth + 1) for entry in value)
    if isinstance(value, str):
        if not _can_be_a_path(value):
            wanted = f"text without NUL, valid in UTF-8, of at most {_LONGEST_TEXT:,} bytes"
    elif isinstance(value, float):
        if not abs(value) <= _LARGEST_FLOAT:  # nan is not
            wanted = f"a finite number, of at most {_LARGEST_FLOAT:.3g}"
    elif isinstance(value, int):
        if path not in _RANGES and not -_LARGEST <= value <= _LARGEST:
            wanted = f"a whole number from {-_LARGEST:,} to {_LARGEST:,}"
    elif value is not None:
        wanted = "made of numbers, texts, true, false, lists and groups"
    if wanted:
        raise ConfigError(f"config.{path}={brief(value)} must be {wanted}")
    return value


def _can_be_a_path(text: str) -> bool:
    """Also with bytes that are not UTF-8, which Python keeps as lone surrogates from U+DC80 to U+DCFF."""
    try:
        return (
            "\0" not in text
            and len(text) <= _LONGEST_TEXT
            and len(text.encode("utf-8", "surrogateescape")) <= _LONGEST_TEXT
        )
    except UnicodeEncodeError:
        return False


def _require(config: Config, path: str, holds: typing.Callable[[Any], bool], wanted: str) -> None:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    if not holds(value):
        raise ConfigError(f"config.{path}={brief(value)} must be {wanted}")
