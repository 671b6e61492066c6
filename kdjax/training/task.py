"""Finds out what a teacher is for, by trying: the noise that it removes, or that it upscales."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax import metrics, validation
from kdjax.models import Model

SIGMAS = (5.0, 10.0, 15.0, 25.0, 35.0, 50.0, 75.0)
# A denoiser that is made for two levels of noise, one twice the other, loses about 3 dB from the lower to the higher.
_LEAST_LOSS, _MOST_LOSS = 1.5, 5.5  # dB per doubling of the noise


@dataclasses.dataclass(frozen=True)
class Task:
    """What the teacher is for: a degradation as in a config, in words, and the noise levels to evaluate at."""

    degrade: dict[str, Any]
    words: str
    sigmas: tuple[float, ...]


def find_task(teacher: Model, images: Sequence[np.ndarray]) -> Task:
    """Finds out what a teacher is for from what it does to clean uint8 images with noise.

    Raises:
      ValueError: it does not denoise, and does not upscale either.
    """
    if teacher.network.scale > 1:
        return Task(dict(name="realesrgan"), f"upscales {teacher.network.scale}x; Real-ESRGAN's degradation", ())
    apply = teacher.network.make_apply()
    before, after = {}, {}
    for sigma in SIGMAS:
        noisy = [validation.add_noise(image, sigma) for image in images]
        outputs = dict(validation.restore(apply, teacher.params, noisy, [sigma] * len(noisy)))
        after[sigma] = statistics.fmean(metrics.psnr(outputs[i], image) for i, image in enumerate(images))
        inputs = [np.round(np.clip(image, 0, 1) * 255).astype(np.uint8) for image in noisy]
        before[sigma] = statistics.fmean(map(metrics.psnr, inputs, images))
    best = max(SIGMAS, key=lambda sigma: after[sigma] - before[sigma])
    if after[best] - before[best] < 1:
        raise ValueError(
            "the model does not make noisy images better, at any level of Gaussian noise from"
            f" {SIGMAS[0]:g} to {SIGMAS[-1]:g}; write a config with the degradation it is for, see docs/training.md"
        )
    low, high = _range_around(best, after)
    if low == high:
        return Task(dict(name="awgn", sigma=best), f"denoises, sigma {best:g}", (best,))
    inside = [sigma for sigma in (15.0, 25.0, 50.0) if low <= sigma <= high] or [best]
    return Task(dict(name="awgn_blind", sigma=(low, high)), f"denoises, sigma {low:g} to {high:g}", tuple(inside))


def _range_around(best: float, psnr: Mapping[float, float]) -> tuple[float, float]:
    """Returns the levels around the best one between which the PSNR falls as that of a blind denoiser does."""
    place = SIGMAS.index(best)
    low = high = place

    def belong(i: int) -> bool:
        lost = (psnr[SIGMAS[i]] - psnr[SIGMAS[i + 1]]) / math.log2(SIGMAS[i + 1] / SIGMAS[i])
        return _LEAST_LOSS <= lost <= _MOST_LOSS

    while low > 0 and belong(low - 1):
        low -= 1
    while high < len(SIGMAS) - 1 and belong(high):
        high += 1
    return SIGMAS[low], SIGMAS[high]
