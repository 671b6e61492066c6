"""Every random stream of a run, in one table, so that no two of them meet.

Nothing random is stored: whatever is drawn follows from the seed of the run, the stream, and a number in this stream.

On the device, streams are keys. The key of the run is `jax.random.key(seed)`; a number is folded into it:

    number                 key of                                             then folded in
    0 ... 2**31 - 1        the degradation of the sample of this number       -
    Stream.TERMS           the choices of loss terms                          the number of the sample
    Stream.CROP            where the crop is cut out of the canvas            the number of the sample
    Stream.STUDENT         the initial values of the student                  -
    Stream.ADAPTERS        the initial values of the adapters of loss terms   the CRC-32 of the term's name
    Stream.VALIDATION      the degradation of validation images; of seed 0,   the place of the image in the set
                           whatever that of the run is

On the host, for the data, they are NumPy generators, seeded by (seed, stream, number). The streams are those of `Kind`.

What belongs to no run has a fixed seed of its own: the noise of `kdjax.validation.add_noise`, for example, is a
protocol.

Before this table, the student had the number 1 and the adapters 2, which are samples, and the terms had that of the
validation. Since they moved, new runs start from other initial values, and `label_consistency` makes other choices. All
else is as before: the order of the data, crops, noise, validation images and caches. A run that is continued keeps its
numbers, unless it has that term.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

SAMPLES = 2**31  # the numbers of samples begin anew from here; those of `Stream` are larger


@enum.unique
class Stream(enum.IntEnum):
    """The numbers that are folded into the key of a run."""

    VALIDATION = 2**32 - 1
    CROP = 2**32 - 2
    STUDENT = 2**32 - 3
    ADAPTERS = 2**32 - 4
    TERMS = 2**32 - 5


class _Draws(NamedTuple):
    order: int  # of the images in an epoch; the number is that of the epoch
    sample: int  # crop and flips, and what replaces a damaged image; the number is that of the sample


@enum.unique
class Kind(_Draws, enum.Enum):
    """The kinds of images that a batch is made of, each with NumPy streams of its own."""

    LABELLED = 0, 1
    UNLABELLED = 2, 3
    UNPAIRED = 4, 5
    CACHED = 6, 7


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """The generator of a number in a stream of the data: one of the two of a `Kind`."""
    return np.random.Generator(np.random.PCG64((seed, stream, number)))
