"""The vocabulary in which `models/X.py` describes its weight files: key layouts, shapes, and what to ask the user.

A file is read in four steps, each of which an architecture can define (`Files`). Its keys are renamed to ours
(`layouts`), hyper-parameters are inferred from the shapes (`infer`), and whatever shapes cannot tell is settled or
asked for (`settle`). Only then is the network built, if its size (`num_tensors`) is close to the file's.
`kdjax.weights` runs these steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kdjax.files import printable

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, in torch's layout
Hparams = Mapping[str, Any]

MAX_UPSAMPLE = 8  # number of x2 upsamplings
MAX_LEVELS = 12  # of a U-Net: a gigapixel image has sides of 2^15 pixels


class WeightsError(ValueError):
    """A weight file that cannot be read or written; the message says what was found and what to do."""


class StoredTensor(Protocol):
    """A tensor in a file, copied out only on demand (`kdjax.weights.tensors.Tensor`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def numel(self) -> int: ...

    @property
    def is_float(self) -> bool: ...

    def array(self) -> np.ndarray: ...


State = Mapping[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One naming scheme for a network's parameters in files.

    Attributes:
      name: its name in messages.
      rename: maps a key of the file to our name, or to None if this layout does not have it.
      is_constant: whether a key is a tensor that is never trained, and so not one of our parameters.
      told: returns the hyper-parameters implied by the layout, or by the values of its constants.
    """

    name: str
    rename: Callable[[str], str | None]
    is_constant: Callable[[str], bool] = lambda key: False
    told: Callable[[State], dict[str, Any]] = lambda constants: {}


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known about a file's network when `Files.settle` decides the rest.

    Attributes:
      layout: the name of the file's layout.
      hparams: complete; anything neither stated nor inferred has its default.
      stated: names of the hyper-parameters that the caller states.
      told: names of those inferred from shapes or layout, possibly by convention.
      is_chosen: the caller chose the architecture; it was not recognised.
    """

    layout: str
    hparams: Hparams
    stated: Collection[str]
    told: Collection[str]
    is_chosen: bool


Settled = tuple[dict[str, Any], list[str]]  # replacement hyper-parameters; notes on what was assumed and why


@dataclasses.dataclass(frozen=True)
class Files:
    """How to read an architecture's weight files.

    Attributes:
      layouts: its naming schemes; of equally good fits, the first wins.
      layouts_of: layouts that depend on the file's keys.
      infer: the hyper-parameters that shapes tell. It is given the stated ones, which decide what shapes leave open. If
        shapes contradict each other, it returns something close: the check of all keys reports what is wrong.
      num_tensors: the network's number of tensors. Computing it costs nothing; building the network costs a millisecond
        per tensor.
      settle: decides what no tensor tells. Returns replacement hyper-parameters and notes; raises WeightsError for what
        the user must state.
      guess: hyper-parameters that change no key, for checking the keys before settling.
      convert: returns the state dict renamed to one of the layouts, and the name of the file's layout; None if it
        already fits one.
      is_extra: whether a key belongs to a tensor that only `convert` reads.
      expand: returns the state dict that kdjax writes, given hyper-parameters and the parameters under our names, where
        other programs need more tensors than the network has. `convert` and `infer` have to reverse it.
    """

    layouts: tuple[Layout, ...]
    infer: Callable[[Shapes, Hparams], dict[str, Any]]
    num_tensors: Callable[[Hparams], int]
    layouts_of: Callable[[Collection[str]], tuple[Layout, ...]] = lambda keys: ()
    settle: Callable[[Known], Settled] = lambda known: ({}, [])
    guess: Hparams = dataclasses.field(default_factory=dict)
    convert: Callable[[State], tuple[dict[str, np.ndarray], str] | None] = lambda state: None
    is_extra: Callable[[str], bool] = lambda key: False
    expand: Callable[[Hparams, dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda hparams, state: state


def listed(keys: Collection[Any], limit: int = 20) -> str:
    """Returns the first names, each shortened and safe to print, and how many there are."""
    first = ", ".join(printable(str(key)[:120]) for key in itertools.islice(keys, limit))
    return first + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


# ---- renaming keys ---------------------------------------------------------------------------------------------


def rename_by(*rules: tuple[str, str]) -> Callable[[str], str | None]:
    """Returns a renaming by whole-key patterns. N, K and J in a pattern are numbers; keys end in .weight or .bias."""
    compiled = []
    for pattern, replacement in rules:
        for letter in "NJK":
            pattern = pattern.replace(f"<{letter}>", f"(?P<{letter}>0|[1-9][0-9]{{0,5}})")
            replacement = replacement.replace(f"<{letter}>", rf"\g<{letter}>")
        compiled.append((re.compile(pattern + r"(?P<leaf>\.weight|\.bias)"), replacement + r"\g<leaf>"))

    def rename(key: str) -> str | None:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(key):
                return match.expand(replacement)
        return None

    return rename


def same_if(pattern: str) -> Callable[[str], str | None]:
    """Returns a renaming for files whose keys are already ours."""
    compiled = re.compile(pattern)
    return lambda key: key if compiled.fullmatch(key) else None


# ---- reading shapes --------------------------------------------------------------------------------------------


def size(shapes: Shapes, axis: int, *keys: str, default: int) -> int:
    """Returns the size along `axis` of the first of these convolutions present in the file."""
    return next((shapes[key][axis] for key in keys if len(shapes.get(key, ())) == 4), default)


def count(shapes: Shapes, pattern: str, *, first: int = 0) -> int:
    """Counts numbered parts by the highest number, unless that is a stray far beyond the rest."""
    numbers = {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}
    found = max(numbers, default=first - 1) + 1 - first
    return found if found <= 2 * len(numbers) + 8 else len(numbers)


def ranks(shapes: Shapes, names: Sequence[str]) -> tuple[int, ...]:
    """Returns the ranks of these convolutions (`kdjax.models.layers.LowRankConv`), 0 for full ones; () if all are."""
    found = tuple(size(shapes, 0, f"{name}.0.weight", default=0) for name in names)
    return found if any(found) else ()


def num_low_rank(hparams: Hparams) -> int:
    """Returns the number of convolutions with a rank; each has a tensor more."""
    return sum(rank > 0 for rank in hparams["ranks"])


def levels(shapes: Shapes, pattern: str) -> int:
    """Returns the number of levels of a U-Net.

    Raises:
      WeightsError: more levels than any image supports.
    """
    found = count(shapes, pattern)
    if found > MAX_LEVELS:
        raise WeightsError(f"it is a U-Net of {found} levels; {MAX_LEVELS} is the limit")
    return found


def upscaling(shapes: Shapes, first: str, steps: int) -> int:
    """Returns the upscaling factor of `steps` pixel shuffles; the `first` convolution shows whether it is 3."""
    shape = shapes.get(first, ())
    return 3 if steps == 1 and len(shape) == 4 and shape[0] == 9 * shape[1] else 2 ** min(steps, MAX_UPSAMPLE)


def num_steps(upscale: int) -> int:
    """Returns the number of pixel shuffles for an upscaling factor."""
    return 1 if upscale == 3 else upscale.bit_length() - 1


def unshuffled(inputs: int, stated: Hparams, *, grey: bool = False) -> tuple[int, int]:
    """Returns the image's colour channels and the un-shuffle factor, given a first convolution with `inputs` channels.

    12 and 48 channels are taken as RGB un-shuffled by 2 and 4; with `grey`, 4 are taken as grey ones un-shuffled by 2.
    Anything else must be stated.
    """
    if "unshuffle" in stated:
        unshuffle = max(1, stated["unshuffle"])
    elif "num_in_ch" in stated:
        unshuffle = max(1, math.isqrt(inputs // max(1, stated["num_in_ch"])))
    else:
        unshuffle = {12: 2, 48: 4, **({4: 2} if grey else {})}.get(inputs, 1)
    return max(1, inputs // unshuffle**2), unshuffle


# ---- what has to be said ---------------------------------------------------------------------------------------


def how_to_say(name: str, values: Iterable[Any]) -> str:
    """Returns how to state a hyper-parameter in Python, on the command line and in a config."""
    python = " or ".join(f"{name}={value!r}" for value in values)
    first = next(iter(values))
    return (
        f"give {python}: as load_model(..., {name}={first!r}) in Python, --hparam {name}={first} on the command line,"
        f" config.teacher.hparams.{name} = {first!r} in a config"
    )


def note_unshuffling(channels: int, factor: int, name: str, value: int, whose: str) -> str:
    """Returns the note saying that the input channels were taken as those of an un-shuffled image."""
    read = channels * factor**2
    return (
        f"its {read} input channels are assumed to be {channels} channels, pixel-unshuffled by {factor}, as in {whose}"
        f" ({name}={value}); if it reads {read} colours, {how_to_say('num_in_ch', (read,))}"
    )


def settle_unshuffle(known: Known) -> Settled:
    """Notes it if `unshuffled` decided by the number of channels."""
    factor = known.hparams["unshuffle"]
    if factor == 1 or {"unshuffle", "num_in_ch"} & set(known.stated):
        return {}, []
    return {}, [note_unshuffling(known.hparams["num_in_ch"], factor, "unshuffle", factor, "a student of kdjax")]
