"""Pixel criteria: two images in, the unreduced loss of every element out.

No weights, no reduction, no state: `kdjax.distill` takes the mean and weights it. Everything is computed in float32,
also for bfloat16 images (Charbonnier's eps would vanish in it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.names import pick

Criterion = Callable[[jax.Array, jax.Array], jax.Array]


def _difference(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return prediction.astype(jnp.float32) - target.astype(jnp.float32)


def l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """|d|, with gradient 0 at d = 0 as in torch (JAX has 1 there)."""
    difference = _difference(prediction, target)
    return jnp.where(difference == 0, 0, jnp.abs(difference))


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """d^2."""
    return jnp.square(_difference(prediction, target))


def charbonnier(prediction: jax.Array, target: jax.Array, *, eps: float = 1e-12) -> jax.Array:
    """sqrt(d^2 + eps). BasicSR adds `eps` to the square, not eps^2: 1e-12 is L1 except for |d| < 1e-6."""
    return jnp.sqrt(jnp.square(_difference(prediction, target)) + eps)


def smooth_l1(prediction: jax.Array, target: jax.Array, *, beta: float = 1.0) -> jax.Array:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta/2. With torch's beta = 1 that is MSE/2 on [0, 1] images."""
    size = jnp.abs(_difference(prediction, target))
    return jnp.where(size < beta, 0.5 * jnp.square(size) / beta, size - 0.5 * beta)


CRITERIA: dict[str, Callable[..., jax.Array]] = {
    "l1": l1,
    "mse": mse,
    "charbonnier": charbonnier,
    "smooth_l1": smooth_l1,
}


def make_criterion(name: str, **options: float) -> Criterion:
    """The criterion called `name` with its options (`eps` for charbonnier, `beta` for smooth_l1) fixed.

    Raises:
      ValueError: an unknown criterion, an option it does not have, or an option that is not positive.
    """
    criterion = pick(CRITERIA, name, "criterion")
    known = criterion.__kwdefaults__ or {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"criterion {name!r} has no option {option!r} (it has: {', '.join(known) or 'none'})")
        if not value > 0:
            raise ValueError(f"criterion {name!r}: {option}={value} must be positive")
    return functools.partial(criterion, **options)
