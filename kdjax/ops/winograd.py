"""3x3 convolutions from many channels to few, sped up on a CPU by Winograd's minimal filtering along rows.

Four neighbouring outputs of a row take 4 x 3 products per input channel and kernel row; F(4, 3) needs only six
(Winograd, 1980, "Arithmetic complexity of computations"; Lavin & Gray, 2016, arXiv:1509.09308, the source of these
matrices). Each of the six is one matrix product of all positions with the three kernel rows side by side, which is wide
although the convolution is narrow; its three results are shifted by a row each and added.

In float32 the result differs from the plain convolution by a few units in the last place of its largest terms. Other
platforms, gradients and shapes where it does not pay off use XLA's own convolution. See `docs/performance.md` for
measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.ops import convolution

# Lavin & Gray, equation 11, for the points 0, 1, -1, 2, -2 and infinity: output x ((kernel x g) * (input x d)).
_TILE = 4
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
_KERNEL = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
_OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32)

_LARGEST_MAP = 128 * 128  # pixels per image; above that the intermediates no longer fit into the cache


@jax.jit  # one call in the jaxpr, which `kdjax.export` recognises by name
def narrow_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, h, w, c) and (3, 3, c, o) -> (b, h, w, o): convolution with zero padding and stride 1."""
    return _convolve(x, kernel)


@jax.custom_vjp
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if not _pays(x.shape, kernel.shape, x.dtype):
        return convolution.plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_winograd, default=convolution.plain)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Faster than transposing the transforms.
    return convolution.gradients(*saved, gradient)


_convolve.defvjp(_forward, _backward)


def _pays(x: tuple, kernel: tuple, dtype: jnp.dtype) -> bool:
    _, height, width, num_in = x
    known = isinstance(height, int) and isinstance(width, int)  # not the symbolic sizes of an export
    narrow = num_in >= 2 * kernel[3] and kernel[3] >= 16
    return known and narrow and dtype == jnp.float32 and height * width <= _LARGEST_MAP


def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    b, height, width, num_in = x.shape
    num_out = kernel.shape[3]
    tiles = -(-width // _TILE)
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1 + tiles * _TILE - width), (0, 0)))
    # The six numbers that represent a tile of four outputs and a kernel row.
    last = _TILE * (tiles - 1) + 1
    inputs = _combine(_INPUT, [x[:, :, i : i + last : _TILE] for i in range(_TILE + 2)])
    kernels = _combine(_KERNEL, [kernel[:, i] for i in range(3)])
    products = [
        jnp.dot(one.reshape(-1, num_in), rows.transpose(1, 0, 2).reshape(num_in, 3 * num_out))
        for one, rows in zip(inputs, kernels, strict=True)
    ]
    columns = []
    for product in products:
        taps = product.reshape(b, height, tiles, 3, num_out)
        taps = jnp.pad(taps, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        columns.append(jnp.asarray(sum(taps[:, i : i + height, :, i] for i in range(3))))
    outputs = jnp.stack(_combine(_OUTPUT, columns), axis=3)
    return outputs.reshape(b, height, tiles * _TILE, num_out)[:, :, :width]


def _combine(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns matrix x arrays, skipping products with zero."""
    rows = ([number * array for number, array in zip(row, arrays, strict=True) if number] for row in matrix)
    return [jnp.asarray(sum(row)) for row in rows]
