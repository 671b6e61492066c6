"""NIQE: how far the statistics of an image are from those of clean photographs (Mittal et al., 2013).

Blocks of 96x96 pixels, at full and half size, each give 18 numbers that describe how normalised luminance and the
products of neighbours are distributed. A Gaussian is fitted to the numbers of an image and compared with one of clean
photographs, the pristine model; lower is better, and no clean version of the image is needed.

The numbers are those of BasicSR 1.4.2 and the authors' MATLAB code when the pristine model is theirs. That file is not
part of this package, since its licence is unclear; `fit` makes a model from photographs, whose scores are good for
comparing with each other, and not with published ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.ndimage import correlate1d
from scipy.special import gamma

from kdjax.metrics.psnr_ssim import TooSmallError, check, crop, luma

BLOCK = 96
NUM_FEATURES = 36
_SHARP = 0.75  # blocks at least this sharp, compared with the sharpest of their image, count as pristine

_WINDOW = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
_WINDOW /= _WINDOW.sum()
# MATLAB's imresize(image, 0.5): the cubic of Keys with a = -0.5, stretched by two against aliasing, at its eight taps.
_HALVING = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
# The shapes among which the generalised Gaussian is looked for, and G(2/a)^2 / (G(1/a) G(3/a)) of each.
_SHAPES = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))


class Pristine(NamedTuple):
    """A Gaussian over the features of clean photographs: `mean` (36,) and `covariance` (36, 36), float64."""

    mean: np.ndarray
    covariance: np.ndarray


def distance(image: np.ndarray, pristine: Pristine, *, crop_border: int = 0) -> float:
    """NIQE of a uint8 (h, w, c) image, RGB or grey: at least 0, and lower is better.

    Raises:
      TooSmallError: the image holds fewer than two blocks of 96x96 pixels that are not flat.
      ValueError: another type or shape.
    """
    features, _ = _block_features(_rounded_luma(image, crop_border))
    mean, covariance = _gaussian(features)
    difference = pristine.mean - mean
    inverse = np.linalg.pinv((pristine.covariance + covariance) / 2)
    return float(np.sqrt(difference @ inverse @ difference))


def fit(images: Iterable[np.ndarray]) -> Pristine:
    """The pristine model of clean photographs, uint8 (h, w, c), from the sharp blocks of each.

    The authors used 125 photographs. Images without a block of 96x96 pixels are passed over.

    Raises:
      ValueError: there are no more than 36 sharp blocks in all, or an image has another type or shape.
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
    """Mean and covariance of (blocks, 36) features; those of a flat block are nan and left out where they are."""
    complete = features[np.isfinite(features).all(axis=1)]
    if len(complete) < 2:
        raise TooSmallError(
            f"NIQE needs at least two blocks of {BLOCK}x{BLOCK} pixels that are not flat, got {len(complete)}"
        )
    return np.nanmean(features, axis=0), np.cov(complete, rowvar=False)


def _block_features(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, 36) features of an (h, w) luminance, and how sharp each block is: its mean local deviation."""
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
        normalised[np.abs(normalised) < 1e-10] = 0  # a flat area, where rounding would decide which side of 0 it is
        blocks = _split(normalised, side)
        if side == BLOCK:
            sharpness = _split(deviation, side).mean(axis=(1, 2))
        shape, left, right = generalised_gaussian(blocks)
        features += [shape, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # the products of neighbours, around the edge of the block
            shape, left, right = generalised_gaussian(blocks * np.roll(blocks, shift, axis=(1, 2)))
            features += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return np.stack(features, axis=1), sharpness


def generalised_gaussian(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The asymmetric generalised Gaussian of each of (n, h, w) blocks: shape, left and right scale, (n,) each.

    By the moments of Lasmar et al. (2009): the density is exp(-(-x / left)^shape) left of 0 and exp(-(x / right)^shape)
    right of it, up to a factor. Where one side is empty, its scale is nan.
    """
    flat = blocks.reshape(len(blocks), -1)
    square = flat**2
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.sqrt((square * (flat < 0)).sum(axis=1) / (flat < 0).sum(axis=1))
        right = np.sqrt((square * (flat > 0)).sum(axis=1) / (flat > 0).sum(axis=1))
        skew = left / right
        ratio = np.abs(flat).mean(axis=1) ** 2 / square.mean(axis=1)
        ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = _SHAPES[np.argmin((_RATIOS - ratio[:, None]) ** 2, axis=1)]
    to_scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * to_scale, right * to_scale


def halve(plane: np.ndarray) -> np.ndarray:
    """An (h, w) plane of even sizes at half its size, as MATLAB's `imresize(plane, 0.5)`: bicubic, no aliasing."""
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
    return correlate1d(correlate1d(plane, _WINDOW, axis=0, mode="nearest"), _WINDOW, axis=1, mode="nearest")
