"""Estimates how much noise an image has, for networks that are told (`Network.takes_sigma`)."""

from __future__ import annotations

import numpy as np

_SIDE = 8  # of the patches
_PATCHES = 8_000  # at most, spread over the image


def estimate_sigma(image: np.ndarray) -> float:
    """Returns the standard deviation of an image's white noise, on the scale of 0 to 255.

    Patches of a photograph vary in few directions; along all others their variance is that of the noise. These
    directions are those whose eigenvalues, largest first, are left when as many have been left out as it takes for
    their mean to be their median (Chen, Zhu and Heng, 2015, "An efficient statistical method for image noise level
    estimation").

    Args:
      image: (h, w, c): float in about [0, 1], or uint8 or uint16. Below 8 x 8 pixels the estimate is 0.
    """
    height, width, channels = image.shape
    if min(height, width) < _SIDE:
        return 0.0
    pixels = np.asarray(image, np.float32) / (np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1)
    views = np.lib.stride_tricks.sliding_window_view(pixels, (_SIDE, _SIDE), axis=(0, 1))
    step = max(1, int(np.sqrt(views.shape[0] * views.shape[1] / _PATCHES)))
    patches = views[::step, ::step].reshape(-1, channels * _SIDE**2)
    if len(patches) < 2:
        return 0.0
    variances = np.linalg.eigvalsh(np.cov(patches, rowvar=False))[::-1]
    for first in range(len(variances)):
        rest = variances[first:]
        if rest.mean() <= np.median(rest):
            break
    return 255 * float(np.sqrt(max(rest.mean(), 0)))
