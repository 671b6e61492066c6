"""Degradations on the device: pure functions of a random key and one clean image, vmapped over the batch.

Images are float32 HWC in [0, 1]; results are not clipped or quantised, as the denoising benchmarks have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kdjax.names import pick

Degrade = Callable[[jax.Array, jax.Array], jax.Array]


def awgn(key: jax.Array, image: jax.Array, *, sigma: float) -> jax.Array:
    """Adds white Gaussian noise of standard deviation `sigma` (0..255 scale) to an (h, w, c) image."""
    return image + sigma / 255 * jax.random.normal(key, image.shape)


def awgn_blind(key: jax.Array, image: jax.Array, *, sigma: tuple[float, float]) -> jax.Array:
    """As `awgn`, with a sigma drawn uniformly between the two numbers for every image."""
    key_sigma, key_noise = jax.random.split(key)
    low, high = sigma
    return awgn(key_noise, image, sigma=jax.random.uniform(key_sigma, minval=low, maxval=high))


def _check_awgn(*, sigma: float) -> None:
    if not isinstance(sigma, int | float) or not 0 <= sigma <= 255:
        raise ValueError(f"awgn: sigma={sigma!r} must be a number from 0 to 255")


def _check_awgn_blind(*, sigma: tuple[float, float]) -> None:
    if not isinstance(sigma, tuple | list) or len(sigma) != 2 or not 0 <= sigma[0] <= sigma[1] <= 255:
        raise ValueError(f"awgn_blind: sigma={sigma!r} must be two numbers, low <= high, from 0 to 255")


# name -> (degradation, check of its options)
DEGRADATIONS: dict[str, tuple[Callable[..., jax.Array], Callable[..., None]]] = {
    "awgn": (awgn, _check_awgn),
    "awgn_blind": (awgn_blind, _check_awgn_blind),
}


def make_degrade(spec: Mapping[str, Any]) -> Degrade:
    """`degrade(key, image) -> lq` from a dict with a `name` and the degradation's own options.

    Raises:
      ValueError: an unknown name or option, or a value out of range.
    """
    options = dict(spec)
    name = options.pop("name", None)
    degrade, check = pick(DEGRADATIONS, name, "degradation")
    try:
        check(**options)
    except TypeError as error:  # an option it does not have, or one that is missing
        raise ValueError(f"degradation {dict(spec)}: {error}") from None
    return functools.partial(degrade, **options)
