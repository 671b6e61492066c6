"""Measuring a model on whole images: the noise protocol, the forward passes over all local devices, PSNR and SSIM.

The protocol is that of the colour denoising benchmarks (KAIR, Restormer): the noise of every image is drawn with
`np.random.seed(0)` in RGB order, the noisy image is neither clipped nor rounded, the output is clipped and rounded to
uint8, and the result of a set is the mean of its images' results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdjax import sharding
from kdjax.degradations import make_degrade
from kdjax.distill import eval_step
from kdjax.metrics import named
from kdjax.models import Apply, Params
from kdjax.streams import Stream

Values = dict[str, float]  # metric -> value
# From float32 (h, w, c) images to (position, restored uint8 image), in any order.
Restore = Callable[[Sequence[np.ndarray]], Iterator[tuple[int, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image to restore: `lq` float32 (h, w, c) in about [0, 1], `gt` uint8 (h*scale, w*scale, c)."""

    name: str
    lq: np.ndarray
    gt: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM of one image, or their means over a set."""

    psnr: float
    ssim: float


def add_noise(gt: np.ndarray, sigma: float) -> np.ndarray:
    """A uint8 (h, w, c) image plus the benchmark's Gaussian noise of `sigma` (0..255 scale), float32, not clipped."""
    noise = np.random.RandomState(0).normal(0, sigma / 255, gt.shape)
    return (gt / 255 + noise).astype(np.float32)


def make_sample(name: str, gt: np.ndarray, lq: np.ndarray | None, sigma: float) -> Sample:
    """A sample from a uint8 `gt` and its uint8 `lq`, or with the benchmark's noise where there is no `lq`."""
    return Sample(name, add_noise(gt, sigma) if lq is None else np.asarray(lq, np.float32) / 255, gt)


def degraded_samples(
    names: Sequence[str], gts: Sequence[np.ndarray], degrade: Mapping[str, Any], scale: int = 1
) -> list[Sample]:
    """Samples from uint8 images, degraded as a config says, always in the same way: the key is the place in the list.

    Every distinct size compiles once.

    Raises:
      ValueError: a degradation that does not exist or cannot make small images.
    """
    step = jax.jit(make_degrade(degrade, scale=scale))
    key = jax.random.fold_in(jax.random.key(0), Stream.VALIDATION)
    lqs = (step(jax.random.fold_in(key, i), gt.astype(np.float32) / 255) for i, gt in enumerate(gts))
    return [Sample(name, np.asarray(lq), gt) for name, lq, gt in zip(names, lqs, gts, strict=True)]


def restore(
    apply: Apply,
    params: Params,
    images: Sequence[np.ndarray],
    *,
    keep_going: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, np.ndarray]]:
    """Restores float32 (h, w, c) images of any sizes, one on each local device at a time.

    Every distinct size compiles once. Images come back as uint8, grouped by size, each with its position; the
    iterator ends early when `keep_going()` is false.
    """
    mesh = sharding.data_mesh(jax.local_devices())
    params = sharding.replicate(params, mesh)
    step = _jitted_eval_step(apply)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, image in enumerate(images):
        by_shape[image.shape].append(position)
    for positions in by_shape.values():
        for start in range(0, len(positions), mesh.size):
            if not keep_going():
                return
            chunk = positions[start : start + mesh.size]
            filled = chunk + chunk[-1:] * (mesh.size - len(chunk))  # repeat the last to fill the devices
            lq = np.stack([images[position] for position in filled])
            outputs = np.asarray(step(params, jax.device_put(lq, sharding.split_batch(mesh))))
            yield from zip(chunk, outputs, strict=False)


def values(image: np.ndarray, gt: np.ndarray, names: Sequence[str], context: named.Context) -> Values:
    """The metrics of those names (`kdjax.metrics.named`) of a uint8 (h, w, c) image; nan where it is too small."""
    return {name: named.measure(name, image, gt, context) for name in names}


def score(output: np.ndarray, gt: np.ndarray) -> Score:
    """PSNR and SSIM of uint8 (h, w, c) images: RGB, no border left out. SSIM is nan below 11x11 pixels."""
    return Score(**values(output, gt, ("psnr", "ssim"), named.Context()))


def measure(
    restore: Restore,
    samples: Sequence[Sample],
    names: Sequence[str],
    context: named.Context,
    *,
    each: Callable[[int, np.ndarray, Values], object] = lambda position, output, values: None,
) -> list[Values]:
    """As `values`, of every sample once it is restored; `each` is told (position, output, values) as they come."""
    measured: dict[int, Values] = {}
    for position, output in restore([sample.lq for sample in samples]):
        measured[position] = values(output, samples[position].gt, names, context)
        each(position, output, measured[position])
    return [measured[position] for position in range(len(samples))]


def input_picture(sample: Sample) -> np.ndarray:
    """The lq as a uint8 picture of the size of gt, every pixel repeated where it is smaller."""
    factor = sample.gt.shape[0] // sample.lq.shape[0]
    picture = np.round(np.clip(sample.lq, 0, 1) * 255).astype(np.uint8)
    return picture.repeat(factor, 0).repeat(factor, 1)


def input_score(samples: Sequence[Sample]) -> Score:
    """The mean score of the inputs themselves: what a model has to beat."""
    return mean_score([score(input_picture(sample), sample.gt) for sample in samples])


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean over images, as benchmarks report it; of SSIM over those it is defined for."""
    return Score(named.mean([s.psnr for s in scores]), named.mean([s.ssim for s in scores]))


@functools.lru_cache(maxsize=32)
def _jitted_eval_step(apply: Apply) -> Callable[[Params, jax.Array], jax.Array]:
    return jax.jit(functools.partial(eval_step, apply))
