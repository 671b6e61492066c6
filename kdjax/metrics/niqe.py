"""NIQE: how far an image's statistics are from those of clean photographs (Mittal et al., 2013).

Each block of 96x96 pixels, at full and half size, yields 18 numbers that describe the distributions of the normalised
luminance and of products of neighbours. A Gaussian is fitted to the numbers of an image and compared with one fitted to
clean photographs, the pristine model. Lower is better, and no clean version of the image is needed.

With the authors' pristine model the numbers match BasicSR 1.4.2 and the authors' MATLAB code. That file is not part of
this package, as its licence is unclear. `fit` makes a model from photographs; its scores can be compared with each
other, but not with published ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kdjax.metrics.psnr_ssim import TooSmallError, check, crop, luma

BLOCK = 96
NUM_FEATURES = 36
_SHARP = 0.75  # blocks at least this sharp, relative to the sharpest of their image, count as pristine

_WINDOW = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
_WINDOW /= _WINDOW.sum()
# MATLAB's imresize(image, 0.5): Keys' cubic with a = -0.5, stretched by two for antialiasing, at its eight taps.
_HALVING = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
_SHAPES = np.arange(0.2, 10.001, 0.001)  # the candidates for the generalised Gaussian


class Pristine(NamedTuple):
    """A Gaussian over the features of clean photographs: `mean` (36,) and `covariance` (36, 36), float64."""

    mean: np.ndarray
    covariance: np.ndarray


def distance(image: np.ndarray, pristine: Pristine, *, crop_border: int = 0) -> float:
    """Returns NIQE of a uint8 (h, w, c) image, RGB or grey: at least 0, lower is better.

    Raises:
      TooSmallError: if the image holds fewer than two non-flat blocks of 96x96 pixels.
      ValueError: if the image has another dtype or shape.
    """
    features, _ = _block_features(_rounded_luma(image, crop_border))
    mean, covariance = _gaussian(features)
    difference = pristine.mean - mean
    inverse = np.linalg.pinv((pristine.covariance + covariance) / 2)
    return float(np.sqrt(difference @ inverse @ difference))


def fit(images: Iterable[np.ndarray]) -> Pristine:
    """Fits the pristine model to the sharp blocks of clean photographs, uint8 (h, w, c).

    The authors used 125 photographs. Images smaller than one block of 96x96 pixels are skipped.

    Raises:
      ValueError: if there are no more than 36 sharp blocks in all, or an image has another dtype or shape.
    """
    kept = []
    for image in images:
        plane = _rounded_luma(image, 0)
        if min(plane.shape) >= BLOCK:
            features, sharpness = _block_features(plane)
            kept.append(features[sharpness > _SHARP * sharpness.max()])
    blocks = np.concatenate(kept) if kept else np.empty((0, NUM_FEATURES))
    blocks = blocks[np.isfinite(blocks).all(axis=1)]
    if len(blocks) <= NUM_FEATURES:
        raise ValueError(
            f"{len(blocks)} sharp blocks of {BLOCK}x{BLOCK} pixels in {len(kept)} images large enough; a model of clean"
            f" photographs needs more than {NUM_FEATURES}, better a thousand; give more or larger photographs"
        )
    return Pristine(blocks.mean(axis=0), np.cov(blocks, rowvar=False))


def _rounded_luma(image: np.ndarray, crop_border: int) -> np.ndarray:
    check(image)
    image = crop(image, crop_border)
    plane = luma(image) if image.shape[2] == 3 else image
    return np.round(plane[..., 0]).astype(np.float64)


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and covariance of (blocks, 36) features; entries of flat blocks are nan and ignored."""
    complete = features[np.isfinite(features).all(axis=1)]
    if len(complete) < 2:
        raise TooSmallError(
            f"NIQE needs at least two blocks of {BLOCK}x{BLOCK} pixels that are not flat, got {len(complete)}"
        )
    return np.nanmean(features, axis=0), np.cov(complete, rowvar=False)


def _block_features(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (blocks, 36) features of an (h, w) luminance, and each block's sharpness: its mean local deviation."""
    rows, columns = plane.shape[0] // BLOCK, plane.shape[1] // BLOCK
    if rows * columns == 0:
        return np.empty((0, NUM_FEATURES)), np.empty(0)
    plane = plane[: rows * BLOCK, : columns * BLOCK]
    features, sharpness = [], np.empty(0)
    for side in (BLOCK, BLOCK // 2):
        if side < BLOCK:
            plane = halve(plane)
        mean = _blur(plane)
        deviation = np.sqrt(np.abs(_blur(plane**2) - mean**2))
        normalised = (plane - mean) / (deviation + 1)
        normalised[np.abs(normalised) < 1e-10] = 0  # flat areas: rounding must not decide the sign
        blocks = _split(normalised, side)
        if side == BLOCK:
            sharpness = _split(deviation, side).mean(axis=(1, 2))
        shape, left, right = generalised_gaussian(blocks)
        features += [shape, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # products of neighbours, wrapping around the block edge
            shape, left, right = generalised_gaussian(blocks * np.roll(blocks, shift, axis=(1, 2)))
            features += [shape, (right - left) * _gamma(2 / shape) / _gamma(1 / shape), left, right]
    return np.stack(features, axis=1), sharpness


def generalised_gaussian(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits an asymmetric generalised Gaussian to each of (n, h, w) blocks: shape, left and right scale, (n,) each.

    Uses the moments of Lasmar et al. (2009). The density is exp(-(-x / left)^shape) left of 0 and exp(-(x /
    right)^shape) right of it, up to a factor. If one side is empty, its scale is nan.
    """
    flat = blocks.reshape(len(blocks), -1)
    square = flat**2
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((square * (flat < 0)).sum(axis=1) / (flat < 0).sum(axis=1))
        right = np.sqrt((square * (flat > 0)).sum(axis=1) / (flat > 0).sum(axis=1))
        skew = left / right
        ratio = np.abs(flat).mean(axis=1) ** 2 / square.mean(axis=1)
        ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = _SHAPES[np.argmin((_ratios() - ratio[:, None]) ** 2, axis=1)]
    to_scale = np.sqrt(_gamma(1 / shape) / _gamma(3 / shape))
    return shape, left * to_scale, right * to_scale


def halve(plane: np.ndarray) -> np.ndarray:
    """Halves an (h, w) plane of even sizes like MATLAB's `imresize(plane, 0.5)`: bicubic with antialiasing."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (3, 3)
        padded = np.moveaxis(np.pad(plane, padding, mode="symmetric"), axis, 0)
        size = plane.shape[axis]
        plane = np.moveaxis(sum(tap * padded[i : i + size : 2] for i, tap in enumerate(_HALVING)), 0, axis)
    return plane


def _split(plane: np.ndarray, side: int) -> np.ndarray:
    """(rows * side, columns * side) -> (rows * columns, side, side)."""
    rows, columns = plane.shape[0] // side, plane.shape[1] // side
    return plane.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)


def _blur(plane: np.ndarray) -> np.ndarray:
    from scipy.ndimage import correlate1d

    return correlate1d(correlate1d(plane, _WINDOW, axis=0, mode="nearest"), _WINDOW, axis=1, mode="nearest")


@functools.cache
def _ratios() -> np.ndarray:
    """G(2/a)^2 / (G(1/a) G(3/a)) of each candidate shape a."""
    return _gamma(2 / _SHAPES) ** 2 / (_gamma(1 / _SHAPES) * _gamma(3 / _SHAPES))


def _gamma(x: np.ndarray) -> np.ndarray:
    from scipy.special import gamma  # SciPy takes half a second to import, and most programs do not need it

    return gamma(x)
