"""Pixel shuffling against the definition, padding, and 8-bit conversion."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import ops


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_pixel_unshuffle_has_torch_channel_order(factor: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 4 * factor, 3 * factor, 3)).astype(np.float32)
    y = np.asarray(ops.pixel_unshuffle(x, factor))
    for channel in range(3):
        for row in range(factor):
            for column in range(factor):
                out = channel * factor**2 + row * factor + column
                np.testing.assert_array_equal(y[..., out], x[:, row::factor, column::factor, channel])
    np.testing.assert_array_equal(ops.pixel_shuffle(y, factor), x)


def test_upsample_nearest_repeats_pixels() -> None:
    x = np.arange(12.0, dtype=np.float32).reshape(1, 2, 3, 2)
    np.testing.assert_array_equal(ops.upsample_nearest(x, 3), x.repeat(3, 1).repeat(3, 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (4, 8), (7, 2)])
def test_pad_to_multiple_reflects_at_bottom_and_right(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=(1, *size, 2)).astype(np.float32)
    y = np.asarray(ops.pad_to_multiple(x, 4))
    pad = [(0, -n % 4) for n in size]
    np.testing.assert_array_equal(y, np.pad(x, ((0, 0), *pad, (0, 0)), mode="reflect"))


def test_to_uint8_clips_and_rounds_half_to_even() -> None:
    x = jnp.array([-1.0, 0.5 / 255, 1.5 / 255, 0.5, 1.0, 2.0])
    np.testing.assert_array_equal(ops.to_uint8(x), np.array([0, 0, 2, 128, 255, 255], np.uint8))


def test_every_uint8_survives_the_way_to_float_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(ops.to_uint8(ops.to_float(jnp.asarray(levels))), levels)
