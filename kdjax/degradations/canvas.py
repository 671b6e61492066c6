"""Images of random size under static shapes.

A canvas is an array (c, H, W) whose first `valid` = (h, w) rows and columns hold the image. The rest is finite and
meaningless.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# (height, width), drawn or static. The types omit the length because these are made by `tuple(... for ...)`.
Size = tuple[jax.Array | int, ...]
Shape = tuple[int, ...]


class Window(NamedTuple):
    """A part of an image: `shape` rows and columns from `start`."""

    start: jax.Array  # int (2,)
    shape: Shape


def whole(shape: Shape) -> Window:
    """Returns the window that covers everything."""
    return Window(jnp.zeros(2, jnp.int32), shape)


def cut(image: jax.Array, window: Window) -> jax.Array:
    """Returns the window of an (h, w, c) image."""
    return jax.lax.dynamic_slice(image, (*window.start, 0), (*window.shape, image.shape[2]))


def reflected(index: jax.Array, count: jax.Array | int) -> jax.Array:
    """Maps an index beyond the ends to its mirror image in 0 ... count - 1, without repeating the ends."""
    period = jnp.maximum(2 * (count - 1), 1)
    folded = index % period
    return jnp.minimum(folded, period - folded)


def is_valid(image: jax.Array, valid: Size) -> jax.Array:
    """(H, W): which pixels belong to the image."""
    rows, columns = (jnp.arange(extent) < size for extent, size in zip(image.shape[1:], valid, strict=True))
    return rows[:, None] & columns[None, :]


def resized_to(image: jax.Array, shape: Shape) -> jax.Array:
    """Crops the canvas, or pads it with zeros at the bottom and right."""
    image = image[:, : shape[0], : shape[1]]
    return jnp.pad(image, ((0, 0), (0, shape[0] - image.shape[1]), (0, shape[1] - image.shape[2])))
