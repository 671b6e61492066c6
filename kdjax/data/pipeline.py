"""From a list of images to training batches and whole validation images.

Training is an endless stream of samples, numbered 0, 1, 2, ...; step `s` at batch size `b` holds the samples s*b ...
s*b + b - 1. The image, crop and flips of sample `n` depend only on (seed, n): not on the number of workers, threads or
processes, nor on the step at which the stream started. So a run resumes by starting at its step, and nothing is stored
or replayed. Each epoch shows every image once, in a new order and with new crops. The processes of a run get
consecutive blocks of the batch: concatenated in process order, they are the batch a single process would get.

Images stay uint8 (height, width, channels), which is exact and a quarter of the float size to move. Noise is not added
here.

A damaged file never stops training and never shifts other samples: its sample draws another image from its own random
stream, and the file is reported once. In validation it is an error, because a mean over other images is a different
number.

Unlabelled images, which only a teacher can use, and unpaired images, which are degraded on the device beside pairs that
are not, take fixed, evenly spaced positions in every batch, so that every process gets its share. Each kind has its own
order (`kdjax.data.samples`).

This package uses only NumPy, Pillow, Grain and ArrayRecord. Workers are spawned and import it, and they must not take
an accelerator. They also import the main module: a program that imports jax should keep all computation out of its
module level.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from absl import flags

from kdjax.batch import Batch
from kdjax.data.cache import Cache, CachedBatches
from kdjax.data.images import ImageError, read_image
from kdjax.data.pairs import ImagePair
from kdjax.data.samples import (
    Batches,
    ImageCache,
    Part,
    Samples,
    check_crop,
    size_message,
    size_text,
    window,
)
from kdjax.data.sources import DataError, one_line
from kdjax.streams import Kind

if TYPE_CHECKING:
    import grain

_logger = logging.getLogger("kdjax")

_THREADS = 4  # decoding threads of the main process when there are no workers; Pillow releases the GIL


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
    unpaired: Sequence[ImagePair] = (),
    unpaired_part: float = 0.5,
) -> TrainingData:
    """Returns endless batches of random crops, from step `start_step` on.

    Every batch is a `kdjax.batch.Batch` of NumPy arrays with b = batch_size / process_count rows. gt is uint8 squares
    of `crop` pixels. lq, also uint8, is present if the pairs have lq files, `labelled` if there are `unlabelled`
    images, and `is_paired` if there are `unpaired` images, whose lq is zeros.

    `unlabelled` (see `find_unlabelled`) fills round(batch_size * unlabelled_part) positions of every batch, `unpaired`
    (clean images beside pairs) round(batch_size * unpaired_part), and `pairs` the rest.

    `hflip` flips left-right with probability 1/2; `rot` flips top-bottom and transposes, each with probability 1/2.
    With both, the eight symmetries of the square are equally likely. Images smaller than the crop are extended by
    reflection at the bottom and right.

    `workers` processes decode; 0 means threads of this process. Each process, and each worker, caches up to `cache_mb`
    megabytes of decoded images. Neither changes the batches.
    """
    read = ImageCache(channels, cache_mb * 2**20)
    options: dict[str, Any] = dict(crop=crop, seed=seed, scale=scale, hflip=hflip, rot=rot, read=read)
    beside = []
    if unlabelled:
        count = round(batch_size * unlabelled_part)
        beside.append(Part("unlabelled", Samples(unlabelled, Kind.UNLABELLED, **options), count, {"labelled": False}))
    if unpaired:
        count = round(batch_size * unpaired_part)
        samples = Samples(unpaired, Kind.UNPAIRED, **options, blank_lq=True)
        beside.append(Part("unpaired", samples, count, {"is_paired": False}))
    all_true = {key: True for part in beside for key in part.flags}
    beside = [dataclasses.replace(part, flags=all_true | part.flags) for part in beside]
    rest = batch_size - sum(part.count for part in beside)
    main = Part("main", Samples(pairs, Kind.LABELLED, **options), rest, all_true)
    has_lq = main.samples.pairs[0].lq is not None
    if unlabelled and (unlabelled[0].lq is not None) != has_lq:
        raise DataError(
            "unlabelled images are degraded images, so they need labelled ones with lq files, and the other way round"
        )
    if unpaired and not has_lq:
        raise DataError("unpaired images stand beside pairs, and these have no lq files: give all clean images as gt")
    if unpaired and unpaired[0].lq is not None:
        raise DataError("unpaired images are clean, and these have lq files: find them without lq")
    return TrainingData(Batches([main, *beside], process_index, process_count), start_step, workers)


def cached_batches(
    cache: Cache,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingData:
    """Returns endless batches from a cache, from step `start_step` on: `training_batches` plus the teacher's answers.

    A batch has `gt`, `index` and, if they were stored, `lq` and `labelled`, all as they are after the device's
    processing, and `teacher`: {"output": (b, h, w, c), "features": {name: (b, h, w, c)}}, in the cache's precision.
    After `cache.samples` samples they repeat, in another order.
    """
    stream = CachedBatches(
        cache, batch_size=batch_size, seed=seed, process_index=process_index, process_count=process_count
    )
    return TrainingData(stream, start_step, workers)


class TrainingData(Iterator[Batch]):
    """The iterator that `training_batches` and `cached_batches` return.

    Close it, or use it in a `with` statement, to stop the workers.

    `damaged` maps the name of every damaged image this process has met so far to the reason (the path is used if two
    sources share the name); each is also logged once. `replaced` counts the samples that drew another image instead.
    """

    def __init__(self, stream: Batches | CachedBatches, start_step: int, workers: int) -> None:
        if start_step < 0:
            raise DataError(f"start_step is {start_step}; it must be 0 or more")
        if workers < 0:
            raise DataError(f"workers is {workers}; it must be 0 (threads of this process) or more")
        self.damaged: dict[str, str] = {}
        self.replaced = 0
        self._reported: set[int | str] = set()
        self._stream = stream
        import grain  # takes half a second, and most programs do not train

        # An element is a batch here, so buffers are counted in batches.
        reading = grain.ReadOptions(
            num_threads=1 if workers else min(_THREADS, os.cpu_count() or 1),
            prefetch_buffer_size=2 if workers else 4,
        )
        source: Any = stream  # its __len__ and __getitem__ are all Grain needs
        batches = grain.MapDataset.source(source)[start_step:].to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which fails outside an absl program
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        # Holds Grain's iterator until close(), which also runs on garbage collection and at exit. At exit, the last
        # reference must go before the modules Grain needs for closing are gone.
        self._open = [iter(batches)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __next__(self) -> Batch:
        if not self._open:
            raise ValueError("the training data were closed")
        try:
            batch = next(self._open[0])
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain has no exception type for a dead worker
                raise
            raise DataError(
                f"a process that loads training images was killed ({str(error).partition('. ')[0]}). Often the machine"
                " ran out of memory: lower data.workers or data.cache_mb, or just run the same command again"
            ) from None
        for number in batch.pop("damaged").tolist():
            if number >= 0:
                self.replaced += 1
                self._report(number)
        # Workers hand over shared memory that is freed with Grain's array. JAX may keep it longer, so copy.
        return cast(Batch, _copied(batch))

    def _report(self, number: int) -> None:
        if number in self._reported:
            return
        name, path, reason = self._stream.explain(number)
        known = path in self._reported  # under another number: an image may be of two kinds
        self._reported |= {number, path}
        if not known:
            self.damaged[path if name in self.damaged else name] = reason
            _logger.warning("damaged training image %s, others are used instead: %s", one_line(name), one_line(reason))

    def close(self) -> None:
        """Stops workers and threads; safe to call twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else np.array(value) for key, value in batch.items()}


def _close(iterators: list[grain.DatasetIterator]) -> None:
    iterators.pop().close()


@dataclasses.dataclass(frozen=True)
class ValidationImage:
    """A decoded validation image, uint8 (height, width, channels)."""

    name: str
    gt: np.ndarray
    lq: np.ndarray | None  # None: a clean image


def load_images(
    pairs: Sequence[ImagePair], *, channels: int = 3, scale: int = 1, crop: int = 0, limit: int = 0
) -> list[ValidationImage]:
    """Reads validation images: whole, or their centre crop if `crop` (in gt pixels) is not 0.

    `limit` takes that many images, evenly spaced over the list; 0 takes all. A gt that exceeds scale * lq by less than
    `scale` is cropped at the bottom and right, as in BasicSR; a clean gt is cropped to a multiple of `scale`. A single
    `DataError` names all unusable files.
    """
    check_crop(crop, scale)
    pairs = spread(pairs, limit)
    images: list[ValidationImage] = []
    faults: list[str] = []
    for pair in pairs:
        try:
            images.append(_load_validation_image(pair, channels, scale, crop))
        except ImageError as error:
            faults.append(f"  {one_line(str(error))}")
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
    """Returns `limit` of the pairs, evenly spaced over the list; 0 takes all."""
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
        raise ImageError(size_message(pair, gt, lq, scale))
    if 0 in (height, width):
        raise ImageError(f"{pair.gt}: {size_text(gt)} is smaller than the scale {scale}")
    gt = gt[: height * scale, : width * scale]
    if crop:
        size = crop // scale
        top, left = max(0, (height - size) // 2), max(0, (width - size) // 2)
        gt = window(gt, top * scale, left * scale, crop, scale)
        lq = None if lq is None else window(lq, top, left, size, scale)
    return ValidationImage(pair.name, np.ascontiguousarray(gt), lq)


def _start_worker(index: int, count: int) -> None:
    """Runs first in every worker process."""
    # Nothing here computes with jax, but Grain imports it if available: keep it off the accelerators.
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update("jax_platforms", "cpu")
    # Ctrl-C reaches the whole process group; the main process stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A killed main process cannot stop them, so end with it.
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
