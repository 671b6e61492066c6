"""What the config of a training run may say: every key, its default, its unit, and what it decides.

This file is the only source: `defaults` is the complete config as a ConfigDict, from which the files in `configs/`
change what differs; `parse` turns a nested mapping into these frozen dataclasses and refuses what does not fit; help
texts and the table in docs/configuration.md are made from it. What a number means for the rest of the run (does the
batch divide, is there such a loss term) is checked where it is used, at start. Whatever the key, numbers are finite in
32 bits, which is what devices compute with, and texts can be paths.

Folders of images may be "embedded", the photographs inside the package, and weights the name of a model there
(`kdjax.assets`).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

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

SAMPLES = "samples"  # what training samples are made of: another value is another stream
BASELINE = "baseline"  # what the scores of the input and the teacher are measured on


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values of a key that `holds` accepts, in words for the message that refuses another one."""

    holds: typing.Callable[[Any], bool]
    words: str


def _whole(least: int, most: int = _LARGEST) -> Allowed:
    return Allowed(lambda value: least <= value <= most, f"from {least} to {most:,}")


def _one_of(*names: str) -> Allowed:
    return Allowed(lambda value: value in names, " or ".join(f'"{name}"' for name in names))


_ANY = Allowed(lambda value: True, "")
_POSITIVE = Allowed(lambda value: 0 <= value <= _LARGEST_FLOAT, "0 or more, and finite")
_PART = Allowed(lambda value: 0 < value < 1, "between 0 and 1")
_DECAY = Allowed(lambda value: 0 <= value < 1, "from 0 up to, not including, 1")
_BETAS = Allowed(
    lambda value: len(value) == 2 and all(type(b) in (int, float) and 0 <= np.float32(b) < 1 for b in value),
    "two numbers from 0 up to, not including, 1",
)


def setting(default: Any, about: str, allowed: Allowed = _ANY, *, decides: str = "") -> Any:
    """A field of the dataclasses below.

    Args:
      about: one line for the help and the docs.
      allowed: what values there are, beyond their type.
      decides: SAMPLES or BASELINE, if the key does: what is kept from an earlier run is then of no use to this one.
    """
    factory: dict[str, Any] = {"default": default} if default.__hash__ else {"default_factory": type(default)}
    return dataclasses.field(**factory, metadata={"about": about, "allowed": allowed, "decides": decides})


@dataclasses.dataclass(frozen=True)
class Student:
    arch: str = setting("srvggnetcompact", 'architecture, or "module:Class" for your own network')
    hparams: dict = setting({}, "hyper-parameters of the architecture; missing ones take their default")
    weights: str = setting("", 'weights to start from: a .pth or .safetensors file, or "teacher" to shrink the teacher')
    remat: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    dtype: str = setting(
        "float32", 'of the forward and backward pass; "bfloat16" on accelerators', _one_of("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True)
class Teacher:
    weights: str = setting(
        "", 'a .pth, .safetensors or .onnx file, "embedded" or "fast"; empty if no term needs a teacher'
    )
    backend: str = setting(
        "", '"spandrel" lets spandrel and PyTorch run the file; empty: kdjax, or ONNX Runtime', _one_of("", "spandrel")
    )
    features: tuple = setting(
        (), "of a teacher that kdjax does not run: modules (spandrel) or tensors (ONNX) to return"
    )
    key: str = setting(
        "auto", 'which weights of the file: "auto" takes params_ema, then params, then a bare state dict'
    )
    hparams: dict = setting({}, "hyper-parameters that the file does not say, such as act_type")
    also: tuple = setting((), "files of more teachers: their images are averaged, the features are the first one's")
    mix: tuple = setting((), "weights of that average, one per teacher; empty: all equal")
    self_ensemble: bool = setting(
        False, "average over the eight flips and rotations of the input, at eight times the cost"
    )
    dtype: str = setting("float32", "of the forward pass", _one_of("float32", "bfloat16"))
    outputs: str = setting("", "instead of a file: folder of the images that a teacher has made of those in data.lq")
    cache: str = setting("", "folder of a teacher cache written by kdjax.cache; empty: the teacher itself is run")


@dataclasses.dataclass(frozen=True)
class Data:
    gt: str = setting("", "folder or pack of clean images")
    lq: str = setting("", "folder or pack of their degraded partners; empty degrades gt with `degrade`")
    filename_tmpl: str = setting("{}", 'file name of lq from that of gt, without suffixes, such as "{}_noisy"')
    meta_info: str = setting("", "BasicSR list of the files to use, one a line; empty takes the whole folder")
    limit: int = setting(0, "use at most this many images, spread over the folder; 0 uses all", _whole(0))
    crop: int = setting(128, "side of the square training crop of gt, pixels", _whole(1), decides=SAMPLES)
    canvas: int = setting(0, "side of the gt square that is degraded before the crop is cut; 0 means crop", _whole(0))
    gt_usm: bool = setting(False, "sharpen the target (unsharp mask), as Real-ESRGAN does", decides=SAMPLES)
    batch_size: int = setting(16, "crops per step, over all devices and processes together", _whole(1))
    per_device: bool = setting(False, "batch_size and workers are per accelerator, as in BasicSR")
    hflip: bool = setting(True, "flip crops at random", decides=SAMPLES)
    rot: bool = setting(True, "rotate crops at random; with hflip, all eight flips and quarter turns", decides=SAMPLES)
    workers: int = setting(0, "decoding processes; 0 decodes in threads of the main process", _whole(0))
    cache_mb: int = setting(512, "decoded images kept in memory, MB per process", _whole(0))
    unlabelled: str = setting("", "folder of degraded images without a clean partner (clean ones without lq)")
    unlabelled_part: float = setting(0.5, "share of unlabelled images in every batch", _PART, decides=SAMPLES)
    unpaired: str = setting("", "folder of clean images beside the pairs of gt and lq, degraded with `degrade`")
    unpaired_meta_info: str = setting("", "list of the files to use, as meta_info")
    unpaired_part: float = setting(0.5, "share of unpaired images in every batch", _PART, decides=SAMPLES)


@dataclasses.dataclass(frozen=True)
class Val:
    gt: str = setting("", "folder or pack of clean images", decides=BASELINE)
    lq: str = setting("", "folder or pack of their degraded partners", decides=BASELINE)
    filename_tmpl: str = setting("{}", "as data.filename_tmpl", decides=BASELINE)
    meta_info: str = setting("", "as data.meta_info", decides=BASELINE)
    sigma: float = setting(
        25.0, "noise added to gt where there is no lq, on the scale of 0 to 255, seed 0 per image",
        Allowed(lambda value: 0 <= value <= 255, "from 0 to 255"), decides=BASELINE,
    )  # fmt: skip
    degrade: dict = setting({}, "as config.degrade, instead of that noise", decides=BASELINE)
    crop: int = setting(0, "side of a centre crop, pixels; 0 validates whole images", _whole(0), decides=BASELINE)
    limit: int = setting(
        0, "use at most this many images, spread over the folder; 0 uses all", _whole(0), decides=BASELINE
    )
    every: int = setting(5_000, "steps between validations", _whole(1))
    save_images: int = setting(4, "side-by-side images saved per validation", _whole(0))


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = setting(250_000, "updates", _whole(1))
    optimizer: str = setting("adam", '"adam" (weight decay as torch\'s Adam, L2) or "adamw"')
    lr: ScheduleSpec = setting(2e-4, "learning rate: a number or a schedule")
    betas: tuple = setting((0.9, 0.99), "Adam's", _BETAS)
    weight_decay: float = setting(0.0, "0 for none", _POSITIVE)
    grad_clip: float = setting(0.0, "largest norm of the gradient; 0 disables clipping", _POSITIVE)
    ema_decay: float = setting(
        0.999, "decay of the moving average of the weights, which is what is validated and saved", _DECAY
    )
    ema_warmup: bool = setting(True, "start with a shorter average: a decay of at most (1 + step) / (10 + step)")
    accumulate: int = setting(
        1, "parts a batch is split into, one after another: less memory, the same update", _whole(1)
    )


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = setting(100, "steps between lines", _whole(1))
    diagnose: bool = setting(
        True, "also log each term's share of the update: a forward pass, and a backward pass a term"
    )
    tensorboard: bool = setting(False, "write event files (extra `tb`)")
    wandb: str = setting("", "report to this Weights & Biases project (extra `wandb`)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = setting(5_000, "steps between checkpoints", _whole(1))
    keep: int = setting(2, "latest checkpoints kept; the best by validation PSNR is kept as well", _whole(1))


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = setting("run", "the run's folder is runs/NAME unless --workdir says otherwise")
    # Larger seeds would give JAX the random numbers of smaller ones.
    seed: int = setting(
        0, "seed of initial weights, data order, crops and noise", _whole(0, 2**32 - 1), decides=SAMPLES
    )
    student: Student = Student()
    teacher: Teacher = Teacher()
    terms: dict = setting({}, "loss terms by name, see docs/distillation.md")
    degrade: dict = setting({}, "how clean images are degraded, see docs/degradations.md")
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
                    f"config.{key}.arch is empty. A YAML cannot import code; name your network on the"
                    f" command line: --config.{key}.arch=my_package.my_net:MyNet"
                )
        for path, field, value in keys(self):
            if not field.metadata["allowed"].holds(value):
                raise ConfigError(f"config.{path}={brief(value)} must be {field.metadata['allowed'].words}")
        try:
            make_schedule(self.train.lr)
        except ValueError as error:
            raise ConfigError(f"config.train.lr: {error}") from None
        if min(levels(self.train.lr)) < 0:
            raise ConfigError(f"config.train.lr={brief(self.train.lr)} must never be negative")
        for name, spec in self.terms.items():
            if not isinstance(spec, Mapping):
                raise ConfigError(f"config.terms.{name} is {brief(spec)}; it must be a group of keys")
        self._check_data()

    def _check_data(self) -> None:
        """What one key of `data` says of another."""
        data = self.data
        if 0 < data.canvas < data.crop:
            raise ConfigError(f"config.data.canvas={data.canvas} must be 0, or at least data.crop={data.crop}")
        if data.unpaired and not data.lq:
            raise ConfigError(
                f"config.data.unpaired={brief(data.unpaired)} needs config.data.lq. Clean images alone belong in"
                " config.data.gt; to add pairs, set config.data.lq to the partners of"
                f" config.data.gt={data.gt or 'FOLDER'!r}"
            )
        if self.teacher.outputs:
            if not data.lq or data.unpaired or data.unlabelled:
                raise ConfigError(
                    f"config.teacher.outputs={brief(self.teacher.outputs)} are made of the images in config.data.lq, so"
                    " that is needed, and config.data.unpaired and unlabelled cannot be used"
                )
            if given := [name for name in ("weights", "cache", "also") if getattr(self.teacher, name)]:
                raise ConfigError(
                    f"config.teacher.outputs takes the place of config.teacher.{given[0]}; give one of them"
                )
        if data.unpaired_meta_info and not data.unpaired:
            raise ConfigError(
                f"config.data.unpaired_meta_info={brief(data.unpaired_meta_info)} needs config.data.unpaired,"
                " the folder of the files it lists"
            )


def defaults() -> ConfigDict:
    """The complete config, every key with its default, for config files to change.

    Values may change their type (a learning rate becomes a schedule); `parse` checks the result.
    """
    return ConfigDict(to_dict(Config()), type_safe=False)


def keys(config: Any) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Path, field and value of every key of a config or of a part of it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{path}", inner, entry) for path, inner, entry in keys(value))
        else:
            yield field.name, field, value


def deciding(config: Any, what: str) -> dict[str, Any]:
    """The values of the fields of a config, or of a part of it, that decide SAMPLES or BASELINE."""
    fields = dataclasses.fields(config)
    return {field.name: getattr(config, field.name) for field in fields if field.metadata.get("decides") == what}


def kind_of(path: str) -> Any:
    """The type of a key by its path ("train.steps"); None for what has none, within a schedule or among hparams."""
    found: Any = Config
    for part in path.split("."):
        if not dataclasses.is_dataclass(found):
            return None
        found = typing.get_type_hints(found).get(part)
    return found


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
            f" not . or .., at most {_LONGEST_NAME} bytes. To write somewhere else, give --workdir"
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


def _parse(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
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
            raise ConfigError(f"config.{path} has the key {brief(wrong[0])}; keys must be strings")
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
        if path != "seed" and not -_LARGEST <= value <= _LARGEST:
            wanted = f"a whole number from {-_LARGEST:,} to {_LARGEST:,}"
    elif value is not None:
        wanted = "made of numbers, strings, booleans, lists and groups"
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
