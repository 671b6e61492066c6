"""Measures a model on whole images: benchmark noise, forward passes on all local devices, PSNR and SSIM.

This follows the colour denoising benchmarks (KAIR, Restormer). Each image's noise is drawn with `np.random.seed(0)` in
RGB order. The noisy image is neither clipped nor rounded; the output is clipped and rounded to uint8. The result of a
set is the mean over its images.
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
from kdjax.degradations import make_degrade, make_sigma
from kdjax.distill import eval_step
from kdjax.metrics import named
from kdjax.models import Apply, Params
from kdjax.noise_level import estimate_sigma
from kdjax.streams import Stream

Values = dict[str, float]  # by metric
# Takes float32 (h, w, c) images and their noise levels, and yields (position, restored uint8 image), in any order.
Restore = Callable[[Sequence[np.ndarray], Sequence[float]], Iterator[tuple[int, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image to restore: `lq` float32 (h, w, c) in about [0, 1], `gt` uint8 (h*scale, w*scale, c).

    `sigma` is the noise level of lq on the scale of 0 to 255, estimated where it is not known.
    """

    name: str
    lq: np.ndarray
    gt: np.ndarray
    sigma: float


@dataclasses.dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM of one image, or their means over a set."""

    psnr: float
    ssim: float


def add_noise(gt: np.ndarray, sigma: float) -> np.ndarray:
    """Adds the benchmark's Gaussian noise of `sigma` (0..255 scale) to a uint8 (h, w, c) image; float32, unclipped."""
    noise = np.random.RandomState(0).normal(0, sigma / 255, gt.shape)
    return (gt / 255 + noise).astype(np.float32)


def make_sample(name: str, gt: np.ndarray, lq: np.ndarray | None, sigma: float) -> Sample:
    """Makes a sample from a uint8 `gt` and its uint8 `lq`, or with the benchmark's noise if `lq` is None."""
    if lq is None:
        return Sample(name, add_noise(gt, sigma), gt, sigma)
    return Sample(name, np.asarray(lq, np.float32) / 255, gt, estimate_sigma(lq))


def degraded_samples(
    names: Sequence[str], gts: Sequence[np.ndarray], degrade: Mapping[str, Any], scale: int = 1
) -> list[Sample]:
    """Degrades uint8 images as a config specifies; always the same way, since the key is the position in the list.

    Compiles once per image size.

    Raises:
      ValueError: if the degradation does not exist or cannot downscale.
    """
    step = jax.jit(make_degrade(degrade, scale=scale))
    key = jax.random.fold_in(jax.random.key(0), Stream.VALIDATION)
    sigma_of, samples = make_sigma(degrade), []
    for i, (name, gt) in enumerate(zip(names, gts, strict=True)):
        key_of_image = jax.random.fold_in(key, i)
        lq = np.asarray(step(key_of_image, gt.astype(np.float32) / 255))
        sigma = float(sigma_of(key_of_image)) if sigma_of else estimate_sigma(lq)
        samples.append(Sample(name, lq, gt, sigma))
    return samples


def restore(
    apply: Apply,
    params: Params,
    images: Sequence[np.ndarray],
    sigmas: Sequence[float],
    *,
    keep_going: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, np.ndarray]]:
    """Restores float32 (h, w, c) images of any size, with noise of `sigmas`, one per local device at a time.

    Compiles once per image size. Yields each uint8 image with its position, grouped by size. Stops early when
    `keep_going()` returns false.
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
            sigma = np.array([sigmas[position] for position in filled], np.float32)
            outputs = np.asarray(step(params, *jax.device_put((lq, sigma), sharding.split_batch(mesh))))
            yield from zip(chunk, outputs, strict=False)


def values(image: np.ndarray, gt: np.ndarray, names: Sequence[str], context: named.MetricInputs) -> Values:
    """Returns the named metrics (`kdjax.metrics.named`) of a uint8 (h, w, c) image; nan if it is too small."""
    return {name: named.measure(name, image, gt, context) for name in names}


def score(output: np.ndarray, gt: np.ndarray) -> Score:
    """Returns PSNR and SSIM of uint8 (h, w, c) images: RGB, no border cropped. SSIM is nan below 11x11 pixels."""
    return Score(**values(output, gt, ("psnr", "ssim"), named.MetricInputs()))


def measure(
    restore: Restore,
    samples: Sequence[Sample],
    names: Sequence[str],
    context: named.MetricInputs,
    *,
    each: Callable[[int, np.ndarray, Values], object] = lambda position, output, values: None,
) -> list[Values]:
    """Returns the `values` of every sample; calls `each(position, output, values)` as samples are restored."""
    measured: dict[int, Values] = {}
    for position, output in restore([sample.lq for sample in samples], [sample.sigma for sample in samples]):
        measured[position] = values(output, samples[position].gt, names, context)
        each(position, output, measured[position])
    return [measured[position] for position in range(len(samples))]


def input_picture(sample: Sample) -> np.ndarray:
    """Returns the lq as a uint8 image of gt's size; if lq is smaller, its pixels are repeated."""
    factor = sample.gt.shape[0] // sample.lq.shape[0]
    picture = np.round(np.clip(sample.lq, 0, 1) * 255).astype(np.uint8)
    return picture.repeat(factor, 0).repeat(factor, 1)


def input_score(samples: Sequence[Sample]) -> Score:
    """Returns the mean score of the unrestored inputs: the baseline a model has to beat."""
    return mean_score([score(input_picture(sample), sample.gt) for sample in samples])


def mean_score(scores: Sequence[Score]) -> Score:
    """Returns the mean over images, as benchmarks report it; SSIM is averaged over the images where it is defined."""
    return Score(named.mean([s.psnr for s in scores]), named.mean([s.ssim for s in scores]))


@functools.lru_cache(maxsize=32)
def _jitted_eval_step(apply: Apply) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    return jax.jit(functools.partial(eval_step, apply))
