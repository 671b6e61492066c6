"""The convolution of odd size, stride 1 and zero padding, with gradients that a CPU computes fast inside of loops too.

XLA's fast routine for CPUs takes one form of convolution only. Outside of loops and conditions XLA brings any other
into that form; inside it does not, and the gradients that JAX writes then take 20 to 50 times as long. So here they are
written in that form: the gradient of the image is a convolution with the turned kernel, that of the kernel one of
images by gradients, with channels and samples exchanged.
"""

from __future__ import annotations

import jax

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, h, w, c) and (n, n, c, o) -> (b, h, w, o), as XLA has it."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(b, h, w, c) and (n, n, c, o), n odd -> (b, h, w, o)."""
    return plain(x, kernel)


def gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of x and of the kernel, for that (b, h, w, o) of the result."""
    return jax.lax.platform_dependent(x, kernel, gradient, cpu=_gradients_in_xlas_form, default=_gradients)


def _gradients(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(plain, x, kernel)[1](gradient)


def _gradients_in_xlas_form(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    of_x = plain(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    rim = [(side // 2, side // 2) for side in kernel.shape[:2]]
    images, weights = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
    of_kernel = jax.lax.conv_general_dilated(images, weights, (1, 1), rim, dimension_numbers=_LAYOUT)
    return of_x, of_kernel.transpose(1, 2, 0, 3)


convolve.defvjp(
    lambda x, kernel: (convolve(x, kernel), (x, kernel)), lambda saved, gradient: gradients(*saved, gradient)
)
