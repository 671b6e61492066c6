"""Least squares for convolutions: kernels that map given inputs to given outputs, of full or reduced rank.

Reduced-rank regression after Izenman, 1975, "Reduced-rank regression for the multivariate linear model": the best
rank-r predictor is the full one, projected on the r leading principal axes of what it predicts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

_RIDGE = 1e-4  # of the mean variance of the inputs
_PIXELS = 4096  # whose patches are in memory at a time


class Kernel(NamedTuple):
    """A convolution: kernel (n, n, c, o) and bias (o,)."""

    kernel: np.ndarray
    bias: np.ndarray


def fit(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray, size: int, prior: Kernel | None = None) -> Kernel:
    """Returns the size x size convolution of x (b, h, w, c) that is nearest to y (b, h, w, o) in least squares.

    Where the inputs do not decide, it is near `prior`, or small.
    """
    regression = _moments(x, y, size)
    weights = _solve(regression, None if prior is None else prior.kernel.reshape(-1, y.shape[-1]))
    return Kernel(weights.reshape(size, size, x.shape[-1], -1), regression.intercept(weights))


def fit_low_rank(x: jax.Array, y: jax.Array, size: int, rank: int) -> tuple[np.ndarray, Kernel]:
    """Returns a kernel (size, size, c, rank) without bias and a 1x1 convolution (1, 1, rank, o) after it, as `fit`."""
    regression = _moments(x, y, size)
    weights = _solve(regression, None)
    _, axes = np.linalg.eigh(weights.T @ regression.xx @ weights)
    axes = axes[:, ::-1][:, :rank]
    first = (weights @ axes).reshape(size, size, x.shape[-1], rank)
    return _float32(first), Kernel(_float32(axes.T[None, None]), regression.intercept(weights @ axes @ axes.T))


class _Moments(NamedTuple):
    """Centred second moments of patches x and outputs y, and their means."""

    xx: np.ndarray
    xy: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def intercept(self, weights: np.ndarray) -> np.ndarray:
        return _float32(self.y - self.x @ weights)


def _moments(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray, size: int) -> _Moments:
    """Sums over all pixels, a few images at a time: patches of all would take size^2 times the memory of x.

    In NumPy: compiling this for the shape of every layer would take longer than computing it.
    """
    inputs, outputs = np.asarray(x), np.asarray(y)
    shifts = inputs.mean((0, 1, 2)), outputs.mean((0, 1, 2))  # about zero, float32 would lose small variances
    several = max(1, _PIXELS // (x.shape[1] * x.shape[2]))
    sums: list[np.ndarray] = []
    for i in range(0, len(x), several):
        patches = _patches(inputs[i : i + several] - shifts[0], shifts[0], size)
        targets = outputs[i : i + several].reshape(-1, y.shape[-1]) - shifts[1]
        ones = np.ones(len(patches), np.float32)
        parts = patches.T @ patches, patches.T @ targets, ones @ patches, ones @ targets
        sums = [*map(np.add, sums, parts)] if sums else [part.astype(np.float64) for part in parts]
    count = x.shape[0] * x.shape[1] * x.shape[2]
    xx, xy, of_x, of_y = (part / count for part in sums)
    xx, xy = xx - np.outer(of_x, of_x), xy - np.outer(of_x, of_y)
    return _Moments(xx, xy, of_x + np.tile(shifts[0], size * size), of_y + shifts[1])


def _patches(x: np.ndarray, shift: np.ndarray, size: int) -> np.ndarray:
    """Returns what a size x size convolution reads at each pixel of x + shift (b, h, w, c), less the shift: (bhw, nnc).

    Outside of the image, that is zero less the shift.
    """
    batch, height, width, channels = x.shape
    padded = np.empty((batch, height + size - 1, width + size - 1, channels), x.dtype)
    padded[...] = -shift
    padded[:, size // 2 : size // 2 + height, size // 2 : size // 2 + width] = x
    patches = np.empty((batch, height, width, size, size, channels), x.dtype)
    for i in range(size):
        for j in range(size):
            patches[:, :, :, i, j] = padded[:, i : i + height, j : j + width]
    return patches.reshape(-1, size * size * channels)


def _solve(moments: _Moments, prior: np.ndarray | None) -> np.ndarray:
    xx = moments.xx + np.eye(len(moments.xx)) * (_RIDGE * np.trace(moments.xx) / len(moments.xx) + 1e-12)
    prior = np.zeros_like(moments.xy) if prior is None else prior.astype(np.float64)
    return prior + np.linalg.solve(xx, moments.xy - moments.xx @ prior)


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


# ---- bases of channels -----------------------------------------------------------------------------------------


def principal_axes(arrays: list[jax.Array], count: int) -> np.ndarray:
    """Returns (c, count): the orthonormal basis of `count` channels that keeps most of arrays (..., c)."""
    moments = sum(_second_moments(array) for array in arrays)
    return _float32(np.linalg.eigh(moments)[1][:, ::-1][:, :count])


def best_channels(activations: jax.Array, count: int) -> np.ndarray:
    """Returns the indices, ascending, of `count` channels of (..., c) from which the others are best predicted.

    Greedy: each is the one that explains most of what the ones before it leave (a column-pivoted Cholesky
    factorisation by the gain in explained variance).
    """
    mean = np.asarray(activations).mean((0, 1, 2), np.float64)
    size = activations.size // activations.shape[-1]
    left = _second_moments(activations) / size - np.outer(mean, mean)
    chosen: list[int] = []
    floor = 1e-12 * max(float(np.trace(left)), 1e-30)
    for _ in range(count):
        variances = np.diag(left).copy()
        gains = np.where(variances > floor, (left**2).sum(0) / np.maximum(variances, floor), -1.0)
        gains[chosen] = -2.0
        best = int(np.argmax(gains))
        chosen.append(best)
        if variances[best] > floor:
            left = left - np.outer(left[:, best], left[best]) / variances[best]
    return np.sort(chosen)


def _second_moments(array: jax.Array) -> np.ndarray:
    flat = np.asarray(array).reshape(-1, array.shape[-1])
    return (flat.T @ flat).astype(np.float64)


def explained(outputs: jax.Array) -> np.ndarray:
    """Returns the variances of (b, h, w, o) along its principal axes, largest first; those within rounding are 0."""
    mean = np.asarray(outputs).mean((0, 1, 2), np.float64)
    moments = _second_moments(outputs) * outputs.shape[-1] / outputs.size
    variances = np.linalg.eigvalsh(moments - np.outer(mean, mean))[::-1]
    return np.where(variances > 1e-6 * np.trace(moments), variances, 0)
