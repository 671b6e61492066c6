"""From a list of images to batches for training, and to whole images for validation.

Training is an endless stream of samples, numbered 0, 1, 2, ...; step `s` of batch size `b` holds the samples
s*b ... s*b + b - 1. What sample `n` is, the image, the crop and the flips, follows from (seed, n) alone: not
from the number of workers, threads or processes, nor from the step at which the stream was started. So a run
resumes by starting at its step, and nothing has to be stored or replayed. Every epoch shows every image once,
in another order and with other crops. The processes of one run get consecutive blocks of the batch: joined in
the order of the processes, they are the batch that a single process would get.

Images stay uint8 (height, width, channels): a quarter of the float size to move, and exact. Noise is not
added here.

A damaged file never stops training and never moves other samples: the sample draws another image from its own
random stream, and the file is reported once. In validation it is an error, since a mean over other images is
another number.

Unlabelled images, which only a teacher can use, take fixed places of every batch, evenly spread, so that every
process has its share. They have an order of their own.

This package is NumPy, Pillow and Grain only. Workers are spawned and import it, and must not take an
accelerator. They also import the main module: a program that imports jax should keep every computation out of
its module level.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grain
import numpy as np
from absl import flags

from kdjax.data.images import ImageError, read_image
from kdjax.data.sources import DataError, ImagePair

_logger = logging.getLogger("kdjax")

_DRAWS = 64  # images that one sample tries before the data set counts as unusable
_STEPS = 2**31 - 1  # the length of the endless stream: Grain wants one
_THREADS = 4  # that decode in the main process when there are no workers; Pillow releases the GIL
_ORDER, _SAMPLE = 0, 1  # keep the random streams of epochs and samples apart


def training_batches(
    pairs: Sequence[ImagePair],
    *,
    crop: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    scale: int = 1,
    channels: int = 3,
    hflip: bool = True,
    rot: bool = True,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    cache_mb: int = 512,
    unlabelled: Sequence[ImagePair] = (),
    unlabelled_part: float = 0.5,
) -> TrainingData:
    """Endless batches of random crops, from step `start_step` on.

    Every batch is a dict of NumPy arrays with b = batch_size / process_count rows:
      gt     uint8 (b, crop, crop, channels)
      lq     uint8 (b, crop/scale, crop/scale, channels); only if the pairs have lq files
      index  int32 (b,), the sample numbers (modulo 2^31): the key to per-sample randomness on the device
      labelled  bool (b,), false for samples from `unlabelled`; only if there are any

    `unlabelled` (see `find_unlabelled`) fill round(batch_size * unlabelled_part) places of every batch.

    `hflip` flips left-right with probability 1/2; `rot` flips top-bottom and transposes, each with
    probability 1/2. With both, the eight symmetries of the square are equally likely. Images smaller than the
    crop are extended by reflection at the bottom and right.

    `workers` processes decode; 0 means threads of this process. Each process, and each worker, keeps up to
    `cache_mb` megabytes of decoded images; neither changes the batches.
    """
    options = (crop, seed, scale, channels, hflip, rot, cache_mb)
    stream = _Batches(
        _Samples(pairs, *options),
        _Samples(unlabelled, *options, first_stream=2) if unlabelled else None,
        round(batch_size * unlabelled_part) if unlabelled else 0,
        batch_size,
        process_index,
        process_count,
    )
    if start_step < 0:
        raise DataError(f"start_step is {start_step}; it must be 0 or more")
    if workers < 0:
        raise DataError(f"workers is {workers}; it must be 0 (threads of this process) or more")
    return TrainingData(stream, start_step, workers)


class TrainingData(Iterator[dict[str, np.ndarray]]):
    """What `training_batches` returns: an iterator. Close it, or use it in a `with` statement, to end workers.

    `damaged` maps the name of every damaged image met so far by this process to the reason; each is also
    logged once. `replaced` counts the samples that drew another image instead.
    """

    def __init__(self, stream: _Batches, start_step: int, workers: int) -> None:
        self.damaged: dict[str, str] = {}
        self.replaced = 0
        self._stream = stream
        # An element is a batch here, so buffers are counted in batches.
        reading = grain.ReadOptions(
            num_threads=1 if workers else min(_THREADS, os.cpu_count() or 1),
            prefetch_buffer_size=2 if workers else 4,
        )
        batches = grain.MapDataset.source(stream)[start_step:].to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which fails outside an absl program
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        # Holds Grain's iterator until it is closed, which also happens when this object is forgotten, and at exit:
        # there the last reference has to go before the modules that Grain needs for closing are gone.
        self._open = [iter(batches)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise ValueError("the training data were closed")
        batch = next(self._open[0])
        for number in batch.pop("damaged").tolist():
            if number >= 0:
                self.replaced += 1
                self._report(*self._stream.pair(number))
        # Workers hand over shared memory that ends with Grain's array; JAX may keep it longer, so copy.
        return {key: np.array(value) for key, value in batch.items()}

    def _report(self, samples: _Samples, pair: ImagePair) -> None:
        if pair.name in self.damaged:
            return
        try:
            samples.load(pair)
            reason = f"{pair.gt}: could not be read at first, but could be when tried again"
        except ImageError as error:
            reason = str(error)
        self.damaged[pair.name] = reason
        _logger.warning("damaged training image %s, replaced by others: %s", pair.name, reason)

    def close(self) -> None:
        """Ends the workers and threads; safe to call twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(iterators: list[grain.DatasetIterator]) -> None:
    iterators.pop().close()


class _Samples:
    """Sample number -> {gt, lq, damaged}: `damaged` is the place in `pairs` of an image that failed, or -1.

    Of several that failed it is the first, the one whose turn it was: so after one epoch each has been reported.
    """

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        crop: int,
        seed: int,
        scale: int,
        channels: int,
        hflip: bool,
        rot: bool,
        cache_mb: int,
        first_stream: int = 0,
    ) -> None:
        if not pairs:
            raise DataError("there are no training images: the list of pairs is empty")
        if len({pair.lq is None for pair in pairs}) > 1:
            raise DataError("some training images have an lq file and some have none; use one kind at a time")
        if seed < 0:
            raise DataError(f"seed is {seed}; it must be 0 or more")
        _check_crop(crop, scale)
        if crop < 1:
            raise DataError(f"crop is {crop}; it must be 1 or more")
        self.pairs = list(pairs)
        self._crop, self._seed, self._scale = crop, seed, scale
        self._hflip, self._rot = hflip, rot
        self._order, self._sample = first_stream + _ORDER, first_stream + _SAMPLE
        self._read = _ImageCache(channels, cache_mb * 2**20)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(number, len(self.pairs))
        chosen = int(_epoch_order(len(self.pairs), self._seed, self._order, epoch)[position])
        random = _generator(self._seed, self._sample, number)
        # All draws but those for replacements come first: a damaged file leaves crop and flips as they are.
        row, column, *coins = random.random(5)
        first_damaged = -1
        tried: list[str] = []
        for _ in range(_DRAWS):
            try:
                gt, lq = self.load(self.pairs[chosen])
                break
            except ImageError as error:
                first_damaged = chosen if first_damaged < 0 else first_damaged
                if str(error) not in tried:
                    tried.append(str(error))
            chosen = int(random.random() * len(self.pairs))
        else:
            some = "\n".join(f"  {reason}" for reason in tried[:5])
            raise DataError(f"{_DRAWS} training images in a row could not be used; some of them:\n{some}")

        # Positions are drawn in lq pixels, so that gt and lq show the same part.
        grid = 1 if lq is None else self._scale
        size = self._crop // grid
        top = int(row * max(1, gt.shape[0] // grid - size + 1))
        left = int(column * max(1, gt.shape[1] // grid - size + 1))
        flips = self._hflip and coins[0] < 0.5, self._rot and coins[1] < 0.5, self._rot and coins[2] < 0.5
        element = {"gt": _flip(_window(gt, top * grid, left * grid, self._crop, grid), *flips)}
        if lq is not None:
            element["lq"] = _flip(_window(lq, top, left, size, grid), *flips)
        element["damaged"] = np.int32(first_damaged)
        return element

    def load(self, pair: ImagePair) -> tuple[np.ndarray, np.ndarray | None]:
        """gt and lq of a pair; raises `ImageError` if one cannot be read or the sizes do not fit."""
        gt = self._read(pair.gt)
        if pair.lq is None:
            return gt, None
        if pair.lq == pair.gt:  # an unlabelled image
            return gt.repeat(self._scale, 0).repeat(self._scale, 1), gt
        lq = self._read(pair.lq)
        if gt.shape[0] != self._scale * lq.shape[0] or gt.shape[1] != self._scale * lq.shape[1]:
            raise ImageError(_size_message(pair, gt, lq, self._scale))
        return gt, lq


class _Batches:
    """Step -> the part of the batch that belongs to this process: a random-access source for Grain.

    Batches are made here, not by Grain: an element is a batch, so the batches do not depend on how Grain
    distributes elements over workers.
    """

    def __init__(
        self,
        labelled: _Samples,
        unlabelled: _Samples | None,
        num_unlabelled: int,  # in a whole batch
        batch_size: int,
        process_index: int,
        process_count: int,
    ) -> None:
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise DataError(
                f"batch_size is {batch_size} for {process_count} processes; it counts the images of all "
                "processes and must be a multiple of their number"
            )
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index is {process_index}; it must lie in 0 ... {process_count - 1}")
        if unlabelled is not None and not 0 < num_unlabelled < batch_size:
            raise DataError(
                f"{num_unlabelled} of the {batch_size} images of a batch would be unlabelled; both kinds need one "
                "image at least: change batch_size or unlabelled_part"
            )
        if unlabelled is not None and (unlabelled.pairs[0].lq is None) != (labelled.pairs[0].lq is None):
            raise DataError("unlabelled images must be degraded where the labelled ones have lq files, and only there")
        self._labelled, self._unlabelled, self._num_unlabelled = labelled, unlabelled, num_unlabelled
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._first = process_index * self._rows

    def __len__(self) -> int:
        return _STEPS

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rows = [self._row(step, position) for position in range(self._first, self._first + self._rows)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, step: int, position: int) -> dict[str, np.ndarray]:
        """The sample at a position of the whole batch."""
        index = {"index": np.int32((step * self._batch_size + position) % 2**31)}
        if self._unlabelled is None:
            return self._labelled[step * self._batch_size + position] | index
        # How many unlabelled ones come before: the places are spread evenly.
        before = position * self._num_unlabelled // self._batch_size
        labelled = (position + 1) * self._num_unlabelled // self._batch_size == before
        if labelled:
            row = self._labelled[step * (self._batch_size - self._num_unlabelled) + position - before]
        else:
            row = self._unlabelled[step * self._num_unlabelled + before]
            if row["damaged"] >= 0:
                row["damaged"] = np.int32(row["damaged"] + len(self._labelled.pairs))
        return row | index | {"labelled": np.bool_(labelled)}

    def pair(self, number: int) -> tuple[_Samples, ImagePair]:
        """What the `damaged` number of a sample stands for, and the source that can load it."""
        if number < len(self._labelled.pairs):
            return self._labelled, self._labelled.pairs[number]
        return self._unlabelled, self._unlabelled.pairs[number - len(self._labelled.pairs)]


class _ImageCache:
    """Reads images, and keeps decoded ones until `limit` bytes are used.

    Nothing is ever dropped: when every epoch has a new order, keeping a fixed part finds more images than
    keeping the latest ones. Copies sent to other processes start empty.
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

    def __reduce__(self) -> tuple[Callable[..., _ImageCache], tuple[int, int]]:
        return _ImageCache, (self._channels, self._limit)


@dataclass(frozen=True)
class ValidationImage:
    """A decoded validation image, uint8 (height, width, channels)."""

    name: str
    gt: np.ndarray
    lq: np.ndarray | None  # None: a clean image


def load_images(
    pairs: Sequence[ImagePair], *, channels: int = 3, scale: int = 1, crop: int = 0, limit: int = 0
) -> list[ValidationImage]:
    """Reads images for validation: whole, or their centre if `crop` (in gt pixels) is not 0.

    `limit` takes that many images, evenly spread over the list; 0 takes all. A gt that exceeds scale * lq by
    less than `scale` is cut at the bottom and right, as BasicSR does; a clean gt is cut to a multiple of
    `scale`. All files that cannot be used are named in one `DataError`.
    """
    _check_crop(crop, scale)
    pairs = spread(pairs, limit)
    images: list[ValidationImage] = []
    faults: list[str] = []
    for pair in pairs:
        try:
            images.append(_load_validation_image(pair, channels, scale, crop))
        except ImageError as error:
            faults.append(f"  {error}")
    if faults:
        raise DataError(
            "\n".join(
                [
                    f"{len(faults)} of {len(pairs)} validation images cannot be used; repair or remove:",
                    *faults,
                ]
            )
        )
    return images


def spread(pairs: Sequence[ImagePair], limit: int) -> list[ImagePair]:
    """That many of the pairs, evenly spread over the list; 0 takes all."""
    if limit < 0:
        raise DataError(f"limit is {limit}; it must be 0 (all images) or more")
    if not 0 < limit < len(pairs):
        return list(pairs)
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, limit).round().astype(int)]


def _load_validation_image(pair: ImagePair, channels: int, scale: int, crop: int) -> ValidationImage:
    gt = read_image(pair.gt, channels)
    lq = None if pair.lq is None else read_image(pair.lq, channels)
    height, width = gt.shape[0] // scale, gt.shape[1] // scale
    if lq is not None and lq.shape[:2] != (height, width):
        raise ImageError(_size_message(pair, gt, lq, scale))
    if 0 in (height, width):
        raise ImageError(f"{pair.gt}: {_size(gt)} is smaller than the scale {scale}")
    gt = gt[: height * scale, : width * scale]
    if crop:
        size = crop // scale
        top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
        gt = _window(gt, top * scale, left * scale, crop, scale)
        lq = None if lq is None else _window(lq, top, left, size, scale)
    return ValidationImage(pair.name, np.ascontiguousarray(gt), lq)


def _check_crop(crop: int, scale: int) -> None:
    if scale < 1:
        raise DataError(f"scale is {scale}; it must be 1 or more")
    if crop < 0 or crop % scale:
        raise DataError(f"crop is {crop} pixels of gt; it must be a multiple of the scale {scale}")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _size_message(pair: ImagePair, gt: np.ndarray, lq: np.ndarray, scale: int) -> str:
    return (
        f"{pair.gt}: gt is {_size(gt)} and lq {pair.lq} is {_size(lq)} pixels (width x height); "
        f"with scale {scale} gt should be {lq.shape[1] * scale}x{lq.shape[0] * scale}"
    )


def _window(image: np.ndarray, top: int, left: int, size: int, scale: int) -> np.ndarray:
    """The square of `size` pixels from (top, left), extended at the bottom and right where the image ends."""
    window = image[top : top + size, left : left + size]
    missing = size - window.shape[0], size - window.shape[1]
    if max(missing) == 0:
        return window
    # Mirroring about the last pixel, as BasicSR does, would move gt against lq when their pixels differ in
    # size; mirroring about the edge does not.
    mode = "reflect" if scale == 1 else "symmetric"
    return np.pad(window, ((0, missing[0]), (0, missing[1]), (0, 0)), mode=mode)


def _flip(image: np.ndarray, left_right: bool, top_bottom: bool, transpose: bool) -> np.ndarray:
    if left_right:
        image = image[:, ::-1]
    if top_bottom:
        image = image[::-1]
    return image.swapaxes(0, 1) if transpose else image


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64((seed, stream, number)))


@functools.lru_cache(maxsize=4)  # prefetching can straddle two epochs
def _epoch_order(length: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return _generator(seed, stream, epoch).permutation(length)


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker process."""
    # Nothing here computes with jax, but Grain imports it when it is there: make sure it could take no
    # accelerator.
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update("jax_platforms", "cpu")
    # Ctrl-C reaches the whole process group; the main process ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A main process that is killed cannot: end with it.
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
