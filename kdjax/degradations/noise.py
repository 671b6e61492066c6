"""Noise fields on (c, h, w) canvases: Gaussian, Poisson, grey or colour, and the sensor model that combines both.

A pixel's value depends only on the key and the pixel's position, not on the canvas size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.degradations.canvas import Size, is_valid

# ITU-R BT.601, as in torchvision's rgb_to_grayscale.
_LUMA = (0.2989, 0.587, 0.114)
# Poisson counts are found one by one up to this mean, and from the normal distribution above it.
_COUNTED_MEAN, _COUNTS = 10.0, 36
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns a (c, h, w) field of numbers between 0 and 1, both excluded, in steps of 2^-23.

    Threefry-2x32 as in `jax.random` (Salmon et al., SC 2011), written out so that it fuses into one loop with its
    consumer. `jax.random.bits` uses half of the bits and takes 14 times as long on a CPU (jax 0.10).
    """
    channels, height, width = shape
    place = jnp.arange(height, dtype=jnp.uint32)[:, None] * jnp.uint32(1 << 16) + jnp.arange(width, dtype=jnp.uint32)
    key = jax.random.key_data(key)
    pairs = [_threefry(key, place, jnp.full_like(place, i)) for i in range(-(-channels // 2))]
    bits = jnp.stack([word for pair in pairs for word in pair][:channels])
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns a (c, h, w) field of standard normal numbers."""
    return _normal_quantile(uniform(key, shape))


def gaussian_noise(key: jax.Array, image: jax.Array, sigma: jax.Array | float, gray: jax.Array | bool) -> jax.Array:
    """Returns noise of standard deviation `sigma` (0..255 scale), equal in all channels where `gray`."""
    field = normal(key, image.shape)
    return sigma / 255 * jnp.where(gray, field[:1], field)


def poisson_noise(
    key: jax.Array, image: jax.Array, scale: jax.Array | float, gray: jax.Array | bool, valid: Size
) -> jax.Array:
    """Returns `scale` x (Poisson(v x) / v - x), with x the 8-bit image, or its luma where `gray`.

    v is the number of distinct levels in the image, rounded up to a power of two. As in BasicSR, an image with few
    levels counts as one with few photons.
    """
    luma = jnp.einsum("i,ihw->hw", jnp.array(_LUMA), image)[None] if image.shape[0] == 3 else image
    image = jnp.where(gray, luma, image)
    level = jnp.round(jnp.clip(image, 0, 1) * 255).astype(jnp.int32)
    level_or_outside = jnp.where(is_valid(image, valid), level, 256)
    occurs = jnp.zeros(257, bool).at[level_or_outside].set(True)[:256]
    # Exact for the 257 possible numbers; log2 in float32 need not be.
    counts = jnp.sum(occurs)
    vals = jnp.float32(2) ** jnp.sum(counts > 2 ** jnp.arange(9))
    u = uniform(key, image.shape)
    mean = level.astype(jnp.float32) / 255 * vals
    return scale * (poisson_quantile(jnp.where(gray, u[:1], u), mean) - mean) / vals


def poisson_quantile(u: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns the least count k with P(Poisson(mean) <= k) >= u, in float32.

    Exact up to a mean of 10. Above it, a Cornish-Fisher expansion is off by one count in less than three cases per
    thousand.
    """
    u = jnp.minimum(u, 1 - 2.0**-21)  # the summed probabilities may end just below 1
    small = jnp.minimum(mean, _COUNTED_MEAN)
    probability = jnp.exp(-small)
    below, count = probability, jnp.zeros_like(u)
    for k in range(1, _COUNTS):
        count += u > below
        probability = probability * small / k
        below = below + probability
    z = _normal_quantile(u)
    root = jnp.sqrt(jnp.maximum(mean, 1) - 1 / 12)  # rounding adds a variance of 1/12 (Sheppard)
    expansion = mean + root * z + (z * z - 1) / 6 + (z - z**3) / (72 * root)
    return jnp.where(mean <= _COUNTED_MEAN, count, jnp.maximum(0, jnp.round(expansion)))


def _normal_quantile(u: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.float32(2)) * jax.lax.erf_inv(2 * u - 1)


def _threefry(key: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    first, second = first + keys[0], second + keys[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            first = first + second
            second = ((second << distance) | (second >> (32 - distance))) ^ first
        first, second = first + keys[(i + 1) % 3], second + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return first, second
