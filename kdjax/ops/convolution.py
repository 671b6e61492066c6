"""Convolution of odd kernel size, stride 1 and zero padding, with gradients that are fast on a CPU even inside loops.

XLA's fast CPU routine accepts only one form of convolution. Outside loops and conditionals XLA rewrites other forms to
it; inside it does not, and JAX's own gradients take 20 to 50 times as long. So the gradients are written in that form
here. The gradient of the image is a convolution with the flipped kernel. That of the kernel is a convolution of images
with gradients, channels and samples swapped; if the kernel has few outputs, it is a matrix product.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, h, w, c) and (n, n, c, o) -> (b, h, w, o), by XLA."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, h, w, c) and (n, n, c, o), n odd -> (b, h, w, o)."""
    return plain(x, kernel)


def gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and of the kernel, given the gradient (b, h, w, o) of the result."""
    return jax.lax.platform_dependent(x, kernel, gradient, cpu=_gradients_in_xlas_form, default=_gradients)


def _gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(plain, x, kernel)[1](gradient)


def _gradients_in_xlas_form(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    of_x = plain(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    if math.prod(kernel.shape[:2]) * kernel.shape[3] <= 9 * 12:  # above that XLA's is faster
        return of_x, _of_kernel_by_taps(x, kernel, gradient)
    rim = [(side // 2, side // 2) for side in kernel.shape[:2]]
    images, weights = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
    of_kernel = jax.lax.conv_general_dilated(images, weights, (1, 1), rim, dimension_numbers=_LAYOUT)
    return of_x, of_kernel.transpose(1, 2, 0, 3)


def _of_kernel_by_taps(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of a kernel with few outputs, such as a network's last: one matmul of images by all shifted gradients.

    XLA's convolution does as much work for 3 outputs as for 16.
    """
    rows, columns, num_in, num_out = kernel.shape
    rim = ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    height, width = x.shape[1:3]
    padded = jnp.pad(gradient, rim)
    places = [(row, column) for row in reversed(range(rows)) for column in reversed(range(columns))]
    shifts = [padded[:, row : row + height, column : column + width] for row, column in places]
    products = jnp.einsum("bhwc,bhwo->co", x, jnp.concatenate(shifts, -1))
    return products.reshape(num_in, rows, columns, num_out).transpose(1, 2, 0, 3)


convolve.defvjp(
    lambda x, kernel: (convolve(x, kernel), (x, kernel)), lambda saved, gradient: gradients(*saved, gradient)
)
