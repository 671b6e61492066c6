"""JPEG compression as arithmetic on the device: Real-ESRGAN's DiffJPEG (Shin & Song, 2017), for any quality.

Chroma subsampling is 4:2:0. As in DiffJPEG, and unlike libjpeg, the scaled tables are neither rounded nor clipped to 1
... 255, and the result is not rounded to 8 bits.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.degradations.canvas import Size, is_valid, resized_to

# ITU-T T.81, annex K. DiffJPEG transposes the luma table, so it treats high frequencies along rows as those along
# columns should be. We keep that, because our degradations are compared with Real-ESRGAN's.
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
).T
_CHROMA = np.full((8, 8), 99, np.float32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# JFIF: full-range BT.601. Cb and Cr are shifted by 128, and so is every plane before its transform: the shifts cancel.
_TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)
# The orthonormal 8-point DCT.
_DCT = np.array(
    [
        [math.cos((2 * x + 1) * u * math.pi / 16) * (math.sqrt(1 / 8) if u == 0 else 0.5) for x in range(8)]
        for u in range(8)
    ],
    np.float32,
)
# For quality 100, where the formula gives 0, a division by zero. It is the factor of quality 99.8, and puts the whole
# table below one half, finer than 8 bits.
_SMALLEST_FACTOR = 0.004


def jpeg(
    image: jax.Array, quality: jax.Array | float, valid: Size | None = None, *, straight_through: bool = False
) -> jax.Array:
    """Compresses a (c, h, w) image in [0, 1], RGB or grey, with a quality from 0 (excluded) to 100.

    Args:
      valid: the image's size within a canvas; by default all of it. As in DiffJPEG, the image is padded with black.
      straight_through: rounding passes gradients through unchanged; otherwise it has none.
    """
    channels, height, width = image.shape
    valid = valid or (height, width)
    image = jnp.where(is_valid(image, valid), image, 0) * 255
    image = resized_to(image, (height + -height % 16, width + -width % 16))
    factor = jnp.where(quality < 50, 50 / quality, 2 - quality / 50)
    factor = jnp.maximum(factor, _SMALLEST_FACTOR)

    def compress(plane: jax.Array, table: np.ndarray) -> jax.Array:
        return _compress(plane, table * factor, straight_through)

    if channels == 1:
        image = compress(image[0] - 128, _LUMA)[None] + 128
    else:
        luma, *chroma = jnp.einsum("ij,jhw->ihw", _TO_YCBCR, image, precision=jax.lax.Precision.HIGHEST)
        luma = compress(luma - 128, _LUMA) + 128
        chroma = [_twice(compress(_half(plane), _CHROMA)) for plane in chroma]
        planes = jnp.stack([luma, *chroma])
        image = jnp.einsum("ij,jhw->ihw", _TO_RGB, planes, precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(image, 0, 255)[:, :height, :width] / 255


def _compress(plane: jax.Array, table: jax.Array | np.ndarray, straight_through: bool) -> jax.Array:
    """Quantises (h, w), with sides divisible by 8, in the DCT domain."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8)
    highest = jax.lax.Precision.HIGHEST
    transformed = jnp.einsum("ux,hxwy,vy->huwv", _DCT, blocks, _DCT, precision=highest)
    scaled = transformed / table[:, None, :]
    rounded = jnp.round(scaled)
    if straight_through:
        rounded = scaled + jax.lax.stop_gradient(rounded - scaled)
    return jnp.einsum("ux,huwv,vy->hxwy", _DCT, rounded * table[:, None, :], _DCT, precision=highest).reshape(
        height, width
    )


def _half(plane: jax.Array) -> jax.Array:
    """Averages 2 x 2 blocks as a sum of four arrays: a reduction takes 10 times as long on a CPU."""
    return jnp.asarray(sum(plane[i::2, j::2] for i in range(2) for j in range(2))) / 4


def _twice(plane: jax.Array) -> jax.Array:
    return jnp.repeat(jnp.repeat(plane, 2, 0), 2, 1)
