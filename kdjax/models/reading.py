"""With what `models/X.py` says how the weight files of its network are read: key layouts, shapes, what has to be asked.

A file is read in four steps, each of which an architecture can state (`Files`): its keys are renamed to ours
(`layouts`), hyper-parameters are inferred from the shapes (`infer`), what shapes cannot tell is settled or asked for
(`settle`), and only then is a network built, if its size (`num_tensors`) is near that of the file. `kdjax.weights`
takes these steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from kdjax.files import printable

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, in torch's layout
Hparams = Mapping[str, Any]

MAX_UPSAMPLE = 8  # enlargements by 2
MAX_LEVELS = 12  # of a U-Net: an image of a gigapixel has 2^15 pixels a side


class WeightsError(ValueError):
    """A weight file that cannot be read or written; the message says what was found and what to do."""


class StoredTensor(Protocol):
    """A tensor of a file, which is copied out of it only when asked for (`kdjax.weights.tensors.Tensor`)."""

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
    """One way in which files name the parameters of a network.

    Attributes:
      name: what messages call it.
      rename: our name for a key of the file, or None for one that this layout does not have.
      is_constant: whether a key is a tensor that is never trained, and so none of our parameters.
      told: hyper-parameters that the layout, or the values of its constants, tell.
    """

    name: str
    rename: Callable[[str], str | None]
    is_constant: Callable[[str], bool] = lambda key: False
    told: Callable[[State], dict[str, Any]] = lambda constants: {}


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a file's network when `Files.settle` is asked for the rest.

    Attributes:
      layout: the name of the file's layout.
      hparams: complete; what was neither stated nor told has its default.
      stated: the names of those that the caller states.
      told: the names of those that the shapes or the layout tell, perhaps by what is usual.
      is_chosen: the architecture is the caller's choice, not recognised.
    """

    layout: str
    hparams: Hparams
    stated: Collection[str]
    told: Collection[str]
    is_chosen: bool


Settled = tuple[dict[str, Any], list[str]]  # hyper-parameters that replace the known ones; what was taken, and why


@dataclasses.dataclass(frozen=True)
class Files:
    """How the weight files of an architecture are read.

    Attributes:
      layouts: how files name its parameters; of equal fits the first one is taken.
      layouts_of: those that depend on the keys of the file.
      infer: the hyper-parameters that shapes tell, given those that are stated, which decide what shapes leave open.
        Where shapes contradict each other, something near: the check of all keys says what is wrong.
      num_tensors: how many tensors the network has. To say it costs nothing; to build it, a millisecond each.
      settle: what no tensor tells: replaced hyper-parameters and notes. Raises WeightsError for what has to be said.
      guess: hyper-parameters that change no key, for checking the keys before they are settled.
      convert: the state dict as one that a layout names, and the name of the file's layout; None where it is one.
      is_extra: whether a key belongs to a tensor that only `convert` reads.
    """

    layouts: tuple[Layout, ...]
    infer: Callable[[Shapes, Hparams], dict[str, Any]]
    num_tensors: Callable[[Hparams], int]
    layouts_of: Callable[[Collection[str]], tuple[Layout, ...]] = lambda keys: ()
    settle: Callable[[Known], Settled] = lambda known: ({}, [])
    guess: Hparams = dataclasses.field(default_factory=dict)
    convert: Callable[[State], tuple[dict[str, np.ndarray], str] | None] = lambda state: None
    is_extra: Callable[[str], bool] = lambda key: False


def listed(keys: Collection[Any], limit: int = 20) -> str:
    """The first of the names, each cut and safe to print, and how many there are."""
    first = ", ".join(printable(str(key)[:120]) for key in itertools.islice(keys, limit))
    return first + (f", ... ({len(keys)} in all)" if len(keys) > limit else "")


# ---- renaming keys ---------------------------------------------------------------------------------------------


def rename_by(*rules: tuple[str, str]) -> Callable[[str], str | None]:
    """A renaming by whole-key patterns; N, K, J in a pattern are numbers, and keys end in .weight or .bias."""
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
    """A renaming for files whose keys are our names."""
    compiled = re.compile(pattern)
    return lambda key: key if compiled.fullmatch(key) else None


# ---- reading shapes --------------------------------------------------------------------------------------------


def size(shapes: Shapes, axis: int, *keys: str, default: int) -> int:
    """The size along `axis` of the first of these convolutions that the file has."""
    return next((shapes[key][axis] for key in keys if len(shapes.get(key, ())) == 4), default)


def count(shapes: Shapes, pattern: str, *, first: int = 0) -> int:
    """How many numbered parts there are: up to the largest number, unless a stray one is far beyond the rest."""
    numbers = {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}
    found = max(numbers, default=first - 1) + 1 - first
    return found if found <= 2 * len(numbers) + 8 else len(numbers)


def levels(shapes: Shapes, pattern: str) -> int:
    """How many levels a U-Net has.

    Raises:
      WeightsError: more than any image has.
    """
    found = count(shapes, pattern)
    if found > MAX_LEVELS:
        raise WeightsError(f"it is a U-Net of {found} levels, at most {MAX_LEVELS} are read")
    return found


def upscaling(shapes: Shapes, first: str, steps: int) -> int:
    """The enlargement by so many pixel shuffles, of which the `first` convolution tells whether it is by 3."""
    shape = shapes.get(first, ())
    return 3 if steps == 1 and len(shape) == 4 and shape[0] == 9 * shape[1] else 2 ** min(steps, MAX_UPSAMPLE)


def num_steps(upscale: int) -> int:
    """How many pixel shuffles enlarge so many times."""
    return 1 if upscale == 3 else upscale.bit_length() - 1


def unshuffled(inputs: int, stated: Hparams) -> tuple[int, int]:
    """Colour channels of the image and the un-shuffling in front of a first convolution that reads `inputs` channels.

    12 and 48 channels are taken for RGB un-shuffled 2 and 4 times; what else there may be has to be stated.
    """
    if "unshuffle" in stated:
        unshuffle = max(1, stated["unshuffle"])
    elif "num_in_ch" in stated:
        unshuffle = max(1, math.isqrt(inputs // max(1, stated["num_in_ch"])))
    else:
        unshuffle = {12: 2, 48: 4}.get(inputs, 1)
    return max(1, inputs // unshuffle**2), unshuffle


# ---- what has to be said ---------------------------------------------------------------------------------------


def how_to_say(name: str, values: Iterable[Any]) -> str:
    """How a hyper-parameter is stated: in Python, on the command line and in a config."""
    python = " or ".join(f"{name}={value!r}" for value in values)
    first = next(iter(values))
    return (
        f"say {python}, as load_model(..., {name}={first!r}) in Python, --hparam {name}={first} on the command line,"
        f" config.teacher.hparams.{name} = {first!r} in a config"
    )


def note_unshuffling(channels: int, factor: int, name: str, value: int, whose: str) -> str:
    """The note about input channels that were taken for those of an un-shuffled image."""
    read = channels * factor**2
    return (
        f"its {read} input channels were taken for {channels} of an image un-shuffled {factor} times, as in {whose}"
        f" ({name}={value}); if it reads {read} colours, {how_to_say('num_in_ch', (read,))}"
    )


def settle_unshuffle(known: Known) -> Settled:
    """Notes that `unshuffled` decided by the number of channels, if it did."""
    factor = known.hparams["unshuffle"]
    if factor == 1 or {"unshuffle", "num_in_ch"} & set(known.stated):
        return {}, []
    return {}, [note_unshuffling(known.hparams["num_in_ch"], factor, "unshuffle", factor, "a student of kdjax")]
