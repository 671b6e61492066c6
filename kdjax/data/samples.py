"""The images, crops and flips of a batch: pure functions of (seed, step), without processes or threads.

`Samples` maps a sample number to pixels. `Batches` maps a step to a batch of several kinds of samples: a run's `pairs`
(or clean images), and beside them `unlabelled` and `unpaired` images. Each kind has its own order and random stream and
takes the same, evenly spaced positions in every batch, so that every process of a run gets its share.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from kdjax.batch import Batch
from kdjax.data.images import ImageError, read_image
from kdjax.data.pairs import ImagePair
from kdjax.data.sources import DataError, one_line
from kdjax.streams import SAMPLES, Kind, generator

DRAWS = 64  # images a sample tries before the data set counts as unusable
ENDLESS = 2**31 - 1  # length of the endless stream: Grain wants one


class Samples:
    """Maps a sample number to {gt, lq, answer, damaged}.

    `damaged` is the index in `pairs` of an image that failed, or -1.
    If several failed, it is the first, the one whose turn it was. So after one epoch each has been reported.

    `kind` selects the random streams. With `blank_lq`, clean images get an lq of zeros.
    """

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        kind: Kind,
        *,
        crop: int,
        seed: int,
        scale: int,
        hflip: bool,
        rot: bool,
        read: ImageCache,
        blank_lq: bool = False,
    ) -> None:
        if not pairs:
            raise DataError("there are no training images: the list of pairs is empty")
        if len({pair.lq is None for pair in pairs}) > 1:
            raise DataError("some training images have an lq file and some do not; use one kind at a time")
        if seed < 0:
            raise DataError(f"seed is {seed}; it must be 0 or more")
        check_crop(crop, scale)
        if crop < 1:
            raise DataError(f"crop is {crop}; it must be 1 or more")
        self.pairs = list(pairs)
        self._crop, self._seed, self._scale = crop, seed, scale
        self._hflip, self._rot = hflip, rot
        self._kind = kind
        self._read = read
        self._blank_lq = blank_lq

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, position = divmod(number, len(self.pairs))
        chosen = int(epoch_order(len(self.pairs), self._seed, self._kind.order, epoch)[position])
        random = generator(self._seed, self._kind.sample, number)
        # Everything except replacements is drawn first, so a damaged file leaves crop and flips unchanged.
        row, column, *coins = random.random(5)
        first_damaged = -1
        tried: list[str] = []
        for _ in range(DRAWS):
            try:
                gt, lq, answer = self.load(self.pairs[chosen])
                break
            except ImageError as error:
                first_damaged = chosen if first_damaged < 0 else first_damaged
                if str(error) not in tried:
                    tried.append(str(error))
            chosen = int(random.random() * len(self.pairs))
        else:
            some = "\n".join(f"  {one_line(reason)}" for reason in tried[:5])
            raise DataError(f"{DRAWS} training images in a row could not be used; some of them:\n{some}")

        # Positions are drawn in lq pixels, so that gt and lq show the same region.
        grid = 1 if lq is None else self._scale
        size = self._crop // grid
        top = int(row * max(1, gt.shape[0] // grid - size + 1))
        left = int(column * max(1, gt.shape[1] // grid - size + 1))
        flips = self._hflip and coins[0] < 0.5, self._rot and coins[1] < 0.5, self._rot and coins[2] < 0.5
        element: dict[str, Any] = {"gt": _flip(window(gt, top * grid, left * grid, self._crop, grid), *flips)}
        if answer is not None:
            element["answer"] = _flip(window(answer, top * grid, left * grid, self._crop, grid), *flips)
        if lq is not None:
            element["lq"] = _flip(window(lq, top, left, size, grid), *flips)
        elif self._blank_lq:
            side = self._crop // self._scale
            element["lq"] = np.zeros((side, side, gt.shape[2]), np.uint8)
        element["damaged"] = np.int32(first_damaged)
        return element

    def load(self, pair: ImagePair) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Returns gt, lq and the teacher's image; raises `ImageError` if one is damaged or sizes do not match."""
        gt = self._read(pair.gt)
        if pair.lq is None:
            return gt, None, None
        if pair.lq == pair.gt:  # an unlabelled image
            return (gt if self._scale == 1 else gt.repeat(self._scale, 0).repeat(self._scale, 1)), gt, None
        lq = self._read(pair.lq)
        if gt.shape[0] != self._scale * lq.shape[0] or gt.shape[1] != self._scale * lq.shape[1]:
            raise ImageError(size_message(pair, gt, lq, self._scale))
        answer = None if pair.answer is None else self._read(pair.answer)
        if answer is not None and answer.shape != gt.shape:
            raise ImageError(
                f"{pair.answer}: the teacher's image is {size_text(answer)} pixels (width x height), gt {pair.gt} is"
                f" {size_text(gt)}"
            )
        return gt, lq, answer


@dataclass(frozen=True)
class Part:
    """The samples of one kind in every batch.

    The whole batch has `count` of them. `flags` are their batch entries, by key; a key of one part must be in all
    parts.
    """

    what: str  # "unlabelled" etc., for messages
    samples: Samples
    count: int
    flags: dict[str, bool]


class Batches:
    """Maps a step to this process's part of the batch: a random-access source for Grain.

    The first of `parts` takes the positions the others leave. Batches are made here, not by Grain: with batches as
    elements, they do not depend on how Grain distributes elements over workers.
    """

    def __init__(self, parts: Sequence[Part], process_index: int, process_count: int) -> None:
        batch_size = sum(part.count for part in parts)
        self._block = block_of_process(batch_size, process_index, process_count)
        for part in parts[1:]:
            if part.count < 1 or parts[0].count < 1:
                raise DataError(
                    f"{part.count} of the {batch_size} images of a batch would be {part.what}, and "
                    f"{parts[0].count} of the main kind; each kind needs at least one image: change batch_size "
                    f"or {part.what}_part"
                )
        self._parts = list(parts)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> Batch:
        rows = [self._row(step, position) for position in self._block]
        batch: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        if "answer" in batch:
            batch["teacher"] = {"output": batch.pop("answer"), "features": {}}
        return cast(Batch, batch)

    def _row(self, step: int, position: int) -> dict[str, Any]:
        """Returns the sample at a position of the whole batch."""
        index = np.int32((step * self._batch_size + position) % SAMPLES)
        number, place = self._place(position)
        part = self._parts[number]
        row = part.samples[step * part.count + place]
        if row["damaged"] >= 0:
            row["damaged"] += np.int32(sum(len(other.samples.pairs) for other in self._parts[:number]))
        return row | {"index": index} | {key: np.bool_(flag) for key, flag in part.flags.items()}

    def _place(self, position: int) -> tuple[int, int]:
        """Returns which part a position of the whole batch belongs to, and its index within that part."""
        free = self._batch_size
        # Each part in turn takes its share of the free positions, evenly spaced; `position` counts the free ones.
        for number, part in list(enumerate(self._parts))[1:]:
            before = position * part.count // free
            if (position + 1) * part.count // free > before:
                return number, before
            position -= before
            free -= part.count
        return 0, position

    def explain(self, number: int) -> tuple[str, str, str]:
        """Returns the name and path of the image behind a sample's `damaged` number, and what is wrong with it."""
        for part in self._parts:
            if number < len(part.samples.pairs):
                pair = part.samples.pairs[number]
                try:
                    part.samples.load(pair)
                except ImageError as error:
                    return pair.name, pair.gt, str(error)
                return pair.name, pair.gt, f"{pair.gt}: could not be read at first, but could on a second try"
            number -= len(part.samples.pairs)
        raise IndexError("there are fewer images")


class ImageCache:
    """Reads images, and caches decoded ones up to `limit` bytes; `channels` is 1 or 3, as in `read_image`.

    Nothing is ever evicted: with a new order every epoch, keeping a fixed set gives more hits than keeping the most
    recent images. Copies sent to other processes start empty.
    """

    def __init__(self, channels: int, limit: int) -> None:
        self._channels, self._limit = channels, limit
        self._images: dict[str, np.ndarray] = {}
        self._used = 0
        self._lock = threading.Lock()

    def __call__(self, path: str) -> np.ndarray:
        image = self._images.get(path)
        if image is None:
            image = read_image(path, self._channels)
            with self._lock:
                if path not in self._images and self._used + image.nbytes <= self._limit:
                    self._images[path] = image
                    self._used += image.nbytes
        return image

    def __reduce__(self) -> tuple[Callable[..., ImageCache], tuple[int, int]]:
        return ImageCache, (self._channels, self._limit)


def block_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """Returns the positions in a batch that belong to a process.

    Raises:
      DataError: the batch cannot be divided, or there is no such process.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise DataError(
            f"batch_size is {batch_size} for {process_count} processes; it counts the images of all "
            "processes and must be a multiple of their number"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index is {process_index}; it must lie in 0 ... {process_count - 1}")
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)


def check_crop(crop: int, scale: int) -> None:
    if scale < 1:
        raise DataError(f"scale is {scale}; it must be 1 or more")
    if crop < 0 or crop % scale:
        raise DataError(f"crop is {crop} pixels of gt; it must be a multiple of the scale {scale}")


def size_text(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def size_message(pair: ImagePair, gt: np.ndarray, lq: np.ndarray, scale: int) -> str:
    return (
        f"{pair.gt}: gt is {size_text(gt)} and lq {pair.lq} is {size_text(lq)} pixels (width x height); "
        f"with scale {scale} gt should be {lq.shape[1] * scale}x{lq.shape[0] * scale}"
    )


def window(image: np.ndarray, top: int, left: int, size: int, scale: int) -> np.ndarray:
    """Returns the square of `size` pixels at (top, left), extended at the bottom and right where the image ends."""
    window = image[top : top + size, left : left + size]
    missing = size - window.shape[0], size - window.shape[1]
    if max(missing) == 0:
        return window
    # Mirroring about the last pixel, as BasicSR does, would shift gt against lq when their pixels differ in size.
    # Mirroring about the edge does not.
    mode = "reflect" if scale == 1 else "symmetric"
    return np.pad(window, ((0, missing[0]), (0, missing[1]), (0, 0)), mode=mode)


def _flip(image: np.ndarray, left_right: bool, top_bottom: bool, transpose: bool) -> np.ndarray:
    """Returns a copy: a view would keep the whole decoded image in memory until the batch is done, which is slow."""
    if left_right:
        image = image[:, ::-1]
    if top_bottom:
        image = image[::-1]
    return (image.swapaxes(0, 1) if transpose else image).copy()


@functools.lru_cache(maxsize=8)  # three kinds of images, and prefetching can straddle two epochs of each
def epoch_order(length: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return generator(seed, stream, epoch).permutation(length)
