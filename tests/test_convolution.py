"""The convolution against XLA's own, and that its gradients keep XLA's fast form inside of a loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.ops.convolution import convolve, plain


@pytest.mark.parametrize("num_out", [1, 3, 6, 40])  # those of a few results are computed otherwise
@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradients_are_those_of_the_plain_convolution(size: int, num_out: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 9, 7, 4)), jax.random.normal(keys[1], (size, size, 4, num_out))
    weights = jax.random.normal(keys[2], (2, 9, 7, num_out))
    results = [
        jax.jit(jax.value_and_grad(lambda x, kernel, f=f: jnp.sum(f(x, kernel) * weights), (0, 1)))(x, kernel)
        for f in (convolve, plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def test_inside_of_a_loop_the_gradients_are_in_the_form_that_is_fast_on_a_cpu() -> None:
    """That form is samples, rows, columns, channels; the plain convolution's gradients are not in it there."""

    def forms(convolution: object) -> set[str]:
        def loop(kernel: jax.Array, images: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolution(x, kernel))), (0, 1))
            add = lambda total, x: (jax.tree.map(jnp.add, total, gradient(x, kernel)), None)  # noqa: E731
            return jax.lax.scan(add, (jnp.zeros(images.shape[1:]), jnp.zeros_like(kernel)), images)[0]

        compiled = jax.jit(loop).lower(jnp.ones((3, 3, 8, 8)), jnp.ones((5, 2, 16, 16, 8))).compile()
        return set(re.findall(r"dim_labels=([\w>-]+)", compiled.as_text()))

    fast = "b01f_01io->b01f"
    assert forms(convolve) == {fast} and forms(plain) - {fast}
