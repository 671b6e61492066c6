"""Self-ensemble: a network averaged over the flips and quarter turns of its input."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.models.model import Apply, Params


def self_ensemble(apply: Apply) -> Apply:
    """Averages a network's output over the eight flips and quarter turns of its input, turned back (x8, "+").

    The features are those of the unchanged input. It costs eight forward passes, one after another. (Timofte et al.,
    2016, "Seven ways to improve example-based single image super resolution".)
    """

    def turned(x: jax.Array, flips: jax.Array) -> jax.Array:
        x = jnp.where(flips[0], x[:, ::-1], x)
        return jnp.where(flips[1], x[:, :, ::-1], x)

    def ensemble(
        params: Params, x: jax.Array, sigma: jax.Array | float | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, features = apply(params, x, sigma)
        total = output
        # Two loops, because a transposed image has a different shape.
        for transposed, flips in ((False, [(1, 0), (0, 1), (1, 1)]), (True, [(0, 0), (1, 0), (0, 1), (1, 1)])):
            view = x.swapaxes(1, 2) if transposed else x
            one = lambda flip, view=view: turned(apply(params, turned(view, flip), sigma)[0], flip)  # noqa: E731
            views = jax.lax.map(one, jnp.array(flips, bool)).sum(0)
            total = total + (views.swapaxes(1, 2) if transposed else views)
        return total / 8, features

    return ensemble
