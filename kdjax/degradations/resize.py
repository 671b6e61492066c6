"""Resizing as torch's `F.interpolate` does it, without antialiasing, by factors that are drawn at random.

Along each axis an output pixel is a weighted sum of a few input pixels. Which ones and how much of each are arrays, so
mode, factor and sizes may be too: no shape depends on them. The canvases do (`kdjax.degradations.canvas`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_CUBIC_A = -0.75  # torch's


class Taps(NamedTuple):
    """What the output pixels along one axis are made of: `index` and `weight` are (pixels, taps)."""

    index: jax.Array
    weight: jax.Array

    def at(self, pixels: jax.Array | slice) -> Taps:
        """Those of some pixels."""
        return Taps(self.index[pixels], self.weight[pixels])


def resize(image: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """A (c, H, W) canvas whose new rows and columns are `rows` and `columns`: (c, H2, W2)."""
    # Channel by channel, for the loop keeps XLA from merging a transpose into the gathers, which on a CPU makes them 4
    # times slower; both axes are then sums of whole rows. Matrix products with dense weights take 6 times longer.
    image = jax.lax.map(lambda plane: _weighted_rows(plane, rows), image)
    return jax.lax.map(lambda plane: _weighted_rows(plane, columns), image.transpose(0, 2, 1)).transpose(0, 2, 1)


def num_taps(size: int, new_size: int) -> int:
    """How many taps resizing `size` pixels to `new_size` or more takes, in any mode."""
    return max(4, math.ceil(size / new_size) + 1)


def resize_taps(
    mode: jax.Array | int,
    size: jax.Array | int,
    new_extent: int,
    new_size: jax.Array | int,
    factor: jax.Array | float,
    count: int,
) -> Taps:
    """`new_extent` output pixels, of which the first `new_size` resize `size` input pixels; the others are arbitrary.

    Args:
      mode: place in MODES.
      factor: output pixels per input pixel, from which bilinear and bicubic take their coordinates. Torch uses the
        factor it was given, or the ratio of the sizes where it was given sizes.
      count: the number of taps, of `num_taps`.
    """
    new = jnp.arange(new_extent)[:, None]
    centre = (new + 0.5) / factor - 0.5
    tap = jnp.arange(count)
    index, weight = jax.lax.switch(mode, [lambda f=f: f(new, tap, centre, size, new_size) for f in MODES.values()])
    return Taps(jnp.clip(index, 0, size - 1), weight)  # pixels beyond the edge are the edge


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
