"""Array operations on images shared by several modules.

Images are NHWC; float images are in [0, 1] and not clipped here. All functions are pure and work under jit, grad and
vmap. Those that rearrange pixels are jitted, not for speed, but so that `kdjax.export` sees each as one named call,
which it maps to ONNX.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def to_float(image: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [0, 1]; a float image is only cast to float32."""
    floats = image.astype(jnp.float32)
    return floats / 255 if image.dtype == jnp.uint8 else floats


def to_uint8(image: jax.Array) -> jax.Array:
    """float [0, 1] -> uint8: clip, multiply by 255, round half to even, like BasicSR's `tensor2img`."""
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
    """(b, h, w, c) -> (b, h*factor, w*factor, c), like torch's bilinear interpolation with align_corners=False."""
    b, h, w, c = x.shape
    return jax.image.resize(x.astype(jnp.float32), (b, h * factor, w * factor, c), "bilinear").astype(x.dtype)


def round_up(size: int, multiple: int) -> int:
    """Rounds `size` up to a multiple of `multiple`; `size` may be a symbolic size of `jax.export`."""
    return multiple * -(-size // multiple)


@functools.partial(jax.jit, static_argnames="multiple")
def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Reflects (b, h, w, c) at the bottom and right until `multiple` divides h and w.

    Gathers pixels, since `jnp.pad` cannot reflect an image of symbolic size.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        padded = round_up(size, multiple)
        if padded != size:
            period = jnp.maximum(2 * (size - 1), 1)  # 0 1 2 3 2 1 | 0 1 ...
            position = jnp.arange(padded) % period
            x = jnp.take(x, jnp.minimum(position, period - position), axis=axis, mode="clip")
    return x


@functools.partial(jax.jit, static_argnames="multiple")
def repeat_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Like `pad_to_multiple`, but repeats the last row and column."""
    for axis in (1, 2):
        padded = round_up(x.shape[axis], multiple)
        if padded != x.shape[axis]:
            x = jnp.take(x, jnp.arange(padded), axis=axis, mode="clip")
    return x
