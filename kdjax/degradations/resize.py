"""Resizing as torch's `F.interpolate` does it, without antialiasing, by factors that are drawn at random.

Along each axis the result is a matrix product with the weights of every input pixel, so that mode, factor and sizes may
all be arrays: no shape depends on them. The canvases do (`kdjax.degradations.canvas`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_CUBIC_A = -0.75  # torch's


def resize(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """A (c, H, W) canvas, resized by the weights (H2, H) of its rows and (W2, W) of its columns to (c, H2, W2)."""
    highest = jax.lax.Precision.HIGHEST
    image = jnp.einsum("ph,chw->cpw", rows, image, precision=highest)
    return jnp.einsum("cpw,qw->cpq", image, columns, precision=highest)


def resize_weights(
    mode: jax.Array | int,
    extent: int,
    size: jax.Array | int,
    new_extent: int,
    new_size: jax.Array | int,
    factor: jax.Array | float,
) -> jax.Array:
    """(new_extent, extent): how much of each of `size` input pixels is in each of `new_size` output pixels.

    A part of it, [:new_extent, :extent], is what a smaller canvas has.

    Args:
      mode: place in MODES.
      factor: output pixels per input pixel, from which bilinear and bicubic take their coordinates. Torch uses the
        factor it was given, or the ratio of the sizes where it was given sizes.
    """
    new = jnp.arange(new_extent)[:, None]
    old = jnp.arange(extent)[None, :]
    centre = (new + 0.5) / factor - 0.5
    branches = [lambda build=build: build(new, old, centre, size, new_size) for build in MODES.values()]
    return jax.lax.switch(mode, branches)


def _area(
    new: jax.Array, old: jax.Array, centre: jax.Array, size: jax.Array | int, new_size: jax.Array | int
) -> jax.Array:
    """Torch's adaptive average: the mean over floor(i n / m) ... ceil((i + 1) n / m)."""
    start, end = new * size // new_size, -((-(new + 1) * size) // new_size)
    inside = (old >= start) & (old < end)
    return inside / jnp.maximum(end - start, 1).astype(jnp.float32)


def _bilinear(
    new: jax.Array, old: jax.Array, centre: jax.Array, size: jax.Array | int, new_size: jax.Array | int
) -> jax.Array:
    return jnp.maximum(0, 1 - jnp.abs(jnp.clip(centre, 0, size - 1) - old))


def _bicubic(
    new: jax.Array, old: jax.Array, centre: jax.Array, size: jax.Array | int, new_size: jax.Array | int
) -> jax.Array:
    first = jnp.floor(centre)
    taps = jnp.arange(-1, 3, dtype=jnp.float32)
    distance = jnp.abs(centre - first - taps)  # (m, 4)
    near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC_A - 4 * _CUBIC_A
    amount = jnp.where(distance <= 1, near, far)
    place = jnp.clip(first + taps, 0, size - 1)  # pixels beyond the edge are the edge
    return sum(jnp.where(old == place[:, i : i + 1], amount[:, i : i + 1], 0) for i in range(4))


MODES: dict[str, Callable[..., jax.Array]] = {"area": _area, "bilinear": _bilinear, "bicubic": _bicubic}
