"""Narrow convolutions equal XLA's, forwards and backwards, and are what they say on each platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kdjax.ops import winograd
from kdjax.ops.winograd import narrow_conv3x3


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (5, 7), (3, 13), (9, 2)])
def test_equals_the_plain_convolution(size: tuple[int, int]) -> None:
    x, kernel = draw(2, *size, 32), draw(3, 3, 32, 16) / 17
    assert winograd._pays(x.shape, kernel.shape, x.dtype)
    np.testing.assert_allclose(narrow_conv3x3(x, kernel), plain(x, kernel), atol=1e-5)


def test_gradients_are_those_of_the_plain_convolution() -> None:
    x, kernel, weights = draw(2, 6, 9, 32), draw(3, 3, 32, 16) / 17, draw(2, 6, 9, 16)
    gradients = [
        jax.jit(jax.grad(lambda x, kernel, conv=conv: jnp.sum(weights * conv(x, kernel)), (0, 1)))(x, kernel)
        for conv in (narrow_conv3x3, plain)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def operations(platform: str, x: tuple, kernel: tuple, dtype: jnp.dtype = jnp.float32) -> str:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (x, kernel)]
    return export.export(narrow_conv3x3, platforms=[platform])(*shapes).mlir_module()


def test_a_cpu_multiplies_matrices_and_others_convolve() -> None:
    shapes = (1, 8, 8, 64), (3, 3, 64, 32)
    on_cpu, on_gpu = operations("cpu", *shapes), operations("cuda", *shapes)
    assert on_cpu.count("stablehlo.dot_general") == 6 and "stablehlo.convolution" not in on_cpu
    assert "stablehlo.convolution" in on_gpu and "dot_general" not in on_gpu


@pytest.mark.parametrize(
    "x, kernel, dtype",
    [
        ((1, 8, 8, 32), (3, 3, 32, 32), jnp.float32),
        ((1, 8, 8, 32), (3, 3, 32, 4), jnp.float32),
        ((1, 8, 8, 32), (3, 3, 32, 16), jnp.bfloat16),
        ((1, 256, 256, 32), (3, 3, 32, 16), jnp.float32),
    ],
)
def test_where_it_does_not_pay_a_cpu_convolves_too(x: tuple, kernel: tuple, dtype: jnp.dtype) -> None:
    assert "stablehlo.convolution" in operations("cpu", x, kernel, dtype)
