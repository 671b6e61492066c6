"""Every random stream of a run in one table, so that no two overlap.

No random state is stored: every draw follows from the run's seed, the stream, and a number within the stream.

On the device, streams are keys. The run's key is `jax.random.key(seed)`, with a number folded into it:

    number                 key for                                            then folded in
    0 ... 2**31 - 1        degrading the sample with this number              -
    Stream.TERMS           random choices of loss terms                       the sample number
    Stream.CROP            the position of the crop in the canvas             the sample number
    Stream.STUDENT         the student's initial weights                      -
    Stream.ADAPTERS        the initial weights of loss terms' adapters        the CRC-32 of the term's name
    Stream.VALIDATION      degrading validation images; always from seed 0,   the image's position in the set
                           whatever the run's seed

On the host, for the data, streams are NumPy generators seeded by (seed, stream, number); `Kind` lists them.

What belongs to no run has its own fixed seed. The noise of `kdjax.validation.add_noise`, for example, is part of a
protocol.

Before this table, the student used number 1 and the adapters number 2, which are also sample numbers, and the terms
used validation's number. Since they moved, new runs start from different initial weights, and `label_consistency` makes
different choices. Everything else is unchanged: data order, crops, noise, validation images and caches. A resumed run
keeps its numbers, unless it has that term.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

SAMPLES = 2**31  # sample numbers wrap around here; the numbers of `Stream` are larger


@enum.unique
class Stream(enum.IntEnum):
    """Numbers folded into the run's key."""

    VALIDATION = 2**32 - 1
    CROP = 2**32 - 2
    STUDENT = 2**32 - 3
    ADAPTERS = 2**32 - 4
    TERMS = 2**32 - 5


class _Draws(NamedTuple):
    order: int  # image order within an epoch; numbered by epoch
    sample: int  # crop and flips, and the substitute for a damaged image; numbered by sample


@enum.unique
class Kind(_Draws, enum.Enum):
    """The kinds of images in a batch, each with its own NumPy streams."""

    LABELLED = 0, 1
    UNLABELLED = 2, 3
    UNPAIRED = 4, 5
    CACHED = 6, 7


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Returns the generator for a number in a data stream, one of a `Kind`'s two."""
    return np.random.Generator(np.random.PCG64((seed, stream, number)))
