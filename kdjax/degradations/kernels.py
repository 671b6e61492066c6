"""Blur kernels of the Real-ESRGAN degradation (arXiv:2107.10833; BasicSR's degradations.py), and filtering.

A kernel is a float32 (side, side) array that sums to 1. `side` is odd and static. `size`, the part of it in use, may be
drawn at random; the rest is 0. Everything works under jit and vmap, with arrays in place of any number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.degradations.canvas import Size, reflected

# How a kernel falls off with the quadratic form q. In configs, each shape has two names: with one sigma, or with two.
SHAPES = ("gaussian", "generalized", "plateau")
KINDS: dict[str, tuple[str, bool]] = {
    "iso": ("gaussian", True),
    "aniso": ("gaussian", False),
    "generalized_iso": ("generalized", True),
    "generalized_aniso": ("generalized", False),
    "plateau_iso": ("plateau", True),
    "plateau_aniso": ("plateau", False),
}
SMALLEST = 7  # kernels have 7, 9, ..., `side` pixels


def bivariate_kernel(
    side: int,
    size: jax.Array | int,
    sigma: tuple[jax.Array | float, jax.Array | float],
    theta: jax.Array | float,
    shape: jax.Array | int = 0,
    beta: jax.Array | float = 1.0,
) -> jax.Array:
    """exp(-q/2), exp(-q^beta/2) or 1/(1 + q^beta), as `shape` indexes SHAPES, with q the quadratic form of an ellipse.

    Args:
      sigma: of the two axes, in pixels.
      theta: angle of the first axis, in radians.
    """
    x, y = _grid(side)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    q = jnp.square((cos * x + sin * y) / sigma[0]) + jnp.square((cos * y - sin * x) / sigma[1])
    powered = jnp.where(q > 0, jnp.where(q > 0, q, 1) ** beta, 0)
    shape = jnp.asarray(shape)
    values = jnp.select([shape == 0, shape == 1], [jnp.exp(-q / 2), jnp.exp(-powered / 2)], 1 / (1 + powered))
    return _normalised(values, size)


def sinc_kernel(side: int, size: jax.Array | int, cutoff: jax.Array | float) -> jax.Array:
    """The circular low-pass filter w J1(w r) / (2 pi r), with cutoff w in radians per pixel; it rings."""
    x, y = _grid(side)
    r = jnp.sqrt(jnp.square(x) + jnp.square(y))
    values = jnp.where(r > 0, _j1(cutoff * r, side + 24) / (2 * jnp.pi * jnp.where(r > 0, r, 1)), cutoff / (4 * jnp.pi))
    return _normalised(cutoff * values, size)


def filter2d(image: jax.Array, kernel: jax.Array, valid: Size) -> jax.Array:
    """Correlates the valid part of a (c, h, w) canvas with a kernel.

    The border is reflected, without repeating the edge. Uses FFTs: a 21 x 21 filter then costs the same on every kind
    of device, whatever differs between samples.
    """
    _, height, width = image.shape
    rows, columns = (
        places_to_filter(0, extent, len(kernel), size) for extent, size in zip((height, width), valid, strict=True)
    )
    return filter_inside(image[:, rows, :][:, :, columns], kernel)[:, :height, :width]


def places_to_filter(start: jax.Array | int, extent: int, side: int, size: jax.Array | int) -> jax.Array:
    """Returns which of `size` rows (or columns) `filter_inside` needs as input for the `extent` rows from `start`."""
    return reflected(start - side // 2 + jnp.arange(_fast_length(extent + side - 1)), size)


def filter_inside(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlates (c, h, w) with a kernel where it fits whole: (c, h - side + 1, w - side + 1)."""
    margin, shape = len(kernel) - 1, image.shape[1:]
    # A convolution with the flipped kernel; the circular wrap-around does not reach the part that is kept.
    spectrum = jnp.fft.rfft2(image) * jnp.fft.rfft2(kernel[::-1, ::-1], s=shape)
    return jnp.fft.irfft2(spectrum, s=shape)[:, margin:, margin:]


def _grid(side: int) -> tuple[jax.Array, jax.Array]:
    line = jnp.arange(side, dtype=jnp.float32) - side // 2
    return line[None, :], line[:, None]


def _normalised(values: jax.Array, size: jax.Array | int) -> jax.Array:
    x, y = _grid(values.shape[0])
    values = jnp.where(jnp.maximum(jnp.abs(x), jnp.abs(y)) <= jnp.asarray(size) // 2, values, 0)
    return values / jnp.sum(values)


def _j1(x: jax.Array, points: int) -> jax.Array:
    """The Bessel function of the first kind and first order, from Bessel's integral by the midpoint rule.

    J1 is the mean of cos(t - x sin t) over half a turn; with n points, its error is about J_2n(x). x is at most pi
    times half the diagonal of a kernel, 2.3 x side. With side + 24 points the error is below 1e-8 up to 51 x 51 pixels.
    """
    t = (jnp.arange(points) + 0.5) * (jnp.pi / points)
    return jnp.mean(jnp.cos(t - x[..., None] * jnp.sin(t)), -1)


def _fast_length(least: int) -> int:
    """Returns the next even length without prime factors above 5, for fast FFTs."""

    def is_fast(length: int) -> bool:
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        return length == 1

    return next(length for length in range(least + least % 2, 4 * least, 2) if is_fast(length))
