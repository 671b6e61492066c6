"""Array operations on images that more than one module needs.

Images are NHWC; float images lie in [0, 1] and are not clipped here. Every function is pure and works under jit,
grad and vmap. Those that rearrange pixels are jitted, not for speed, but to be seen as one call by `kdjax.export`,
which has an ONNX operator for each of these names.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def to_float(image: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [0, 1]; of a float image only the precision becomes float32."""
    floats = image.astype(jnp.float32)
    return floats / 255 if image.dtype == jnp.uint8 else floats


def to_uint8(image: jax.Array) -> jax.Array:
    """float [0, 1] -> uint8: clip, times 255, round half to even, as BasicSR's `tensor2img` does."""
    return jnp.round(jnp.clip(image, 0, 1) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="factor")
def pixel_unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """(b, h, w, c) -> (b, h/factor, w/factor, c*factor^2), in torch's channel order c*f*f + row*f + column."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor * factor)


@functools.partial(jax.jit, static_argnames="factor")
def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of `pixel_unshuffle`: (b, h, w, c*factor^2) -> (b, h*factor, w*factor, c)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * factor, w * factor, c // factor**2)


@functools.partial(jax.jit, static_argnames="factor")
def upsample_nearest(x: jax.Array, factor: int) -> jax.Array:
    """(b, h, w, c) -> (b, h*factor, w*factor, c); every pixel becomes a factor x factor square."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, factor, w, factor, c))
    return x.reshape(b, h * factor, w * factor, c)


@functools.partial(jax.jit, static_argnames="factor")
def upsample_bilinear(x: jax.Array, factor: int) -> jax.Array:
    """(b, h, w, c) -> (b, h*factor, w*factor, c), as torch's bilinear interpolation with align_corners=False."""
    b, h, w, c = x.shape
    return jax.image.resize(x.astype(jnp.float32), (b, h * factor, w * factor, c), "bilinear").astype(x.dtype)


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `size`, which may also be a symbolic size of `jax.export`."""
    return multiple * -(-size // multiple)


@functools.partial(jax.jit, static_argnames="multiple")
def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Reflects (b, h, w, c) at the bottom and right until h and w divide by `multiple`.

    Gathers the pixels, since `jnp.pad` cannot reflect an image of symbolic size.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        padded = round_up(size, multiple)
        if padded != size:
            period = jnp.maximum(2 * (size - 1), 1)  # 0 1 2 3 2 1 | 0 1 ...
            position = jnp.arange(padded) % period
            x = jnp.take(x, jnp.minimum(position, period - position), axis=axis, mode="clip")
    return x
