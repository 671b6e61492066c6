"""Resizing as in torch's `F.interpolate`, without antialiasing, by random factors.

Along each axis, an output pixel is a weighted sum of a few input pixels. Their indices and weights are arrays, so mode,
factor and sizes can be arrays too: no shape depends on them. Only the canvas size is static
(`kdjax.degradations.canvas`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_CUBIC_A = -0.75  # as in torch


class Taps(NamedTuple):
    """The inputs of the output pixels along one axis; `index` and `weight` are (pixels, taps)."""

    index: jax.Array
    weight: jax.Array

    def at(self, pixels: jax.Array | slice) -> Taps:
        """Returns the taps of some pixels."""
        return Taps(self.index[pixels], self.weight[pixels])


def resize(image: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """Resizes a (c, H, W) canvas to (c, H2, W2), with taps for its rows and columns."""
    # Channel by channel: the loop keeps XLA from merging a transpose into the gathers, which makes them 4 times slower
    # on a CPU, and both axes become sums of whole rows. Matrix products with dense weights take 6 times longer.
    image = jax.lax.map(lambda plane: _weighted_rows(plane, rows), image)
    return jax.lax.map(lambda plane: _weighted_rows(plane, columns), image.transpose(0, 2, 1)).transpose(0, 2, 1)


def num_taps(size: int, new_size: int) -> int:
    """Returns the number of taps needed to resize `size` pixels to `new_size` or more, in any mode."""
    return max(4, math.ceil(size / new_size) + 1)


def resize_taps(
    mode: jax.Array | int,
    size: jax.Array | int,
    new_extent: int,
    new_size: jax.Array | int,
    factor: jax.Array | float,
    count: int,
) -> Taps:
    """Returns taps for `new_extent` output pixels.

    The first `new_size` of them resize `size` input pixels; the rest are arbitrary.

    Args:
      mode: index into MODES.
      factor: output pixels per input pixel, which sets the coordinates for bilinear and bicubic. Torch uses the factor
        it was given, or the ratio of the sizes if it was given sizes.
      count: the number of taps, from `num_taps`.
    """
    new = jnp.arange(new_extent)[:, None]
    centre = (new + 0.5) / factor - 0.5
    tap = jnp.arange(count)
    index, weight = jax.lax.switch(mode, [lambda f=f: f(new, tap, centre, size, new_size) for f in MODES.values()])
    return Taps(jnp.clip(index, 0, size - 1), weight)  # pixels beyond the edge repeat the edge


def _weighted_rows(plane: jax.Array, taps: Taps) -> jax.Array:
    """(H, W) -> (H2, W)."""
    parts = (plane.at[taps.index[:, i]].get(mode="clip") * taps.weight[:, i, None] for i in range(taps.index.shape[1]))
    return jnp.asarray(sum(parts))


def _area(
    new: jax.Array, tap: jax.Array, centre: jax.Array, size: jax.Array | int, new_size: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Torch's adaptive average: the mean over floor(i n / m) ... ceil((i + 1) n / m)."""
    start, end = new * size // new_size, -((-(new + 1) * size) // new_size)
    return start + tap, (start + tap < end) / jnp.maximum(end - start, 1).astype(jnp.float32)


def _bilinear(
    new: jax.Array, tap: jax.Array, centre: jax.Array, size: jax.Array | int, new_size: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    centre = jnp.clip(centre, 0, size - 1)
    place = jnp.floor(centre).astype(jnp.int32) + tap
    return place, jnp.maximum(0, 1 - jnp.abs(centre - place))


def _bicubic(
    new: jax.Array, tap: jax.Array, centre: jax.Array, size: jax.Array | int, new_size: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    place = jnp.floor(centre).astype(jnp.int32) - 1 + tap
    distance = jnp.abs(centre - place)
    near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * _CUBIC_A - 4 * _CUBIC_A
    return place, jnp.select([distance <= 1, tap < 4], [near, far], 0.0)


MODES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "area": _area,
    "bilinear": _bilinear,
    "bicubic": _bicubic,
}
